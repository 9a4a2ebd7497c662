"""Every name of TensorRT's Python API that this package uses, as data: what a new version must still have.

It is the builder half; what executes an engine is listed in runtime/tensorrt/api.py. Both TensorRTs have all
of it, but for `RTX_ONLY`. Tests hold the lists to the source, both ways, and to the installed TensorRT-RTX.
"""

from mistral_trt.tensorrt_names import RTX

BUILDER: dict[str, tuple[str, ...]] = {
    "Builder": (
        "build_serialized_network_to_stream",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
    ),
    "INetworkDefinition": (
        "add_constant",
        "are_weights_marked_refittable",
        "get_input",
        "get_layer",
        "get_output",
        "mark_weights_refittable",
        "num_inputs",
        "num_layers",
        "num_outputs",
        "set_weights_name",
    ),
    "IBuilderConfig": (
        "add_optimization_profile",
        "num_compute_capabilities",
        "profiling_verbosity",
        "progress_monitor",
        "set_compute_capability",
        "set_flag",
    ),
    "IOptimizationProfile": ("set_shape",),
    "OnnxParser": ("get_error", "num_errors", "parse_from_file"),
    "ParserError": ("desc", "node_name", "node_operator"),
    "ILayer": ("get_input", "get_output", "name", "num_inputs", "num_outputs", "set_input", "type"),
    "IAttentionInputLayer": ("attention",),
    "IAttention": (
        "causal_kind",
        "decomposable",
        "get_input",
        "key_value_lengths",
        "mask",
        "name",
        "norm_op",
        "query_lengths",
        "set_input",
    ),
    "IConstantLayer": ("weights",),
    "IElementWiseLayer": ("op",),
    "ITensor": ("dtype", "name", "shape"),
    "ILogger": ("log",),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "IStreamWriter": ("write",),
    "Weights": (),
}
"""Class → members: called, read, set, or overridden by a class of ours."""

BUILDER_ENUMS: dict[str, tuple[str, ...]] = {
    "AttentionNormalizationOp": ("SOFTMAX",),
    "BuilderFlag": ("REFIT_INDIVIDUAL", "STRIP_PLAN"),
    "CausalMaskKind": ("NONE",),
    "ComputeCapability": ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    "DataType": ("BF16", "FLOAT", "FP8", "HALF", "INT4", "INT64", "INT8"),
    "ElementWiseOperation": ("PROD",),
    "LayerType": (
        "ATTENTION_INPUT",
        "CAST",
        "CONSTANT",
        "CONVOLUTION",
        "DECONVOLUTION",
        "DEQUANTIZE",
        "EINSUM",
        "ELEMENTWISE",
        "KV_CACHE_UPDATE",
        "MATRIX_MULTIPLY",
        "QUANTIZE",
        "SHUFFLE",
    ),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "ProfilingVerbosity": ("DETAILED",),
}
"""Enum → members, by attribute or by name."""

RTX_ONLY = frozenset(
    {
        "ComputeCapability",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
    }
)
"""What full TensorRT lacks: targets other than the GPU here."""

SIGNATURES = {
    "Builder.create_network": "(flags) -> INetworkDefinition",
    "Builder.build_serialized_network_to_stream": "(network, config, writer) -> bool",
    "INetworkDefinition.add_constant": "(shape, weights) -> IConstantLayer",
    "INetworkDefinition.set_weights_name": "(weights, name) -> bool",
    "INetworkDefinition.mark_weights_refittable": "(name) -> bool",
    "IBuilderConfig.add_optimization_profile": "(profile) -> int",
    "IBuilderConfig.set_compute_capability": "(compute_capability, index) -> bool",
    "IOptimizationProfile.set_shape": "(input, min, opt, max) -> None",
    "OnnxParser.parse_from_file": "(model) -> bool",
    "IAttention.set_input": "(index, tensor) -> bool",
    "ILayer.set_input": "(index, tensor) -> None",
    "IProgressMonitor.step_complete": "(phase_name, step) -> bool",
    "Weights.__init__": "(type, ptr, count) -> None",
}
"""Parameters and result of what is called with care: a refusal is a False here, and no exception."""


def listed(flavor: str) -> dict[str, tuple[str, ...]]:
    """Classes and enums with their members that a flavor has ("tensorrt" or "tensorrt-rtx")."""
    both = {**BUILDER, **BUILDER_ENUMS}
    if flavor == RTX:
        return both
    return {
        name: tuple(member for member in members if f"{name}.{member}" not in RTX_ONLY)
        for name, members in both.items()
        if name not in RTX_ONLY
    }
