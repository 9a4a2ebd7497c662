"""Rows of the rolling cache in GPU memory: allocated once, read, written and copied by row.

A ring is [max_batch_size, K, R, D], one allocation, its past and its present at once. numpy has no bfloat16,
so the rings of a bf16 engine come and go as uint16, the same 16 bits.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from mistral_trt.contract import GraphContract, TensorSpec
from mistral_trt.errors import EngineMismatchError
from mistral_trt.runtime.backend import RingArray
from mistral_trt.runtime.tensorrt.cuda import Cuda
from mistral_trt.runtime.tensorrt.memory import ALIGNMENT
from mistral_trt.runtime.tensorrt.plan import shape_of

_STORED = {"bfloat16": np.dtype(np.uint16)}


class DeviceRings:
    """The rings of every layer, zeroed.

    resources: gives their memory back.  addresses: of each ring, in the order of `contract.past()`.
    Raises EngineMismatchError if rows do not begin where TensorRT takes an address.
    """

    def __init__(self, cuda: Cuda, contract: GraphContract, resources: ExitStack) -> None:
        self._cuda, self._rows = cuda, contract.max_batch_size
        self._shapes = [shape_of(spec, {"B": 1})[1:] for spec in contract.past()]
        self._dtype = stored_dtype(contract.past()[0])
        self._row_bytes = [int(np.prod(shape)) * self._dtype.itemsize for shape in self._shapes]
        require_aligned_rows(contract, self._row_bytes[0])
        self.addresses: list[int] = []
        for spec, size in zip(contract.past(), self._row_bytes, strict=True):
            address = cuda.allocate(self._rows * size, spec.name)
            resources.callback(cuda.release, "cudaFree", address)
            self.addresses.append(address)
        self.clear()

    def at_row(self, row: int) -> list[int]:
        """Where a row begins in each ring."""
        if not 0 <= row < self._rows:
            raise ValueError(f"expected a row of 0…{self._rows - 1}, found {row}")
        places = zip(self.addresses, self._row_bytes, strict=True)
        return [address + row * size for address, size in places]

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        """Copies, [K, R, D] each."""
        found = [np.empty(shape, self._dtype) for shape in self._shapes]
        for array, address in zip(found, self.at_row(row), strict=True):
            self._cuda.download(array.ctypes.data, address, array.nbytes)
        self._cuda.wait()
        return tuple(found)

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        """Overwrite a row; None zeroes it. Raises ValueError for rings of another shape or dtype."""
        places = list(zip(self.at_row(row), self._row_bytes, strict=True))
        arrays = None if rings is None else self._checked(rings)  # live until `wait`
        for i, (address, size) in enumerate(places):
            if arrays is None:
                self._cuda.clear(address, size)
            else:
                self._cuda.upload(address, arrays[i].ctypes.data, size)
        self._cuda.wait()

    def copy_row(self, source: int, target: int) -> None:
        if source == target:
            return
        places = zip(self.at_row(target), self.at_row(source), self._row_bytes, strict=True)
        for to, of, size in places:
            self._cuda.copy(to, of, size)
        self._cuda.wait()

    def clear(self) -> None:
        """Zero every row."""
        for address, size in zip(self.addresses, self._row_bytes, strict=True):
            self._cuda.clear(address, self._rows * size)
        self._cuda.wait()

    def _checked(self, rings: Sequence[RingArray]) -> list[np.ndarray[Any, Any]]:
        found = [(ring.shape, ring.dtype.name) for ring in rings]
        names = {self._dtype.name, "bfloat16"} if self._dtype == _STORED["bfloat16"] else {self._dtype.name}
        shapes = [shape for shape, _ in found]
        if shapes != self._shapes or not {name for _, name in found} <= names:
            raise ValueError(
                f"expected {len(self._shapes)} rings of {' or '.join(sorted(names))} "
                f"{list(self._shapes[0])}, found {found[:1]}"
            )
        return [np.ascontiguousarray(ring.view(self._dtype)) for ring in rings]


def stored_dtype(spec: TensorSpec) -> np.dtype[Any]:
    """What numpy keeps a ring's numbers as."""
    return _STORED.get(spec.dtype) or np.dtype(spec.dtype)


def require_aligned_rows(contract: GraphContract, row_bytes: int) -> None:
    """Raise EngineMismatchError unless each row of a ring begins at a multiple of 256 bytes."""
    if contract.max_batch_size > 1 and row_bytes % ALIGNMENT:
        raise EngineMismatchError(
            f"a row of a ring has {row_bytes} bytes, and TensorRT takes addresses in multiples of "
            f"{ALIGNMENT}, so only the first row could be used; export with --max-batch-size 1, or with a "
            "--prefill-chunk that is a multiple of 16"
        )
