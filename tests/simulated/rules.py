"""What the doubles enforce, and where each rule comes from.

A rule whose `words` stand in the documentation of an installed package is checked against that documentation
by `test_simulated_rules`; the others name the header of NVIDIA/TensorRT (a892d222, 11.1) or the page.
"""

from dataclasses import dataclass

_HEADER = "NvInferRuntime.h"
_BEST_PRACTICES = "docs.nvidia.com/deeplearning/tensorrt-rtx/latest/performance/best-practices.html"


class RuleBroken(Exception):
    """A use whose outcome NVIDIA leaves undefined: the real thing may crash, or answer wrongly in silence."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {RULES[rule].says} ({RULES[rule].source}); {detail}")
        self.rule = rule


@dataclass(frozen=True)
class Rule:
    """source: `module:attribute` of an installed package, or a header with its line, or a page.

    words: a few of the source's own, by which it can be found again; for an installed package, exact.
    """

    says: str
    source: str
    words: str


RULES = {
    # --- memory -------------------------------------------------------------------------------------------
    "memory-not-cleared": Rule(
        "fresh GPU memory holds anything; here NaN", "cudart:cudaMalloc", "The memory is not cleared"
    ),
    "memory-runs-out": Rule(
        "an allocation that does not fit returns cudaErrorMemoryAllocation",
        "cudart:cudaMalloc",
        "returns :py:obj:`~.cudaErrorMemoryAllocation` in case of failure",
    ),
    "freed-once": Rule(
        "memory is freed once", "cudart:cudaFree", "has already been called before, an error is returned"
    ),
    "freed-by-its-kind": Rule(
        "host memory is not freed as GPU memory, nor the other way",
        "cudart:cudaFreeHost",
        "must have been returned by a previous call to :py:obj:`~.cudaMallocHost()` or",
    ),
    "range-allocated": Rule(
        "a copy or clear that is not inside an allocation returns cudaErrorInvalidValue",
        "cudart:cudaError_t.cudaErrorInvalidValue",
        "not within an acceptable range of values",
    ),
    "copy-direction": Rule(
        "source and target of a copy lie where its kind says",
        "cudart:cudaMemcpyAsync",
        "that do not match the direction of the copy results in an undefined behavior",
    ),
    # --- streams ------------------------------------------------------------------------------------------
    "copy-later": Rule(
        "a copy is done when the stream gets to it, not when it is asked for",
        "cudart:cudaMemcpyAsync",
        "so the call may return before the copy is complete",
    ),
    "memory-in-use": Rule(
        "what enqueued work reads or writes stays allocated until the stream is synchronized",
        "trt:IExecutionContext.execute_async_v3",
        "releasing memory that has been registered for the tensors before stream synchronization",
    ),
    "stream-alive": Rule(
        "a stream that was destroyed is no stream", "cudart:cudaStreamSynchronize", "InvalidResourceHandle"
    ),
    "error-sticks": Rule(
        "after a fault on the GPU every call returns it",
        "cudart:cudaError_t.cudaErrorIllegalAddress",
        "any further CUDA work will return the same error",
    ),
    # --- capture ------------------------------------------------------------------------------------------
    "capture-not-run": Rule(
        "what is captured is not executed",
        "cudart:cudaStreamBeginCapture",
        "will not be executed, but will instead be captured into a graph",
    ),
    "capture-once": Rule(
        "a stream that captures cannot begin to",
        "cudart:cudaStreamBeginCapture",
        "it may only be initiated if the stream is not already in capture mode",
    ),
    "capture-own-stream": Rule(
        "the default stream cannot be captured",
        "cudart:cudaStreamBeginCapture",
        "Capture may not be initiated if `stream` is :py:obj:`~.cudaStreamLegacy`",
    ),
    "capture-ended-where-begun": Rule(
        "only a stream that captures can end its capture",
        "cudart:cudaStreamEndCapture",
        "Capture must have been initiated on `stream`",
    ),
    "capture-one-thread": Rule(
        "a thread-local capture is ended by the thread that began it",
        "cudart:cudaStreamEndCapture",
        "this call must be from the same thread as :py:obj:`~.cudaStreamBeginCapture`",
    ),
    "capture-no-wait": Rule(
        "a stream that captures cannot be waited for",
        "cudart:cudaError_t.cudaErrorStreamCaptureUnsupported",
        "The operation is not permitted when the stream is capturing",
    ),
    "capture-no-allocation": Rule(
        "a thread that captures does not allocate or free",
        "cudart:cudaThreadExchangeStreamCaptureMode",
        "it is prohibited from potentially unsafe API calls",
    ),
    "capture-invalidated": Rule(
        "a capture in which a rule was broken gives no graph",
        "cudart:cudaStreamEndCapture",
        "due to a violation of the rules of stream capture, then a NULL graph will be returned",
    ),
    "capture-pinned": Rule(
        "a captured copy has page-locked host memory: with pageable memory a copy waits",
        "docs.nvidia.com/cuda/archive/12.2.0/cuda-runtime-api/api-sync-behavior.html",
        "from device memory to pageable host memory, the function will return only once",
    ),
    "graph-alive": Rule(
        "a graph that was destroyed cannot be launched", "cudart:cudaGraphLaunch", "cudaErrorInvalidValue"
    ),
    # --- execution contexts -------------------------------------------------------------------------------
    "address-aligned": Rule(
        "a tensor's address is a multiple of 256",
        f"{_HEADER}:4378 (setTensorAddress)",
        "at least 256-byte alignment",
    ),
    "address-set": Rule(
        "every input and output has an address before a step",
        f"{_HEADER}:4360 (setTensorAddress)",
        "each input must have a non-null address",
    ),
    "buffer-large-enough": Rule(
        "a tensor's buffer holds all of it; past its end the GPU faults",
        f"{_HEADER}:4368 (setTensorAddress)",
        "a device buffer of sufficient size and alignment",
    ),
    "alias-one-memory": Rule(
        "a present lies at the very address of its past",
        "trt:ICudaEngine.get_aliased_input_tensor",
        "the output tensor may share the same memory buffer as the input tensor",
    ),
    "update-inside-cache": Rule(
        "a cache update past the ring's end is dropped in silence",
        "NvInfer.h:9715 (addKVCacheUpdate)",
        "Out-of-bound updates will be ignored silently",
    ),
    "shape-in-profile": Rule(
        "an input's shape lies in the profile of its context",
        f"{_HEADER}:4130 (setInputShape)",
        "Each dimension must agree with the network dimension",
    ),
    "shapes-given": Rule(
        "every input's shape is known before a step",
        "trt:IExecutionContext.infer_shapes",
        "return the names of any tensors that are insufficiently specified",
    ),
    "profile-before-shapes": Rule(
        "another profile forgets the shapes",
        "trt:IExecutionContext",
        "will invalidate all dynamic bindings for the current execution context",
    ),
    "profile-synchronized": Rule(
        "the stream of a profile's change is synchronized before a step on another",
        "trt:IExecutionContext.set_optimization_profile_async",
        "synchronization between the profile sync stream and the enqueue stream",
    ),
    "stream-not-default": Rule(
        "steps do not go to the default stream",
        "trt:IExecutionContext.execute_async_v3",
        "Please use non-default stream instead",
    ),
    "activations-given": Rule(
        "a context whose memory the user manages gets it, 256-aligned and large enough, before a step",
        "trt:IExecutionContext.set_device_memory",
        "This must be at least as large as CudaEngine.get_device_memory_size_v2",
    ),
    "activations-in-turn": Rule(
        "contexts that share their memory do not run beside each other",
        "trt:IExecutionContext.set_device_memory",
        "This includes using the same memory for a parallel execution context",
    ),
    "device-of-the-thread": Rule(
        "a thread that runs an engine uses the GPU that the engine was loaded on",
        "docs.nvidia.com/deeplearning/tensorrt/11.4.0/reference/troubleshooting-faq.html",
        "ensure that the thread is associated with the correct device",
    ),
    "settings-before-context": Rule(
        "a runtime configuration is read when a context is made",
        f"{_HEADER}:2945 (IRuntimeConfig)",
        "used during execution context creation",
    ),
    # --- captured contexts --------------------------------------------------------------------------------
    "capture-after-a-step": Rule(
        "a context has run its shapes once before it is captured",
        f"{_HEADER}:4272 (setOptimizationProfileAsync)",
        "will trigger layer resource updates on the next call",
    ),
    "captured-context-untouched": Rule(
        "a context is left as it was when it was captured: one context for each graph",
        _BEST_PRACTICES,
        "best practice is to use one execution context per captured graph",
    ),
    "captured-before-refit": Rule(
        "a graph does not outlive a refit: it holds the addresses of the weights it was captured with",
        _BEST_PRACTICES,
        "specific to the input size and the locations of input and output buffers",
    ),
    # --- plans, weights and kernels -----------------------------------------------------------------------
    "plan-loads-or-none": Rule(
        "a plan that cannot be loaded gives None, and no exception",
        "trt:Runtime.deserialize_cuda_engine",
        "or None if it could not be deserialized",
    ),
    "weights-as-built": Rule(
        "a weight of another count or dtype is rejected",
        "trt:Refitter.set_named_weights",
        "The size of the weights is inconsistent with the size returned",
    ),
    "weights-complete": Rule(
        "a refit with weights missing is refused",
        "trt:Refitter.refit_cuda_engine",
        "or get_missing_weights() != 0 before the call",
    ),
    "weights-filled": Rule(
        "an engine without its weights is not run",
        "trt:BuilderFlag",
        "Strip refittable weights from the engine plan file",
    ),
    "refit-at-rest": Rule(
        "nothing of the engine is enqueued while it is refitted",
        "trt:Refitter.refit_cuda_engine",
        "The behavior is undefined if the engine has pending enqueued work",
    ),
    "weights-kept-until-refit": Rule(
        "a refit reads the weights where they lie: they stay unchanged until it returns",
        "trt:Refitter.set_named_weights",
        "Modifying the weights before :func:`refit_cuda_engine`",
    ),
    "kernels-of-this-machine": Rule(
        "a runtime cache of another machine or version is refused and changes nothing",
        "rtx:IRuntimeCache.deserialize",
        "is rejected (leaving this cache unchanged) on any mismatch",
    ),
    "kernels-in-the-background": Rule(
        "with LAZY a shape's first steps run a general kernel, whose sums end in other bits",
        "rtx:DynamicShapesKernelSpecializationStrategy",
        "use a fallback kernel till compilation is complete",
    ),
}
