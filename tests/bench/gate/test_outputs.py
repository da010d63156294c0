"""What CI systems read; and hostile names, which stay inert in each of them."""

import json
import re
from xml.etree import ElementTree as ET

import pytest
from gate_world import make_run

from bench.gate.baseline import make_baseline
from bench.gate.formats import junit, summary, workflow_commands
from bench.gate.gate import gate
from bench.run.archive import load_run, load_runs

HOSTILE = "<script>alert(1)</script>|`x`[a](http://b)\n::error::owned%0A\x1b[31m\x00$(rm)&amp;@all"


@pytest.fixture
def report(baseline, seeds, tmp_path):
    runs = [seeds[0], make_run(tmp_path / "leaky", seed=1, retrained=1, shift={"ssim": 0.1})]
    return gate(baseline, load_runs(runs), name="baseline.json")


@pytest.fixture
def hostile(tmp_path):
    """A report in which the names of defence, options and run are out to break something."""
    made = {"defense": HOSTILE, "options": {HOSTILE: HOSTILE}}
    base = make_baseline(load_runs([make_run(tmp_path / "base", **made)]))
    worse = make_run(tmp_path / "worse", retrained=1, shift={"ssim": 0.3}, **made)
    other = make_run(tmp_path / "other", attack="linear", **made)
    return gate(base, load_runs([worse, other]), name=HOSTILE)


def test_junit_has_a_case_per_figure(report):
    root = ET.fromstring(junit(report))
    suites = root.findall("testsuite")
    assert [suite.get("failures") for suite in suites] == ["0", "1"]
    assert suites[0].get("tests") == str(len(report.cells[0].figures))
    failure = root.find(".//failure")
    assert failure.get("type") == "regress"
    assert "recovery.ssim regress: 0.7" in failure.get("message")


def test_junit_tells_undecided_from_failed(baseline, seeds, tmp_path):
    run = load_run(seeds[0])
    without = run.result.model_copy(update={"utility": None})
    undecided = gate(baseline, [type(run)(run.directory, run.manifest, without, run.per_image)], name="b")
    suite = ET.fromstring(junit(undecided)).find("testsuite")
    assert (suite.get("failures"), suite.get("errors")) == ("0", "2")
    missing = gate(baseline, [load_run(make_run(tmp_path / "x", defense="blur"))], name="b")
    assert ET.fromstring(junit(missing)).find(".//failure").get("type") == "missing"


def test_annotations_are_one_command_per_line(report):
    lines = list(workflow_commands(report))
    assert len(lines) == 1
    assert lines[0].startswith("::error title=privacy gate%3A regress::partialface / unet")
    assert "%0Arecovery.ssim regress" in lines[0]
    assert "\n" not in lines[0]


def test_an_improvement_is_a_notice(baseline, tmp_path):
    better = make_run(tmp_path / "better", seed=0, retrained=1, shift={"ssim": -0.2})
    [line] = workflow_commands(gate(baseline, [load_run(better)], name="b"))
    assert line.startswith("::notice title=privacy gate::")
    assert "better than the baseline" in line


def test_the_summary_has_a_row_per_figure(report):
    text = summary(report)
    assert text.startswith("## ❌ Privacy gate: regress")
    rows = [line for line in text.splitlines() if line.startswith("| ❌")]
    assert len(rows) == 1
    assert rows[0].startswith("| ❌ | recovery.ssim | 0.7")
    assert rows[0].count("|") == 10


def test_hostile_names_are_text_in_junit(hostile):
    root = ET.fromstring(junit(hostile))
    assert root.find(".//script") is None
    assert "<script>alert(1)</script>" in root.find("testsuite").get("name")
    assert "\x1b" not in junit(hostile)
    assert "\x00" not in junit(hostile)


def test_hostile_names_start_no_workflow_command(hostile):
    lines = list(workflow_commands(hostile))
    assert len(lines) == 2
    for line in lines:
        assert re.match(r"::(error|notice) title=[^:,]*::", line)
        assert "\n" not in line
        assert "\r" not in line
        # Their own percent signs must not decode to line feeds.
        assert "owned%250A" in line


def test_hostile_names_are_no_markup_in_the_summary(hostile):
    text = summary(hostile)
    for part in ("<script", "`x`", "[a](", "@all", "$("):
        assert part not in text
    assert all(line.startswith(("#", "|", "-", "Run", "Baseline")) for line in text.splitlines() if line)


def test_json_holds_all_of_it(hostile):
    document = json.loads(hostile.model_dump_json())
    assert document["outcome"] == "regress"
    assert HOSTILE in document["cells"][0]["cell"]
