"""The code of the pages works as it is printed: installed as its reader would, and run through the pipeline."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pixel_judge import write_pixel_judge
from rich.console import Console
from safetensors.torch import load_file

from bench import plugins
from bench.errors import UsageError
from bench.results import Quality, RunResult
from bench.run.config import resolve
from bench.run.pipeline import Pipeline

DOCS = Path(__file__).parents[2] / "docs"
SIZE = 24
#: How far above a floor an attack on noise may stand by chance.
CHANCE = 0.05

WORLD = {
    "preset": "quick",
    "device": "cpu",
    "image_size": SIZE,
    "probes": 16,
    "bootstrap": 100,
    "utility": False,
    "dataset_options": {"identities": 40, "images_per_identity": 6},
    "shares": {"provider": 0.2, "public": 0.5, "evaluator": 0.0, "victims": 0.3},
}

_BLOCK = re.compile(r'^```\w+ title="(?P<file>[^"]+)"\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


def files(page: str) -> dict[str, str]:
    """The files that a page prints; several blocks of one name are parts of one file."""
    printed: dict[str, str] = {}
    for block in _BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        name = block["file"]
        printed[name] = printed[name] + "\n\n" + block["code"] if name in printed else block["code"]
    return printed


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Both pages' packages on the path, with the metadata that an installer writes."""
    site = tmp_path_factory.mktemp("site")
    modules = set()
    for page in ("write-a-defence.md", "write-an-attack.md"):
        printed = files(page)
        project = tomllib.loads(printed.pop("pyproject.toml"))["project"]
        metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = [
            "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())])
            for group, entries in project["entry-points"].items()
        ]
        (metadata / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
        for name, code in printed.items():
            (site / name).write_text(code, encoding="utf-8")
            modules.add(Path(name).stem)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        plugins.defenses.cache_clear()
        plugins.attacks.cache_clear()
        yield
    for module in modules:
        sys.modules.pop(module, None)
    plugins.defenses.cache_clear()
    plugins.attacks.cache_clear()


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    """An evaluator that tells rendered faces apart, fitted to other people."""
    return write_pixel_judge(tmp_path_factory.mktemp("evaluator") / "discriminants.onnx")


Run = Callable[..., RunResult]


@pytest.fixture(scope="module")
def run(installed, evaluator, tmp_path_factory):
    """One cell through the whole pipeline, at a size of seconds."""
    out = tmp_path_factory.mktemp("runs")

    def cell(defense: str, attack: str, knowledge: str = "whitebox", **options: Any) -> RunResult:
        names = {"defense": defense, "attack": attack, "knowledge": knowledge}
        asked = {**WORLD, **names, "evaluator": evaluator, "out": out, **options}
        return Pipeline(resolve(asked, {}), console=Console(quiet=True)).run()

    cell.out = out
    return cell


def ssim(quality: Quality) -> float:
    assert quality.ssim.value is not None
    return quality.ssim.value


def best_floor(result: RunResult) -> float:
    assert result.recovery is not None
    return max(ssim(floor) for floor in result.recovery.floors.values())


def faces(count: int) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["tile-shuffle", "secret-tile-shuffle"])
class TestTheDefence:
    """Against pixels that were moved by hand, and the parts of the contract that it claims."""

    def test_tiles_are_where_the_table_says(self, installed, name):
        defense = plugins.make_defense(name, {"tiles": "2", "shuffles": "3"}, "quick", SIZE)
        protected = defense.protect(faces(6), torch.Generator().manual_seed(1))
        half = SIZE // 2
        corners = [(slice(i * half, (i + 1) * half), slice(j * half, (j + 1) * half)) for i in (0, 1) for j in (0, 1)]
        for face, sent, (row,) in zip(faces(6), protected.representation, protected.state.tolist(), strict=True):
            for target, source in enumerate(defense.table[row].tolist()):
                assert torch.equal(sent[:, *corners[target]], face[:, *corners[source]])

    def test_states_are_what_is_drawn(self, installed, name):
        defense = plugins.make_defense(name, {}, "quick", SIZE)
        drawn = defense.draw(200, torch.Generator().manual_seed(0))
        assert torch.equal(drawn.unique(dim=0), defense.states())
        assert defense.entropy_bits == 3
        assert len(defense.protect(faces(0), torch.Generator()).representation) == 0

    def test_differentiable(self, installed, name):
        defense = plugins.make_defense(name, {}, "quick", SIZE)
        pixels = faces(2).requires_grad_()
        defense.protect(pixels, torch.Generator()).representation.square().sum().backward()
        torch.testing.assert_close(pixels.grad, 2 * pixels.detach())

    def test_bad_options_are_one_line(self, installed, name):
        with pytest.raises(UsageError, match="7 tiles do not divide 24 pixels"):
            plugins.make_defense(name, {"tiles": "7"}, "quick", SIZE)


def test_the_secret_is_guessed(installed):
    defense = plugins.make_defense("secret-tile-shuffle", {}, "quick", SIZE)
    guess, again = (defense.guess(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(guess.secret["table"], again.secret["table"])
    assert not torch.equal(guess.secret["table"], defense.secret["table"])


def test_the_linear_operator_is_the_transform(installed):
    defense = plugins.make_defense("secret-tile-shuffle", {}, "quick", SIZE)
    state = torch.tensor([3])
    operator = defense.linear_operator(state)
    sent = defense.protect(faces(2), torch.Generator(), state=state.expand(2, 1)).representation
    assert torch.equal(operator(faces(2)), sent)
    other = torch.rand(sent.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = faces(2).double()
    assert torch.equal(operator.adjoint(operator(x)), x)
    assert float((operator(x) * other).sum()) == pytest.approx(float((x * operator.adjoint(other)).sum()))


def test_who_knows_the_shuffle_gets_the_face_back(run):
    result = run("secret-tile-shuffle", "linear", "oracle", defense_options={"shuffles": 2})
    assert ssim(result.recovery) > 0.99
    assert result.defense.states == 2


def test_what_was_learnt_is_kept_with_the_run(run, installed):
    result = run("learnt-patches", "ridge", defense_options={"epochs": 1})
    assert result.status == "success"
    assert ssim(result.recovery) > best_floor(result)  # eight numbers for 48 pixels hide little
    (kept,) = run.out.glob(f"{result.run_id}/checkpoints/defense.safetensors")
    learnt = load_file(kept)["projection.weight"]
    untrained = plugins.make_defense("learnt-patches", {}, "quick", SIZE)
    assert learnt.shape == untrained.projection.weight.shape
    assert not torch.equal(learnt, untrained.projection.weight)


def test_ridge_walks_through_an_open_door_and_gets_nothing_out_of_noise(run):
    result = run("none", "ridge")
    assert ssim(result.recovery) > best_floor(result) + 0.1
    assert result.recovery.identity.type1_tar.value > 0.9
    assert not any("broken" in warning for warning in result.warnings)
    result = run("noise", "ridge", defense_options={"scale": 1e5})
    assert ssim(result.recovery) < best_floor(result) + CHANCE


def test_ridge_against_the_shuffle(run):
    """One page's attack on the other's defence, trained on every state it emits."""
    result = run("tile-shuffle", "ridge", defense_options={"shuffles": 2})
    assert result.attack.states_covered is True
    assert ssim(result.recovery) < ssim(result.recovery.ceiling)


def test_linear_undoes_the_shuffle_whether_it_is_declared_or_not(run):
    """As the page says: at the white box the order is read, and nothing is lost."""
    declared = run("secret-tile-shuffle", "linear", attack_options={"rank": 20})
    assert declared.attack.details["linearity"] == "declared"
    silent = run("tile-shuffle", "linear", attack_options={"rank": 20})
    assert any("undeclared, but linear" in warning for warning in silent.warnings)
    for result in (declared, silent):
        assert result.attack.states_covered is True
        assert result.attack.details["state_accuracy"] > 0.98
        assert ssim(result.recovery) > 0.99
    named = pd.read_parquet(run.out / silent.run_id / "state_inference.parquet")
    assert (named["drawn"] == named["named"]).mean() > 0.98


def test_ridge_at_blackbox_guesses_the_table(run):
    result = run("secret-tile-shuffle", "ridge", "blackbox", defense_options={"shuffles": 2})
    known = run("secret-tile-shuffle", "ridge", "whitebox", defense_options={"shuffles": 2})
    assert result.attack.states_covered is None
    assert ssim(result.recovery) < ssim(known.recovery)
