"""Presets: layers of defaults for a kind of machine and purpose. A config file, environment or flag overrides them.

Options of a defence or an attack under a preset live with that defence or attack (its ``presets``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: How the rendered identities are shared out. The evaluator's network is the slowest to train on a processor.
_SYNTHETIC_SHARES = {"provider": 0.4, "public": 0.25, "evaluator": 0.12, "victims": 0.15}

#: For hundreds of identities instead of the published tens of thousands: a gentler margin, and augmentation that takes
#: away the shortcuts which small sets offer (crop, exposure, colour).
_SMALL_SET = {
    "head": "cosface",
    "scale": 24.0,
    "margin": 0.1,
    "learning_rate": 0.15,
    "augmentation": {
        "shift": 0.08,
        "zoom": 0.12,
        "brightness": 0.2,
        "contrast": 0.3,
        "saturation": 0.4,
        "grey": 0.05,
    },
}

#: The hyper-parameters of the PartialFace paper (Mi et al., ICCV 2023, section 5.1).
_PUBLISHED = {
    "epochs": 24,
    "batch_size": 64,
    "learning_rate": 0.1,
    "schedule": "step",
    "milestones": (10, 18, 22),
    "warmup_epochs": 0,
    "head": "arcface",
    "embedding_size": 512,
    "scale": 64.0,
    "margin": 0.5,
}


def _synthetic(identities: int, images: int, **more: Any) -> Mapping[str, Any]:
    options = {"identities": identities, "images_per_identity": images}
    return {"dataset_options": options, "shares": _SYNTHETIC_SHARES, **more}


#: Dataset -> preset -> fields of a run. Only the synthetic dataset is as large as one asks for.
DATASET_PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "synthetic": {
        "quick": _synthetic(80, 10),
        # Thousands of images, not tens of thousands: smaller batches for more steps.
        "cpu": _synthetic(420, 16, training={"epochs": 12, "batch_size": 64, "learning_rate": 0.1, "views": 1}),
        "gpu": _synthetic(4000, 24),
        "paper": _synthetic(4000, 24),
    }
}

#: Preset name -> fields of :class:`bench.config.RunConfig`.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # For CI: everything runs, nothing is converged.
    "quick": {
        "image_size": 64,
        "backbone": "ir-tiny",
        "probes": 64,
        "bootstrap": 300,
        "training": {**_SMALL_SET, "epochs": 4, "views": 1, "batch_size": 64},
    },
    # Two cores, some minutes.
    "cpu": {"image_size": 64, "backbone": "ir-tiny", "training": {**_SMALL_SET, "epochs": 12}},
    # One accelerator: 112 px and the published network widths.
    "gpu": {"image_size": 112, "backbone": "ir-18", "probes": 1000, "training": {**_SMALL_SET, "epochs": 24}},
    "paper": {"image_size": 112, "backbone": "ir-50", "probes": 1000, "training": _PUBLISHED},
}
