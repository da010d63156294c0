"""The result schema: strict, stable, and shipped as JSON Schema."""

import json
from importlib.resources import files

import pytest
from pydantic import ValidationError
from run_folders import write_run

from bench.results import Identity, Measure, Quality, RunResult, read_result, upgrade


def test_a_missing_value_needs_a_reason():
    with pytest.raises(ValidationError, match="needs a reason"):
        Measure(value=None, direction="privacy")
    assert Measure(value=None, direction="privacy", reason="no weights").reason == "no weights"


def test_round_trip(tmp_path):
    result = RunResult(run_id="x", status="error", error="disk full")
    (tmp_path / "metrics.json").write_text(result.to_json())
    assert read_result(tmp_path) == result
    document = json.loads(result.to_json())
    assert document["schema"] == "2"
    assert document["status"] == "error"


def test_results_of_before_a_figure_existed_are_read():
    measure = {"value": 0.5, "direction": "leakage"}
    old = Identity.model_validate(dict.fromkeys(("type1_tar", "type2_tar", "rank1", "cosine"), measure))
    assert old.rank5 is old.knn_distance is None


def old(document):
    """A document of version 1: every measure says whom a higher value suits, which is never what leaks."""
    if isinstance(document, list):
        return [old(item) for item in document]
    if not isinstance(document, dict):
        return document
    if "direction" in document:
        return {k: v for k, v in document.items() if k != "direction"} | {"higher_is_better_for": "utility"}
    return {name: old(item) for name, item in document.items()}


@pytest.fixture(params=["recovery", "linkage"])
def stored(request, tmp_path):
    """A result of today, and the same as version 1 stored it."""
    linkage = request.param == "linkage"
    today = read_result(write_run(tmp_path / "run", linkage=linkage, strength=not linkage))
    document = old(json.loads(today.to_json())) | {"schema": "1"}
    del document["attacks"], document["worst_case"]
    return today, document


def test_version_1_is_read(stored):
    today, document = stored
    assert RunResult.model_validate_json(json.dumps(document)) == today
    with pytest.raises(ValidationError, match="not a result of schema 1 either"):
        RunResult.model_validate(document | {"attack": [1], "recovery": None})


def test_a_composite_run_of_version_1_becomes_several_attacks(stored):
    today, document = stored
    if today.recovery is None:
        return
    info, recovery = document["attack"], document["recovery"]
    quality = {name: recovery[name] for name in Quality.model_fields}
    names = ("linear", "unet")
    document["attack"] = {
        **info,
        "name": "composite",
        "members": {n: {**info, "name": n, "members": {}} for n in names},
    }
    document["recovery"] = recovery | {"members": dict.fromkeys(names, quality)}
    read = RunResult.model_validate(document)
    assert read.attack is read.recovery is None
    assert list(read.attacks) == ["linear", "unet"]
    assert read.worst_case == read.attacks["unet"].recovery == today.recovery
    assert read.attacks["linear"].attack == today.attack.model_copy(update={"name": "linear"})


def test_the_strength_of_a_linkage_run_of_version_1_is_called_as_its_figures_are():
    measure = {"value": 0.5, "higher_is_better_for": "utility"}
    document = {
        "schema": "1",
        "linkage": {"rank1": measure},
        "strength": {
            "points": [{"budget": 1, "values": {"accuracy": measure, "auc": measure, "rank1": measure}}],
            "gain_of_last_doubling": {"accuracy": measure},
            "tolerance": {"accuracy": 0.005},
        },
    }
    curve = upgrade(document)["strength"]
    leaks = {"value": 0.5, "direction": "leakage"}
    assert curve["points"][0]["values"] == {"linkage": leaks, "linkage_auc": leaks, "linkage_rank1": leaks}
    assert (curve["gain_of_last_doubling"], curve["tolerance"]) == ({"linkage": leaks}, {"linkage": 0.005})


def test_one_attack_and_several_are_told_alike(stored):
    today, _ = stored
    [(name, only)] = today.attack_results.items()
    assert (name, only.attack, only.recovery, only.linkage) == ("unet", today.attack, today.recovery, today.linkage)
    figure = "linkage" if today.linkage else "ssim"
    assert only.figure(figure) == (today.linkage.protected_plain.accuracy if today.linkage else today.recovery.ssim)
    assert only.ceiling(figure).value > only.figure(figure).value
    assert only.figure("ssim" if today.linkage else "linkage") is None
    assert today.linkage or today.recovery.figure("nonsense") is today.recovery.figure("rank5") is None
    with pytest.raises(ValidationError, match="several attacks"):
        RunResult.model_validate({**today.model_dump(by_alias=True), "attacks": {name: only}})


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError):
        RunResult.model_validate({"run_id": "x", "status": "success", "sism": 1})


def test_the_shipped_schema_is_the_models():
    """Regenerate with ``python -m bench.results`` when the models change on purpose."""
    shipped = json.loads(files("bench").joinpath("schema", "metrics-2.json").read_text())
    assert shipped == RunResult.model_json_schema(by_alias=True)
