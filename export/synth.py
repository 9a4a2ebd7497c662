"""A named configuration → a checkpoint of seeded random weights in the hub's layout, for scale tests.

Every tensor is drawn from a stream of its own, seeded by the seed and its name and by nothing else: a model
of 4 layers holds the first 4 layers of the 32, however many files they lie in. Sixteen random bits pick one
of 65536 evenly spaced quantiles of the tensor's distribution, so the values of one seed are the same in
every dtype but for rounding, and drawing them is faster than a disk takes them.
"""

import argparse
import hashlib
import json
import math
import shutil
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from mistral_trt.artifact import new_artifact, require_space
from mistral_trt.config import ModelConfig
from mistral_trt.contract import DTYPE_BYTES
from mistral_trt.errors import ConfigError, MissingDependencyError, require
from mistral_trt.export.tensor_files import DTYPES
from mistral_trt.manifest import describe_files
from mistral_trt.progress import quiet, track

CONFIGS = Path(__file__).parent / "configs"
ORIGIN = "ORIGIN.json"
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MAX_SHARD_BYTES = 5_000_000_000
TOKENIZERS = {
    "mistral-7b-v0.1": "tokenizer.model.v1",
    "mistral-7b-v0.2": "tokenizer.model.v1",
    "mistral-7b-v0.3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-nemo-12b": "tekken_240718.json",
}
"""Configuration → its tokenizer's file in the package mistral-common."""

_STD = 0.02
_PIECE_ELEMENTS = 1 << 20
_PIECES_AHEAD = 4
_SPARE_BYTES = 64 << 20

Bits = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Draw:
    """One tensor to be: its place in the file and the table its values come from."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    std: float | None
    """Of a normal distribution; None for a norm's weight, uniform in [0.5, 1.5]."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


def write_synthetic(
    config: Mapping[str, Any],
    out: Path,
    *,
    layers: int | None = None,
    dtype: str = "bf16",
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Path | None = None,
    source: str = "mistral-trt synth",
) -> None:
    """Write a checkpoint in the shapes of `config`, the content of a `config.json`, to `out`, all or nothing.

    layers: only the first so many.  dtype: bf16, fp16 or fp32.  max_shard_bytes: of tensors in one file.
    tokenizer: copied as `tekken.json` (a .json file) or `tokenizer.model`.  source: goes into ORIGIN.json.
    Raises ConfigError, or ArtifactError if `out` is in the way or the disk too small.
    """
    if dtype not in PRECISIONS:
        raise ConfigError(f"dtype must be one of {', '.join(PRECISIONS)}, found {dtype!r}")
    if layers is not None and layers < 1:
        raise ConfigError(f"--layers must be at least 1, found {layers}")
    depth = ModelConfig.from_huggingface(config).num_hidden_layers
    raw = {**config, "num_hidden_layers": layers or depth, "torch_dtype": PRECISIONS[dtype]}
    shards = plan_shards(raw, dtype=PRECISIONS[dtype], depth=depth, max_shard_bytes=max_shard_bytes)
    require_space(
        out, total_bytes(shards) + _SPARE_BYTES, "free some, choose another --out or fewer --layers"
    )
    with new_artifact(out, ORIGIN) as folder:
        hashes = write_shards(folder, shards, seed)
        write_texts(folder, raw, shards)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / tokenizer_name(tokenizer))
        origin = {
            "model": f"random weights in Mistral's shapes, {layers or depth} layers, {dtype}, seed {seed}",
            "licence": "weights: random numbers; tokenizer: Apache-2.0 (Mistral AI's mistral-common)",
            "source": source,
            "files": {name: entry.sha256 for name, entry in describe_files(folder, hashes).items()},
        }
        write_json(folder / ORIGIN, origin)


def plan_shards(
    raw: Mapping[str, Any], *, dtype: str, depth: int, max_shard_bytes: int
) -> dict[str, list[Draw]]:
    """File name → its tensors: files are filled in the model's order and sorted by name, as on the hub.

    depth: layers of the whole model, by which projections into the residual stream are scaled.
    """
    config = ModelConfig.from_huggingface(raw)
    shards: list[list[Draw]] = [[]]
    room = max_shard_bytes
    for name, shape in model_shapes(config).items():
        draw = Draw(name, shape, dtype, _std(name, depth))
        if draw.bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(draw)
        room -= draw.bytes
    if len(shards) == 1:
        return {"model.safetensors": sorted(shards[0], key=lambda draw: draw.name)}
    return {
        f"model-{i:05}-of-{len(shards):05}.safetensors": sorted(shard, key=lambda draw: draw.name)
        for i, shard in enumerate(shards, 1)
    }


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the order of transformers' state dict."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def total_bytes(shards: Mapping[str, list[Draw]]) -> int:
    return sum(draw.bytes for shard in shards.values() for draw in shard)


def _std(name: str, depth: int) -> float | None:
    """Standard deviation of a tensor, the residual ones scaled as GPT-2's; None for a norm."""
    if name.endswith("norm.weight"):
        return None
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return _STD / math.sqrt(2 * depth) if residual else _STD


# ---------------------------------------------------------------- values


def pieces(draw: Draw, seed: int) -> Iterator[Bits]:
    """The tensor's values as the bits of its dtype, a megabyte or so at a time, the same ones every time."""
    digest = hashlib.sha256(f"{seed} {draw.name}".encode()).digest()
    stream = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest)))
    table = quantiles(draw.std, draw.dtype)
    for start in range(0, draw.elements, _PIECE_ELEMENTS):
        count = min(_PIECE_ELEMENTS, draw.elements - start)
        words = stream.random_raw(-(-count // 4)).astype("<u8", copy=False)
        yield np.take(table, words.view("<u2")[:count], mode="wrap")


@cache
def quantiles(std: float | None, dtype: str) -> Bits:
    """65536 evenly spaced quantiles, ascending: normal with this std, or (None) uniform in [0.5, 1.5]."""
    levels = (np.arange(1 << 16) + 0.5) / (1 << 16)
    if std is None:
        return _bits(levels + 0.5, dtype)
    inverse = NormalDist(0.0, std).inv_cdf
    return _bits(np.array([inverse(level) for level in levels.tolist()]), dtype)


def _bits(values: npt.NDArray[np.float64], dtype: str) -> Bits:
    """Float64, by way of float32 → the bits of a dtype, little endian, rounded to nearest even."""
    exact = values.astype(np.float32)
    if dtype != "bfloat16":
        size = DTYPE_BYTES[dtype]
        return exact.astype(f"<f{size}").view(f"<u{size}")
    bits = exact.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


# ---------------------------------------------------------------- files


def write_shards(folder: Path, shards: Mapping[str, list[Draw]], seed: int) -> dict[str, str]:
    """Write the safetensors files; return the SHA-256 of each. Values are drawn in a thread of their own."""
    hashes = {}
    every = (piece for shard in shards.values() for draw in shard for piece in pieces(draw, seed))
    with track("weights", total_bytes(shards), unit="bytes") as advance, closing(ahead(every)) as drawn:
        for name, shard in shards.items():
            hashes[name] = _write_shard(folder / name, shard, drawn, advance)
    return hashes


def _write_shard(path: Path, shard: list[Draw], drawn: Iterator[Bits], advance: Callable[[int], None]) -> str:
    head = header(shard)
    digest = hashlib.sha256(head)
    left = sum(draw.bytes for draw in shard)
    with path.open("wb", buffering=0) as file:
        file.write(head)
        while left:
            piece = next(drawn).data.cast("B")
            _write_all(file.write, piece)
            digest.update(piece)
            advance(len(piece))
            left -= len(piece)
    return digest.hexdigest()


def _write_all(write: Callable[[memoryview], int | None], piece: memoryview) -> None:
    while piece:
        piece = piece[write(piece) :]


def ahead(items: Iterator[Bits]) -> Generator[Bits, None, None]:
    """The same items, a few of them made before they are asked for."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        waiting = deque(worker.submit(next, items, None) for _ in range(_PIECES_AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(worker.submit(next, items, None))
            yield item


def header(shard: list[Draw]) -> bytes:
    """What a safetensors file starts with (see tensor_files.py), as the safetensors package writes it."""
    stored = {ours: theirs for theirs, ours in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for draw in shard:
        start, end = end, end + draw.bytes
        entries[draw.name] = {
            "dtype": stored[draw.dtype],
            "shape": list(draw.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_texts(folder: Path, raw: Mapping[str, Any], shards: Mapping[str, list[Draw]]) -> None:
    """`config.json`, `generation_config.json` and, for several files, their index."""
    write_json(folder / "config.json", raw)
    kept = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "transformers_version") if key in raw}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **kept})
    if len(shards) > 1:
        places = {draw.name: name for name, shard in shards.items() for draw in shard}
        index = {"metadata": {"total_size": total_bytes(shards)}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def tokenizer_name(tokenizer: Path) -> str:
    """What the hub calls a tokenizer file of this kind."""
    return "tekken.json" if tokenizer.suffix == ".json" else "tokenizer.model"


# ---------------------------------------------------------------- the command


def named_config(name: str) -> dict[str, Any]:
    """The `config.json` of a configuration known here. Raises ConfigError that lists them."""
    known = sorted(path.stem for path in CONFIGS.glob("*.json"))
    if name not in known:
        raise ConfigError(f"no configuration is called {name!r}; known: {', '.join(known)}")
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def packaged_tokenizer(name: str) -> Path:
    """A configuration's tokenizer in mistral-common. Raises MissingDependencyError if it is not there."""
    package = require("mistral_common", "synth")
    path = Path(str(package.__file__)).parent / "data" / TOKENIZERS[name]
    if not path.is_file():
        raise MissingDependencyError(
            f"the mistral-common installed here has no {TOKENIZERS[name]}; "
            "run: pip install --upgrade 'mistral-trt[synth]'"
        )
    return path


def synth(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "mistral-trt synth",
        description="A named configuration → a checkpoint of seeded random weights in the hub's layout.",
    )
    names = ", ".join(TOKENIZERS)
    parser.add_argument("--config", required=True, metavar="NAME", help=names)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint to write")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="bf16")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    args = parser.parse_args(argv)
    if args.quiet:
        quiet()
    layers = f" --layers {args.layers}" if args.layers else ""
    write_synthetic(
        named_config(args.config),
        args.out,
        layers=args.layers,
        dtype=args.dtype,
        seed=args.seed,
        tokenizer=packaged_tokenizer(args.config),
        source=f"mistral-trt synth --config {args.config}{layers} --dtype {args.dtype} --seed {args.seed}",
    )
    print(args.out)
    return 0
