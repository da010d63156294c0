"""``bench list``: what can be named on the command line, as rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench import plugins
from bench.errors import UsageError
from bench.run.config import DATA, INTERCEPTIONS

if TYPE_CHECKING:
    from attacks.base import Attack


def _defenses() -> list[dict[str, Any]]:
    rows = []
    registry = plugins.defenses()
    for name in registry:
        plugin = registry.get(name)
        rows.append(
            {
                "name": name,
                "summary": plugin.summary,
                "options": ", ".join(plugin.Options.model_fields),
                "reference": plugin.reference,
            }
        )
    return rows


def _attacks() -> list[dict[str, Any]]:
    rows = []
    registry = plugins.attacks()
    for name in registry:
        plugin = registry.get(name)
        rows.append(
            {
                "name": name,
                "summary": plugin.summary,
                "kind": _kind(plugin),
                "needs": ", ".join(sorted(plugin.needs)),
                "uses": ", ".join(sorted(plugin.uses)),
                "cost": plugin.cost,
                "budgets": ", ".join((DATA, INTERCEPTIONS, *plugin.budgets)),
                "options": ", ".join(plugin.Options.model_fields),
                "reference": plugin.reference,
            }
        )
    return rows


def _kind(plugin: type[Attack]) -> str:
    from attacks.base import CompositeAttack, LinkageAttack

    if issubclass(plugin, CompositeAttack):
        return "composite"
    return "linkage" if issubclass(plugin, LinkageAttack) else "recovery"


def _datasets() -> list[dict[str, Any]]:
    from bench.data.loaders import DATASETS

    rows = []
    for name in DATASETS:
        dataset = DATASETS.get(name)
        rows.append(
            {
                "name": name,
                "summary": dataset.summary,
                "needs": "--data-root" if dataset.needs_root else "",
                "options": ", ".join(dataset.Options.model_fields),
            }
        )
    return rows


def _backbones() -> list[dict[str, Any]]:
    import torch

    from bench.nets.backbones import BACKBONES
    from bench.nets.recogniser import Recogniser, RecogniserSpec

    rows = []
    for name in BACKBONES:
        with torch.device("meta"):
            recogniser = Recogniser(RecogniserSpec(name, (3, 112, 112), 512))
        rows.append({"name": name, "parameters (RGB, 112 px, 512-d)": f"{recogniser.parameter_count / 1e6:.2f} M"})
    return rows


def _heads() -> list[dict[str, Any]]:
    from bench.recognition.options import HEADS

    return [{"name": name, "summary": (HEADS.get(name).__doc__ or "").strip().splitlines()[0]} for name in HEADS]


def _metrics() -> list[dict[str, Any]]:
    entries = {
        "accuracy": ("utility", "%", "pair accuracy, threshold from the other folds (LFW View 2)"),
        "auc": ("utility", "%", "area under the ROC curve of the pairs"),
        "eer": ("utility", "%", "equal error rate; lower is better"),
        "tar_at_far": ("utility", "%", "genuine pairs accepted at a given share of accepted impostors"),
        "ssim": ("recovery", "-1..1", "structural similarity to the original, Gaussian window 11, sigma 1.5"),
        "psnr": ("recovery", "dB", "peak signal-to-noise ratio, per image"),
        "psnr_aligned": ("recovery", "dB", "PSNR after a per-channel affine fit to the original"),
        "ms_ssim": ("recovery", "0..1", "multi-scale SSIM"),
        "lpips": ("recovery", ">= 0", "LPIPS v0.1, AlexNet trunk; higher is less alike"),
        "type1_tar": ("identity", "%", "recovered face accepted against the same original image"),
        "type2_tar": ("identity", "%", "recovered face accepted against another image of the person"),
        "rank1": ("identity", "%", "recovered face finds its person in a gallery of other images"),
        "rank5": ("identity", "%", "its person is among the five nearest in that gallery"),
        "cosine": ("identity", "-1..1", "evaluator's cosine between recovered and original"),
        "knn_distance": (
            "identity",
            "0..2",
            "distance to another image of the person; lower leaks more",
        ),
        "linkage accuracy": (
            "linkage",
            "%",
            "pair accuracy of an attack: protected against plain, or against protected",
        ),
        "linkage rank1": ("linkage", "%", "a representation finds its person among plain faces"),
        "d_sys": ("linkage", "0..1", "global unlinkability measure: 0 unlinkable, 1 fully linkable"),
        "states": ("state inference", "%", "interceptions, and channels, of which the attack names what was drawn"),
    }
    return [
        {"name": name, "group": group, "unit": unit, "summary": summary}
        for name, (group, unit, summary) in entries.items()
    ]


def catalogue(kind: str) -> list[dict[str, Any]]:
    """The rows of ``bench list KIND``.

    Raises:
        UsageError: there is no such list.
    """
    makers = {
        "defenses": _defenses,
        "attacks": _attacks,
        "datasets": _datasets,
        "backbones": _backbones,
        "heads": _heads,
        "metrics": _metrics,
    }
    if kind not in makers:
        raise UsageError(f"nothing to list called {kind!r}: {', '.join(makers)}")
    return makers[kind]()
