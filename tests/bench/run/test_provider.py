"""Energy of the frequencies, against a textbook block DCT."""

import numpy as np
import torch
from scipy.fft import dctn

from bench.run.provider import channel_energy

COLOURS = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def test_energies_are_mean_magnitudes_of_the_block_dct():
    side = 16
    faces = torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = channel_energy({"kept_channels": [4, 5]}, faces)["channel_energy"]

    position = np.arange(8 * side) * (side - 1) / (8 * side - 1)
    left = np.minimum(position.astype(int), side - 2)
    upsample = np.zeros((8 * side, side))
    upsample[np.arange(8 * side), left] = 1 - (position - left)
    upsample[np.arange(8 * side), left + 1] += position - left
    expected = np.zeros(64)
    for face in faces.double().numpy():
        planes = np.einsum("pc,chw->phw", COLOURS, face) + np.array([-128.0, 0, 0])[:, None, None]
        large = upsample @ planes @ upsample.T
        blocks = large.reshape(3, side, 8, side, 8).transpose(0, 1, 3, 2, 4)
        spectrum = dctn(blocks, axes=(3, 4), norm="ortho")
        expected += np.abs(spectrum).mean(axis=(1, 2)).sum(axis=0).reshape(64) / len(faces)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_energies_are_those_at_the_factor_of_the_defence():
    faces = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    described = {"kept_channels": [4, 5], "options": {"upsampling": 1, "sigma": None}}
    found = channel_energy(described, faces)["channel_energy"]
    luma = np.tensordot([0.299, 0.587, 0.114], faces.double().numpy(), axes=(0, 1)) - 128
    chroma = [np.tensordot(row, faces.double().numpy(), axes=(0, 1)) for row in COLOURS[1:]]
    blocks = np.stack([luma, *chroma], axis=1).reshape(2, 3, 2, 8, 2, 8).transpose(0, 1, 2, 4, 3, 5)
    spectrum = dctn(blocks, axes=(4, 5), norm="ortho")
    np.testing.assert_allclose(found, np.abs(spectrum).mean(axis=(0, 2, 3)).sum(axis=0).flatten(), rtol=1e-4)


def test_a_defence_that_keeps_no_frequencies_has_none():
    assert channel_energy({"name": "blur"}, torch.zeros(1, 3, 16, 16, dtype=torch.uint8)) == {}
