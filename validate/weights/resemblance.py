"""A weight that is wrong → whose numbers it holds, if they are some other weight's of the checkpoint."""

from torch import Tensor

from mistral_trt.export.checkpoint import EMBEDDING, Checkpoint
from mistral_trt.export.conversion import Weight, pieces
from mistral_trt.validate.weights.graph import CODES, WeightGraph
from mistral_trt.validate.weights.linear import Folds, read_linear

_ALIKE = 0.8  # linears of two layers have other scales folded into their inputs
_ROW = 1  # the first one is where it was in most orders of rows


def resemblance(graph: WeightGraph, source: Checkpoint, folds: Folds, name: str) -> str | None:
    """Where the artifact's row 1 of a weight is found in the checkpoint, by correlation; None for nowhere.

    Searched are the first million numbers of each weight of its shape.
    """
    own = source.weights[name if name in source.weights else EMBEDDING]
    row = _row(graph, folds, name) if graph.dtype(name) in CODES else _float_row(graph, name)
    others = [weight for weight in source.weights.values() if weight.shape == own.shape and weight is not own]
    for weight in (own, *others):
        place = _place(row, weight)
        if place is not None:
            vector = len(own.shape) == 1
            if weight is own:
                return None if vector or place == _ROW else f"its row {_ROW} is the checkpoint's row {place}"
            return f"its numbers are those of {weight.name}" if vector or place == _ROW else None
    return None


def _float_row(graph: WeightGraph, name: str) -> Tensor:
    whole = graph.numbers(name).float()
    return whole if whole.ndim == 1 else whole[_ROW]


def _row(graph: WeightGraph, folds: Folds, name: str) -> Tensor:
    """One row of a quantized weight, as a row of the checkpoint's: float32 [in]."""
    module = name.removesuffix(".weight")
    linear, reads = read_linear(graph, module), folds.of_input(module)
    row = (linear.codes[_ROW].float().view(linear.scale.shape[1], -1) * linear.scale[_ROW, :, None]).flatten()
    return row if reads is None else (row * reads.values).nan_to_num(0.0)


def _place(row: Tensor, weight: Weight) -> int | None:
    """The row of a weight's first piece that a row is a positive multiple of, nearly."""
    piece = next(pieces(weight)).reshape(-1).float()
    rows = piece[: len(piece) // len(row) * len(row)].view(-1, len(row))
    rows, row = rows - rows.mean(1, keepdim=True), row - row.mean()
    alike = (rows @ row) / (rows.norm(dim=1) * row.norm()).clamp(min=1e-30)
    best = int(alike.argmax()) if len(rows) else 0
    return best if len(rows) and float(alike[best]) > _ALIKE else None
