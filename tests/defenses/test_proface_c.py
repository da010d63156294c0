"""PRO-Face C: the three filters, the order of the blocks, the published shapes, and the joint training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.ndimage
import torch
from lightning_fabric import Fabric
from pictures import generator, noise
from torch.nn import functional

from defenses import proface_c
from defenses.linear import blur_matrix
from defenses.proface_c import ProFaceC, ProFaceCOptions, shuffled


def made(size=24, **options):
    return ProFaceC(ProFaceCOptions(**{"width": 2, **options}), image_size=size).eval().requires_grad_(False)


def test_what_is_sent_has_the_published_shapes():
    assert ProFaceC().parts == {
        "picture": (3, 112, 112),
        "stage-1": (64, 56, 56),
        "stage-2": (128, 28, 28),
        "stage-3": (256, 14, 14),
        "stage-4": (512, 7, 7),
    }


def test_every_patch_is_a_median_a_blur_or_a_mosaic_a_third_each():
    """Against another library, at half the template's size; which patch got what is told by the equality itself."""
    size, defense, faces = 56, made(56), noise(3, 56)
    pictures = defense.obfuscated(faces.repeat(8, 1, 1, 1), generator(5)).unflatten(0, (8, 3))
    medians = torch.from_numpy(scipy.ndimage.median_filter(faces.numpy(), size=(1, 1, 7, 7), mode="mirror"))
    is_median = (pictures - medians).abs().amax(dim=2) < 1e-9
    is_mosaic = torch.zeros_like(is_median)
    for side in range(2, 6):
        whole = functional.avg_pool2d(faces, side, ceil_mode=True, count_include_pad=False)
        mosaic = whole.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., :size, :size]
        is_mosaic |= (pictures - mosaic).abs().amax(dim=2) < 1e-9
    shares = [float(kind.double().mean()) for kind in (is_median, is_mosaic)]
    assert all(0.22 < share < 0.45 for share in shares), shares  # of 300 patches or so, not all of one size
    rest = ~is_median & ~is_mosaic
    # A Gaussian of 1 to 4 pixels leaves of white noise, of standard deviation 12^-1/2, 1 / (2 sqrt(pi) sigma) of it.
    spread = (pictures - 0.5).square().mean(dim=2)[rest].mean().sqrt() * 12**0.5
    assert 1 / (3.55 * 4) < float(spread) < 1 / (3.55 * 1)


def test_several_blurs_are_each_that_of_its_own_deviation():
    together = blur_matrix(24, torch.tensor([1.0, 2.5]), 5)
    for matrix, sigma in zip(together, (1.0, 2.5), strict=True):
        torch.testing.assert_close(matrix, blur_matrix(24, sigma, 5))


@pytest.mark.parametrize(("shuffle", "side"), [("paper", 2), ("official", 6)])
def test_blocks_of_the_first_map_change_places(shuffle, side):
    """Blocks of two values a side, as meant; or of half the map: four of them."""
    defense, plain, faces = made(shuffle=shuffle), made(shuffle="none"), noise(2, 24)
    plain.load_state_dict(
        {name: value for name, value in defense.state_dict().items() if name != "order"}, strict=False
    )
    sent, straight = (side.protect(faces, generator()).representation for side in (defense, plain))
    first, kept = (part.unpack(z)["stage-1"] for part, z in ((defense, sent), (plain, straight)))
    blocks, theirs = (functional.unfold(maps, side, stride=side) for maps in (first, kept))
    assert sorted(defense.order.tolist()) == list(range((12 // side) ** 2))
    torch.testing.assert_close(blocks, theirs[:, :, defense.order])
    assert not torch.equal(first, kept)
    torch.testing.assert_close(defense.canonical(sent, None), straight)
    for name in ("picture", "stage-2", "stage-3", "stage-4"):
        assert torch.equal(defense.unpack(sent)[name], plain.unpack(straight)[name])


def test_the_published_map_has_784_blocks_and_the_released_code_shuffles_four():
    assert [len(ProFaceC(ProFaceCOptions(shuffle=kind)).order) for kind in ("paper", "official")] == [784, 4]
    assert not made(shuffle="official").secret


def test_what_blocks_leave_over_stays():
    maps = torch.arange(25.0).view(1, 1, 5, 5)
    out = shuffled(maps, torch.tensor([3, 0, 1, 2]), 2)
    by_hand = [[12, 13, 0, 1, 4], [17, 18, 5, 6, 9], [2, 3, 10, 11, 14], [7, 8, 15, 16, 19], [20, 21, 22, 23, 24]]
    assert out[0, 0].tolist() == by_hand


def test_a_guess_has_another_order_and_the_same_network():
    defense = made()
    guess, faces = defense.guess(generator(3)), noise(1, 24)
    assert not torch.equal(guess.order, defense.order)
    sides = [side.canonical(side.protect(faces, generator()).representation, None) for side in (guess, defense)]
    torch.testing.assert_close(*sides)


def test_without_strength_the_face_is_sent():
    defense, faces = made(strength=0), noise(2, 24)
    assert torch.equal(defense.unpack(defense.protect(faces, generator()).representation)["picture"], faces)


@pytest.mark.parametrize("match", [0, 1])
def test_client_and_recogniser_learn_together(make_training, monkeypatch, match):
    monkeypatch.setattr(proface_c, "MILESTONES", ())  # there are few steps
    training, recognisers = make_training(size=16), []

    def make_recogniser(shape):
        network, head = training.make_recogniser(shape)
        recognisers.append((torch.nn.Sequential(torch.nn.BatchNorm2d(shape[0]), network), head))
        return recognisers[-1]

    torch.manual_seed(0)
    options = ProFaceCOptions(width=2, epochs=8, batch_size=8, match=match, learning_rate=0.005)
    defense = ProFaceC(options, image_size=16)
    before = [weight.clone() for weight in defense.parameters()]
    defense.fit(replace(training, make_recogniser=make_recogniser))
    assert all((old != new).any() for old, new in zip(before, defense.parameters(), strict=True))
    assert len(recognisers) == 1 + match
    (recogniser, head), (faces, labels) = recognisers[0], next(training.batches(32, generator(0)))
    defense.requires_grad_(False)  # in training mode: after so few steps, running statistics lag behind
    hits = head(recogniser(defense.protect(faces, torch.Generator()).representation), labels)[1]
    assert float(hits.float().mean()) > 0.5  # by chance a quarter


def test_half_precision_in_training_changes_nothing_of_what_is_sent(make_training):
    defense, faces = made(16), noise(8, 16, dtype=torch.float32)
    sent = defense.protect(faces, generator()).representation
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(defense.protect(faces, generator()).representation, sent)
    training = replace(make_training(size=16), fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))
    ProFaceC(ProFaceCOptions(width=2, epochs=1), image_size=16).fit(training)
