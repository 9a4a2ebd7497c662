"""Steps → logits on a GPU: TensorRT's half of the runtime.

Rings, contexts, buffers and one stream are made once, at load. In full TensorRT a decode step is one
replayed CUDA graph, which copies its tokens in and its logits out; TensorRT-RTX captures what lies between.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mistral_trt.errors import BackendError
from mistral_trt.manifest import Manifest
from mistral_trt.runtime.backend import Logits, Progress, RingArray, Step
from mistral_trt.runtime.engine_folder import read_engine_details
from mistral_trt.runtime.tensorrt.api import load_modules
from mistral_trt.runtime.tensorrt.contexts import BoundContext
from mistral_trt.runtime.tensorrt.graphs import StepGraphs
from mistral_trt.runtime.tensorrt.loaded import LoadedEngine
from mistral_trt.tensorrt_names import FULL


def open_tensorrt_backend(
    folder: Path,
    manifest: Manifest,
    *,
    plan: memoryview | None = None,
    fixed_batch: bool = False,
    exact: bool = False,
    trust_weights: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    cuda_graphs: bool = True,
    trt: Any = None,
    cudart: Any = None,
) -> "TensorRtBackend":
    """Load an engine folder that `check_machine` has found fit for this machine.

    External weights are hashed while they go into the engine: the caller need not.
    plan: the bytes of model.plan if they were compared with the manifest already; None compares them here.
    fixed_batch, exact: see `TensorRtBackend`.  trust_weights: do not compare the weights' hashes.
    cache_dir: where TensorRT-RTX keeps compiled kernels, None for the user's cache folder.
    cuda_graphs: False runs every step without.  trt, cudart: the modules, imported if not given.
    Raises MissingDependencyError, ManifestError for an altered folder, EngineMismatchError where it does not
    fit this machine, BackendError where CUDA or TensorRT fails.
    """
    trt, cudart = load_modules(read_engine_details(manifest).flavor, trt, cudart)
    engine = LoadedEngine(
        trt,
        cudart,
        folder,
        manifest,
        plan=plan,
        cache_dir=cache_dir,
        trust_weights=trust_weights,
        progress=progress,
    )
    return TensorRtBackend(engine, cuda_graphs=cuda_graphs, fixed_batch=fixed_batch, exact=exact)


class TensorRtBackend:
    """A `Backend` on a GPU: the execution contexts of a loaded engine, which it closes, and captured steps.

    exact: every step runs in the kernels that were compiled for its shape, so the same call gives the same
    bits.  fixed_batch: exact, and decode steps are of max_batch_size rows and no others: a row's logits
    depend on that row alone.
    One thread calls it at a time; it need not be always the same one. Two of them may share an engine and its
    rings, one with and one without CUDA graphs, if they take turns and neither is refitted.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        *,
        cuda_graphs: bool = True,
        fixed_batch: bool = False,
        exact: bool = False,
    ) -> None:
        self.contract = engine.contract
        self._loaded, self._cuda, self._rings = engine, engine.cuda, engine.rings
        self._buffers = engine.buffers
        self._graphs = StepGraphs(engine.cuda)
        self._cuda_graphs, self._exact = cuda_graphs, exact or fixed_batch
        rows = engine.contract.max_batch_size
        self._batches = [rows] if fixed_batch else decode_batches(rows)
        self._decode: dict[int, BoundContext] = {}
        self._prefill: BoundContext | None = None
        self._dead: str | None = None
        self._ready = False
        engine.before_closing(self._drop_contexts)
        try:
            self._make_contexts()
        except BaseException:
            self.close()
            raise

    @property
    def ready(self) -> bool:
        """Whether every decode batch has been run and captured, and nothing has failed for good since."""
        return self._ready and self._dead is None and not self._loaded.closed

    def warm_up(self, progress: Progress | None = None) -> None:
        """Run every shape that serving repeats, capture every decode step, and keep the compiled kernels.

        Call it before the first sequence: the rings are zero afterwards.
        """
        chunks = sorted({1, self.contract.ring.prefill_chunk})
        calls = [(f"{batch} rows", partial(self._warm_decode, batch)) for batch in self._batches]
        calls += [(f"chunks of {new}", partial(self._warm_prefill, new)) for new in chunks]
        with self._alive():
            for done, (what, call) in enumerate(calls):
                if progress is not None:
                    progress(f"warming up {what}", done / len(calls))
                call()
            self._rings.clear()
            if self._loaded.kernels is not None:
                self._loaded.kernels.save()
        self._ready = True

    def run(self, step: Step) -> Logits:
        """Run one step and update the rings of its rows in place.  Returns float32 [B, N, V], a copy.

        A step of S = 1 at row 0 is a decode step, of 1, 2, 4, …, max_batch_size rows (of the last alone with
        fixed_batch); any other is a prefill of one row.
        Raises BackendError, fatal after a CUDA error that sticks.
        """
        with self._alive():
            batch, count = step.logits_index.shape
            new = step.input_ids.shape[1]
            if new == count == 1 and step.first_row == 0 and batch in self._decode:
                self._run_decode(step, batch)
            elif batch == 1:
                self._run_prefill(step, new, count)
            else:
                raise BackendError(
                    f"expected a decode step of {list(self._decode)} rows from row 0 or a prefill of one, "
                    f"found {batch} rows of {new} tokens from row {step.first_row}"
                )
            self._cuda.wait()
            return self._buffers.read_logits(batch, count)

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        """Copies of one row's rings, keys and values of layer 0, then layer 1, …: [K, R, D] each.

        The numbers of a bf16 engine are uint16, the same bits.
        """
        with self._alive():
            return self._rings.read_row(row)

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        """Overwrite one row's rings; None zeroes them."""
        with self._alive():
            self._rings.write_row(row, rings)

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite the rings of row `target` with those of row `source`, on the GPU."""
        with self._alive():
            self._rings.copy_row(source, target)

    def refit(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        trust_weights: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Exchange the weights for those of another folder with the same plan (`mistral-trt refit`).

        Every CUDA graph is dropped and every ring zeroed; `warm_up` captures anew. For another plan raises
        EngineMismatchError, with nothing changed. After any other error the backend cannot be run.
        """
        with self._alive():
            self._loaded.require_same_plan(folder, manifest)
            self._ready = False
            self._dead = f"the weights of {folder} did not go into the engine whole"
            self._drop_contexts()
            self._loaded.refit(folder, manifest, trust_weights=trust_weights, progress=progress)
            self._make_contexts()
            self._rings.clear()
            self._dead = None

    def close(self) -> None:
        """Give everything back, in the reverse of the order it was taken in; again, it does nothing."""
        if self.ready and self._loaded.kernels is not None:
            self._loaded.kernels.save()  # those for prefill have been compiled since, one by one
        self._loaded.close()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Refuse what comes after a fatal error, and notice one; after any error nothing is left running."""
        if self._dead is not None or self._loaded.closed:
            raise BackendError(self._dead or "the backend is closed; load the engine again", fatal=True)
        try:
            self._cuda.use()
            yield
        except BaseException as error:
            # TensorRT says only that it failed; what failed on the GPU is known once the stream is empty.
            fault = self._fault(error)
            if fault is not None:
                self._dead = str(fault)
            if fault is None or fault is error or not isinstance(error, Exception):
                raise
            raise fault from error

    def _fault(self, error: BaseException) -> BackendError | None:
        """The fatal error behind `error`, once the stream is empty; None if there is none."""
        if isinstance(error, BackendError) and error.fatal:
            return error
        try:
            self._cuda.wait()
        except BackendError as found:
            return found if found.fatal else None
        return None

    def _make_contexts(self) -> None:
        """One for each decode batch, bound for good, and one for prefill, bound anew as it is used."""
        maker = self._loaded.context_maker(cuda_graphs=self._cuda_graphs, eager_prefill=self._exact)
        for batch in self._batches:
            self._decode[batch] = maker.make("decode")
            self._bind(self._decode[batch], self.contract.decode_shape(batch), 0)
        self._prefill = maker.make("prefill")

    def _drop_contexts(self) -> None:
        """Graphs before the contexts that they were captured from."""
        self._graphs.drop()
        self._decode.clear()
        self._prefill = None

    def _bind(self, context: BoundContext, sizes: dict[str, int], first_row: int) -> None:
        context.bind(sizes, self._buffers.inputs, self._rings.at_row(first_row), self._buffers.logits)

    def _run_decode(self, step: Step, batch: int) -> None:
        self._buffers.fill(step)
        if batch in self._graphs:
            self._graphs.launch(batch)
        else:
            self._enqueue(self._decode[batch], batch, 1, 1)

    def _run_prefill(self, step: Step, new: int, count: int) -> None:
        assert self._prefill is not None
        self._buffers.fill(step)
        self._bind(self._prefill, {"B": 1, "S": new, "N": count}, step.first_row)
        self._enqueue(self._prefill, 1, new, count)

    def _enqueue(self, context: BoundContext, batch: int, new: int, count: int) -> None:
        """A whole step, copies included: this is what a graph captures."""
        self._buffers.upload(batch, new, count)
        context.enqueue()
        self._buffers.download(batch, count)

    def _warm_decode(self, batch: int) -> None:
        """Run, capture where TensorRT does not do it itself, and run what was captured."""
        step = _blank(batch, 1)
        self._run_decode(step, batch)
        self._cuda.wait()
        by_hand = self._loaded.details.flavor == FULL and self._cuda_graphs
        if by_hand and batch not in self._graphs:
            self._graphs.capture(batch, partial(self._enqueue, self._decode[batch], batch, 1, 1))
        self._run_decode(step, batch)
        self._cuda.wait()

    def _warm_prefill(self, new: int) -> None:
        self._run_prefill(_blank(1, new), new, 1)
        self._cuda.wait()


def decode_batches(max_batch_size: int) -> list[int]:
    """1, 2, 4, … and max_batch_size.  6 -> 1 2 4 6"""
    powers = (2**i for i in range(max_batch_size.bit_length()))
    return sorted({*powers, max_batch_size})


def _blank(batch: int, new: int) -> Step:
    """A step of `new` zero tokens from position 0, logits for the last."""
    positions = np.tile(np.arange(new, dtype=np.int64), (batch, 1))
    return Step(np.zeros_like(positions), positions, np.full((batch, 1), new - 1, np.int64), 0)
