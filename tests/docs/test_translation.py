from __future__ import annotations

import json
import math
import sys
from itertools import pairwise, product

import pytest
import torch
from translation import demo
from translation.corpus import GENDERS, Languages, Vocabulary
from translation.decoding import beam_search, greedy
from translation.translation import BEGIN, END, PADDING, TranslationModel, published, sinusoids

from bench.errors import MissingError, UsageError
from bench.nets.partialformer import BlockOptions

ENCODER = BlockOptions(width=16, heads=2, scaled_heads=5, hidden_ratio=2)
DECODER = BlockOptions(width=16, heads=2, scaled_heads=3, hidden_ratio=2)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def model(vocabulary: int = 7, seed: int = 0) -> TranslationModel:
    """Fresh, but sure of itself: with its usual weights every word would be about as likely."""
    torch.manual_seed(seed)
    net = TranslationModel(vocabulary, ENCODER, DECODER, (2, 1))
    with torch.no_grad():
        net.embedding.weight[1:] *= 4
    return net.eval()


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_published_model_has_the_published_size():
    """FACTS: about 66.6 M with a shared vocabulary of 34k, 68 M with the global attention."""
    with torch.device("meta"):
        without, whole = published(residual_attention=False), published()
    assert parameters(without) == 24 * 1_739_325 + 6 * 2_097_382 + 34_000 * 360 + 2 * 720
    assert parameters(without) / 1e6 == pytest.approx(66.6, abs=0.05)
    # Norm, queries and keys of 30 heads for the encoder, of 16 for the decoder.
    extra = 2 * 720 + 2 * (360 * 1350 + 1350) + 2 * (360 * 720 + 720)
    assert parameters(whole) == parameters(without) + extra
    assert parameters(whole) / 1e6 == pytest.approx(68, abs=0.1)


def test_positions_are_sines_and_cosines():
    table = sinusoids(7, 6)
    for position, channel in product(range(7), range(3)):
        angle = position / 10_000 ** (2 * channel / 6)
        assert float(table[position, 2 * channel]) == pytest.approx(math.sin(angle), abs=1e-6)
        assert float(table[position, 2 * channel + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


@torch.no_grad()
def test_padding_of_the_source_changes_nothing():
    net = model()
    source, target = torch.tensor([[3, 5, 4, END]]), torch.tensor([[BEGIN, 6, 3]])
    padded = torch.nn.functional.pad(source, (0, 3), value=PADDING)
    torch.testing.assert_close(net(padded, target), net(source, target), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_next_word_depends_on_the_words_before_only():
    net = model()
    source, target = torch.tensor([[3, 5, END]]), torch.tensor([[BEGIN, 6, 3, 4]])
    other = target.clone()
    other[0, 3] = 5
    torch.testing.assert_close(net(source, other)[:, :3], net(source, target)[:, :3])
    assert not torch.allclose(net(source, other)[:, 3], net(source, target)[:, 3])


def best_by_enumeration(net: TranslationModel, source: torch.Tensor, length: int, penalty: float) -> tuple[int, ...]:
    """Every sentence that ends within ``length`` words or is cut there, scored one at a time."""
    words = [word for word in range(net.embedding.num_embeddings) if word not in (PADDING, BEGIN)]
    best: tuple[int, ...] = ()
    best_rank = -math.inf
    for size in range(1, length + 1):
        for sentence in product(words, repeat=size):
            ended = sentence[-1] == END
            if END in sentence[:-1] or not (ended or size == length):
                continue
            logits = net(source, torch.tensor([[BEGIN, *sentence[:-1]]]))[0].double()
            logits[:, [PADDING, BEGIN]] = -math.inf
            chosen = logits.log_softmax(-1)[range(size), list(sentence)]
            rank = float(chosen.sum()) / ((5 + size) / 6) ** penalty
            if rank > best_rank:
                best, best_rank = sentence, rank
    return best


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@torch.no_grad()
def test_a_beam_wide_enough_finds_the_best_sentence_of_all(penalty):
    source = torch.tensor([[3, 4, END], [4, END, PADDING]])
    for seed in range(2):
        net = model(6, seed)
        searched = beam_search(net, source, 3, beams=64, length_penalty=penalty)
        for row, given in zip(searched.tolist(), source, strict=True):
            words = tuple(word for word in row if word != PADDING)
            assert words == best_by_enumeration(net, given[given != PADDING].unsqueeze(0), 3, penalty)


@torch.no_grad()
def test_one_beam_is_greedy_and_greedy_takes_the_likeliest_word():
    source = torch.tensor([[3, 5, 4, END], [6, END, PADDING, PADDING], [4, 4, 3, END]])
    for seed in range(4):
        net = model(7, seed)
        words = greedy(net, source, 8)
        assert torch.equal(beam_search(net, source, 8, beams=1), words)
        for row, given in zip(words.tolist(), source, strict=True):
            so_far = [BEGIN]
            for word in row:
                if so_far[-1] == END:
                    assert word == PADDING
                    continue
                logits = net(given[given != PADDING].unsqueeze(0), torch.tensor([so_far]))[0, -1]
                logits[[PADDING, BEGIN]] = -math.inf
                assert word == int(logits.argmax())
                so_far.append(word)
                if word == END:
                    break


def test_impossible_models_and_beams_are_refused():
    with pytest.raises(ValueError, match="equally wide, got 16 and 32"):
        TranslationModel(9, ENCODER, BlockOptions(width=32, heads=2, scaled_heads=3, hidden_ratio=2), (1, 1))
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        beam_search(model(), torch.tensor([[3, END]]), 4, beams=0)


def test_the_generated_languages_keep_their_grammar():
    languages = Languages(torch.Generator().manual_seed(0))
    pairs = languages.pairs(400, torch.Generator().manual_seed(1))
    assert len({source for source, _ in pairs}) == 400
    assert pairs == Languages(torch.Generator().manual_seed(0)).pairs(400, torch.Generator().manual_seed(1))
    endings: dict[str, set[str]] = {}
    for source, target in pairs:
        plain = languages.word_by_word(source)
        assert len(plain) == len(source)
        verb = next(word for word in plain if word in languages._target["verb"])
        assert target[-1].removesuffix("s") == verb  # the verb goes last
        first_noun = target[0]  # and the noun first, with the subject's number
        assert target[-1].endswith("s") == first_noun.endswith("s")
        for noun, follower in pairwise(target):
            stem = follower.removesuffix("s")[:-1]
            if noun.removesuffix("s") in languages._target["noun"] and stem in languages._target["adjective"]:
                assert noun.endswith("s") == follower.endswith("s")
                endings.setdefault(noun.removesuffix("s"), set()).add(follower.removesuffix("s")[-1])
    assert all(len(ending) == 1 for ending in endings.values())  # a noun has one gender
    assert set().union(*endings.values()) == set(GENDERS)


def test_the_vocabulary_survives_a_round_trip():
    pairs = Languages(torch.Generator().manual_seed(0)).pairs(20, torch.Generator().manual_seed(1))
    vocabulary = Vocabulary(pairs)
    sources = [source for source, _ in pairs]
    numbers = vocabulary.encode(sources)
    assert vocabulary.decode(numbers) == sources
    assert ((numbers == END).sum(1) == 1).all()
    with pytest.raises(KeyError):
        vocabulary.encode([("unheard",)])


def test_the_learning_rate_rises_and_falls():
    assert [demo.inverse_square_root(step, 4) for step in (1, 2, 4, 16, 64)] == [0.25, 0.5, 1, 0.5, 0.25]


@pytest.mark.slow
def test_a_small_model_learns_to_translate():
    """A generated corpus; word by word, even a perfect dictionary is wrong everywhere."""
    pytest.importorskip("sacrebleu")
    report = demo.run(220, 0, beams=3, depths=(1, 1))
    assert report.bleu["untrained"] < 5
    assert report.bleu["word_by_word"] < 5
    assert report.bleu["greedy"] > 70
    assert report.bleu["beam"] > 70
    assert "nrefs:1" in report.signature


def test_the_command_speaks_json(capsys, monkeypatch):
    pytest.importorskip("sacrebleu")
    monkeypatch.setattr(demo, "TRAINING_PAIRS", 100)
    monkeypatch.setattr(demo, "TEST_PAIRS", 5)
    state = torch.get_rng_state()
    arguments = ["--steps", "2", "--seed", "3", "--layers", "1", "1", "--json"]
    assert demo.main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["corpus"] == "generated"
    assert set(first["bleu"]) == {"untrained", "word_by_word", "greedy", "beam"}
    assert torch.equal(torch.get_rng_state(), state)
    assert demo.main(arguments[:-1]) == 0
    assert "Generated corpus" in capsys.readouterr().out
    assert demo.main(["--steps", "0"]) == UsageError.exit_code
    assert "at least 1, got 0" in capsys.readouterr().err


def test_without_sacrebleu_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(MissingError, match="pip install sacrebleu"):
        demo.run(1, 0)
