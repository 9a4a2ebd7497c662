"""An artifact's folder → what opens it as a rolling cache, as often as it is asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mistral_trt.manifest import GRAPH_NAME, Manifest
from mistral_trt.progress import note
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.loading import open_artifact
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.validate.twin import float32_twin

Opener = Callable[[], RollingCache]


@contextmanager
def openable(folder: Path, manifest: Manifest, *, threads: int | None) -> Iterator[Opener]:
    """An engine on its GPU; a graph in ONNX Runtime on the CPU, computing what it says; or the graph's
    float32 twin where a CPU cannot run its bfloat16.

    threads: of ONNX Runtime.  The files are taken as they are: the caller has read them with their manifest.
    """
    if manifest.stage == "engine":
        yield partial(open_engine, folder)
    elif manifest.contract.cache_dtype != "bfloat16":
        yield partial(open_cache, folder, threads=threads, trust_weights=True, exact=True)
    else:
        note("bf16: making the float32 twin")
        with float32_twin(folder / GRAPH_NAME, manifest.contract) as (path, contract):
            yield lambda: RollingCache(OnnxRuntimeBackend(path, contract, threads=threads))


def open_engine(folder: Path) -> RollingCache:
    """An engine as it serves: its kernels compiled, its decode steps captured."""
    _, backend = open_artifact(folder, trust_weights=True, exact=True)
    try:
        backend.warm_up()
    except BaseException:
        backend.close()
        raise
    return RollingCache(backend)
