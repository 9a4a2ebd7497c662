"""A weight that lies in a file → the same over mapped bytes, whatever other names the file has.

An export refers into hard links of the checkpoint's files; onnx_ir opens no file that has a second name.
"""

import numpy as np
import onnx_ir as ir


def mapped(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """The same numbers, name, shape and dtype; nothing is read before it is asked for."""
    shape, dtype = tensor.shape.numpy(), tensor.dtype
    data = np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.nbytes,))
    if dtype.bitwidth < 8:
        return ir.PackedTensor(data, dtype, shape=ir.Shape(shape), name=tensor.name)
    return ir.tensor(data.view(dtype.numpy()).reshape(shape), dtype=dtype, name=tensor.name)


def map_weights(model: ir.Model) -> ir.Model:
    """Every initializer that lies in a file, in place."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = mapped(value.const_value)
    return model
