"""What of a run goes into a file for attacks that are run elsewhere, and what does not."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pixel_judge import write_pixel_judge
from tiny_runs import pipeline, registered

from attacks.base import FitReport, RecoveryAttack
from bench.errors import DataError, MissingError, UsageError
from bench.images import to_float
from bench.plugins import make_defense
from bench.run.observe import Exports, digest_of, observe
from bench.run.store import run_id


class Grey(RecoveryAttack):
    """Answers grey, in no time."""

    name = "grey-answer"
    summary = "for tests"

    def build(self, adversary):
        self.register_buffer("nothing", torch.zeros(1))

    def fit(self, adversary):
        return FitReport()

    def run(self, observation):
        return torch.full((len(observation), 3, 32, 32), 0.5)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    judge = write_pixel_judge(tmp_path_factory.mktemp("judge") / "judge.onnx")
    return {"attack": "grey-answer", "utility": False, "evaluator": [judge], "seed": 41}


@pytest.fixture(scope="module")
def runs(out, settings):
    """A tiny run of a defence at a rung, observed: (arrays of the file, pipeline, folder)."""
    with registered(Grey):

        def observed(templates=False, **asked):
            cell, file = pipeline(out, **settings, **asked), out / "observed.npz"
            folder = out / run_id(cell.config)
            if not (folder / "metrics.json").is_file():
                cell.run()
            observe(folder, file, templates=templates)
            with np.load(file, allow_pickle=False) as held:
                return dict(held), cell, folder

        yield observed


def test_the_file_holds_no_victim(runs):
    arrays, cell, folder = runs(defense="fixed-subset", knowledge="whitebox")
    assert set(arrays) == {"representations", "faces", "identities", "about", "observed", "weights.subset_channels"}
    attacks = cell.attack_stages()
    victims, probes = attacks.stages.splits.victims, attacks.selection.attacked
    assert arrays["representations"].shape[:2] == (len(probes), 1)
    public = {face.tobytes() for face in arrays["faces"]}
    assert not public & {face.numpy().tobytes() for face in victims.images}
    assert len(arrays["faces"]) == len(arrays["identities"]) == len(attacks.stages.splits.public)
    text = b"".join(array.tobytes() for array in arrays.values()) + arrays["about"].item().encode()
    assert not any(name.encode() in text for name in victims.used_names)
    about = json.loads(arrays["about"].item())
    assert set(about) == {"knowledge", "defense", "options", "image_size"}  # no seed, and no name that holds one
    assert (about["knowledge"], about["defense"]) == ("whitebox", "fixed-subset")
    named = arrays.pop("observed").item()
    assert digest_of(arrays) == named
    assert named in Exports.of(folder).observed


def test_what_is_sent_can_be_made_with_what_is_handed_over(runs):
    arrays, cell, _ = runs(defense="fixed-subset", knowledge="whitebox")
    attacks = cell.attack_stages()
    about = json.loads(arrays["about"].item())
    defense = make_defense(about["defense"], about["options"], "cpu", about["image_size"])
    weights = {name.removeprefix("weights."): array for name, array in arrays.items() if name.startswith("weights.")}
    defense.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    faces = to_float(attacks.stages.splits.victims.images[attacks.selection.attacked])
    sent = defense.protect(faces, torch.Generator()).representation
    torch.testing.assert_close(torch.from_numpy(arrays["representations"][:, 0]), sent, rtol=1e-5, atol=1e-5)


def test_a_black_box_is_handed_a_guess(runs):
    arrays, _, _ = runs(defense="fracface", knowledge="blackbox")
    defense = make_defense("fracface", {}, "cpu", 32)
    options = json.loads(arrays["about"].item())["options"]
    assert options["key_seed"] != defense.options.key_seed
    held = [array for name, array in arrays.items() if name.startswith("weights.")]
    secret = next(iter(defense.secret.values())).numpy()
    assert not any(array.shape == secret.shape and (array == secret).all() for array in held)


def test_states_come_at_the_rung_that_grants_them(runs):
    assert "states" not in runs(defense="partialface", knowledge="whitebox", queries=2)[0]
    arrays, cell, _ = runs(defense="partialface", knowledge="oracle", queries=2)
    probes = len(cell.attack_stages().selection.attacked)
    assert arrays["states"].shape[:2] == arrays["representations"].shape[:2] == (probes, 2)


def test_templates_come_where_they_are_stolen(runs):
    arrays, cell, _ = runs(defense="pixelate", templates=True)
    probes = len(cell.attack_stages().selection.attacked)
    assert arrays["templates"].shape[:2] == (probes, 1)
    assert arrays["enrolled"].shape == (probes, arrays["templates"].shape[2])
    np.testing.assert_allclose(np.linalg.norm(arrays["templates"], axis=2), 1, rtol=1e-5)


def test_what_cannot_be_observed_is_said(runs, tmp_path):
    with pytest.raises(UsageError, match=r"must end in \.npz"):
        observe(tmp_path, tmp_path / "out.txt")
    with pytest.raises(MissingError, match=r"manifest\.json"):
        observe(tmp_path, tmp_path / "out.npz")
    _, _, folder = runs(defense="pixelate")
    result = json.loads((folder / "metrics.json").read_text())
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "manifest.json").write_text((folder / "manifest.json").read_text())
    (failed / "metrics.json").write_text(json.dumps({**result, "status": "error", "error": "no such luck"}))
    with pytest.raises(DataError, match="no such luck"):
        observe(failed, tmp_path / "out.npz")
    (failed / "metrics.json").write_text(json.dumps({**result, "recovery": None}))
    with pytest.raises(UsageError, match="no attack that recovers faces"):
        observe(failed, tmp_path / "out.npz")


def test_other_victims_than_the_runs_are_noticed(runs, tmp_path):
    _, _, folder = runs(defense="pixelate")
    table = pd.read_parquet(folder / "per_image.parquet")
    try:
        table.assign(ssim=table["ssim"] + 0.01).to_parquet(folder / "per_image.parquet", index=False)
        with pytest.raises(DataError, match="its data have changed"):
            observe(folder, tmp_path / "out.npz")
    finally:
        table.to_parquet(folder / "per_image.parquet", index=False)
