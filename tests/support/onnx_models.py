"""ONNX recognisers whose embeddings can be worked out."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def linear_model(path, weights, shape, *, reshaped=None, external=None):
    """Write ``flatten(x) @ weights``, float32 (pixels, D), for x of ``shape``, e.g. ("n", 3, 8, 8); return its path.

    ``reshaped`` is the shape that the graph gives x instead of flattening it; ``external`` the name of the file beside
    it that takes the weights.
    """
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], axis=1)
        if reshaped is None
        else helper.make_node("Reshape", ["input", "to"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["embedding"]),
    ]
    constants = {"w": weights} if reshaped is None else {"w": weights, "to": np.array(reshaped)}
    return _write(path, nodes, constants, list(shape), weights.shape[1], external=external)


def entering_model(path, weights, operations, *, colours="RGB", layout="NCHW", hidden=False, side=8):
    """Write ``tanh(flatten(y) @ weights + 0.5)`` of what ``operations`` (Sub, Mul or Div, value) make of faces.

    They are RGB and NCHW after the entry of the graph, whatever ``colours`` and ``layout`` it takes. A ``hidden``
    normalisation stands behind an operation that nobody reads as one.
    """
    nodes, constants, at = [], {"w": weights, "shift": np.float32(0.5)}, "input"

    def then(operation, *others, **attributes):
        nonlocal at
        nodes.append(helper.make_node(operation, [at, *others], [f"t{len(nodes)}"], **attributes))
        at = nodes[-1].output[0]

    if layout == "NHWC":
        then("Transpose", perm=[0, 3, 1, 2])
    if colours == "BGR":
        constants["turned"] = np.array([2, 1, 0])
        then("Gather", "turned", axis=1)
    if hidden:
        constants["ones"] = np.array([1, 3, side, side])
        then("Expand", "ones")
    for number, (operation, value) in enumerate(operations):
        constants[f"c{number}"] = np.asarray(value, dtype=np.float32).reshape(-1, 1, 1)
        then(operation, f"c{number}")
    then("Flatten", axis=1)
    then("MatMul", "w")
    then("Add", "shift")
    nodes.append(helper.make_node("Tanh", [at], ["embedding"]))
    shape = ["n", 3, side, side] if layout == "NCHW" else ["n", side, side, 3]
    return _write(path, nodes, constants, shape, weights.shape[1])


def _write(path, nodes, constants, shape, size, *, external=None):
    ends = (("input", shape), ("embedding", [shape[0], size]))
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)] for name, sizes in ends)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "made", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if external is None:
        onnx.save(model, path)
    else:
        (path.parent / external).unlink(missing_ok=True)  # else it is written behind what is there
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=100)
    return path
