"""The table of a sweep: every cell is in it, with what its figures have to be read against."""

from rich.console import Console

from bench.results import Measure
from bench.sweep.state import CellState, KeyFigure, SweepState
from reports.sweep_table import render_sweep


def text(cells, width=160):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(render_sweep(SweepState(sweep="ab", directory="runs/sweeps/ab", cells=cells)))
    return console.export_text()


def cell(**changed):
    return CellState(
        **{"defense": "none", "attack": "unet", "knowledge": "whitebox", "seed": 0, "run_id": "r", **changed}
    )


def measure(value):
    return Measure(value=value, higher_is_better_for="utility", reason=None if value is not None else "no weights")


def test_figures_stand_beside_their_neighbours():
    figures = {
        "ssim": KeyFigure(value=measure(0.5), floor=measure(0.25), ceiling=measure(0.75)),
        "accuracy": KeyFigure(value=measure(0.9), ceiling=measure(0.97)),
    }
    done = cell(status="success", directory="runs/r", figures=figures, warnings=["synthetic faces"], unsaturated=True)
    shown = text([done, cell(seed=1)])
    assert "0.500 (0.250 to 0.750)" in shown
    assert "90.0 (97.0)" in shown
    assert "success *" in shown
    assert "* unsaturated" in shown
    assert "warning: synthetic faces" in shown
    assert "2 cells: 1 pending, 1 success" in shown
    assert "runs/sweeps/ab/sweep.json" in shown
    assert "linkage" not in shown  # no cell has it


def test_why_a_cell_has_no_figures():
    shown = text(
        [
            cell(status="failed", error="the loss is [not] finite", directory="runs/r"),
            cell(status="refused", seed=1, error="needs more"),
            cell(status="success", seed=2, figures={"ssim": KeyFigure(value=measure(None))}),
        ]
    )
    assert "failed: unet (whitebox) on none, seed 0: the loss is [not] finite" in shown
    assert "refused: unet (whitebox) on none, seed 1: needs more" in shown
    assert "–" in shown


def test_a_warning_of_some_cells_names_them():
    cells = [cell(status="success", seed=seed, warnings=["noisy"] if seed < 2 else []) for seed in range(3)]
    assert "warning: unet (whitebox) on none, seed 0 and 1 more: noisy" in text(cells)
