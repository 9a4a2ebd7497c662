"""Every error this package raises on purpose.

MistralTrtError
├── ConfigError            a checkpoint's configuration, or a setting, that is not supported
├── CheckpointError        a checkpoint whose files are missing, damaged or of the wrong shape
├── ExportError            an ONNX graph that does not keep the contract
├── CalibrationError       calibration text that cannot be used, or a model that it breaks
├── ArtifactError          an output folder that cannot be written
├── ManifestError          an artifact folder that is not whole, not ours or was altered
├── GpuError               a GPU that is unknown or cannot be targeted from here
├── BuildError             TensorRT refused, or built something that must not be used
├── EngineMismatchError    an artifact that does not fit this machine or this backend
│   └── GraphError             a graph that ONNX Runtime cannot load, or that does not keep its contract
├── GenerationError        a request that cannot be served as asked
│   ├── NonFiniteLogitsError   a step produced NaN or infinity; the request is ended
│   ├── QueueFullError         more requests wait for a row than the engine's queue holds
│   ├── EngineClosedError      the engine was closed, or can no longer run
│   └── SessionError           a session whose ring is gone, or a file of one that cannot be restored
├── BackendError           what runs the graph failed; the requests of that step are ended
├── ValidationError        a validation that could not be run (a failed gate is not an error)
└── MissingDependencyError an optional package that this command needs

A message says what was expected, what was found and, where there is one, the command that repairs it.
"""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class MistralTrtError(Exception):
    """Root of the tree above; the command line prints its message without a traceback."""


class ConfigError(MistralTrtError):
    pass


class CheckpointError(MistralTrtError):
    pass


class ExportError(MistralTrtError):
    pass


class CalibrationError(MistralTrtError):
    pass


class ArtifactError(MistralTrtError):
    pass


class ManifestError(MistralTrtError):
    pass


class GpuError(MistralTrtError):
    pass


class BuildError(MistralTrtError):
    pass


class EngineMismatchError(MistralTrtError):
    pass


class GraphError(EngineMismatchError):
    pass


class GenerationError(MistralTrtError):
    pass


class NonFiniteLogitsError(GenerationError):
    """rows: the rows that failed.  healthy: logits of the other rows of the same step, by row."""

    def __init__(self, rows: list[int], healthy: Mapping[int, Any]) -> None:
        super().__init__(
            f"the model produced NaN or infinity in row(s) {', '.join(map(str, rows))}; the request is ended "
            "(a float16 overflow is the usual cause: try --precision bf16)"
        )
        self.rows = rows
        self.healthy = healthy


class QueueFullError(GenerationError):
    pass


class EngineClosedError(GenerationError):
    pass


class SessionError(GenerationError):
    pass


class BackendError(MistralTrtError):
    """fatal: the backend cannot run again, as after a CUDA error that sticks to its context."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class ValidationError(MistralTrtError):
    pass


class MissingDependencyError(MistralTrtError):
    pass


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises MissingDependencyError if the package is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise MissingDependencyError(
            f"this needs the package {missing!r}, which is not installed; "
            f"run: pip install 'mistral-trt[{extra}]'"
        ) from error
