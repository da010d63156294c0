"""The model card of an exported network: what it is, what it was trained on, what it was measured to do, and not to do.

After Mitchell et al., *Model Cards for Model Reporting* (FAT* 2019), as far as a run knows the answers.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.data.loaders import MAIN, ROLES
from bench.measures import KINDS, Measure, interval, shown
from bench.run.archive import Run
from bench.run.export import Exported
from reports.formats import markdown_text

#: Figures of a recovery that say what an attack's network gives back.
_RECOVERED = ("ssim", "psnr_aligned", "type1_tar", "type2_tar")
_USE = {
    "recogniser": "To measure a defence: what is sent of a face goes in, an embedding comes out, compared by its "
    "cosine. Not to identify anybody: it was trained for a comparison of defences, on few people, and nobody has "
    "looked at how its errors differ between groups of people.",
    "attack": "To measure a defence: what is intercepted goes in, a face comes out. Not for use against people who did "
    "not agree to it; what it recovers is its guess, which may look like somebody else.",
}


def model_card(run: Run, exported: Exported) -> str:
    """Markdown that goes with the file that ``exported`` describes; of a run without figures it says so."""
    return "\n".join(_lines(run, exported)) + "\n"


def _lines(run: Run, exported: Exported) -> Iterator[str]:
    config, manifest, result = run.manifest.config, run.manifest, run.result
    defense, attack = (markdown_text(str(config.get(name, "?"))) for name in ("defense", "attack"))
    what = "Recogniser behind" if exported.what == "recogniser" else f"Network of the attack {attack} on"
    yield f"# {what} {defense}\n"
    inputs = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in exported.inputs.items())
    yield f"- file: ONNX, SHA-256 `{exported.sha256}`; at most {exported.difference:.1g} from torch"
    yield f"- input: {inputs}; output: {exported.output}"
    yield f"- made by: ppfr-bench {manifest.version}, commit {manifest.git_commit or '?'}, run `{manifest.run_id}`"
    yield f"- trained: {manifest.started or '?'}, on {manifest.device_name or '?'}, seed {config.get('seed', '?')}"
    yield f"\n## Use\n\n{_USE[exported.what]}"
    yield "\n## Trained on\n"
    role = "provider" if exported.what == "recogniser" else "public"
    if (data := result.dataset) is None:
        yield "The run left no figures, nor what it was trained on."
    else:
        named = next(name for name, parts in ROLES.items() if role in parts)
        source = markdown_text(data.sources.get(named) or data.sources.get(MAIN) or data.name)
        kind = "synthetic faces of people who do not exist" if data.synthetic else "photographs"
        images, people = (counted.get(role, 0) for counted in (data.images, data.identities))
        yield f"{source}: {images:,} images of {people:,} people, {data.image_size} px, {kind}."
        if result.teacher is not None and exported.what == "recogniser":
            yield f"It learnt to agree with the embeddings of {markdown_text(result.teacher.name)}."
    options = config.get("training" if exported.what == "recogniser" else "attack_options") or {}
    if options:
        yield "\nOptions: " + ", ".join(f"{key} {markdown_text(str(value))}" for key, value in options.items()) + "."
    yield "\n## Measured\n"
    yield from _measured(run, exported)
    if result.warnings:
        yield "\n## Before you quote a figure\n"
        yield from (f"- {markdown_text(warning)}" for warning in result.warnings)


def _measured(run: Run, exported: Exported) -> Iterator[str]:
    result = run.result
    figures: list[tuple[str, str, Measure | None]] = []
    if exported.what == "recogniser" and (utility := result.utility) is not None:
        figures = [
            ("accuracy", "", utility.accuracy),
            ("accuracy", " without the defence", utility.unprotected.accuracy),
        ]
    elif exported.what == "attack" and result.recovery is not None:
        figures = [(name, "", result.recovery.figure(name)) for name in _RECOVERED]
    if not figures:
        yield "Nothing."
        return
    assert result.dataset is not None
    yield f"On {markdown_text(result.dataset.name)}, people who were not trained on, with 95 % intervals over people:\n"
    for name, more, measure in figures:
        yield f"- {KINDS[name].heading}{more}: {shown(name, measure)} {interval(name, measure)}".rstrip()
