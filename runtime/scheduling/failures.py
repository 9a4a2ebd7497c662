"""What went wrong in the scheduler → the error that a request's consumer gets.

Each request gets one of its own: an exception that several threads raise would mix their tracebacks.
"""

from mistral_trt.errors import BackendError, EngineClosedError, GenerationError, MistralTrtError


def backend_error(error: Exception) -> BackendError:
    """A step failed.  fatal, as `error` is: nothing more can be run."""
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
