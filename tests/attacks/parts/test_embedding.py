"""Embeddings behind templates: under stolen keys by their constraints, without keys by what examples teach."""

from __future__ import annotations

import pytest
import torch
from pictures import generator
from torch import Tensor
from torch.nn import functional

from attacks.parts.embedding import EmbeddingEstimator, KanLayer
from defenses.biohash import BioHash, BioHashOptions
from defenses.polyprotect import PolyProtect
from defenses.template import TemplateDefense

SIZE = 24


class Rotated(TemplateDefense):
    """A secret rotation that everybody shares and a cube of each value: no keys, and no word of constraints."""

    name = "rotated"
    summary = "a rotation and cubes"

    @property
    def template_size(self) -> int:
        return SIZE

    def draw_keys(self, count: int, generator: torch.Generator) -> None:
        return None

    def enrol(self, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        rotation = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(3)))[0]
        return (embeddings @ rotation.to(embeddings)) ** 3 * SIZE

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        return functional.cosine_similarity(first, second)


def people(count: int, seed: int = 0) -> Tensor:
    """Embeddings whose directions differ in how much they vary, around a common one."""
    drawn = torch.randn(count, SIZE, generator=generator(seed)) * torch.linspace(2, 0.2, SIZE) + 0.3
    return functional.normalize(drawn, dim=1)


def estimator(mechanism: TemplateDefense, *, with_keys: bool, kind: str = "mlp") -> EmbeddingEstimator:
    mechanism.attach(torch.nn.Identity(), SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = EmbeddingEstimator(mechanism, SIZE, with_keys=with_keys, kind=kind, steps=60, seed=0)
    for _ in made.fit(people(600), epochs=8):
        pass
    return made.eval()


def records(mechanism: TemplateDefense, embeddings: Tensor, count: int) -> tuple[Tensor, Tensor]:
    keys = torch.stack([mechanism.draw_keys(len(embeddings), generator(10 + turn)) for turn in range(count)], dim=1)
    stored = [mechanism.enrol(embeddings, keys[:, turn], generator(turn)) for turn in range(count)]
    return torch.stack(stored, dim=1), keys


def near(found: Tensor, true: Tensor) -> float:
    return float(functional.cosine_similarity(found, true).mean())


@pytest.fixture(scope="module")
def stolen():
    return estimator(BioHash(BioHashOptions(bits=16), image_size=24), with_keys=True)


def floor(true: Tensor) -> float:
    return near(people(600).mean(dim=0, keepdim=True).expand_as(true), true)


def test_bits_under_stolen_keys_tell_the_embedding_and_several_records_more(stolen):
    true = people(32, seed=5)
    cosines = {}
    for count in (1, 4):
        templates, keys = records(stolen.mechanism, true, count)
        cosines[count] = near(stolen(templates, keys), true)
    assert stolen.method == "constraints"
    assert cosines[1] > floor(true) + 0.1
    assert cosines[4] > cosines[1] + 0.05
    # What an attacker is told of the own estimates, on public people, holds for others.
    assert float(stolen.near) == pytest.approx(cosines[1], abs=0.05)


def test_wrong_keys_tell_nothing(stolen):
    true = people(32, seed=5)
    templates, keys = records(stolen.mechanism, true, 1)
    assert near(stolen(templates, keys.flip(0)), true) < floor(true) + 0.05


def test_keys_are_asked_for(stolen):
    with pytest.raises(ValueError, match="keys"):
        stolen(torch.zeros(1, 1, 16), None)


def test_values_of_polynomials_under_their_key_give_the_embedding_back():
    found = estimator(PolyProtect(image_size=24), with_keys=True)
    true = people(16, seed=6)
    assert near(found(*records(found.mechanism, true, 1)), true) > floor(true) + 0.2


@pytest.mark.parametrize("kind", ["mlp", "kan"])
def test_what_a_defence_does_not_tell_is_learnt_from_examples(kind):
    found = estimator(Rotated(image_size=24), with_keys=False, kind=kind)
    assert found.method == "learnt map"
    true = people(64, seed=7)
    templates = found.mechanism.enrol(true, None, generator())[:, None]
    assert near(found(templates, None), true) > floor(true) + 0.15


def test_without_its_key_a_template_of_bits_teaches_no_map():
    found = estimator(BioHash(BioHashOptions(bits=16), image_size=24), with_keys=False)
    true = people(64, seed=8)
    templates, _ = records(found.mechanism, true, 1)
    assert near(found(templates, None), true) < floor(true) + 0.05


def test_a_layer_of_bumps_fits_a_function_that_a_linear_one_cannot():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = KanLayer(8, 1)
    x = functional.layer_norm(torch.randn(512, 8, generator=generator()), (8,))
    y = x[:, :1].abs()
    design = torch.cat((x, torch.ones(512, 1)), dim=1)
    linear = (design @ torch.linalg.lstsq(design, y).solution - y).square().mean()
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        loss = functional.mse_loss(layer(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.2 * float(linear)
