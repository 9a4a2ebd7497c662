"""What a person can ask of a quantized export, beside the precision."""

import math
from dataclasses import dataclass
from pathlib import Path

from mistral_trt.errors import ConfigError

METRICS = ("perplexity", "kl")


@dataclass(frozen=True)
class Budget:
    """What quantization may cost, measured on the calibration text.

    metric: "perplexity", over that of the model as it is, or "kl", the mean divergence of the next token's
    distribution, in nats.
    """

    metric: str
    limit: float

    def __post_init__(self) -> None:
        least = 1.0 if self.metric == "perplexity" else 0.0
        if self.metric not in METRICS or not (math.isfinite(self.limit) and self.limit >= least):
            raise ConfigError(
                "--quality must be perplexity=RATIO with a ratio of 1 or more, or kl=NATS, found "
                f"{self.metric}={self.limit:g}"
            )

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """perplexity=1.03, kl=0.01.  Raises ConfigError."""
        metric, _, limit = text.partition("=")
        try:
            return cls(metric, float(limit))
        except ValueError as error:
            raise ConfigError(
                f"--quality must be perplexity=RATIO or kl=NATS, for example perplexity=1.03, found {text!r}"
            ) from error


@dataclass(frozen=True)
class QuantizationSettings:
    """How to calibrate and what to leave alone.

    calibration: a file or folder of text, None for the speeches that come along.  samples, tokens: how much
    of it, None for the defaults.  keep: patterns of module names that stay float16.  quality: what
    quantization may cost, None for no budget.
    """

    calibration: Path | None = None
    samples: int | None = None
    tokens: int | None = None
    keep: tuple[str, ...] = ()
    quality: Budget | None = None
    quantize_lm_head: bool = False
