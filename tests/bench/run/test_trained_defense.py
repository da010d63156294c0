"""Defences that learn, or protect what a recogniser learnt: fitted once, frozen, stored, listed, used again."""

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from tiny_runs import TINY_UNET, measured, stages_of

from bench.commands.protect import protect
from bench.errors import MissingError, UsageError
from bench.images import to_float
from bench.run.attacker import AttackStages

TINY = {
    "defense": "split",
    "defense_options": {"width": 4, "epochs": 2, "batch_size": 16},
    "attack": "unet",
    "attack_options": TINY_UNET,
    "probes": 8,
    "utility": False,
    "dataset_options": {"identities": 28, "images_per_identity": 4},
}
#: Templates whose keys were stolen.
TEMPLATES = {
    "defense": "biohash",
    "defense_options": {"bits": 32},
    "attack": "template",
    "attack_options": {"width": 2, "images": 64, "batch_size": 8},
    "knowledge": "oracle",
    "utility": True,
}


def pipeline(out, **changes):
    return tiny_runs.pipeline(out, **{**TINY, **changes})


def fitted(out, log=lambda *_, **__: None, **changes):
    """The defence of a fresh process, fitted there or read from the cache."""
    stages = stages_of(pipeline(out, **changes), log)
    return stages.defense(stages.config.defense, stages.config.defense_options)


@pytest.fixture(scope="module")
def planned(out, tmp_path_factory):
    return measured(pipeline(out), tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def run(out, planned):
    """The folder of a finished run."""
    cell = pipeline(out)
    assert cell.run().status == "success"
    return cell.directory


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    return tmp_path / "face.png"


def equal(first, second):
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_plan_lists_the_fit(planned):
    assert planned["defense-split"] > 0


def test_the_fit_is_kept_with_the_run_and_reused(run, out):
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"attack.safetensors", "defense.safetensors"}
    assert (run / "samples" / "contact-sheet.png").is_file()
    events = []
    defense = fitted(out, lambda event, **fields: events.append((event, fields.get("stage"))))
    assert ("cached", "defense-split") in events
    assert not defense.training
    assert not any(weight.requires_grad for weight in defense.parameters())
    (stage,) = [stage for stage in pipeline(out).plan().stages if stage.name == "defense-split"]
    assert stage.cached


def test_the_seed_alone_decides_the_fit(run, out, tmp_path):
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = fitted(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(weight.requires_grad for weight in again.parameters())
    assert equal(again, fitted(out))
    assert not equal(again, fitted(tmp_path, seed=1))


def test_a_killed_fit_goes_on_where_it_was(run, out, tmp_path, monkeypatch):
    from defenses.base import DefenseTraining

    steps, passes = DefenseTraining.steps, []

    def killed_in_the_second_pass(self, epochs, batch_size, kept):
        for number, step in enumerate(steps(self, epochs, batch_size, kept)):
            passes.append(number)
            if number * batch_size > self.images + batch_size:
                raise KeyboardInterrupt
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(DefenseTraining, "steps", killed_in_the_second_pass)
        with pytest.raises(KeyboardInterrupt):
            fitted(tmp_path)
    first = len(passes)
    with monkeypatch.context() as patch:
        patch.setattr(DefenseTraining, "steps", lambda *given: (passes.append(0) or step for step in steps(*given)))
        resumed = fitted(tmp_path)
    assert len(passes) - first < first  # one pass, not two
    assert equal(resumed, fitted(out))


def test_protect_takes_the_defence_of_a_run(run, out, photo, tmp_path):
    file = tmp_path / "p.npz"
    protect([photo], file, run=run)
    face = to_float(torch.from_numpy(np.array(Image.open(photo))).movedim(2, 0)[None])
    expected = fitted(out).protect(face, torch.Generator()).representation
    with np.load(file) as content:
        np.testing.assert_allclose(content["representation"], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_protect_refuses_what_was_not_fitted(photo, tmp_path, out):
    for refused in ({"defense": "split"}, {"defense": "biohash"}, {}, {"defense": "none", "run": out}):
        with pytest.raises(UsageError, match="--from"):
            protect([photo], tmp_path / "p.npz", **refused)
    with pytest.raises(MissingError, match=r"manifest\.json"):
        protect([photo], tmp_path / "p.npz", run=out)


def test_parts_are_written_under_their_names(photo, tmp_path):
    file = tmp_path / "p.npz"
    protect([photo], file, defense="pyramid", defense_option=["levels=2"], image_size=32)
    with np.load(file) as content:
        assert content["level-0"].shape == (1, 3, 32, 32)
        assert content["level-1"].shape == (1, 3, 16, 16)
        assert "representation" not in content


@pytest.fixture(scope="module")
def templates(out):
    cell = pipeline(out, **TEMPLATES)
    return cell, cell.run()


@pytest.mark.slow
def test_templates_run_from_end_to_end(templates, photo, tmp_path):
    cell, result = templates
    assert result.status == "success"
    assert result.defense.bytes_per_face == 4
    names = {path.name for path in (cell.directory / "checkpoints").iterdir()}
    assert names == {"attack.safetensors", "recogniser.safetensors"}
    file = tmp_path / "p.npz"
    protect([photo, photo], file, run=cell.directory)
    with np.load(file) as content:
        assert content["representation"].shape == (2, 32, 1, 1)
        assert content["keys"].shape == (2, 1)
        assert (content["representation"][0] != content["representation"][1]).any()  # another client, another key


def test_pairs_are_scored_under_one_key(templates):
    """Each pair by hand: both plain embeddings, the first person's key, the share of equal bits."""
    cell, _ = templates
    stages = stages_of(cell)
    defense = stages.defense("biohash", {"bits": 32})
    victims, pairs = stages.splits.victims, stages.splits.pairs
    keys = stages.victim_keys(defense, "queries")
    assert torch.equal(keys, keys[[int((victims.labels == label).nonzero()[0]) for label in victims.labels]])
    embeddings = defense.embed(to_float(victims.images), torch.Generator())
    first, second = (defense.enrol(embeddings[side], keys[pairs.first], None) for side in (pairs.first, pairs.second))
    expected = (first * second > 0).float().mean(dim=1)
    # A coordinate near zero may fall on the other side in a batch of another size.
    assert (stages.do(stages.verification_job(defense)) - expected).abs().max() <= 2 / 32


def test_keys_are_stolen_on_the_highest_rung_alone(templates, out):
    for knowledge, stolen in (("whitebox", False), ("oracle", True)):
        cell = pipeline(out, **{**TEMPLATES, "knowledge": knowledge})
        attacks = AttackStages(stages_of(cell))
        defense = attacks.stages.defense("biohash", {"bits": 32})
        attack = next(iter(cell.attack_configs.values()))[-1].make()
        probes = attacks.selection.attacked
        observed = next(iter(attacks.observations(attack, defense, probes, 2))).observation
        assert (observed.keys is not None) == stolen
        if observed.keys is not None:
            assert not torch.equal(observed.keys[:, 0], observed.keys[:, 1])  # records of two systems
            index = probes[: len(observed)]
            assert torch.equal(observed.keys[:, 0], attacks.stages.victim_keys(defense)[index])
