"""Reference and artifact logits → errors at every position, computed in float64 a few rows at a time."""

from dataclasses import dataclass, fields

import numpy as np

_PIECE_ELEMENTS = 1 << 17  # a piece and its intermediates stay in the processor's cache


@dataclass(frozen=True)
class LogitErrors:
    """How far the artifact is from the reference, one number per position: arrays [n]."""

    max_abs: np.ndarray
    """Largest absolute difference of a logit."""
    mean_abs: np.ndarray
    """Mean absolute difference over the vocabulary."""
    relative: np.ndarray
    """Root mean square difference over the standard deviation of the reference's logits."""
    cosine: np.ndarray
    """1 - cosine of the angle between the two logit vectors."""
    kl: np.ndarray
    """KL(reference || artifact) of the two next-token distributions, in nats."""
    agree: np.ndarray
    """bool: whether both put the same token first."""

    def __len__(self) -> int:
        return len(self.max_abs)


@dataclass(frozen=True)
class Extreme:
    """The worst value of a metric and the position it was found at."""

    value: float
    position: int | None


def logit_errors(reference: np.ndarray, artifact: np.ndarray) -> LogitErrors:
    """Compare logits row by row.  Both float32 [n, V]; the arithmetic is float64.

    Raises ValueError if the shapes differ.
    """
    if reference.shape != artifact.shape:
        raise ValueError(f"expected logits of equal shape, found {reference.shape} and {artifact.shape}")
    rows = max(1, _PIECE_ELEMENTS // reference.shape[1])
    pieces = [
        _compare(reference[i : i + rows].astype(np.float64), artifact[i : i + rows].astype(np.float64))
        for i in range(0, len(reference), rows)
    ]
    return concatenate(pieces)


def concatenate(parts: list[LogitErrors]) -> LogitErrors:
    """Join errors of consecutive positions."""
    columns = {}
    for field in fields(LogitErrors):
        dtype = bool if field.name == "agree" else np.float64
        columns[field.name] = np.concatenate(
            [np.empty(0, dtype), *(getattr(part, field.name) for part in parts)]
        )
    return LogitErrors(**columns)


def worst(errors: LogitErrors, metric: str) -> Extreme:
    """Largest value of a metric; NaN counts as largest, and no positions at all give NaN."""
    values = getattr(errors, metric)
    if not len(values):
        return Extreme(float("nan"), None)
    position = int(np.argmax(values))  # numpy's argmax stops at the first NaN
    return Extreme(float(values[position]), position)


def mean(errors: LogitErrors, metric: str) -> float:
    """Mean of a metric over all positions; NaN where there are none."""
    values = getattr(errors, metric)
    return float(np.mean(values)) if len(values) else float("nan")


def _compare(reference: np.ndarray, artifact: np.ndarray) -> LogitErrors:
    """KL of logits a and b: sum p (a - b) - lse(a) + lse(b), where p = softmax(a)."""
    size = reference.shape[1]
    difference = artifact - reference  # [n, V]
    probability, reference_lse = _exponentials(reference)  # [n, V], [n]
    _, artifact_lse = _exponentials(artifact)  # [n]
    variance = _dot(reference, reference) / size - reference.mean(axis=-1) ** 2  # [n]
    norms = np.sqrt(_dot(reference, reference) * _dot(artifact, artifact))  # [n]
    magnitude = np.abs(difference)  # [n, V]
    with np.errstate(divide="ignore", invalid="ignore"):
        return LogitErrors(
            max_abs=magnitude.max(axis=-1),
            mean_abs=magnitude.mean(axis=-1),
            relative=np.sqrt(_dot(difference, difference) / size / variance),
            cosine=1.0 - _dot(reference, artifact) / norms,
            kl=artifact_lse - reference_lse - _dot(probability, difference),
            agree=reference.argmax(axis=-1) == artifact.argmax(axis=-1),
        )


def _exponentials(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, V] -> probabilities [n, V] and log-sum-exp [n]"""
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / total, (np.log(total) + largest)[:, 0]


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, V], [n, V] -> [n]"""
    return np.asarray(np.einsum("nv,nv->n", a, b))
