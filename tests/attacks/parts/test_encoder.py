from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from attacks.parts.encoder import Encoder, LayoutConvolution, MapNormalisation, channel_statistics


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder(shape, **options):
    torch.manual_seed(0)
    return Encoder(shape, **{"widths": (4, 6), "blocks": 1, "embedding_size": 5} | options)


def test_channels_and_maps_of_any_scale_come_out_alike():
    scales = torch.tensor([1e-3, 1.0, 750.0])[:, None, None]
    sent = torch.randn(40, 3, 8, 8, generator=seeded()) * scales + 5 * scales
    sent[7] *= 1e-2  # one faint face
    layer = MapNormalisation(3)
    layer.measure([(sent[:15], None), (sent[15:], None)])
    torch.testing.assert_close(layer.mean, sent.mean(dim=(0, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.std, sent.std(dim=(0, 2, 3), correction=0), rtol=1e-4, atol=0)
    power = layer(sent).square().mean(dim=(2, 3))
    torch.testing.assert_close(power, torch.ones(40, 3))


def test_a_constant_channel_is_not_blown_up():
    sent = torch.randn(4, 2, 8, 8, generator=seeded())
    sent[:, 1] = 3.3
    layer = MapNormalisation(2)
    layer.measure([(sent, None)])
    assert layer(sent)[:, 1].abs().max() < 1e-2


def test_templates_keep_their_size():
    sent = torch.randn(30, 2, 1, 1, generator=seeded())
    layer = MapNormalisation(2)
    layer.measure([(sent, None)])
    expected = (sent - sent.mean(dim=0)) / sent.std(dim=0, correction=0)
    torch.testing.assert_close(layer(sent), expected, rtol=1e-4, atol=1e-5)


def test_statistics_follow_the_layout():
    scales = torch.tensor([1.0, 10.0, 100.0])
    layout = torch.stack([torch.randperm(3, generator=seeded(i))[:2] for i in range(50)])
    sent = (torch.randn(50, 2, 8, 8, generator=seeded()) + 2) * scales[layout][..., None, None]
    layer = MapNormalisation(3)
    layer.measure([(sent[:20], layout[:20]), (sent[20:], layout[20:])])
    torch.testing.assert_close(layer.std, scales, rtol=0.1, atol=0)
    torch.testing.assert_close(layer.mean, 2 * scales, rtol=0.1, atol=0)
    torch.testing.assert_close(layer(sent, layout).square().mean(dim=(2, 3)), torch.ones(50, 2))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_a_layout_convolution_is_a_convolution_of_the_spread_maps(stride, size):
    torch.manual_seed(0)
    layer = LayoutConvolution(5, 2, 3, stride)
    layout = torch.tensor([[4, 1], [0, 2]])
    sent = torch.randn(2, 2, *size)
    spread = torch.zeros(2, 5, *size).scatter(1, layout[:, :, None, None].expand_as(sent), sent)
    weight = layer.weight.view(5, 9, 3).permute(2, 0, 1).reshape(3, 5, 3, 3)
    expected = functional.conv2d(spread, weight, padding=1, stride=stride)
    torch.testing.assert_close(layer(sent, layout), expected)


@pytest.mark.parametrize("shape", [(3, 64, 64), (27, 33, 47), (1, 8, 8), (16, 7, 7), (512, 1, 1), (2, 40, 3)])
def test_any_representation_gets_an_embedding(shape):
    network = encoder(shape, widths=(4, 6, 8), blocks=2)
    embeddings = network(torch.rand(3, *shape))
    assert embeddings.shape == (3, 5)
    assert embeddings.dtype == torch.float32
    assert embeddings.requires_grad


def test_a_template_is_not_squeezed_through_the_layers_for_pictures():
    def widths(shape):
        network = encoder(shape, widths=(4, 8, 64))
        return [maps.shape[1] for maps in network.stage_outputs(torch.rand(2, *shape))]

    assert widths((40, 1, 1)) == widths((16, 7, 7)) == [64, 64, 64]
    assert widths((3, 8, 8)) == [4, 8, 64]


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(N, 3, 16, 16\), got \(2, 4, 16, 16\)"):
        encoder((3, 16, 16))(torch.rand(2, 4, 16, 16))


def test_the_forward_pass_reads_out_the_last_stage():
    network = encoder((3, 16, 16)).eval()
    faces = torch.rand(2, 3, 16, 16)
    outputs = network.stage_outputs(faces)
    assert [tuple(maps.shape[1:]) for maps in outputs] == [(4, 16, 16), (6, 8, 8)]
    torch.testing.assert_close(network.read_out(outputs[-1]), network(faces))


def test_a_student_takes_over_all_but_the_first_layer_and_the_statistics():
    teacher, student = encoder((3, 16, 16)), encoder((27, 16, 16))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(1)
    teacher.normalisation.mean.fill_(7)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.start_from(teacher)
    after, source = student.state_dict(), teacher.state_dict()
    kept = {"first.weight", "normalisation.mean", "normalisation.std"}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert all(torch.equal(after[name], source[name]) for name in after if name not in kept)


def test_a_student_of_plain_faces_takes_over_everything():
    teacher, student = encoder((3, 16, 16)), encoder((3, 16, 16))
    nn.init.normal_(teacher.first.weight)
    student.start_from(teacher)
    faces = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(student.eval()(faces), teacher.eval()(faces))


def test_a_student_can_start_with_the_mean_and_spread_of_what_it_imitates():
    network = encoder((3, 16, 16)).train()
    targets = torch.randn(200, 5, generator=seeded()) * torch.tensor([0.1, 1, 2, 3, 4]) + 3
    network.aim_at(targets)
    embeddings = network(torch.rand(64, 3, 16, 16, generator=seeded(1))).detach()
    torch.testing.assert_close(embeddings.mean(dim=0), targets.mean(dim=0), rtol=0, atol=1e-4)
    torch.testing.assert_close(embeddings.std(dim=0, correction=0), targets.std(dim=0, correction=0), rtol=1e-2, atol=0)


def test_a_face_of_a_wild_scale_moves_no_statistics():
    faces = 3 + torch.randn(200, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    usual = channel_statistics([(faces, None)], 2)
    wild = faces.clone()
    wild[7] *= 1e4
    for expected, actual in zip(usual, channel_statistics([(wild[:50], None), (wild[50:], None)], 2), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0)
    # Scales that merely vary are left as they are.
    scales = torch.logspace(0, 1.5, 200)[:, None, None, None]
    flat = (scales * faces).double().transpose(0, 1).flatten(1)
    mean, std = channel_statistics([(scales * faces, None)], 2)
    torch.testing.assert_close(mean, flat.mean(dim=1))
    torch.testing.assert_close(std, flat.std(dim=1, correction=0))
