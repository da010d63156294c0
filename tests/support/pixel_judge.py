"""A judge that tells rendered faces apart and was trained in seconds: linear discriminants of coarse pixels."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from bench.data.synthetic import SyntheticOptions, load_synthetic
from bench.images import to_float

SIDE, CELL = 112, 7
#: Faces of people whom no run renders: its data set has another seed.
FACES = SyntheticOptions(identities=150, images_per_identity=8, image_size=32, seed=7)


def write_pixel_judge(path, dimensions=32, ridge=0.03):
    """Fit Fisher's discriminants to cells of 7 x 7 pixels, write them as an ONNX recogniser, and return its path."""
    faces = load_synthetic(FACES).in_memory
    pixels = functional.interpolate(to_float(faces.images), (SIDE, SIDE), mode="bilinear", antialias=True)
    pixels = torch.cat((pixels, pixels.flip(-1)))
    labels = faces.labels.repeat(2)
    cells = functional.avg_pool2d((255 * pixels - 127.5) / 128, CELL).flatten(1).double()
    mean = cells.mean(dim=0)
    means = torch.stack([cells[labels == person].mean(dim=0) for person in range(FACES.identities)])
    within = torch.cov((cells - means[labels]).T, correction=0)
    within += ridge * within.diagonal().mean() * torch.eye(len(within), dtype=torch.float64)
    root = torch.linalg.cholesky(within)
    whitened = torch.linalg.solve_triangular(root, (means - mean).T, upper=False)
    directions = torch.linalg.svd(whitened, full_matrices=False).U[:, :dimensions]
    weights = torch.linalg.solve_triangular(root.T, directions, upper=True)
    constants = {"mean": mean, "weights": weights}
    nodes = [
        helper.make_node("AveragePool", ["input"], ["cells"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("Flatten", ["cells"], ["flat"]),
        helper.make_node("Sub", ["flat", "mean"], ["centred"]),
        helper.make_node("MatMul", ["centred", "weights"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "discriminants",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", dimensions])],
        [numpy_helper.from_array(value.numpy().astype(np.float32), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path
