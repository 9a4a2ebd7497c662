"""What TensorRT says while it parses and builds → the lines that fail a build, and those worth keeping."""

import logging
import re
from dataclasses import dataclass, field
from typing import NamedTuple

FAILURES = ("INTERNAL_ERROR", "ERROR")
"""TensorRT's severities that fail a build."""

_LOG = logging.getLogger("mistral_trt")
_UNUSED = "Unused Input"


class AllowedWarning(NamedTuple):
    """A warning that does not fail a build.  said: whether the user gets to read it all the same."""

    pattern: str
    reason: str
    said: bool


ALLOWED_WARNINGS = (
    AllowedWarning(
        r"Make sure input \S+ has Int64 binding", "said of each int64 input, and int64 is what we bind", False
    ),
    AllowedWarning(
        r"(?i)insufficient memory on requested size|Device memory is insufficient to use tactic",
        "full TensorRT tries kernels on the GPU itself; one that does not fit there is left out, and what is "
        "chosen instead is as right (github.com/NVIDIA/TensorRT-LLM/issues/493)",
        True,
    ),
    AllowedWarning(
        r"CUDA lazy loading is not enabled",
        "a setting of the machine (CUDA_MODULE_LOADING) that costs memory and is not in the plan",
        True,
    ),
)
"""The first is the only one that tensorrt-rtx 1.7.1 prints in healthy builds, of any precision and GPU. The
others depend on the machine, and only full TensorRT prints them."""


@dataclass
class BuilderLog:
    """What TensorRT said: lines that fail a build, and the verbose ones the reports are read from."""

    problems: list[str] = field(default_factory=list)
    verbose: list[str] = field(default_factory=list)

    def add(self, severity: str, message: str) -> None:
        """TensorRT builds wrong engines after some errors and ignores an input it cannot use with only a
        warning, so errors and warnings not known to be harmless are problems, whatever the build returns."""
        allowed = [known for known in ALLOWED_WARNINGS if re.search(known.pattern, message)]
        if severity in FAILURES or _UNUSED in message:
            self.problems.append(message)
        elif severity != "WARNING":
            self.verbose.append(message)
        elif not allowed:
            self.problems.append(f"{message} (a warning that is not known to be harmless)")
        elif allowed[0].said:
            _LOG.warning("TensorRT: %s", message)
