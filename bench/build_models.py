"""A named configuration → ONNX folders of so many layers in each precision, random weights, little memory.

fp16   a synthetic checkpoint, whose files the ONNX folder then links
int8   the same, calibrated on next to nothing: stored formats of INT8 lack the scales of activations
int4   a checkpoint that is stored quantized (compressed-tensors), written here a layer at a time with random
       codes, which export takes over as they are
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mistral_trt.config import ModelConfig
from mistral_trt.export.synth import model_shapes, named_config

CLI = (sys.executable, "-m", "mistral_trt.cli")
PRECISIONS = ("fp16", "int8", "int4")
CALIBRATION = ("--calibration-samples", "1", "--calibration-tokens", "8")
BLOCK = 128
STORED_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": BLOCK,
            },
        }
    },
}


def onnx_folder(config: str, precision: str, layers: int, scratch: Path) -> Path:
    """Export it under `scratch`; the checkpoint is gone again when this returns."""
    checkpoint, out = scratch / f"checkpoint-{precision}-{layers}", scratch / f"{precision}-{layers}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    try:
        if precision == "int4":
            write_stored_int4(named_config(config), layers, checkpoint)
        else:
            options = ("--layers", str(layers), "--dtype", "fp16", "--quiet")
            run("synth", "--config", config, "--out", str(checkpoint), *options, scratch=scratch)
        more = CALIBRATION if precision == "int8" else ()
        options = ("--precision", precision, "--prefill-chunk", "256", "--quiet")
        run("export", str(checkpoint), "--out", str(out), *options, *more, scratch=scratch)
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return out


def run(*words: str, scratch: Path) -> None:
    """One command of mistral-trt that remembers nothing outside `scratch`."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(scratch / "cache")}
    done = subprocess.run([*CLI, *words], env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"mistral-trt {words[0]} ended with status {done.returncode}; see above")


def write_stored_int4(raw: dict[str, Any], layers: int, folder: Path, seed: int = 0) -> None:
    """A checkpoint of random codes in the shapes of `raw`, a config.json: a file for each layer."""
    config = ModelConfig.from_huggingface({**raw, "num_hidden_layers": layers})
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in model_shapes(config).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, shapes in files.items():
        tensors: dict[str, np.ndarray] = {}
        for name, shape in shapes.items():
            tensors |= stored_tensors(name, shape, rng)
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    stated = {**raw, "num_hidden_layers": layers, "quantization_config": STORED_INT4}
    (folder / "config.json").write_text(json.dumps(stated))


def stored_tensors(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What is stored of a weight: codes and scales of a layer's linear, float16 of anything else.

    Scales are all different: TensorRT stores equal ones once.
    """
    if len(shape) == 1 or not name.startswith("model.layers."):
        return {name: rng.standard_normal(shape, np.float32).astype(np.float16) * np.float16(0.02)}
    (rows, columns), module = shape, name.removesuffix(".weight")
    words = rng.integers(-(2**31), 2**31, (rows, columns // 8), dtype=np.int32)
    scales = rng.uniform(0.001, 0.004, (rows, columns // BLOCK)).astype(np.float16)
    return {
        f"{module}.weight_packed": words,
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": np.array(shape, np.int64),
    }
