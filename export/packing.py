"""Stored tensors of a quantized linear → its integers and floats, unpacked and in the linear's order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from mistral_trt.errors import CheckpointError
from mistral_trt.export.tensor_files import StoredTensor

Layout = Literal["gptq", "awq", "packed", "plain"]
"""How a weight's codes lie: as GPTQ packs them, as AWQ does, as compressed-tensors does, or one a byte."""

PARTS: dict[Layout, tuple[str, ...]] = {
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "awq": ("qweight", "scales", "qzeros"),
    "packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "plain": ("weight", "weight_scale", "weight_zero_point", "weight_g_idx"),
}
"""What a quantized linear's tensors are called after its module's name; the first holds its codes."""

FLOATS = ("float32", "float16", "bfloat16")
INTEGERS = ("I64", "I32", "I8", "U8")
INSTEAD = "use the original float checkpoint with"

_NUMPY = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "|i1",
    "U8": "|u1",
}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_array(stored: StoredTensor) -> npt.NDArray[Any]:
    """A stored tensor of a dtype in FLOATS or INTEGERS in memory; bfloat16 becomes float32, exactly.

    Raises CheckpointError for a file that ends too early. Read, not mapped: see `conversion`.
    """
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        flat = np.fromfile(file, _NUMPY[stored.dtype], stored.elements)
    if len(flat) != stored.elements:
        raise CheckpointError(f"{stored.path} became shorter while it was read: {stored.name!r} is cut off")
    if stored.dtype == "bfloat16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.reshape(stored.shape)


def read_codes(
    stored: StoredTensor, layout: Layout, bits: int, shape: tuple[int, int]
) -> npt.NDArray[np.int8]:
    """The codes of a weight.

    stored: int32 [in * bits / 32, out] in "gptq", [in, out / 8] in "awq", [out, in * bits / 32] in "packed",
    int8 [out, in] in "plain".  shape: (out, in).
    Returns int8 [out, in]; where they are packed, the zero point 2 ** (bits - 1) is taken off.
    Raises CheckpointError for a file that ends too early, or a code that does not fit `bits`.
    """
    found = read_array(stored)
    middle = 1 << (bits - 1)
    if layout == "plain":
        if found.size and not -middle <= int(found.min()) <= int(found.max()) < middle:
            raise CheckpointError(
                f"{stored.path}: {stored.name!r} holds codes from {found.min()} to {found.max()}; expected "
                f"{-middle} to {middle - 1}, as config.json calls for INT{bits}: the checkpoint is damaged"
            )
        return found
    if layout == "gptq":
        fields = unpacked(found.T, bits)
    elif layout == "awq":
        fields = unpacked_awq(found).T
    else:
        fields = unpacked(found, bits)
    rows, columns = shape
    fields -= np.uint8(middle)
    return np.ascontiguousarray(fields[:rows, :columns]).view(np.int8)


def unpacked(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """int32 [rows, words], each 32 / bits fields with the first lowest -> uint8 [rows, words * 32 / bits].

    bits = 4:  0x76543210 -> 0 1 2 3 4 5 6 7
    """
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return data
    fields = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 15, out=fields[:, :, 0])
    np.right_shift(data, 4, out=fields[:, :, 1])
    return fields.reshape(len(data), -1)


def unpacked_awq(words: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """int32 [rows, words], the fields of a word belong to columns 0 2 4 6 1 3 5 7 -> uint8 [rows, words * 8].

    0x75316420 -> 0 1 2 3 4 5 6 7
    """
    fields = unpacked(words, 4).reshape(len(words), -1, 8)
    return fields[:, :, np.argsort(_AWQ_ORDER)].reshape(len(words), -1)


def read_scales(stored: StoredTensor, shape: tuple[int, int], layout: Layout) -> npt.NDArray[np.float32]:
    """What the codes are multiplied by.

    stored: [groups, out] in "gptq" and "awq", else [out, groups]; or a single number for all.
    shape: (out, groups).  Returns float32 [out, groups].
    Raises CheckpointError for a file that ends too early, or a scale that is negative or not finite.
    """
    found = read_array(stored).astype(np.float32)
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise CheckpointError(
            f"{stored.path}: {stored.name!r} holds NaN, infinity or a negative number; expected scales that "
            "are finite and not negative: the checkpoint is damaged"
        )
    if found.size == 1:
        return np.full(shape, found.item(), np.float32)
    return np.ascontiguousarray(found.T if layout in ("gptq", "awq") else found)


@dataclass(frozen=True)
class Parts:
    """The tensors of one quantized linear, by what follows its module's name: qweight, scales, …"""

    module: str
    tensors: Mapping[str, StoredTensor]

    def take(self, part: str, shape: tuple[int, ...] | None, *dtypes: str) -> StoredTensor:
        """The tensor, as expected; shape None is any matrix. Raises CheckpointError."""
        found = self.tensors.get(part)
        if found is None:
            raise CheckpointError(
                f"the checkpoint lacks {f'{self.module}.{part}'!r}; expected one in every quantized linear: "
                "download it again"
            )
        fits = len(found.shape) == 2 if shape is None else found.shape == shape
        if not fits or found.dtype not in dtypes:
            expected = "of two axes" if shape is None else str(list(shape))
            self._refuse(
                found,
                f"is {found.dtype} {list(found.shape)}; expected {' or '.join(dtypes)} {expected}, as "
                "config.json and the other tensors call for (all linears have to be quantized alike)",
            )
        return found

    def groups(self, shape: tuple[int, int], group_size: int | None) -> int:
        """How many groups a row of [out, in] has. Raises CheckpointError if the last one is not whole."""
        if group_size is None:
            return 1
        if shape[1] % group_size:
            found = next(iter(self.tensors.values()))
            self._refuse(found, f"has {shape[1]} input features; expected a multiple of {group_size}")
        return shape[1] // group_size

    def require_symmetric(self, layout: Layout, bits: int, shape: tuple[int, int], stored_zero: int) -> None:
        """Raise CheckpointError unless every zero point in qzeros is stored as `stored_zero`.

        shape: (groups, out).  qzeros: int32 [groups, out * bits / 32], packed as AWQ packs its codes, or in
        order.
        """
        groups, rows = shape
        stored = self.take("qzeros", (groups, -(-rows * bits // 32)), "I32")
        fields = unpacked_awq(read_array(stored)) if layout == "awq" else unpacked(read_array(stored), bits)
        middle = 1 << (bits - 1)
        zeros = fields[:, :rows].astype(np.int16) + (middle - stored_zero)
        wrong = zeros[zeros != middle]
        if not wrong.size:
            return
        other = "gptq_v2" if wrong[0] > middle else "gptq"
        one_off = layout == "gptq" and wrong.size == zeros.size and (abs(wrong - middle) == 1).all()
        hint = f" (if sym is true, the file may well be in {other}: then say so in checkpoint_format, format)"
        self._refuse(
            stored,
            f"has the zero point {wrong[0]}; expected {middle} throughout, asymmetric weights have no form "
            f"in the graph{hint if one_off else ''}",
        )

    def require_zero(self, part: str, shape: tuple[int, ...], reason: str) -> None:
        """Raise CheckpointError for a tensor that is there and holds anything but zeros."""
        if part in self.tensors:
            stored = self.take(part, shape, *FLOATS, *INTEGERS)
            if read_array(stored).any():
                self._refuse(stored, f"is not zero throughout: {reason}")

    def require_order(self, part: str, columns: int, group_size: int | None, *, reordered: bool) -> None:
        """Raise CheckpointError unless input feature i is in group i // group_size.

        part: g_idx or weight_g_idx, int32 [in]; compressed-tensors leaves -1 where it was not used.
        """
        if part not in self.tensors:
            if reordered and group_size is not None:
                raise CheckpointError(
                    f"the checkpoint lacks {f'{self.module}.{part}'!r}; expected it, as config.json says "
                    f"that the input features were reordered (act-order); {INSTEAD} --precision int4"
                )
            return
        stored = self.take(part, (columns,), "I32", "I64")
        found = read_array(stored)
        if not (found == -1).all() and (found != np.arange(columns) // (group_size or columns)).any():
            self._refuse(
                stored,
                "reorders the input features (act-order, desc_act), which would need a gather of the "
                "activations in every linear; expected feature i in group i // group_size",
            )

    def _refuse(self, stored: StoredTensor, reason: str) -> NoReturn:
        raise CheckpointError(f"{stored.path}: {stored.name!r} {reason}; {INSTEAD} --precision int4")


def quantized_linears(tensors: Mapping[str, StoredTensor], layout: Layout) -> list[Parts]:
    """Every module with a tensor of the layout's first name, with the tensors that belong to it."""
    marker, *rest = PARTS[layout]
    found = []
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == marker and (layout != "plain" or tensor.dtype == "I8"):
            own = {part: tensors.get(f"{module}.{part}") for part in (marker, *rest, "bias")}
            found.append(Parts(module, {part: stored for part, stored in own.items() if stored is not None}))
    return found


def other_tensors(tensors: Mapping[str, StoredTensor], linears: Iterable[Parts]) -> dict[str, StoredTensor]:
    """What belongs to no quantized linear.

    Raises CheckpointError if one is no float, or called as a quantized linear's parts are.
    """
    taken = {stored.name for linear in linears for stored in linear.tensors.values()}
    odd = {part for parts in PARTS.values() for part in parts} - {"weight"}
    others = {name: stored for name, stored in tensors.items() if name not in taken}
    for name, stored in others.items():
        if name.rpartition(".")[2] in odd or stored.dtype not in FLOATS:
            raise CheckpointError(
                f"{stored.path}: {name!r} ({stored.dtype}) belongs to no linear that is quantized as "
                f"config.json says; {INSTEAD} --precision int4"
            )
    return others
