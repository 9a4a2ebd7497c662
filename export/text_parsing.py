"""A small file that a checkpoint brings → bytes, JSON, text; or one error that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral_trt.errors import CheckpointError, MistralTrtError

_LIMIT_BYTES = 64 << 20


@contextmanager
def refusing(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a parser raises into a CheckpointError that names the file."""
    try:
        yield
    except (MistralTrtError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's
            raise
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise CheckpointError(f"{path}: expected {expected}, found {found}") from error


def read_bytes(path: Path) -> bytes:
    with refusing(path, "a file that can be read"):
        size = path.stat().st_size
        if size > _LIMIT_BYTES:
            raise CheckpointError(f"{path}: expected at most {_LIMIT_BYTES} bytes, found {size}")
        return path.read_bytes()


def parse_object(path: Path, data: bytes) -> dict[str, Any]:
    with refusing(path, "a JSON object"):
        content = json.loads(data.decode())
        if not isinstance(content, dict):
            raise TypeError(f"{type(content).__name__}")
        return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(data).__name__}")
    return data


def token_text(token: Any) -> str:
    """Text, plain or in a token's object. Raises TypeError or ValueError if it cannot be written."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.40} is no text")
    return text.encode().decode()
