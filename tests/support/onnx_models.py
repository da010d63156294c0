"""ONNX recognisers whose embeddings can be worked out."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper


def linear_model(path, weights, shape):
    """Write ``flatten(x) @ weights``, float32 (pixels, D), for x of ``shape``, e.g. ("n", 3, 8, 8); return its path."""
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w"], ["embedding"]),
    ]
    ends = (("input", list(shape)), ("embedding", [shape[0], weights.shape[1]]))
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)] for name, sizes in ends)
    constant = helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.flatten())
    graph = helper.make_graph(nodes, "linear", inputs, outputs, [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
