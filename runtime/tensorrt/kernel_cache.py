"""TensorRT-RTX's runtime cache ↔ a file, so that a second start compiles no kernels.

The file is named after what its kernels depend on. TensorRT checks that again when it reads it, the driver's
build included; a file that it refuses is no error, only a slow start.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

from mistral_trt.artifact import cache_folder, write_file
from mistral_trt.runtime.tensorrt.cuda import Gpu

_LOG = logging.getLogger("mistral_trt.runtime")


def cache_path(cache_dir: Path | None, plan_sha256: str, gpu: Gpu, version: str) -> Path | None:
    """Where the kernels of one plan, GPU, driver and TensorRT are kept.

    cache_dir: None for the user's own cache folder ($XDG_CACHE_HOME/mistral-trt), who may have none: None.
    """
    try:
        folder = cache_dir or cache_folder()
    except RuntimeError as error:  # neither $XDG_CACHE_HOME nor a home
        _LOG.warning("compiled kernels are not kept for the next start: %s", error)
        return None
    parts = (plan_sha256, gpu.name, gpu.compute_capability, gpu.driver, version)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return folder / "kernels" / f"{key[:32]}.bin"


class KernelCache:
    """TensorRT's cache object and its file.

    path: None keeps nothing.  cache: to be given to the settings of every context.
    """

    def __init__(self, engine: Any, path: Path | None) -> None:
        self.path = path
        self.cache = engine.create_runtime_config().create_runtime_cache()
        self._written = b""

    def load(self) -> None:
        """Take what an earlier run compiled; without a usable file the cache stays empty."""
        try:
            data = self.path.read_bytes() if self.path is not None else None
        except FileNotFoundError:
            return
        except OSError as error:
            _LOG.warning("compiled kernels cannot be read: %s", error)
            return
        if data is not None and not (data and self.cache.deserialize(data)):
            _LOG.warning("%s is damaged or of another machine: its kernels are compiled again", self.path)

    def save(self) -> None:
        """Write the file, whole or not at all, if there is news; that it cannot be written is no error."""
        data = bytes(self.cache.serialize())
        digest = hashlib.sha256(data).digest()
        if self.path is None or digest == self._written:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, data)
        except OSError as error:
            _LOG.warning("compiled kernels cannot be kept for the next start: %s", error)
        self._written = digest
