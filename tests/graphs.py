"""ONNX graphs made by hand for the tests."""

import onnx_ir as ir

from mistral_trt.contract import GraphContract
from mistral_trt.export.checkpoint import expected_shapes


def bare_graph(contract: GraphContract) -> ir.Model:
    """A graph that holds the weights of a contract and no node."""
    dtype = ir.DataType[{"float32": "FLOAT"}.get(contract.cache_dtype, contract.cache_dtype.upper())]
    weights = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        for name, shape in expected_shapes(contract.config).items()
    ]
    graph = ir.Graph([], [], nodes=[], initializers=weights, opset_imports={"": 24}, name="bare")
    return ir.Model(graph, ir_version=10)
