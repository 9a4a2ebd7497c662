"""An artifact's folder → what opens it as a rolling cache, as often as it is asked for.

A graph that does not load is a finding: it opens as a cache of which every call fails.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from mistral_trt.contract import GraphContract
from mistral_trt.errors import GraphError
from mistral_trt.manifest import GRAPH_NAME, Manifest
from mistral_trt.progress import note
from mistral_trt.runtime.backend import Logits, Progress, RingArray, Step
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
        opener = partial(open_cache, folder, threads=threads, trust_weights=True, exact=True)
        yield partial(open_graph, opener, manifest.contract)
    else:
        note("bf16: making the float32 twin")
        with ExitStack() as stack:
            yield partial(
                open_graph, twin_opener(stack, folder, manifest.contract, threads), manifest.contract
            )


def twin_opener(stack: ExitStack, folder: Path, contract: GraphContract, threads: int | None) -> Opener:
    """Of the float32 twin, which is there as long as the stack is."""
    try:
        path, widened = stack.enter_context(float32_twin(folder / GRAPH_NAME, contract))
    except GraphError as error:
        return partial(RollingCache, Unloadable(contract, error))
    return lambda: RollingCache(OnnxRuntimeBackend(path, widened, threads=threads))


def open_graph(opener: Opener, contract: GraphContract) -> RollingCache:
    """What an opener opens; if the graph does not load, a cache of which every call fails."""
    try:
        return opener()
    except GraphError as error:
        return RollingCache(Unloadable(contract, error))


class Unloadable:
    """A backend without its graph: no step of it can be run."""

    def __init__(self, contract: GraphContract, error: GraphError) -> None:
        self.contract = contract
        self._error = error

    @property
    def ready(self) -> bool:
        return False

    def warm_up(self, progress: Progress | None = None) -> None:
        """Nothing."""

    def run(self, step: Step) -> Logits:
        raise GraphError(str(self._error))

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        raise GraphError(str(self._error))

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        """Nothing: there are no rings."""

    def copy_row(self, source: int, target: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_engine(folder: Path) -> RollingCache:
    """An engine as it serves: its kernels compiled, its decode steps captured."""
    _, backend = open_artifact(folder, trust_weights=True, exact=True)
    try:
        backend.warm_up()
    except BaseException:
        backend.close()
        raise
    return RollingCache(backend)
