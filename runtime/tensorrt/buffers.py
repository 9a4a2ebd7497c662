"""A step's tokens and positions → the GPU, and its logits back, through page-locked memory that never moves.

A captured step copies from and to these very addresses, so a replay needs no more than new numbers in them.
"""

import ctypes
from contextlib import ExitStack
from typing import Any

import numpy as np

from mistral_trt.contract import GraphContract
from mistral_trt.runtime.backend import Logits, Step
from mistral_trt.runtime.tensorrt.cuda import Cuda
from mistral_trt.runtime.tensorrt.memory import step_tokens

_TOKEN_BYTES, _LOGIT_BYTES = 8, 4


class StepBuffers:
    """input_ids, position_ids, logits_index and logits, each in pinned host and in GPU memory.

    They hold the largest call.  resources: gives the memory back.
    """

    def __init__(self, cuda: Cuda, contract: GraphContract, resources: ExitStack) -> None:
        self._cuda, self._vocab_size = cuda, contract.config.vocab_size
        tokens = step_tokens(contract)
        self.inputs: list[int] = []
        self._host_inputs: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        for spec in contract.step_inputs():
            device, host = self._allocate(_TOKEN_BYTES * tokens, spec.name, resources)
            self.inputs.append(device)
            self._host_inputs.append(_view(host, np.dtype(np.int64), tokens))
        count = tokens * self._vocab_size
        self.logits, host = self._allocate(_LOGIT_BYTES * count, contract.logits().name, resources)
        self._host_logits = _view(host, np.dtype(np.float32), count)

    def fill(self, step: Step) -> None:
        """Put a step's numbers into the host's side; nothing that the GPU still reads may lie there."""
        arrays = (step.input_ids, step.position_ids, step.logits_index)
        for host, array in zip(self._host_inputs, arrays, strict=True):
            host[: array.size] = array.reshape(-1)

    def upload(self, batch: int, new: int, count: int) -> None:
        """Copy B x S tokens and positions and B x N indices, in the order of the stream."""
        sizes = (batch * new, batch * new, batch * count)
        for device, host, size in zip(self.inputs, self._host_inputs, sizes, strict=True):
            self._cuda.upload(device, host.ctypes.data, _TOKEN_BYTES * size)

    def download(self, batch: int, count: int) -> None:
        """Copy the logits of B x N tokens, in the order of the stream."""
        size = _LOGIT_BYTES * batch * count * self._vocab_size
        self._cuda.download(self._host_logits.ctypes.data, self.logits, size)

    def read_logits(self, batch: int, count: int) -> Logits:
        """What was downloaded, as an array of its own: pinned memory ends with the backend."""
        shape = (batch, count, self._vocab_size)
        return self._host_logits[: int(np.prod(shape))].reshape(shape).copy()

    def _allocate(self, size: int, what: str, resources: ExitStack) -> tuple[int, int]:
        """Address on the GPU and on the host."""
        device = self._cuda.allocate(size, what)
        resources.callback(self._cuda.release, "cudaFree", device)
        host = self._cuda.allocate_pinned(size)
        resources.callback(self._cuda.release, "cudaFreeHost", host)
        return device, host


def _view(address: int, dtype: "np.dtype[Any]", count: int) -> np.ndarray[Any, Any]:
    raw = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address)
    found: np.ndarray[Any, Any] = np.ctypeslib.as_array(raw).view(dtype)
    return found
