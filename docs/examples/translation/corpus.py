"""A generated translation task: two invented languages whose grammars disagree.

No person ever spoke either. Sentences count things: "forty two red boats carry seven lamps". The source language says
subject, verb, object, and number, adjective, noun. The target language

- puts the verb last, and the adjective and the number after the noun;
- says units before tens, with a word between ("two and forty");
- gives nouns and verbs a plural, the verb's after its subject;
- makes adjectives agree with the gender and the number of their noun; gender is the noun's own and cannot be seen.

So that replacing word by word, even with a perfect dictionary, gets neither order nor endings right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .translation import BEGIN, END, PADDING

Sentence = tuple[str, ...]
Pair = tuple[Sentence, Sentence]

NOUNS, ADJECTIVES, VERBS = 16, 8, 8
GENDERS = ("o", "a", "u")
PLURAL = "s"
AND = "ke"


def _words(count: int, consonants: str, generator: torch.Generator) -> list[str]:
    """Distinct words of two syllables."""
    syllables = [consonant + vowel for consonant in consonants for vowel in "aeiou"]
    order = torch.randperm(len(syllables) ** 2, generator=generator)[:count].tolist()
    return [syllables[i // len(syllables)] + syllables[i % len(syllables)] for i in order]


@dataclass(frozen=True, slots=True)
class _Thing:
    """A number of things of one kind, 1 to 99, possibly with an adjective."""

    number: int
    adjective: int | None
    noun: int


class Languages:
    """The two languages: their words, drawn from ``generator``, and their grammars."""

    def __init__(self, generator: torch.Generator) -> None:
        kinds = {"unit": 9, "ten": 9, "adjective": ADJECTIVES, "noun": NOUNS, "verb": VERBS}
        source = iter(_words(sum(kinds.values()), "bdgjlmz", generator))
        target = iter(_words(sum(kinds.values()), "fhknprt", generator))
        self._source = {kind: [next(source) for _ in range(count)] for kind, count in kinds.items()}
        self._target = {kind: [next(target) for _ in range(count)] for kind, count in kinds.items()}
        self._genders = torch.randint(len(GENDERS), (NOUNS,), generator=generator).tolist()
        self._dictionary = {
            word: self._target[kind][i] + (GENDERS[0] if kind == "adjective" else "")
            for kind, words in self._source.items()
            for i, word in enumerate(words)
        }

    def pair(self, generator: torch.Generator) -> Pair:
        """A random sentence in both languages."""
        subject, thing = self._thing(generator), self._thing(generator)
        verb = _draw(VERBS, generator)
        source = (*self._say(subject), self._source["verb"][verb], *self._say(thing))
        plural = PLURAL if subject.number > 1 else ""
        target = (*self._translate(subject), *self._translate(thing), self._target["verb"][verb] + plural)
        return source, target

    def pairs(self, count: int, generator: torch.Generator) -> list[Pair]:
        """``count`` pairs, no source sentence twice."""
        pairs: dict[Sentence, Sentence] = {}
        while len(pairs) < count:
            source, target = self.pair(generator)
            pairs[source] = target
        return list(pairs.items())

    def word_by_word(self, source: Sentence) -> Sentence:
        """A perfect dictionary and no grammar: every word replaced by its basic form, in place."""
        return tuple(self._dictionary[word] for word in source)

    def _thing(self, generator: torch.Generator) -> _Thing:
        # One thing in four is single, so that both numbers are common.
        number = 1 if _draw(4, generator) == 0 else 2 + _draw(98, generator)
        adjective = _draw(2 * ADJECTIVES, generator)
        return _Thing(number, adjective if adjective < ADJECTIVES else None, _draw(NOUNS, generator))

    def _say(self, thing: _Thing) -> Sentence:
        tens, units = divmod(thing.number, 10)
        words = [self._source["ten"][tens - 1]] if tens else []
        words += [self._source["unit"][units - 1]] if units else []
        words += [] if thing.adjective is None else [self._source["adjective"][thing.adjective]]
        return (*words, self._source["noun"][thing.noun])

    def _translate(self, thing: _Thing) -> Sentence:
        tens, units = divmod(thing.number, 10)
        plural = PLURAL if thing.number > 1 else ""
        words = [self._target["noun"][thing.noun] + plural]
        if thing.adjective is not None:
            words.append(self._target["adjective"][thing.adjective] + GENDERS[self._genders[thing.noun]] + plural)
        words += [self._target["unit"][units - 1]] if units else []
        words += [AND] if tens and units else []
        words += [self._target["ten"][tens - 1]] if tens else []
        return tuple(words)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


class Vocabulary:
    """The words of both languages as numbers, after :data:`PADDING`, :data:`BEGIN` and :data:`END`."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.words = (
            "<padding>",
            "<begin>",
            "<end>",
            *sorted({word for pair in pairs for side in pair for word in side}),
        )
        self._numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentences: Sequence[Sentence]) -> torch.Tensor:
        """Sentences, each closed by :data:`END`, to int64 (B, L), padded at the end.

        Raises:
            KeyError: a word that the vocabulary does not have.
        """
        rows = [torch.tensor([*(self._numbers[word] for word in sentence), END]) for sentence in sentences]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)

    def decode(self, numbers: torch.Tensor) -> list[Sentence]:
        """The inverse of :meth:`encode`, whatever follows :data:`END` left out."""
        sentences = []
        for row in numbers.tolist():
            row = row[: row.index(END)] if END in row else row
            sentences.append(tuple(self.words[number] for number in row if number not in (PADDING, BEGIN)))
        return sentences
