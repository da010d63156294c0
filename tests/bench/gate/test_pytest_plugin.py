"""The fixture ``privacy_gate`` in a pytest of its own."""

import subprocess
import sys

import pytest
from gate_world import make_run

import bench.run.pipeline  # noqa: F401  (a pytest in this process forgets what it imported, which torch does not survive)
from bench.gate.baseline import make_baseline, write_baseline
from bench.run.archive import load_runs

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    good = [make_run(folder / f"seed{seed}", seed=seed) for seed in range(3)]
    make_run(folder / "leaky", seed=1, retrained=1, shift={"ssim": 0.1})
    make_run(folder / "other", attack="linear")
    write_baseline(make_baseline(load_runs(good)), folder / "baseline.json")
    return folder


@pytest.fixture
def inner(pytester, request, world):
    """Run a test file that uses the fixture; the plug-in is loaded by name where it is not installed."""
    plugins = {name for name, _ in request.config.pluginmanager.list_name_plugin()}
    installed = plugins & {"bench.gate.pytest_plugin", "privacy-gate"}

    def call(body, *arguments):
        pytester.makepyfile(f"from pathlib import Path\nWORLD = Path({str(world)!r})\n{body}")
        plugin = () if installed else ("-p", "bench.gate.pytest_plugin")
        return pytester.runpytest(*plugin, "--rootdir", pytester.path, *arguments)

    return call


CHECK = """
def test_it(privacy_gate):
    assert privacy_gate.check(WORLD / {!r}).outcome == "pass"
"""


def test_without_a_baseline_it_skips_and_says_why(inner):
    result = inner(CHECK.format("seed0"), "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no --privacy-baseline FILE was given*"])


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_a_run_that_keeps_its_baseline_passes_and_is_said_to_have_been_compared(inner, world, workers):
    result = inner(CHECK.format("seed0"), "--privacy-baseline", world / "baseline.json", *workers)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*= privacy gate =*", "partialface / unet (*): pass", "  recovery.ssim pass: 0.* -> 0.*, change *"]
    )


OUT = """
def test_it(privacy_gate):
    privacy_gate.out.mkdir(exist_ok=True)
    (privacy_gate.out / "trained").touch()
"""


@pytest.mark.parametrize("asked", [False, True])
def test_the_next_session_finds_what_was_trained(inner, world, pytester, asked):
    more = ("--privacy-runs", pytester.path / "runs") if asked else ()
    inner(OUT, "--privacy-baseline", world / "baseline.json", *more).assert_outcomes(passed=1)
    (found,) = pytester.path.rglob("trained")
    assert found.is_relative_to(pytester.path / ("runs" if asked else ".pytest_cache"))


def test_without_a_cache_runs_last_a_session(inner, world, pytester):
    inner(OUT, "--privacy-baseline", world / "baseline.json", "-p", "no:cacheprovider").assert_outcomes(passed=1)
    assert not (pytester.path / ".pytest_cache").exists()


def test_a_leak_fails_readably(inner, world):
    result = inner(CHECK.format("leaky"), "--privacy-baseline", world / "baseline.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["privacy gate", "partialface / unet (*): regress", "  recovery.ssim regress: 0.* -> 0.*, change +0.*"]
    )
    assert "Traceback" not in result.stdout.str()


def test_a_run_of_no_cell_fails(inner, world):
    result = inner(CHECK.format("other"), "--privacy-baseline", world / "baseline.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*is of no cell of the baseline*"])


def test_a_baseline_that_is_not_there_fails_in_one_line(inner, world):
    result = inner(CHECK.format("seed0"), "--privacy-baseline", world / "none.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*does not exist: make one with*"])


RUN = """
def test_it(privacy_gate, monkeypatch):
    class Stored:
        directory = WORLD / "leaky"

        def __init__(self, config, console):
            assert (config.defense, config.preset, config.seed) == ("partialface", "quick", 1)
            assert config.out == privacy_gate.out

        def run(self):
            pass

    monkeypatch.setattr("bench.run.pipeline.Pipeline", Stored)
    privacy_gate(defense="partialface", attack="unet", preset="quick", seed=1, {})
"""


def test_it_runs_the_cell_that_it_is_asked_for(inner, world):
    result = inner(RUN.format(""), "--privacy-baseline", world / "baseline.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*recovery.ssim regress*"])


def test_bad_settings_fail_in_one_line(inner, world):
    result = inner(RUN.format("sigma=3"), "--privacy-baseline", world / "baseline.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["the run failed: *unknown key 'sigma'*"])


def test_collection_imports_nothing_heavy():
    code = (
        "import sys, bench.gate.pytest_plugin\nassert not {'torch', 'numpy', 'pandas', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
