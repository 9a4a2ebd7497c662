"""Weight files → the empty weights of a plan, straight from the mapped files, hashed in the same pass.

TensorRT reads a weight where the page cache has it; threads beside it hash each file from its first byte to
its last. So every page is read from the disk once, and no file has a second copy in memory.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mistral_trt.errors import EngineMismatchError
from mistral_trt.manifest import Manifest
from mistral_trt.runtime.backend import Progress
from mistral_trt.runtime.mapped_file import hashed_file, mapped, require_hash
from mistral_trt.runtime.tensorrt.log import TensorRtLog
from mistral_trt.tensorrt_names import TRT_DTYPES
from mistral_trt.weight_index import INDEX_NAME, RefitWeight, files_of, read_weight_index

_LOG = logging.getLogger("mistral_trt.runtime")
_HASH_THREADS = 4


def refit(
    trt: Any,
    engine: Any,
    log: TensorRtLog,
    folder: Path,
    manifest: Manifest,
    *,
    trust_weights: bool = False,
    progress: Progress | None = None,
) -> None:
    """Fill every weight that the plan leaves out.

    trust_weights: do not compare the weight files' hashes. Nothing of the engine may be running.
    Raises ManifestError for a file that is not the manifest's, EngineMismatchError where TensorRT refuses. In
    either case some weights may have been filled, so the engine must not be run.
    """
    with hashed_file(folder, INDEX_NAME, manifest):
        weights = read_weight_index(folder)
    files = files_of(weights)
    if trust_weights:
        _LOG.warning("%s: the weights are trusted, so their hashes are not compared", folder)
    with _mapped_files(folder, files) as data, _hashed({} if trust_weights else data, folder, manifest) as ok:
        try:
            _fill(trt, engine, log, folder, weights, data)
        except EngineMismatchError:
            ok(None)  # an altered file is the better reason
            raise
        ok(progress)


def _fill(
    trt: Any,
    engine: Any,
    log: TensorRtLog,
    folder: Path,
    weights: Sequence[RefitWeight],
    data: Mapping[str, memoryview],
) -> None:
    if not engine.refittable:
        raise EngineMismatchError(f"{folder}: its weights are external, and its plan cannot be refitted")
    # The refitter keeps addresses, so it ends with this function, before the files are unmapped.
    refitter = trt.Refitter(engine, log.logger)
    starts = {name: np.frombuffer(view, np.uint8).ctypes.data for name, view in data.items()}
    for weight in weights:
        dtype = getattr(trt.DataType, TRT_DTYPES[weight.dtype])
        numbers = trt.Weights(dtype, starts[weight.file] + weight.offset, weight.count)
        if not refitter.set_named_weights(weight.name, numbers):
            raise EngineMismatchError(
                f"{folder}: the plan does not take {weight.name} as {weight.dtype} {list(weight.shape)}"
                f"{log.because()}"
            )
    if missing := refitter.get_missing_weights():
        raise EngineMismatchError(
            f"{folder}: {INDEX_NAME} has no numbers for {len(missing)} weights of the plan, {missing[0]} "
            "among them"
        )
    if not refitter.refit_cuda_engine():
        raise EngineMismatchError(f"{folder}: TensorRT does not refit the plan{log.because()}")


@contextmanager
def _mapped_files(folder: Path, files: Sequence[str]) -> Iterator[dict[str, memoryview]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(mapped(folder / name)) for name in files}


@contextmanager
def _hashed(
    data: Mapping[str, memoryview], folder: Path, manifest: Manifest
) -> Iterator[Callable[[Progress | None], None]]:
    """Hash files in threads; yields what waits for them and raises ManifestError if one is not as it was."""
    with ThreadPoolExecutor(_HASH_THREADS, "hash") as pool:
        jobs = {name: pool.submit(require_hash, view, folder, name, manifest) for name, view in data.items()}
        yield lambda progress: _wait_for(jobs, progress)


def _wait_for(jobs: Mapping[str, "Future[None]"], progress: Progress | None) -> None:
    for done, (name, job) in enumerate(jobs.items()):
        if progress is not None:
            progress(f"hashing {name}", done / len(jobs))
        job.result()
