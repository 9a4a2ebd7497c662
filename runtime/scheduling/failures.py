"""What went wrong in the scheduler → the error that a request's consumer gets.

Each request gets one of its own: an exception that several threads raise would mix their tracebacks.
"""

import traceback

from mistral_trt.errors import BackendError, EngineClosedError, GenerationError, MistralTrtError


def backend_error(error: Exception) -> BackendError:
    """A step failed.  fatal, as `error` is: nothing more can be run.

    A consumer may keep its error; what the frames of the step held, a ring on its way to a row, is let go.
    """
    _clear_frames(error)
    fatal = isinstance(error, BackendError) and error.fatal
    reason = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
    failure = BackendError(f"a step of this request failed: {reason}", fatal=fatal)
    failure.__cause__ = error
    return failure


def sampling_error(error: Exception) -> MistralTrtError:
    """Choosing a token failed; what is none of our errors comes from a caller's logits processor."""
    if isinstance(error, MistralTrtError):
        return error
    failure = GenerationError(f"choosing a token failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def closed_error(reason: str, error: BaseException | None) -> EngineClosedError:
    """The engine has ended, because of `error` if there is one."""
    closed = EngineClosedError(reason)
    closed.__cause__ = error
    return closed


def _clear_frames(error: BaseException) -> None:
    """Drop the variables of an error's frames, and of those of what caused it; the lines stay."""
    cause: BaseException | None = error
    seen = set[int]()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
