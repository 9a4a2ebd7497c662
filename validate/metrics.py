"""Reference and artifact logits → errors at every position, computed in float64 a few rows at a time."""

from dataclasses import dataclass, fields

import numpy as np

_PIECE_ELEMENTS = 1 << 17  # a piece and its intermediates stay in the processor's cache


_DTYPES = {"position": np.int64, "rank": np.int64, "agree": np.bool_, "scored": np.bool_}
"""Of the fields that are not float64."""


@dataclass(frozen=True)
class LogitErrors:
    """How far the artifact is from the reference, one number per position: arrays [n]."""

    position: np.ndarray
    """int64: which position of the sequence the others are of."""
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
    rank: np.ndarray
    """int64: how many tokens the artifact puts before the reference's first choice; V where it gives NaN."""
    nll_reference: np.ndarray
    """Negative log-likelihood of the text's next token by the reference, in nats; NaN where there is none."""
    nll: np.ndarray
    """The same by the artifact."""
    scored: np.ndarray
    """bool: whether the text has a next token."""

    def __len__(self) -> int:
        return len(self.max_abs)


@dataclass(frozen=True)
class Extreme:
    """The worst value of a metric and the position it was found at."""

    value: float
    position: int | None


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a text's tokens; NaN where the text has none.

    ratio: the artifact's over the reference's.  positions: tokens that were scored.
    """

    reference: float
    artifact: float
    ratio: float
    positions: int


def logit_errors(
    reference: np.ndarray, artifact: np.ndarray, *, positions: np.ndarray, targets: np.ndarray
) -> LogitErrors:
    """Compare logits row by row.  Both float32 [n, V]; the arithmetic is float64.

    positions: int64 [n].  targets: int64 [n], the text's next token at each, -1 where there is none.
    Raises ValueError if the shapes differ.
    """
    if reference.shape != artifact.shape:
        raise ValueError(f"expected logits of equal shape, found {reference.shape} and {artifact.shape}")
    if targets.shape != reference.shape[:1]:
        raise ValueError(f"expected a target for each of {len(reference)} positions, found {targets.shape}")
    rows = max(1, _PIECE_ELEMENTS // reference.shape[1])
    pieces = [slice(i, i + rows) for i in range(0, len(reference), rows)]
    return concatenate(
        [
            _compare(
                reference[p].astype(np.float64),
                artifact[p].astype(np.float64),
                positions=positions[p],
                targets=targets[p],
            )
            for p in pieces
        ]
    )


def concatenate(parts: list[LogitErrors]) -> LogitErrors:
    """Join errors of several calls."""
    columns = {}
    for field in fields(LogitErrors):
        dtype = _DTYPES.get(field.name, np.float64)
        columns[field.name] = np.concatenate(
            [np.empty(0, dtype), *(getattr(part, field.name) for part in parts)]
        )
    return LogitErrors(**columns)


def by_position(errors: LogitErrors) -> LogitErrors:
    """The same in order of position."""
    order = np.argsort(errors.position, kind="stable")
    return LogitErrors(**{field.name: getattr(errors, field.name)[order] for field in fields(LogitErrors)})


def worst(errors: LogitErrors, metric: str) -> Extreme:
    """Largest value of a metric; NaN counts as largest, and no positions at all give NaN."""
    values = getattr(errors, metric)
    if not len(values):
        return Extreme(float("nan"), None)
    place = int(np.argmax(values))  # numpy's argmax stops at the first NaN
    return Extreme(float(values[place]), int(errors.position[place]))


def mean(errors: LogitErrors, metric: str) -> float:
    """Mean of a metric over all positions; NaN where there are none."""
    values = getattr(errors, metric)
    return float(np.mean(values)) if len(values) else float("nan")


def percentile(errors: LogitErrors, metric: str, percent: float) -> float:
    """The value that so many percent of the positions do not exceed; NaN where there are none."""
    values = getattr(errors, metric)
    return float(np.percentile(values, percent, method="inverted_cdf")) if len(values) else float("nan")


def top5_agreement(errors: LogitErrors) -> float:
    """Share of the positions at which the reference's first choice is among the artifact's first five."""
    return float(np.mean(errors.rank < 5)) if len(errors) else float("nan")


def perplexity(errors: LogitErrors) -> Perplexity:
    """Perplexity of the text by both sides.  Mean nll_reference 2, nll 2.5: e^2, e^2.5, ratio e^0.5."""
    positions = int(np.count_nonzero(errors.scored))
    if not positions:
        return Perplexity(float("nan"), float("nan"), float("nan"), 0)
    reference = np.mean(errors.nll_reference[errors.scored])
    artifact = np.mean(errors.nll[errors.scored])
    with np.errstate(over="ignore"):  # infinity is a finding: no gate passes it
        ratio = float(np.exp(artifact - reference))
        return Perplexity(float(np.exp(reference)), float(np.exp(artifact)), ratio, positions)


def _compare(
    reference: np.ndarray, artifact: np.ndarray, *, positions: np.ndarray, targets: np.ndarray
) -> LogitErrors:
    """KL of logits a and b: sum p (a - b) - lse(a) + lse(b), where p = softmax(a).

    The negative log-likelihood of token t is lse(a) - a[t].
    """
    size = reference.shape[1]
    difference = artifact - reference  # [n, V]
    probability, reference_lse = _exponentials(reference)  # [n, V], [n]
    _, artifact_lse = _exponentials(artifact)  # [n]
    variance = _dot(reference, reference) / size - reference.mean(axis=-1) ** 2  # [n]
    norms = np.sqrt(_dot(reference, reference) * _dot(artifact, artifact))  # [n]
    magnitude = np.abs(difference)  # [n, V]
    with np.errstate(divide="ignore", invalid="ignore"):
        return LogitErrors(
            position=positions,
            max_abs=magnitude.max(axis=-1),
            mean_abs=magnitude.mean(axis=-1),
            relative=np.sqrt(_dot(difference, difference) / size / variance),
            cosine=1.0 - _dot(reference, artifact) / norms,
            kl=artifact_lse - reference_lse - _dot(probability, difference),
            agree=reference.argmax(axis=-1) == artifact.argmax(axis=-1),
            rank=_rank(artifact, reference.argmax(axis=-1)),
            nll_reference=reference_lse - _at(reference, targets),
            nll=artifact_lse - _at(artifact, targets),
            scored=targets >= 0,
        )


def _rank(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """How many of [n, V] lie above the logit of each token [n]; V where one is NaN."""
    above = logits > logits[np.arange(len(logits)), tokens][:, None]  # [n, V]
    return np.where(np.isnan(logits).any(axis=-1), logits.shape[1], above.sum(axis=-1))


def _exponentials(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, V] -> probabilities [n, V] and log-sum-exp [n]"""
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / total, (np.log(total) + largest)[:, 0]


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, V], [n, V] -> [n]"""
    return np.asarray(np.einsum("nv,nv->n", a, b))


def _at(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Logits [n, V] of tokens [n] -> [n]; NaN where the token is -1"""
    found = logits[np.arange(len(logits)), targets]
    return np.where(targets < 0, np.nan, found)
