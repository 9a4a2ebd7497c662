"""Engine folder + GPU → the engine with its weights, the rings, and the memory that steps need.

What is taken is given back in the reverse order, also when loading fails halfway.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mistral_trt.errors import EngineMismatchError
from mistral_trt.manifest import PLAN_NAME, Manifest
from mistral_trt.runtime.backend import Progress
from mistral_trt.runtime.engine_folder import EngineDetails, read_engine_details
from mistral_trt.runtime.tensorrt.buffers import StepBuffers
from mistral_trt.runtime.tensorrt.contexts import ContextMaker
from mistral_trt.runtime.tensorrt.cuda import Cuda, Gpu
from mistral_trt.runtime.tensorrt.kernel_cache import KernelCache, cache_path
from mistral_trt.runtime.tensorrt.log import tensorrt_log
from mistral_trt.runtime.tensorrt.memory import demand, require_memory
from mistral_trt.runtime.tensorrt.plan import load_plan
from mistral_trt.runtime.tensorrt.refit import refit
from mistral_trt.runtime.tensorrt.rings import DeviceRings
from mistral_trt.tensorrt_names import RTX


class LoadedEngine:
    """An engine on the GPU, ready for execution contexts.

    plan, cache_dir, trust_weights, progress: see `open_tensorrt_backend`, also for what it raises.
    kernels: TensorRT-RTX's compiled kernels, None for full TensorRT.
    """

    def __init__(
        self,
        trt: Any,
        cudart: Any,
        folder: Path,
        manifest: Manifest,
        *,
        plan: memoryview | None = None,
        cache_dir: Path | None = None,
        trust_weights: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.contract, self.folder, self.manifest = manifest.contract, folder, manifest
        self.details = read_engine_details(manifest)
        self.cuda = Cuda(cudart)
        self.kernels: KernelCache | None = None
        self._trt, self._log = trt, tensorrt_log(trt)
        self._plan: Any = None
        self.closed = False
        self._resources = ExitStack()
        try:
            gpu = self.cuda.gpu()
            _require_capability(gpu, folder, self.details)
            self.cuda.open_stream()
            self._resources.callback(self.cuda.close_stream)
            self._load_plan(plan, trust_weights, progress)
            self._allocate()
            if self.details.flavor == RTX:
                self._open_kernels(cache_dir, gpu)
        except BaseException:
            self.close()
            raise

    def context_maker(self, *, cuda_graphs: bool, eager_prefill: bool) -> ContextMaker:
        """What makes execution contexts of this engine."""
        return ContextMaker(
            self._trt,
            self._plan.engine,
            self.cuda,
            self._log,
            self.contract,
            flavor=self.details.flavor,
            activations=self._activations,
            cuda_graphs=cuda_graphs,
            eager_prefill=eager_prefill,
            cache=self.kernels.cache if self.kernels else None,
        )

    def refit(
        self, folder: Path, manifest: Manifest, *, trust_weights: bool, progress: Progress | None
    ) -> None:
        """Exchange the weights for those of a folder that `require_same_plan` accepts."""
        self._fill_weights(folder, manifest, trust_weights, progress)
        self.folder, self.manifest = folder, manifest

    def require_same_plan(self, folder: Path, manifest: Manifest) -> None:
        """Raise EngineMismatchError unless only the weights of that folder are others."""
        theirs, ours = manifest.contract, self.contract
        same = (
            manifest.files[PLAN_NAME].sha256 == self.manifest.files[PLAN_NAME].sha256
            and self.details.weights == read_engine_details(manifest).weights == "external"
            and (theirs.ring, theirs.precision, theirs.max_batch_size)
            == (ours.ring, ours.precision, ours.max_batch_size)
        )
        if not same:
            raise EngineMismatchError(
                f"expected a folder with the plan of {self.folder} and external weights, found {folder}; "
                f"make one with: mistral-trt refit {self.folder} --from ONNX_DIR --out DIR"
            )

    def before_closing(self, give_back: Callable[[], None]) -> None:
        """Call `give_back` before anything is given back that was taken until now."""
        self._resources.callback(give_back)

    def close(self) -> None:
        """Give everything back; again, it does nothing."""
        self.closed = True
        self.cuda.settle()
        self._resources.close()

    def _load_plan(self, plan: memoryview | None, trust_weights: bool, progress: Progress | None) -> None:
        if progress is not None:
            progress("loading the plan", 0.0)
        self._plan = load_plan(self._trt, self._log, self.folder, self.manifest, plan=plan)
        self._resources.callback(setattr, self, "_plan", None)
        if self.details.weights == "external":
            self._fill_weights(self.folder, self.manifest, trust_weights, progress)

    def _fill_weights(
        self, folder: Path, manifest: Manifest, trust_weights: bool, progress: Progress | None
    ) -> None:
        engine, log = self._plan.engine, self._log
        refit(self._trt, engine, log, folder, manifest, trust_weights=trust_weights, progress=progress)

    def _allocate(self) -> None:
        """Rings, step buffers and the contexts' memory, if there is room for all of it."""
        cuda, contract = self.cuda, self.contract
        size = self._plan.engine.device_memory_size_v2
        require_memory(demand(contract, size), cuda.free_bytes(), self.folder, self.manifest)
        self.rings = DeviceRings(cuda, contract, self._resources)
        self.buffers = StepBuffers(cuda, contract, self._resources)
        address = cuda.allocate(max(size, 1), "activations")
        self._resources.callback(cuda.release, "cudaFree", address)
        self._activations = (address, size)

    def _open_kernels(self, cache_dir: Path | None, gpu: Gpu) -> None:
        plan_sha256 = self.manifest.files[PLAN_NAME].sha256
        path = cache_path(cache_dir, plan_sha256, gpu, self._trt.__version__)
        self.kernels = KernelCache(self._plan.engine, path)
        self._resources.callback(setattr, self, "kernels", None)
        self.kernels.load()


def _require_capability(gpu: Gpu, folder: Path, details: EngineDetails) -> None:
    """The GPU that CUDA uses may be another than the first that nvidia-smi lists."""
    if gpu.compute_capability not in details.compute_capabilities:
        raise EngineMismatchError(
            f"{folder} was built for compute capability {' or '.join(details.compute_capabilities)}, and "
            f"CUDA uses the {gpu.name} ({gpu.compute_capability}) here; choose the GPU with "
            "CUDA_VISIBLE_DEVICES"
        )
