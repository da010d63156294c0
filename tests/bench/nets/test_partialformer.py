"""The PartialFormer layers against the definition: loops over heads and positions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from translation.translation import Decoder, DecoderLayer, causal

from bench.nets.partialformer import BlockOptions, Encoder, PartialSublayer

OPTIONS = BlockOptions(width=24, heads=4, scaled_heads=10, hidden_ratio=3)
BATCH, LENGTH, SOURCE = 2, 5, 7
H = OPTIONS.head_width

ABLATIONS = {
    "whole": {},
    "no small nets": {"small_nets": False},
    "no head scaling": {"head_scaling": False},
    "neither": {"small_nets": False, "head_scaling": False},
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(module: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """The module in float64 with every parameter, biases and norms too, away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator) + 0.05)
    return module


def affine(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def normalised(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    deviation = ((x - x.mean()).square().mean() + 1e-5).sqrt()
    return weights[f"{name}.weight"] * (x - x.mean()) / deviation + weights[f"{name}.bias"]


def textbook(
    weights: dict[str, Tensor],
    x: Tensor,
    source: Tensor | None,
    sees: list[list[bool]] | None,
    extra: Tensor | None,
    options: BlockOptions,
) -> Tensor:
    """One sequence (T, d) through one sub-layer, a vector at a time.

    q and k: few heads. Their logits, vectors over heads, pass W2 ReLU(W1 l + b1) + b2. Each of the many heads takes the
    softmax over positions, gathers its values, adds small(head), and the heads' concatenation is gated by ReLU(U x).
    """
    normed = [normalised(weights, "norm", row) for row in x]
    given = normed if source is None else list(source)
    queries = [affine(weights, "attention.query", row) for row in normed]
    keys = [affine(weights, "attention.key", row) for row in given]
    values = [affine(weights, "attention.value", row) for row in given]
    rows = []
    for t, row in enumerate(x):
        columns = []
        for s in range(len(given)):
            few = torch.stack(
                [
                    queries[t][head * H : (head + 1) * H] @ keys[s][head * H : (head + 1) * H] / math.sqrt(H)
                    for head in range(options.heads)
                ]
            )
            if options.head_scaling:
                hidden = affine(weights, "attention.scaling.expand", few).clamp_min(0)
                few = affine(weights, "attention.scaling.mix", hidden)
            columns.append(few if extra is None else few + extra[:, t, s])
        parts = []
        for head in range(options.value_heads):
            total, gathered = 0.0, torch.zeros(H, dtype=torch.float64)
            for s in range(len(given)):
                if sees is None or sees[t][s]:
                    weight = math.exp(float(columns[s][head]))
                    total += weight
                    gathered += weight * values[s][head * H : (head + 1) * H]
            part = gathered / total
            if options.small_nets:
                part = part + affine(
                    weights, "small_net.reduce", affine(weights, "small_net.expand", part).clamp_min(0)
                )
            parts.append(part)
        gated = affine(weights, "gate", normed[t]).clamp_min(0) * torch.cat(parts)
        rows.append(row + affine(weights, "output", gated))
    return torch.stack(rows)


@pytest.mark.parametrize("parts", ABLATIONS.values(), ids=ABLATIONS)
@torch.no_grad()
def test_the_sublayer_is_its_definition(parts: dict[str, bool]) -> None:
    options = BlockOptions(width=24, heads=4, scaled_heads=10, hidden_ratio=3, **parts)
    layer = made(PartialSublayer(options))
    x, extra = tokens(BATCH, LENGTH, 24), tokens(BATCH, options.value_heads, LENGTH, LENGTH, seed=1)
    output = layer(x, visible=causal(LENGTH), global_logits=extra)
    sees = [[s <= t for s in range(LENGTH)] for t in range(LENGTH)]
    for i in range(BATCH):
        expected = textbook(layer.state_dict(), x[i], None, sees, extra[i], options)
        torch.testing.assert_close(output[i], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_cross_attention_is_its_definition() -> None:
    layer = made(PartialSublayer(OPTIONS))
    x, source = tokens(BATCH, LENGTH, 24), tokens(BATCH, SOURCE, 24, seed=1)
    lengths = (SOURCE, SOURCE - 3)
    visible = (torch.arange(SOURCE) < torch.tensor(lengths).unsqueeze(1))[:, None, None]
    output = layer(x, source, visible)
    for i, length in enumerate(lengths):
        expected = textbook(layer.state_dict(), x[i], source[i, :length], None, None, OPTIONS)
        torch.testing.assert_close(output[i], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_residual_like_attention_adds_one_map_of_the_embeddings_to_every_layer() -> None:
    encoder = made(Encoder(OPTIONS, 2))
    weights = encoder.state_dict()
    x = tokens(LENGTH, 24)
    part = below(weights, "global_logits.")
    normed = torch.stack([normalised(part, "norm", row) for row in x])
    query = torch.stack([affine(part, "query", row) for row in normed]).unflatten(1, (OPTIONS.scaled_heads, H))
    key = torch.stack([affine(part, "key", row) for row in normed]).unflatten(1, (OPTIONS.scaled_heads, H))
    extra = torch.einsum("tnh,snh->nts", query, key) / math.sqrt(H)
    expected = x
    for i in range(2):
        expected = textbook(below(weights, f"layers.{i}."), expected, None, None, extra, OPTIONS)
    expected = torch.stack([normalised(weights, "norm", row) for row in expected])
    torch.testing.assert_close(encoder(x.unsqueeze(0))[0], expected, rtol=1e-9, atol=1e-9)
    without = Encoder(BlockOptions(width=24, heads=4, scaled_heads=10, hidden_ratio=3, residual_attention=False), 2)
    without.double().load_state_dict({k: v for k, v in weights.items() if not k.startswith("global")})
    assert not torch.allclose(without(x.unsqueeze(0))[0], expected, atol=1e-3)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_an_encoder_layer_has_the_published_parameters() -> None:
    layer = PartialSublayer(BlockOptions(width=360, scaled_heads=30, hidden_ratio=4))
    assert parameters(layer) == 1_739_325
    attention = layer.attention
    assert parameters(attention.query) + parameters(attention.key) == 259_920
    assert parameters(attention.value) + parameters(layer.gate) + parameters(layer.output) == 1_461_060
    assert parameters(layer.small_net) == 16_425
    assert parameters(attention.scaling) == 1_200
    assert parameters(layer.norm) == 720


def test_a_decoder_layer_has_the_published_parameters() -> None:
    assert parameters(DecoderLayer(BlockOptions(width=360, scaled_heads=16, hidden_ratio=2))) == 2_097_382


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    encoder = made(Encoder(OPTIONS, 2))
    x = tokens(1, LENGTH, 24)
    padded = torch.cat((x, 100 * tokens(1, 3, 24, seed=9)), 1)
    visible = (torch.arange(LENGTH + 3) < LENGTH)[None, None, None]
    torch.testing.assert_close(encoder(padded, visible)[:, :LENGTH], encoder(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(encoder(padded)[:, :LENGTH], encoder(x))


@torch.no_grad()
def test_a_sequence_of_nothing_but_padding_stays_finite() -> None:
    encoder = Encoder(OPTIONS, 2).eval()
    visible = torch.zeros(1, 1, 1, LENGTH, dtype=torch.bool)
    assert torch.isfinite(encoder(tokens(1, LENGTH, 24).float(), visible)).all()


def test_the_decoder_looks_at_no_later_position() -> None:
    decoder = made(Decoder(OPTIONS, 2))
    x, memory = tokens(1, LENGTH, 24).requires_grad_(), tokens(1, SOURCE, 24, seed=1)
    for t in range(LENGTH):
        (gradient,) = torch.autograd.grad(decoder(x, memory)[0, t].sum(), x)
        reached = gradient[0].abs().amax(1) > 0
        assert reached.tolist() == [s <= t for s in range(LENGTH)]


def test_gradients_are_those_of_finite_differences() -> None:
    options = BlockOptions(width=8, heads=2, scaled_heads=3, hidden_ratio=2)
    decoder = made(Decoder(options, 1))
    inputs = (tokens(1, 3, 8).requires_grad_(), tokens(1, 2, 8, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(decoder, inputs)


@torch.no_grad()
def test_bfloat16_autocast_stays_near_float32() -> None:
    torch.manual_seed(0)
    encoder = Encoder(OPTIONS, 2).eval()
    x = tokens(BATCH, LENGTH, 24).float()
    visible = (torch.arange(LENGTH) < 4)[None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(x, visible)
    torch.testing.assert_close(output.float(), encoder(x, visible), rtol=0, atol=0.1)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        BlockOptions(width=20, heads=8, scaled_heads=4, hidden_ratio=2)
