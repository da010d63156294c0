"""A run's recogniser, or the network of its attack, as an ONNX file that was compared with torch."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attacks.base import GRANTS, Adversary, Capability, Knowledge, Observation, RecoveryAttack
from bench import plugins
from bench.data.faces import FaceSet
from bench.data.synthetic import SyntheticOptions, load_synthetic
from bench.errors import BenchError, DataError, MissingError, UsageError, first_line
from bench.files import replacing, sha256
from bench.images import to_float
from bench.nets.checkpoints import load_recogniser
from bench.randomness import Streams
from bench.run.config import RunConfig, run_config
from bench.run.machines import choose_machine
from bench.run.provider import load_defense
from defenses.base import Defense
from defenses.template import TemplateDefense

#: Largest difference to torch that is let through, over the largest output or 1.
TOLERANCE = 1e-4
#: Faces traced with, and another number of them to see whether the graph takes any.
_TRACED, _OTHER = 2, 3
_OPSET = 17


class Exported(BaseModel):
    """What was written.

    Attributes:
        file: the ONNX file.
        what: the recogniser, or the attack's network.
        inputs: name -> shape; the first axis is ``batch``, or 1 for a network that takes one face at a time.
        output: its name.
        evaluator: whether the file can be an ``--evaluator``: RGB faces in, embeddings out.
        difference: the largest one between onnxruntime's output and torch's, over the largest output or 1.
        sha256: of the file.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    what: str
    inputs: dict[str, tuple[int | str, ...]]
    output: str
    evaluator: bool
    difference: float
    sha256: str


class _FromPixels(nn.Module):
    """A recogniser of faces in [0, 1] under the field's usual pre-processing, (255 x - 127.5) / 128."""

    def __init__(self, recogniser: nn.Module) -> None:
        super().__init__()
        self.recogniser = recogniser

    def forward(self, pixels: Tensor) -> Tensor:
        embedding: Tensor = self.recogniser((pixels * 128 + 127.5) / 255)
        return embedding


def export(run: Path, what: str, out: Path) -> Exported:
    """Write a network of a finished run as ONNX, once onnxruntime was seen to agree with torch on it.

    * ``recogniser``: representation to embedding (not normalised). Where the defence is ``none`` its input is
      RGB as (255 x - 127.5) / 128 of faces x in [0, 1], so that the file can be an ``--evaluator``.
    * ``attack``: what the attack calls its ``network``, with the inputs that the attack gives it.

    Args:
        run: the run's folder.
        what: which network.
        out: the file, replaced if it is there.

    Raises:
        UsageError: a run whose attack has no network, or ``out`` is no ``.onnx`` file.
        MissingError: no run, or no such checkpoint in it.
        DataError: the run's files are damaged or of another version.
        BenchError: the network cannot be expressed in ONNX, or comes out different.
    """
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: an ONNX file ends in .onnx")
    config = run_config(run)
    defense = load_defense(run, config)
    if what == "recogniser":
        network, inputs = _recogniser(run, defense)
        names, output = ["input" if isinstance(network, _FromPixels) else "representation"], "embedding"
    elif what == "attack":
        network, inputs = _attack(run, config, defense)
        names, output = list(inspect.signature(network.forward).parameters)[: len(inputs)], "face"
    else:
        raise UsageError(f"--what must be recogniser or attack, got {what!r}")
    network = network.to(memory_format=torch.contiguous_format).eval()
    with replacing(out) as temporary:
        free = True
        try:
            _write(network, [tensor[:_TRACED] for tensor in inputs], temporary, names, output, free=True)
            difference = max(_difference(network, [t[:n] for t in inputs], temporary, names) for n in (_TRACED, _OTHER))
        except _OtherBatch:
            free = False
            _write(network, [tensor[:1] for tensor in inputs], temporary, names, output, free=False)
            difference = _difference(network, [tensor[:1] for tensor in inputs], temporary, names)
    shapes = {n: ("batch" if free else 1, *t.shape[1:]) for n, t in zip(names, inputs, strict=True)}
    return Exported(
        file=str(out),
        what=what,
        inputs=shapes,
        output=output,
        evaluator=isinstance(network, _FromPixels),
        difference=difference,
        sha256=sha256(out),
    )


def _checkpoint(run: Path, name: str) -> Path:
    path = run / "checkpoints" / f"{name}.safetensors"
    if not path.is_file():
        kept = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "nothing"
        raise MissingError(f"{run} keeps no {name} (checkpoints: {kept})")
    return path


def _recogniser(run: Path, defense: Defense) -> tuple[nn.Module, list[Tensor]]:
    checkpoint = _checkpoint(run, "recogniser")
    if (brought := run_config(run).recogniser) is not None:
        raise UsageError(f"the recogniser of {run} was brought along and is not written again: {brought}")
    recogniser, _ = load_recogniser(checkpoint)
    example = torch.randn(_OTHER, *recogniser.spec.representation_shape, generator=Streams(0).generator("export"))
    if defense.name == "none" or (isinstance(defense, TemplateDefense) and defense.behind is None):
        return _FromPixels(recogniser), [example.clamp(-1, 1)]
    # Representations of any scale will do, but each channel's own statistics show a mistake best.
    measured = recogniser.normalisation
    scale, shift = measured.variance.sqrt(), measured.mean
    return recogniser, [example * scale[:, None, None] + shift[:, None, None]]


def _attack(run: Path, config: RunConfig, defense: Defense) -> tuple[nn.Module, list[Tensor]]:
    """The attack's network, and what the attack shows it of some rendered faces."""
    weights = _checkpoint(run, "attack")
    attack = plugins.make_attack(config.attack, config.attack_options, config.preset)
    faces = _rendered(config)
    attack.prepare(_adversary(config, defense, faces))
    attack.eval()
    if not isinstance(attack, RecoveryAttack) or not isinstance(getattr(attack, "network", None), nn.Module):
        raise UsageError(f"attack {attack.name} trains no network that could be exported")
    try:
        attack.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise DataError(f"{weights} does not hold the weights of this attack: {first_line(error)}") from error
    network = attack.get_submodule("network")  # the stored views decide how wide it is
    seen: list[tuple[Any, ...]] = []
    handle = network.register_forward_pre_hook(lambda _, given: seen.append(given))
    try:
        sent = defense.protect(to_float(faces.images[:_OTHER]), Streams(config.seed).generator("export"))
        states = sent.state if Knowledge(config.knowledge) is Knowledge.ORACLE else None
        states = None if states is None else states[:, None]
        attack.recover(Observation(sent.representation[:, None], states=states))
    except ValueError as error:
        raise BenchError(f"attack {attack.name} cannot be shown an example: {error}") from error
    finally:
        handle.remove()
    return network, [given for given in seen[0] if isinstance(given, Tensor)]


def _rendered(config: RunConfig) -> FaceSet:
    """Faces of which only the shape and the range matter."""
    return load_synthetic(SyntheticOptions(identities=4, images_per_identity=2, image_size=config.image_size)).in_memory


def _adversary(config: RunConfig, defense: Defense, faces: FaceSet) -> Adversary:
    """As in the run, as far as it decides what the attack builds; nothing is learned of these faces."""
    knowledge = Knowledge(config.knowledge)
    return Adversary(
        faces=faces.images,
        identities=faces.labels,
        knowledge=knowledge,
        mechanism=defense.guess if knowledge is Knowledge.BLACKBOX else lambda generator: defense,
        generator=Streams(config.seed).generator("attack"),
        fabric=choose_machine("cpu", "32-true").fabric,
        traffic=(lambda count: iter(())) if Capability.TRAFFIC in GRANTS[knowledge] else None,
    )


class _OtherBatch(Exception):
    """The graph takes the number of faces that it was traced with, and no other."""


def _write(
    network: nn.Module, inputs: Sequence[Tensor], path: Path, names: list[str], output: str, *, free: bool
) -> None:
    """Trace the network; :raises BenchError: it cannot be expressed."""
    axes = {name: {0: "batch"} for name in (*names, output)} if free else None
    with warnings.catch_warnings():
        # Of the tracer's doubts (what depends on shapes) and of the exporter's age; what matters is compared below.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            # Not dynamo=True, the default since torch 2.9: it needs another package, onnxscript.
            torch.onnx.export(
                network,
                tuple(inputs),
                str(path),
                input_names=names,
                output_names=[output],
                dynamic_axes=axes,
                opset_version=_OPSET,
                dynamo=False,
            )
        except Exception as error:  # the exporter's exceptions have no base class of their own
            raise BenchError(f"the network cannot be expressed in ONNX: {first_line(error)}") from error


def _difference(network: nn.Module, inputs: Sequence[Tensor], path: Path, names: list[str]) -> float:
    """The largest difference between onnxruntime's output and torch's, over the largest output or 1.

    Raises:
        _OtherBatch: onnxruntime refuses so many faces.
        BenchError: the outputs differ.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    # What the network does not look at is no input of the graph.
    taken = {entry.name for entry in session.get_inputs()}
    given = {name: t.contiguous().numpy() for name, t in zip(names, inputs, strict=True) if name in taken}
    try:
        (found,) = session.run(None, given)
    except Exception as error:  # nor have onnxruntime's
        raise _OtherBatch(str(error)) from error
    with torch.no_grad():
        expected: Tensor = network(*inputs)
    scale = max(1.0, float(expected.abs().max()))
    difference = float((torch.from_numpy(found) - expected).abs().max()) / scale
    if not difference <= TOLERANCE:
        raise BenchError(
            "the ONNX file computes something else: its output differs from torch's by "
            f"{difference:.2g} of the largest value"
        )
    return difference
