"""Train a small PartialFormer to translate between two generated languages, and say how well it does.

    python -m docs.examples.translation.demo --steps 400 --seed 0

The corpus is generated (:mod:`docs.examples.translation.corpus`): this shows that the translation model learns
and decodes, and nothing about translation between languages that people speak.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.errors import BenchError, MissingError, UsageError
from bench.nets.partialformer import BlockOptions
from bench.randomness import Streams

from .corpus import Languages, Pair, Sentence, Vocabulary
from .decoding import beam_search, greedy
from .translation import BEGIN, PADDING, TranslationModel

TRAINING_PAIRS, TEST_PAIRS = 8000, 200
BATCH = 64
#: Of Adam, reached at the end of the warm-up.
PEAK_RATE = 5e-3
SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class TranslationReport:
    """How well a model translates sentences that it has never seen.

    Attributes:
        bleu: corpus BLEU, in [0, 100]: ``untrained`` and ``word_by_word`` (a perfect dictionary without grammar) to
            compare with, ``greedy`` and ``beam`` of the trained model.
        exact: share of sentences that beam search gets right to the last word, in [0, 1].
        loss: mean training loss of the last tenth of the steps, in nats; label smoothing keeps it above zero.
        parameters: learned values.
        seconds: of training.
        signature: what sacrebleu says of how it counted.
    """

    bleu: dict[str, float]
    exact: float
    loss: float
    parameters: int
    seconds: float
    signature: str


def inverse_square_root(step: int, warmup: int) -> float:
    """The learning rate relative to its peak at ``step`` >= 1: linear up to ``warmup``, then falling with 1/sqrt."""
    return float(min(step / warmup, (warmup / step) ** 0.5))


def small_model(vocabulary: int, depths: tuple[int, int]) -> TranslationModel:
    """A model that a processor trains in seconds; ``depths`` are its encoder and decoder layers."""
    encoder = BlockOptions(width=64, scaled_heads=12, hidden_ratio=4, dropout=0.05)
    decoder = BlockOptions(width=64, scaled_heads=10, hidden_ratio=2, dropout=0.05)
    return TranslationModel(vocabulary, encoder, decoder, depths)


def fit(model: TranslationModel, source: Tensor, target: Tensor, steps: int, streams: Streams) -> list[float]:
    """Train with label-smoothed cross-entropy; returns the loss of every step.

    Args:
        model: trained in place.
        source: int64 (P, S), padded.
        target: int64 (P, T), padded, each closed by END.
        steps: batches of :data:`BATCH` pairs.
        streams: of the order of the pairs and of dropout.
    """
    order = streams.generator("translation/order")
    optimiser = torch.optim.Adam(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98))
    warmup = max(1, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: inverse_square_root(done + 1, warmup))
    begun = F.pad(target[:, :-1], (1, 0), value=BEGIN)
    losses = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.seed_for("translation/dropout"))
        for _ in range(steps):
            batch = torch.randint(len(source), (BATCH,), generator=order)
            logits = model(source[batch], begun[batch])
            loss = F.cross_entropy(
                logits.flatten(0, 1), target[batch].flatten(), ignore_index=PADDING, label_smoothing=SMOOTHING
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
    model.eval()
    return losses


def bleu(sentences: Sequence[Sentence], references: Sequence[Sentence]) -> tuple[float, str]:
    """Corpus BLEU in [0, 100] and sacrebleu's signature.

    Raises:
        MissingError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingError("BLEU needs sacrebleu: pip install sacrebleu") from error
    metric = BLEU()
    score = metric.corpus_score([" ".join(s) for s in sentences], [[" ".join(s) for s in references]])
    return float(score.score), str(metric.get_signature())


def run(steps: int, seed: int, *, beams: int = 4, depths: tuple[int, int] = (3, 2)) -> TranslationReport:
    """Generate the corpus, train, translate the held-out sentences.

    Raises:
        UsageError: fewer than one step, beam or layer.
        MissingError: sacrebleu is not installed.
    """
    if min(steps, beams, *depths) < 1:
        raise UsageError(f"--steps, --beams and --layers must be at least 1, got {steps}, {beams} and {depths}")
    bleu([("a",)], [("a",)])  # what is missing is told before the training, not after it
    streams = Streams(seed)
    languages = Languages(streams.generator("translation/languages"))
    pairs = languages.pairs(TRAINING_PAIRS + TEST_PAIRS, streams.generator("translation/sentences"))
    vocabulary = Vocabulary(pairs)
    training, held_out = pairs[TEST_PAIRS:], pairs[:TEST_PAIRS]
    references = [target for _, target in held_out]
    unseen = vocabulary.encode([source for source, _ in held_out])
    longest = vocabulary.encode(references).shape[1] + 5

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.seed_for("translation/weights"))
        model = small_model(len(vocabulary), depths).eval()
    untrained = vocabulary.decode(greedy(model, unseen, longest))
    start = time.perf_counter()
    losses = fit(model, *_sides(vocabulary, training), steps, streams)
    seconds = time.perf_counter() - start
    best = vocabulary.decode(beam_search(model, unseen, longest, beams=beams))
    outputs = {
        "untrained": untrained,
        "word_by_word": [languages.word_by_word(source) for source, _ in held_out],
        "greedy": vocabulary.decode(greedy(model, unseen, longest)),
        "beam": best,
    }
    last = losses[-max(1, steps // 10) :]
    return TranslationReport(
        bleu={name: bleu(sentences, references)[0] for name, sentences in outputs.items()},
        exact=sum(a == b for a, b in zip(best, references, strict=True)) / len(references),
        loss=sum(last) / len(last),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=seconds,
        signature=bleu(best, references)[1],
    )


def _sides(vocabulary: Vocabulary, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    return vocabulary.encode([source for source, _ in pairs]), vocabulary.encode([target for _, target in pairs])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.examples.translation.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of languages, sentences and training (default: 0)")
    parser.add_argument("--beams", type=int, default=4, help="of beam search (default: 4)")
    parser.add_argument(
        "--layers", type=int, nargs=2, default=(3, 2), metavar=("ENCODER", "DECODER"), help="default: 3 2"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    options = parser.parse_args(arguments)
    try:
        report = run(options.steps, options.seed, beams=options.beams, depths=tuple(options.layers))
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"corpus": "generated", **asdict(report)}) if options.json else _text(report, vars(options)))
    return 0


def _text(report: TranslationReport, options: dict[str, Any]) -> str:
    rows = {
        "untrained model": report.bleu["untrained"],
        "word by word, perfect dictionary": report.bleu["word_by_word"],
        "greedy": report.bleu["greedy"],
        f"beam search ({options['beams']})": report.bleu["beam"],
    }
    lines = [
        f"Generated corpus: {TRAINING_PAIRS} training pairs, {TEST_PAIRS} held out; no language that people speak.",
        f"PartialFormer, {report.parameters:,} parameters, {options['steps']} steps of {BATCH} pairs, "
        f"{report.seconds:.0f} s, loss {report.loss:.2f}.",
        *(f"BLEU {value:6.2f}  {name}" for name, value in rows.items()),
        f"{report.exact:.1%} of the sentences are right to the last word. {report.signature}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
