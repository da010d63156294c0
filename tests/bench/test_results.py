"""The result schema: strict, stable, and shipped as JSON Schema."""

import json
from importlib.resources import files

import pytest
from pydantic import ValidationError

from bench.results import AttackInfo, Identity, Measure, RunResult, read_result


def test_a_missing_value_needs_a_reason():
    with pytest.raises(ValidationError, match="needs a reason"):
        Measure(value=None, higher_is_better_for="privacy")
    assert Measure(value=None, higher_is_better_for="privacy", reason="no weights").reason == "no weights"


def test_round_trip(tmp_path):
    result = RunResult(run_id="x", status="error", error="disk full")
    (tmp_path / "metrics.json").write_text(result.to_json())
    assert read_result(tmp_path) == result
    document = json.loads(result.to_json())
    assert document["schema"] == "1"
    assert document["status"] == "error"


def test_results_of_before_a_figure_existed_are_read():
    measure = {"value": 0.5, "higher_is_better_for": "utility"}
    old = Identity.model_validate(dict.fromkeys(("type1_tar", "type2_tar", "rank1", "cosine"), measure))
    assert old.rank5 is None
    assert old.knn_distance is None
    attack = {"name": "x", "options": {}, "knowledge": "whitebox", "saturated": None, "states_covered": None}
    assert AttackInfo.model_validate(attack).members == {}


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError):
        RunResult.model_validate({"schema": "1", "run_id": "x", "status": "success", "sism": 1})


def test_the_shipped_schema_is_the_models():
    """Regenerate with ``python -m bench.results`` when the models change on purpose."""
    shipped = json.loads(files("bench").joinpath("schema", "metrics-1.json").read_text())
    assert shipped == RunResult.model_json_schema(by_alias=True)
