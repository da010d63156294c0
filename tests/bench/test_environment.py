"""Environment variables: every field of a run that holds one value, nothing else."""

import pytest
from pydantic import BaseModel

from bench.config import RunConfig
from bench.environment import FIELDS, known_variables, read_environment
from bench.errors import UsageError


def test_the_variables_are_the_fields_that_hold_one_value():
    single = {name for name, field in RunConfig.model_fields.items() if not isinstance(field.default, dict | BaseModel)}
    assert single == FIELDS


def test_unknown_variable_is_an_error():
    with pytest.raises(UsageError, match="unknown environment variable BENCH_DATAROOT"):
        read_environment({"BENCH_DATAROOT": "/x"})


def test_values_are_read_and_empty_ones_are_absent():
    environment = {"BENCH_LPIPS_WEIGHTS": "/x", "PATH": "/bin", "BENCH_SEED": "3", "BENCH_DEVICE": ""}
    assert read_environment(environment) == {"seed": "3"}
    assert {"BENCH_DATA_ROOT", "BENCH_EVALUATOR", "BENCH_DEBUG"} <= known_variables()
