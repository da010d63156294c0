"""Training in several processes is the training of one, with every head; and what happens when one cannot go on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import training_at_work as work
from in_processes import in_processes

from bench.recognition.processes import Processes

WHOLE = {"head": "partial-fc", "sample_rate": 1.0}
CHANGES: list[dict[str, Any]] = [
    {"head": "arcface"},
    WHOLE,
    {**WHOLE, "label_noise": 0.4, "margin": 0.0, "cosine_margin": 0.1, "margin_warmup_epochs": 1.5},
    {**WHOLE, "taught": True, "distillation": 2.0, "classification": 0.5},
    {"head": "arcface", "taught": True, "distillation": 2.0, "classification": 0.5},
    {"head": "arcface", "sync_batch_norm": False},
]
#: Sums in another order differ by rounding, which 12 steps of training amplify some 30,000 times: weights that differ
#: in their last bit alone move a loss by up to 0.4 per cent of the first epoch's in float32, by 1e-11 in float64.
EXACT, ROUNDED = 1e-9, 0.03


def curve(losses: tuple[float, ...], tolerance: float = EXACT) -> Any:
    return pytest.approx(losses, abs=tolerance * losses[0], rel=0)


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return work.learn(Processes(), CHANGES, exact=True)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return in_processes(2, tmp_path_factory.mktemp("processes"), work.learn, CHANGES, None, None, True)


@pytest.mark.parametrize("case", range(5))
def test_two_processes_have_the_loss_curve_of_one(
    alone: list[dict[str, Any]], together: list[list[dict[str, Any]]], case: int
) -> None:
    expected = alone[case]
    for process in together:
        assert process[case]["losses"] == curve(expected["losses"])
        assert process[case]["accuracies"] == expected["accuracies"]
        assert process[case]["report"].processes == 2
        assert process[case]["kinds"] == expected["kinds"]  # the layers are themselves again
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(process[case]["weights"][name], weight, rtol=EXACT, atol=EXACT)
    first, second = (process[case]["weights"] for process in together)
    assert all(torch.equal(first[name], second[name]) for name in first)
    centres = [process[case]["head"] for process in together]
    whole = centres[0] if CHANGES[case]["head"] == "arcface" else torch.cat(centres)  # Partial FC's are shared out
    torch.testing.assert_close(whole, expected["head"], rtol=EXACT, atol=EXACT)


def test_in_float32_they_agree_as_far_as_rounding_allows(tmp_path: Path) -> None:
    (expected,) = work.learn(Processes(), [WHOLE])
    for (process,) in in_processes(2, tmp_path, work.learn, [WHOLE]):
        assert process["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-4)
        assert process["losses"] == curve(expected["losses"], ROUNDED)


def test_with_statistics_of_its_own_a_process_trains_another_way(
    alone: list[dict[str, Any]], together: list[list[dict[str, Any]]]
) -> None:
    off, on = together[0][5]["losses"], together[0][0]["losses"]
    assert alone[5]["losses"] == alone[0]["losses"]  # one process has the whole batch
    assert max(abs(a - b) for a, b in zip(off, on, strict=True)) > 0.01 * on[0]


def test_every_head_is_taught_alike(alone: list[dict[str, Any]]) -> None:
    assert alone[3]["losses"] == curve(alone[4]["losses"])
    assert alone[4]["losses"] != curve(alone[0]["losses"], ROUNDED)


def test_flipped_labels_are_counted_and_hurt(alone: list[dict[str, Any]]) -> None:
    assert alone[2]["report"].flipped_labels == 10
    assert alone[1]["report"].flipped_labels == 0
    assert alone[2]["accuracies"][-1] < alone[1]["accuracies"][-1]


def test_partial_fc_learns_from_a_sample(tmp_path: Path) -> None:
    change = {"head": "partial-fc", "sample_rate": 0.5, "epochs": 10}
    first, again = (work.learn(Processes(), [change])[0] for _ in range(2))
    assert first["accuracies"][-1] > 0.9
    assert first["losses"] == again["losses"]
    assert first["report"].overfull_steps > 0  # batches of 6 images of 5 identities, 2 centres


@pytest.mark.parametrize("change", [WHOLE, {"head": "partial-fc", "sample_rate": 0.6}, {"head": "arcface"}])
def test_a_training_killed_in_one_process_goes_on_there(tmp_path: Path, change: dict[str, Any]) -> None:
    (expected,) = work.learn(Processes(), [change])
    (killed,) = work.learn(Processes(), [change], tmp_path, poisoned_epoch=1)
    assert "not finite at epoch 2, step 2 of 4" in killed["error"]
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == (["training.safetensors"] if change["head"] == "arcface" else ["centres-1", "training.safetensors"])
    # Three processes were killed while they wrote the second epoch.
    (tmp_path / "centres-2").mkdir()
    (tmp_path / "centres-2" / "rows-0000000002-0000000004.safetensors").write_bytes(b"torn")
    (resumed,) = work.learn(Processes(), [{**change, "epochs": 3}], tmp_path)
    assert resumed["losses"] == expected["losses"]
    assert all(torch.equal(resumed["weights"][name], value) for name, value in expected["weights"].items())
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    centres = [] if change["head"] == "arcface" else ["centres-3/rows-0000000000-0000000005.safetensors"]
    assert [name for name in left if not name.startswith("centres-2/")] == [*centres, "training.safetensors"]
    assert change["head"] == "arcface" or len(left) == 2


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_it_goes_on_in_another_number_of_processes(
    tmp_path: Path, alone: list[dict[str, Any]], before: int, after: int
) -> None:
    def learn(size: int, name: str, poisoned_epoch: int | None = None) -> list[dict[str, Any]]:
        arguments = ([WHOLE], tmp_path / "resume", poisoned_epoch, True)
        if size == 1:
            return work.learn(Processes(), *arguments)
        return [process[0] for process in in_processes(size, tmp_path / name, work.learn, *arguments)]

    for killed in learn(before, "before", 1):
        # Only the last process computed anything that was not finite.
        assert re.match("BenchError: training diverged: .* epoch 2, step 2 of 4", killed["error"])
    for resumed in learn(after, "after"):
        assert resumed["losses"] == curve(alone[1]["losses"])


def test_centres_that_are_gone_are_an_error_in_all_processes(tmp_path: Path) -> None:
    work.learn(Processes(), [{**WHOLE, "epochs": 1}], tmp_path / "resume")
    next((tmp_path / "resume" / "centres-1").iterdir()).unlink()
    for (process,) in in_processes(
        2, tmp_path / "processes", work.learn, [{**WHOLE, "epochs": 1}], tmp_path / "resume"
    ):
        assert re.match("(DataError|BenchError): .*centres-1 holds 0 of the", process["error"])


def test_a_batch_too_small_for_the_processes_is_refused(tmp_path: Path) -> None:
    for (process,) in in_processes(2, tmp_path, work.learn, [{"batch_size": 3}]):
        assert process["error"] == (
            "UsageError: 2 processes cannot share batches of 3: start fewer, or raise training.batch_size to 4 or more"
        )


@pytest.mark.slow
def test_memory_that_is_full_in_one_process_cuts_the_batches_of_all(tmp_path: Path) -> None:
    """Into as many parts, for the gradients that one process has of whole batches."""
    unnormed = {"normed": False, "epochs": 2}  # statistics are over parts
    heads: list[dict[str, Any]] = [{"head": "arcface", "taught": True, **unnormed}, {**WHOLE, **unnormed}]
    expected = work.learn(Processes(), heads, None, None, True)
    changes = [*({**head, "most": 2} for head in heads), {"batch_size": 9, "most": 3}, {"most": 0}]
    first, second = in_processes(2, tmp_path, work.learn, changes, None, None, True)
    for process in (first, second):
        for learnt, whole in zip(process, expected, strict=False):
            assert learnt["losses"] == curve(whole["losses"])
            for name, weight in whole["weights"].items():
                torch.testing.assert_close(learnt["weights"][name], weight, rtol=EXACT, atol=EXACT)
        assert re.match("OutOfMemoryError|LostProcess", process[3]["error"])  # at once: nobody waits for another
    # With the statistics of parts, over both processes, it is another training; one of both all the same.
    assert all(torch.equal(value, second[2]["weights"][name]) for name, value in first[2]["weights"].items())
    assert first[2]["accuracies"][-1] > first[2]["accuracies"][0]
