"""``bench baseline``, ``bench gate`` and ``bench compare``: output and exit codes."""

import json

import pytest
from gate_world import make_run


@pytest.fixture
def stored(bench, seeds, tmp_path):
    code, out, _ = bench("baseline", *seeds, "-o", tmp_path / "baseline.json")
    assert code == 0
    assert "4 runs" in out
    return tmp_path / "baseline.json"


def test_exit_codes(bench, stored, seeds, tmp_path):
    assert bench("gate", "--baseline", stored, *seeds)[0] == 0
    leaky = make_run(tmp_path / "leaky", seed=1, retrained=1, shift={"ssim": 0.1})
    code, out, _ = bench("gate", "--baseline", stored, leaky)
    assert code == 1
    assert "REGRESS (1 regress)" in out
    lacking = make_run(tmp_path / "lacking", seed=0, retrained=1)
    document = json.loads((lacking / "metrics.json").read_text())
    document["utility"] = None
    (lacking / "metrics.json").write_text(json.dumps(document))
    code, out, _ = bench("gate", "--baseline", stored, lacking)
    assert code == 4
    assert "utility.accuracy: not measured" in out


def test_outputs_for_ci(bench, stored, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("earlier step\n")
    leaky = make_run(tmp_path / "leaky", seed=1, retrained=1, shift={"ssim": 0.1})
    code, out, err = bench("gate", "--baseline", stored, "--junit", tmp_path / "junit.xml", "--json", leaky)
    assert code == 1
    document = json.loads(out)  # one document: the annotations go to stderr
    assert (document["outcome"], document["exit_code"]) == ("regress", 1)
    assert err.startswith("::error title=privacy gate%3A regress::")
    assert (tmp_path / "summary.md").read_text().startswith("earlier step\n## ❌ Privacy gate: regress")
    assert "<failure" in (tmp_path / "junit.xml").read_text()


def test_a_baseline_is_not_replaced_by_accident(bench, stored, seeds):
    code, _, err = bench("baseline", *seeds, "-o", stored)
    assert code == 2
    assert "exists: choose another file, or replace it with --overwrite" in err
    assert bench("baseline", *seeds, "-o", stored, "--overwrite", "--json")[0] == 0


def test_bad_files_are_one_line(bench, seeds, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    code, _, err = bench("gate", "--baseline", tmp_path / "bad.json", seeds[0])
    assert code == 3
    assert len(err.strip().splitlines()) == 1
    assert bench("gate", "--baseline", tmp_path / "none.json", seeds[0])[0] == 5


def test_compare(bench, seeds, tmp_path):
    other = make_run(tmp_path / "other", seed=0, retrained=1, options={"subset": "0"}, shift={"ssim": 0.1})
    code, out, _ = bench("compare", seeds[0], other)
    assert code == 0
    assert "defense_options.subset" in out
    assert "ceiling.ssim" in out
    code, out, _ = bench("compare", seeds[0], other, "--json")
    assert json.loads(out)["settings"][0]["second"] == "0"
