from __future__ import annotations

from typing import Any

import pytest

from bench.recognition.options import PUBLISHED, TrainingOptions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "step"}, "needs milestones"),
        ({"milestones": (3,)}, "belong to schedule 'step'"),
        ({"schedule": "linear", "milestones": (3,)}, "belong to schedule 'step'"),
        ({"schedule": "step", "milestones": (5, 3)}, "ascending"),
        ({"schedule": "step", "milestones": (0, 3)}, "positive"),
        ({"epochs": 2, "warmup_epochs": 3}, "cannot exceed"),
        ({"margin": 1.6}, r"margin of head arcface must lie in \[0, 1.571\)"),
        ({"head": "cosface", "margin": 1.0}, r"margin of head cosface must lie in \[0, 1\)"),
        ({"head": "partial-fc", "label_smoothing": 0.1}, "head partial-fc takes no label_smoothing"),
        ({"head": "partial-fc", "precision": "16-mixed"}, "32-true or bf16-mixed"),
        ({"sample_rate": 0.5}, "head arcface takes no sample_rate; it belongs to head partial-fc"),
        ({"head": "cosface", "cosine_margin": 0.5}, "takes no cosine_margin; it belongs to head combined, partial-fc"),
        ({"head": "combined", "interclass_filter": 0.5}, "head combined takes no interclass_filter"),
    ],
)
def test_impossible_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**values)


def test_a_head_is_given_what_it_takes() -> None:
    assert TrainingOptions(head="cosface").head_options == {"scale": 32.0, "margin": 0.3, "label_smoothing": 0.0}
    assert TrainingOptions(head="partial-fc", interclass_filter=0.4).head_options == {
        "scale": 32.0,
        "margin": 0.3,
        "angle_factor": 1.0,
        "cosine_margin": 0.0,
        "sample_rate": 0.1,
        "interclass_filter": 0.4,
    }


def test_the_published_options_are_those_of_the_paper() -> None:
    values = PUBLISHED.model_dump()
    expected = {
        "epochs": 24,
        "batch_size": 64,
        "learning_rate": 0.1,
        "optimiser": "sgd",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": (10, 18, 22),
        "head": "arcface",
        "scale": 64.0,
        "margin": 0.5,
    }
    assert {name: values[name] for name in expected} == expected
