"""Law: an adapter's updates and replacements, added densely, are the weights of peft's merge_and_unload."""

import copy
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralForCausalLM

from mistral_trt.errors import CheckpointError, ConfigError, MistralTrtError
from mistral_trt.export.conversion import Weight
from mistral_trt.export.lora import (
    CONFIG_NAME,
    TEXT_FILES,
    WEIGHTS_NAME,
    Adapter,
    adapters_sha256,
    apply_adapters,
    parse_lora,
)
from mistral_trt.export.lora_config import LoraSettings
from mistral_trt.export.tensor_files import StoredTensor, read_header
from tests.conftest import Folder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q0 = "model.layers.0.self_attn.q_proj"
PEFT_Q0 = f"base_model.model.{Q0}"
ROUNDING = 1e-6  # of the largest number: float32 sums of at most 64 products, in another order
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_KNOWN_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",
    "Setting `save_embedding_layers` to `True`",
    "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`",
    "lora with eva initialization used with low_cpu_mem_usage=False",
    "Model (has|with) `tie_word_embeddings=True` and",
    "The following (rank|alpha)_pattern keys did not match any targeted module",
    "You have passed exclude_modules=.* but no modules were excluded",
)


@contextmanager
def peft_warnings() -> Iterator[None]:
    """What peft says while it does what we ask of it."""
    with warnings.catch_warnings():
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def tied_base(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def fresh() -> Callable[..., MistralForCausalLM]:
    """fresh(checkpoint, rows=None) -> the model in float32, with that many rows of embeddings."""
    loaded: dict[Path, MistralForCausalLM] = {}

    def model(checkpoint: Path, rows: int | None = None) -> MistralForCausalLM:
        if checkpoint not in loaded:
            loaded[checkpoint] = MistralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        copied = copy.deepcopy(loaded[checkpoint])
        if rows is not None:
            torch.manual_seed(rows)
            copied.resize_token_embeddings(rows, mean_resizing=False)
        return copied

    return model


def train(model: MistralForCausalLM, out: Path, *, seed: int = 1, **config: Any) -> Any:
    """Save an adapter with random factors and random modules_to_save to `out`, by peft; the wrapped model."""
    torch.manual_seed(seed)
    with peft_warnings():
        wrapped = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **config}))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        wrapped.save_pretrained(str(out))
    return wrapped


def merge_by_peft(model: MistralForCausalLM, loras: Sequence[tuple[Path, float]]) -> dict[str, Tensor]:
    with peft_warnings():
        names = [f"adapter{i}" for i in range(len(loras))]
        wrapped: Any = PeftModel.from_pretrained(model, str(loras[0][0]), adapter_name=names[0])
        for name, (folder, _) in list(zip(names, loras, strict=True))[1:]:
            wrapped.load_adapter(str(folder), adapter_name=name)
        for module in wrapped.modules():
            for name, (_, scale) in zip(names, loras, strict=True):
                if isinstance(module, LoraLayer) and name in module.scaling:
                    module.scaling[name] *= scale
        merged = wrapped.merge_and_unload(adapter_names=names)
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def base_weights(checkpoint: Path) -> dict[str, Weight]:
    return {name: Weight(name, t) for name, t in read_header(checkpoint / "model.safetensors").items()}


def read(stored: StoredTensor) -> Tensor:
    """The numbers of a stored tensor, by another way than the package's."""
    data = bytearray(stored.path.read_bytes()[stored.offset : stored.offset + stored.bytes])
    return torch.frombuffer(data, dtype=getattr(torch, stored.dtype)).view(stored.shape).float()


def dense(weight: Weight) -> Tensor:
    """The weight with its updates added."""
    result = read(weight.stored)
    for update in weight.updates:
        left, right = read(update.left), read(update.right)
        result = result + update.scale * (left.T @ right.T if update.transposed else left @ right)
    return result


def merge(checkpoint: Path, loras: Sequence[tuple[Path, float]], *, tied: bool = False) -> dict[str, Weight]:
    adapters = [Adapter.open(folder, scale) for folder, scale in loras]
    return apply_adapters(base_weights(checkpoint), adapters, tied=tied)


def difference(ours: Mapping[str, Weight], peft: Mapping[str, Tensor]) -> float:
    """The largest difference of any weight, of that weight's largest number; infinite for another shape."""
    assert set(ours) == set(peft)
    worst = 0.0
    for name, weight in ours.items():
        if weight.shape != tuple(peft[name].shape):
            return math.inf
        worst = max(worst, ((dense(weight) - peft[name]).abs().max() / peft[name].abs().max()).item())
    return worst


CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "default targets": {},
    "rank-stabilised": {
        "target_modules": ["o_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
    },
    "rank and alpha by pattern": {
        "target_modules": LINEARS,
        "rank_pattern": {".*layers.1.*": 2, "layers.0.self_attn.q_proj": 3, "mlp.*": 5},
        "alpha_pattern": {"layers": 99, r"model\.layers\.1\.mlp\..*": 0.5, "q_proj": 7},
        "use_rslora": True,
    },
    "first pattern that matches": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"a": 1, "a|q_proj": 6, "q_proj": 2},
        "alpha_pattern": {"0.self_attn.q_proj": 1, "self_attn.*": 5},
    },
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer, by number": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "two layers_patterns": {
        "target_modules": ["k_proj", f"{Q0}"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "lay.*"],
    },
    "no layer left out": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "pattern of modules": {"target_modules": r".*layers\.[0-9]+\.self_attn\.(q|o)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude names": {"target_modules": LINEARS, "exclude_modules": ["layers.0.mlp.up_proj", "q_proj"]},
    "exclude a pattern": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    "a pattern matches whole names": {"target_modules": LINEARS, "exclude_modules": r"model\.layers\.1"},
    "fan_in_fan_out": {"target_modules": ["q_proj", "k_proj"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 4},
    "embedding alone, fan_in_fan_out": {"target_modules": ["embed_tokens"], "fan_in_fan_out": True},
    "lm_head": {"target_modules": ["lm_head"], "use_rslora": True},
    "embedding and lm_head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "whole modules to save": {"target_modules": LINEARS, "modules_to_save": ["mlp"]},
    "a linear to save": {"target_modules": LINEARS, "modules_to_save": ["0.self_attn.k_proj"]},
    "resized": {"target_modules": ["q_proj"], "rows": 101},
    "resized, embedding and lm_head": {"target_modules": ["embed_tokens", "lm_head"], "rows": 101},
    "resized, modules_to_save": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "rows": 101,
    },
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "eva": {"target_modules": ["q_proj"], "init_lora_weights": "eva", "eva_config": EvaConfig()},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"},
    "no task": {"target_modules": ["q_proj"], "task_type": None, "init_lora_weights": False},
    "rank of a whole square": {"target_modules": ["q_proj", "o_proj"], "r": 64},
}


@pytest.mark.parametrize("case", CASES)
def test_merging_equals_peft(case: str, base: Path, fresh: Any, tmp_path: Path) -> None:
    config = dict(CASES[case])
    rows = config.pop("rows", None)
    train(fresh(base, rows), tmp_path / "a", **config)
    loras = [(tmp_path / "a", 1.0)]
    merged = merge(base, loras)
    assert difference(merged, merge_by_peft(fresh(base, rows), loras)) <= ROUNDING
    assert difference(merged, fresh(base, rows).state_dict()) > 1e-2, "the adapter changes nothing"


def in_order(patterns: st.SearchStrategy[dict[str, int]]) -> st.SearchStrategy[dict[str, int]]:
    """Sorted, as peft saves them: in another order the first that matches is not the one it trained with."""
    return patterns.map(lambda found: dict(sorted(found.items())))


@st.composite
def lora_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any mixture of what may be mixed; some match no module, which peft refuses."""
    names = st.sampled_from(
        [*LINEARS, "embed_tokens", "lm_head", Q0, "layers.1.mlp.up_proj", "self_attn.q_proj"]
    )
    patterns = st.sampled_from(
        [
            "q_proj",
            ".*mlp.*",
            "layers.0.self_attn.[qk]_proj",
            f"^{Q0}",
            "proj",
            "lm_head|v_proj",
            r"model\..*",
        ]
    )
    config: dict[str, Any] = {
        "r": draw(st.integers(1, 9)),
        "lora_alpha": draw(st.one_of(st.integers(-3, 40), st.floats(0.1, 9))),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(in_order(st.dictionaries(patterns, st.integers(1, 9), max_size=3))),
        "alpha_pattern": draw(in_order(st.dictionaries(patterns, st.integers(-3, 20), max_size=3))),
        "target_modules": draw(
            st.one_of(
                st.lists(names, min_size=1, max_size=5, unique=True),
                st.just("all-linear"),
                st.sampled_from([r".*\.(q|v|up)_proj", r"model\.layers\.1\..*_proj|lm_head"]),
            )
        ),
        "exclude_modules": draw(st.sampled_from([None, ["v_proj", Q0], r".*layers\.1\.mlp.*"])),
        "modules_to_save": draw(
            st.sampled_from([None, None, ["norm"], ["lm_head"], ["model.norm", "embed_tokens"], ["0.mlp"]])
        ),
    }
    if isinstance(config["target_modules"], list):
        config["layers_to_transform"] = draw(st.sampled_from([None, None, 0, 1, [1], [0, 1], [7, 0]]))
    return config


@settings(max_examples=25)
@given(
    config=lora_configs(),
    scale=st.sampled_from([1.0, 0.5, -2.0, 0.0]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_merging_equals_peft_for_any_config(
    config: dict[str, Any],
    scale: float,
    dtype: str,
    base: Path,
    fresh: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any") / "a"
    try:
        train(fresh(base), folder, **config)
    except ValueError:
        assume(False)
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in load_file(folder / WEIGHTS_NAME).items()}
    save_file(tensors, folder / WEIGHTS_NAME)
    loras = [(folder, 1.0 if config["modules_to_save"] or dtype != "float32" else scale)]
    assert difference(merge(base, loras), merge_by_peft(fresh(base), loras)) <= ROUNDING


def test_two_adapters_add_up_each_at_its_scale(base: Path, fresh: Any, tmp_path: Path) -> None:
    train(fresh(base), tmp_path / "a", target_modules=["q_proj", "embed_tokens"], seed=1)
    train(fresh(base), tmp_path / "b", target_modules=["q_proj", "up_proj", "embed_tokens"], r=3, seed=2)
    loras = [(tmp_path / "a", 1.0), (tmp_path / "b", 0.5)]
    merged = merge(base, loras)
    assert difference(merged, merge_by_peft(fresh(base), loras)) <= ROUNDING
    assert [u.left.path.parent.name for u in merged[f"{Q0}.weight"].updates] == ["a", "b"]
    exchanged = merge(base, [(tmp_path / "a", 0.5), (tmp_path / "b", 1.0)])
    assert difference(exchanged, merge_by_peft(fresh(base), loras)) > 1e-2


def test_modules_to_save_of_one_adapter_and_updates_of_another(
    base: Path, fresh: Any, tmp_path: Path
) -> None:
    train(fresh(base), tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"])
    train(fresh(base), tmp_path / "b", target_modules=["q_proj", "k_proj"], seed=2)
    loras = [(tmp_path / "a", 1.0), (tmp_path / "b", -0.25)]
    assert difference(merge(base, loras), merge_by_peft(fresh(base), loras)) <= ROUNDING


def test_names_that_still_hold_the_adapters_name(base: Path, fresh: Any, tmp_path: Path) -> None:
    train(fresh(base), tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    renamed = {re.sub(r"(lora_(embedding_)?[AB])", r"\1.default", n): t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "a" / WEIGHTS_NAME)
    assert f"{PEFT_Q0}.lora_A.default.weight" in renamed
    with peft_warnings():
        wrapped: Any = PeftModel.from_pretrained(fresh(base), str(tmp_path / "a"))
        merged = wrapped.merge_and_unload().state_dict()
    assert difference(merge(base, [(tmp_path / "a", 1.0)]), merged) <= ROUNDING


def test_target_modules_null_means_what_peft_takes_for_mistral(base: Path, fresh: Any, broken: Path) -> None:
    with_config(broken, target_modules=None)
    loras = [(broken, 1.0)]
    assert difference(merge(base, loras), merge_by_peft(fresh(base), loras)) <= ROUNDING


def test_what_is_not_touched_stays_the_same_object(base: Path, adapter: Path) -> None:
    weights = base_weights(base)
    before = dict(weights)
    merged = apply_adapters(weights, [Adapter.open(adapter)], tied=False)
    assert weights == before and list(merged) == list(before)
    changed = {name for name in merged if merged[name] is not before[name]}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qv"}


def test_an_update_keeps_the_rotary_order_of_its_weight_a_replacement_does_not(
    base: Path, adapter: Path, fresh: Any, tmp_path: Path
) -> None:
    name = f"{Q0}.weight"
    weights = base_weights(base)
    weights[name] = replace(weights[name], interleaved_heads=4)
    updated = apply_adapters(weights, [Adapter.open(adapter)], tied=False)[name]
    assert updated.interleaved_heads == 4 and len(updated.updates) == 1
    train(fresh(base), tmp_path / "a", target_modules=["v_proj"], modules_to_save=["q_proj"])
    replaced = apply_adapters(weights, [Adapter.open(tmp_path / "a")], tied=False)[name]
    assert replaced.interleaved_heads == 0 and replaced.stored.path.parent == tmp_path / "a"


def test_embeddings_saved_as_they_were_are_no_replacement(
    tiny_checkpoint: Folder, fresh: Any, tmp_path: Path
) -> None:
    half = tiny_checkpoint(
        dtype="bfloat16"
    )  # fresh() loads it in float32, as peft's preparation for QLoRA does
    for name, seed in (("a", 1), ("b", 2)):
        train(fresh(half), tmp_path / name, target_modules=["embed_tokens"], seed=seed)
        assert Adapter.open(tmp_path / name).replacements[EMBEDDING].dtype == "float32"
    loras = [(tmp_path / "a", 0.5), (tmp_path / "b", 1.0)]
    merged = merge(half, loras)
    assert merged[EMBEDDING].stored.path.parent == half
    assert difference(merged, merge_by_peft(fresh(half), loras)) <= ROUNDING


def test_an_update_of_a_resized_embedding_is_scaled_alone(base: Path, fresh: Any, tmp_path: Path) -> None:
    train(fresh(base, 101), tmp_path / "a", target_modules=["embed_tokens", "lm_head"])
    loras = [(tmp_path / "a", 0.5)]
    assert difference(merge(base, loras), merge_by_peft(fresh(base, 101), loras)) <= ROUNDING


# Planted faults: the comparison above has to see them.


def test_a_factor_without_the_root_is_seen(
    base: Path, fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(fresh(base), tmp_path / "a", target_modules=["q_proj"], use_rslora=True)
    loras = [(tmp_path / "a", 1.0)]
    peft = merge_by_peft(fresh(base), loras)
    assert difference(merge(base, loras), peft) <= ROUNDING
    monkeypatch.setattr(LoraSettings, "factor", lambda self, module: self.lora_alpha / self.rank(module))
    assert difference(merge(base, loras), peft) > 1e-2


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_exchanged_factors_are_seen(target: str, tiny_checkpoint: Folder, fresh: Any, tmp_path: Path) -> None:
    square = tiny_checkpoint(vocab_size=64)
    train(fresh(square), tmp_path / "a", target_modules=[target], r=64)
    loras = [(tmp_path / "a", 1.0)]
    merged, peft = merge(square, loras), merge_by_peft(fresh(square), loras)
    assert difference(merged, peft) <= ROUNDING
    name = EMBEDDING if target == "embed_tokens" else f"{Q0}.weight"
    update = merged[name].updates[0]
    for fault in (
        replace(update, left=update.right, right=update.left),
        replace(update, transposed=not update.transposed),
        replace(update, scale=-update.scale),
    ):
        faulty = {**merged, name: replace(merged[name], updates=(fault,))}
        assert difference(faulty, peft) > 1e-2


# Tied embeddings.


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "rows": 101},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"]},
    ],
    ids=["resized", "saved together", "apart from them"],
)
def test_tied_embeddings_replaced_together_stay_one(
    config: dict[str, Any], tied_base: Path, fresh: Any, tmp_path: Path
) -> None:
    config = dict(config)
    rows = config.pop("rows", None)
    train(fresh(tied_base, rows), tmp_path / "a", **config)
    loras = [(tmp_path / "a", 1.0)]
    peft = merge_by_peft(fresh(tied_base, rows), loras)
    assert torch.equal(peft[HEAD], peft.pop(EMBEDDING))
    peft[EMBEDDING] = peft.pop(HEAD)
    merged = merge(tied_base, loras, tied=True)
    assert HEAD not in merged and difference(merged, peft) <= ROUNDING


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_tied_embeddings_changed_apart_are_refused(
    config: dict[str, Any], tied_base: Path, fresh: Any, tmp_path: Path
) -> None:
    train(fresh(tied_base), tmp_path / "a", **config)
    with pytest.raises(ConfigError, match="apart, but the base model ties them .* tie_word_embeddings=False"):
        merge(tied_base, [(tmp_path / "a", 1.0)], tied=True)


def run_remedy(message: str) -> None:
    """Run the Python of a message's `python -c "..."`."""
    code = re.search(r'python -c "(.*?)"', message)
    assert code is not None
    with peft_warnings():
        warnings.filterwarnings("ignore", "Passing `weights_only`|.*lm_head")
        exec(code[1], {})


def test_untying_as_told_gives_the_adapters_own_logits_which_pefts_merge_does_not(
    tied_base: Path, fresh: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(tied_base, tmp_path / "base")
    trained = train(fresh(folder), tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = trained.eval()(tokens).logits
    with pytest.raises(ConfigError) as refused:
        merge(folder, [(tmp_path / "a", 1.0)], tied=True)
    run_remedy(str(refused.value))
    untied = tmp_path / "base-untied"
    assert json.loads((untied / "config.json").read_text())["tie_word_embeddings"] is False
    model = fresh(untied)
    merged = {name: dense(weight) for name, weight in merge(untied, [(tmp_path / "a", 1.0)]).items()}
    model.load_state_dict(merged)
    with torch.no_grad():
        assert (model(tokens).logits - expected).abs().max() < 1e-4
        peft = fresh(folder)
        peft.load_state_dict(merge_by_peft(fresh(folder), [(tmp_path / "a", 1.0)]))
        assert (peft(tokens).logits - expected).abs().max() > 0.1


def test_a_lora_of_tied_embeddings_is_refused(tied_base: Path, fresh: Any, tmp_path: Path) -> None:
    train(fresh(tied_base), tmp_path / "a", target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ConfigError, match="ensure_weight_tying.*adds twice.*tie_word_embeddings false"):
        Adapter.open(tmp_path / "a")


# Malformed adapters.


@pytest.fixture(scope="module")
def adapter(base: Path, fresh: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter of q_proj and v_proj, rank 8; a test that alters it copies it."""
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    train(fresh(base), folder, target_modules=["q_proj", "v_proj"])
    return folder


def with_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**raw, **changes}))


def with_tensors(folder: Path, *without: str, **changes: Tensor) -> None:
    """Names are as in the file, after "base_model.model."."""
    tensors = {**load_file(folder / WEIGHTS_NAME)}
    for name in without:
        del tensors[f"base_model.model.{name}"]
    for name, tensor in changes.items():
        tensors[f"base_model.model.{name}"] = tensor
    save_file(tensors, folder / WEIGHTS_NAME)


@pytest.fixture
def broken(adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(adapter, tmp_path / "broken")


_MERGE = r"is not supported: .*; merge it with: python -c .* and export .*-merged"
_NO_MERGE = "is not supported: .*; no merged weights can do the same; train without it"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "ADALORA"}, rf"peft_type = 'ADALORA' {_MERGE}"),
        ({"peft_type": None}, "peft_type = None is not supported: expected 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS' .* expected 'CAUSAL_LM'"),
        ({"use_dora": True}, rf"use_dora = True {_MERGE}"),
        ({"kasa_config": {"beta": 1}}, f"kasa_config = .* {_MERGE}"),
        ({"velora_config": {"scale": 1}}, f"velora_config = .* {_MERGE}"),
        ({"monteclora_config": {"a": 1}}, f"monteclora_config = .* {_MERGE}"),
        ({"use_bdlora": {"nblocks": 2}}, f"use_bdlora = .* {_MERGE}"),
        ({"target_parameters": ["x"]}, f"target_parameters = .* {_MERGE}"),
        ({"trainable_token_indices": [0]}, rf"trainable_token_indices = \[0\] {_MERGE}"),
        ({"lora_bias": True}, f"lora_bias = True {_NO_MERGE}"),
        ({"alora_invocation_tokens": [1]}, f"alora_invocation_tokens = .* {_NO_MERGE}"),
        ({"arrow_config": {"top_k": 1}}, f"arrow_config = .* {_NO_MERGE}"),
        ({"layer_replication": [[0, 2], [1, 2]]}, f"layer_replication = .* {_NO_MERGE}"),
        ({"megatron_config": {"a": 1}}, f"megatron_config = .* {_NO_MERGE}"),
        ({"use_qalora": True}, f"use_qalora = True {_NO_MERGE}"),
        ({"bias": "all"}, f"bias = 'all' {_MERGE}"),
        ({"bias": "lora_only"}, f"bias = 'lora_only' {_MERGE}"),
        *(
            ({"init_lora_weights": init}, f"init_lora_weights = '{init}' .* merge it where it was trained")
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new")
        ),
        ({"init_lora_weights": 1}, "init_lora_weights = 1 is not supported"),
        ({"some_new_key": 3}, f"some_new_key = 3 {_MERGE}"),
        ({"some_new_key": 0}, "some_new_key = 0 is not supported"),
        ({"r": "8"}, "r must be a whole number >= 1, found '8'"),
        ({"r": 0}, "r must be a whole number >= 1, found 0"),
        ({"r": -4}, "r must be a whole number >= 1, found -4"),
        ({"r": True}, "r must be a whole number >= 1, found True"),
        ({"r": None}, "r must be a whole number >= 1, found None"),
        ({"lora_alpha": "16"}, "lora_alpha must be a finite number, found '16'"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number, found nan"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, found 1000"),
        ({"lora_alpha": True}, "lora_alpha must be a finite number, found True"),
        ({"alpha_pattern": [1]}, r"alpha_pattern must be an object of numbers, found \[1\]"),
        (
            {"alpha_pattern": {"q_proj": math.inf}},
            "alpha_pattern.'q_proj'. must be a finite number, found inf",
        ),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.'q_proj'. must be a whole number >= 1, found 0"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern holds '.', which is not a regular expression"),
        ({"alpha_pattern": {"a{99999999999}": 4}}, "alpha_pattern holds .* not a regular expression"),
        ({"target_modules": "(q_proj"}, "target_modules holds .*q_proj', which is not a regular expression"),
        ({"target_modules": 3}, "target_modules must be a list of names, found 3"),
        ({"target_modules": [3]}, r"target_modules must be a list of names, found \[3\]"),
        ({"exclude_modules": "["}, "exclude_modules holds '.', which is not a regular expression"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules must be a list of names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, found 'lm_head'"),
        ({"modules_to_save": [""]}, "modules_to_save must be a list of names"),
        ({"modules_to_save": ["("]}, "modules_to_save holds '.', which is not a regular expression"),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform must be layer indices, found \['0'\]"),
        ({"layers_to_transform": True}, "layers_to_transform must be layer indices, found True"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform, found null"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern holds '.', which is not"),
        (
            {"layers_to_transform": [0], "layers_pattern": 3},
            "layers_pattern must be a list of names, found 3",
        ),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "need a list in target_modules"),
        ({"use_rslora": "true"}, "use_rslora must be true or false, found 'true'"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out must be true or false, found 1"),
        ({"ensure_weight_tying": "no"}, "ensure_weight_tying must be true or false, found 'no'"),
        ({"r": 4}, r"lora_B.weight' has shape \[64, 8\]; expected \[..., 4\], the rank that .* gives"),
        ({"rank_pattern": {Q0: 4}}, rf"expected \[..., 4\], the rank that {CONFIG_NAME} gives {Q0}$"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_.*, but adapter_config.json does not target .*v_proj"),
        ({"layers_to_transform": [1]}, "does not target model.layers.0"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_config_that_is_refused(changes: dict[str, Any], words: str, broken: Path) -> None:
    with_config(broken, **changes)
    with pytest.raises(MistralTrtError, match=words) as refused:
        Adapter.open(broken)
    assert isinstance(refused.value, ConfigError | CheckpointError) and "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(broken))


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, found list"),
        ('{"peft_type": ' + NESTED + "}", "cannot be read as JSON"),
        ('{"peft_type": "LORA", "new": ' + NESTED[99_100:-99_100] + "}", "new = .* is not supported"),
        ('{"peft_type": "LORA", "new": "' + r"\n" * 5000 + '"}', "new = .* is not supported"),
        ('{"peft_type": "LORA", "r": 8, "lora_alpha": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
    ids=["cut off", "a list", "nested too deep", "nested", "long", "too many digits"],
)
def test_a_config_that_is_not_one(text: str, words: str, broken: Path) -> None:
    (broken / CONFIG_NAME).write_text(text)
    with pytest.raises(MistralTrtError, match=words) as refused:
        Adapter.open(broken)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


Z = torch.zeros


@pytest.mark.parametrize(
    ("without", "changes", "words"),
    [
        ((), {"vision.q_proj.lora_A.weight": Z(8, 4)}, "'base_model.model.vision.*'; expected .*Mistral"),
        ((), {"model.layers.00.mlp.up_proj.lora_A.weight": Z(8, 4)}, "layers.00.*; expected"),
        ((), {f"{Q0}.lora_magnitude_vector": Z(64)}, "lora_magnitude_vector'; expected"),
        ((), {f"{Q0}.bias": Z(64)}, "q_proj.bias'; expected"),
        ((), {f"{Q0}.lora_B.bias": Z(64)}, "lora_B.bias'; expected"),
        ((), {f"{Q0}.lora_A.other.weight": Z(8, 64)}, "lora_A.other.weight'; expected"),
        ((), {f"{Q0}.lora_A.default.weight": Z(8, 64)}, "lora_A.* and .*lora_A.*, which are the same"),
        ((), {f"{Q0}.weight": Z(64, 64)}, f"{Q0}.weight'; expected none: .* does not name it"),
        ((), {f"{Q0}.base_layer.weight": Z(64, 64)}, "base_layer.weight'; expected none"),
        ((), {"model.norm.weight": Z(64)}, "model.norm.weight'; expected none"),
        ((), {"lm_head.base_layer.weight": Z(97, 64)}, "lm_head.base_layer.weight'; expected none"),
        ((), {"lm_head.original_module.weight": Z(97, 64)}, "original_module.weight'; expected none"),
        ((), {"model.norm.lora_A.weight": Z(8, 64)}, "norm.lora_A.*there is no such LoRA"),
        ((), {"model.embed_tokens.lora_A.weight": Z(8, 64)}, "embed_tokens.lora_A.*there is no such LoRA"),
        ((), {f"{Q0}.lora_embedding_A": Z(8, 64)}, "there is no such LoRA"),
        ((f"{Q0}.lora_B.weight",), {}, f"lora_A.weight'; expected {Q0}.lora_B.weight with it"),
        ((f"{Q0}.lora_A.weight",), {}, f"lora_B.weight'; expected {Q0}.lora_A.weight with it"),
        ((), {f"{Q0}.lora_A.weight": Z(4, 64)}, r"lora_A.weight' has shape \[4, 64\]; expected \[8, ...\]"),
        ((), {f"{Q0}.lora_A.weight": Z(8)}, r"lora_A.weight' has shape \[8\]; expected \[8, ...\]"),
        ((), {f"{Q0}.lora_B.weight": Z(64, 8, 1)}, r"has shape \[64, 8, 1\]; expected \[..., 8\]"),
        (
            (),
            {f"{Q0}.lora_A.weight": Z(8, 64, dtype=torch.int8)},
            "is I8; expected float32, float16, bfloat16",
        ),
        ((), {f"{Q0}.lora_A.weight": Z(8, 64, dtype=torch.float64)}, "is F64; expected float32"),
    ],
    ids=lambda value: "+".join(value)[:70] if isinstance(value, dict) else "",
)
def test_tensors_that_are_refused(
    without: tuple[str, ...], changes: dict[str, Tensor], words: str, broken: Path
) -> None:
    with_tensors(broken, *without, **changes)
    with pytest.raises(CheckpointError, match=words) as refused:
        Adapter.open(broken)
    assert "\n" not in str(refused.value) and str(broken / WEIGHTS_NAME) in str(refused.value)


def test_a_name_with_a_line_break_stays_on_one_line(broken: Path) -> None:
    with_tensors(broken, **{"a\nb": Z(1)})
    with pytest.raises(CheckpointError) as refused:
        Adapter.open(broken)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "without", "changes", "words"),
    [
        (
            {},
            (f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"),
            {},
            f"has no tensors for {Q0}; .*target_modules",
        ),
        (
            {"target_modules": ["q_proj", "v_proj", "lm_head"]},
            (),
            {},
            "no tensors for lm_head; .*target_modules",
        ),
        ({"target_modules": ".*"}, (), {}, "has no tensors for .*; .*target_modules"),
        (
            {"modules_to_save": ["norm"]},
            (),
            {},
            "no tensors for model.layers.0.input_layernorm; .*modules_to_save",
        ),
        ({"modules_to_save": ["lm_head"]}, (), {}, "no tensors for lm_head; .*modules_to_save"),
        (
            {},
            (),
            {
                f"model.layers.2.self_attn.q_proj.lora_{x}.weight": Z(8, 64) if x == "A" else Z(64, 8)
                for x in "AB"
            },
            "model.layers.2.self_attn.q_proj.weight, which the base model does not have",
        ),
        ({}, (), {f"{Q0}.lora_A.weight": Z(8, 65)}, r"are for \[64, 65\], the base's is \[64, 64\]"),
        ({}, (), {f"{Q0}.lora_B.weight": Z(32, 8)}, r"are for \[32, 64\], the base's is \[64, 64\]"),
        (
            {"modules_to_save": ["model.norm"]},
            (),
            {"model.norm.weight": Z(65)},
            r"is \[65\], the base's is \[64\]",
        ),
        ({}, (), {"lm_head.weight": Z(96, 64)}, r"is \[96, 64\], the base's is \[97, 64\]"),
        ({}, (), {"lm_head.weight": Z(101, 65)}, r"is \[101, 65\], the base's is \[97, 64\]"),
        ({}, (), {"lm_head.weight": Z(101)}, r"is \[101\], the base's is \[97, 64\]"),
        (
            {"modules_to_save": ["2.mlp"]},
            (),
            {"model.layers.2.mlp.up_proj.weight": Z(96, 64)},
            "does not have",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_the_model(
    config: dict[str, Any],
    without: tuple[str, ...],
    changes: dict[str, Tensor],
    words: str,
    base: Path,
    broken: Path,
) -> None:
    with_config(broken, **config)
    with_tensors(broken, *without, **changes)
    opened = Adapter.open(broken)
    with pytest.raises(CheckpointError, match=words) as refused:
        apply_adapters(base_weights(base), [opened], tied=False)
    assert "\n" not in str(refused.value) and str(broken / WEIGHTS_NAME) in str(refused.value)
    assert "have" not in words or f"{CONFIG_NAME} names '{base}'" in str(refused.value)


def test_weights_whose_shapes_nobody_checked(base: Path, adapter: Path) -> None:
    weights = base_weights(base)
    weights[f"{Q0}.weight"] = Weight(f"{Q0}.weight", weights["model.norm.weight"].stored)
    with pytest.raises(CheckpointError, match=r"the base's is \[64\]"):
        apply_adapters(weights, [Adapter.open(adapter)], tied=False)
    del weights[f"{Q0}.weight"]
    with pytest.raises(CheckpointError, match="does not have"):
        apply_adapters(weights, [Adapter.open(adapter)], tied=False)


def test_a_replacement_cannot_be_scaled(base: Path, fresh: Any, tmp_path: Path) -> None:
    train(fresh(base), tmp_path / "a", target_modules=["q_proj"], modules_to_save=["model.norm"])
    with pytest.raises(
        ConfigError, match="replaces model.norm.weight and cannot be scaled by 0.5: use scale 1"
    ):
        merge(base, [(tmp_path / "a", 0.5)])


@pytest.mark.parametrize("other", [["norm"], ["lm_head"]], ids=["replaced twice", "replaced and updated"])
def test_two_adapters_at_odds(other: list[str], base: Path, fresh: Any, tmp_path: Path) -> None:
    train(fresh(base), tmp_path / "a", target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])
    named = {"modules_to_save": other} if other == ["norm"] else {"target_modules": other}
    train(fresh(base), tmp_path / "b", **{"target_modules": ["k_proj"], **named}, seed=2)
    for order in ("ab", "ba"):
        with pytest.raises(ConfigError, match="/a replaces .*/b changes too|/b replaces .*/a changes too"):
            merge(base, [(tmp_path / name, 1.0) for name in order])


def test_a_second_copy_of_a_file_is_no_conflict(base: Path, adapter: Path) -> None:
    twice = merge(base, [(adapter, 1.0), (adapter, 1.0)])[f"{Q0}.weight"]
    once = merge(base, [(adapter, 2.0)])[f"{Q0}.weight"]
    assert torch.allclose(dense(twice), dense(once))


# Folders.


def make_shards(folder: Path) -> None:
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model-00001-of-00002.safetensors")


def make_inner(folder: Path) -> None:
    (folder / "french").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (folder / name).rename(folder / "french" / name)


def make_model(folder: Path) -> None:
    (folder / CONFIG_NAME).rename(folder / "config.json")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), f"has no {WEIGHTS_NAME}; download or save"),
        (
            lambda folder: (folder / CONFIG_NAME).unlink(),
            f"has no {CONFIG_NAME}; expected a folder written by",
        ),
        (make_shards, f"holds its weights in several files; expected one, {WEIGHTS_NAME}"),
        (make_inner, f"has no {CONFIG_NAME}, but .*/french has; pass that"),
        (make_model, "is a whole model, not an adapter; pass it as the checkpoint"),
        (shutil.rmtree, "is not a folder; .*hf download"),
        (lambda folder: save_file({}, folder / WEIGHTS_NAME), "holds no tensors; expected lora_A and lora_B"),
        (lambda folder: (folder / WEIGHTS_NAME).write_bytes(b"x" * 99), "is not a whole safetensors file"),
    ],
)
def test_folders_that_are_refused(damage: Callable[[Path], None], words: str, broken: Path) -> None:
    damage(broken)
    with pytest.raises(CheckpointError, match=words) as refused:
        Adapter.open(broken)
    assert "\n" not in str(refused.value) and str(broken) in str(refused.value)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(broken: Path) -> None:
    expected = read(Adapter.open(broken).updates[f"{Q0}.weight"].left)
    tensors = load_file(broken / WEIGHTS_NAME)
    (broken / WEIGHTS_NAME).unlink()
    torch.save(tensors, broken / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights, which can run code") as refused:
        Adapter.open(broken)
    run_remedy(str(refused.value))
    assert torch.equal(read(Adapter.open(broken).updates[f"{Q0}.weight"].left), expected)


def test_dora_is_refused_with_a_command_that_merges_it(base: Path, fresh: Any, tmp_path: Path) -> None:
    train(fresh(base), tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ConfigError, match="use_dora") as refused:
        Adapter.open(tmp_path / "a")
    run_remedy(str(refused.value))
    merged = load_file(tmp_path / "a-merged" / "model.safetensors")
    for name, tensor in merge_by_peft(fresh(base), [(tmp_path / "a", 1.0)]).items():
        assert torch.allclose(merged[name], tensor, atol=1e-6)


def test_fan_in_fan_out_is_said_aloud(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_config(broken, fan_in_fan_out=True)
    with caplog.at_level("INFO", "mistral_trt"):
        Adapter.open(broken)
    assert "fan_in_fan_out is true" in caplog.text and "taken as false" in caplog.text


def test_an_alpha_that_the_files_order_decides_is_said_aloud(
    base: Path, fresh: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alphas = {"q_proj": 4, ".*self_attn.*": 32}
    train(fresh(base), tmp_path / "a", target_modules=["q_proj"], alpha_pattern=alphas)
    saved = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())["alpha_pattern"]
    assert list(saved) == sorted(alphas) != list(alphas)
    with caplog.at_level("INFO", "mistral_trt"):
        assert Adapter.open(tmp_path / "a").updates[f"{Q0}.weight"].scale == 32 / 8
    assert "more than one alpha_pattern matches" in caplog.text
    assert (
        difference(merge(base, [(tmp_path / "a", 1.0)]), merge_by_peft(fresh(base), [(tmp_path / "a", 1.0)]))
        <= ROUNDING
    )


def test_keys_that_change_nothing_are_taken(base: Path, adapter: Path, broken: Path) -> None:
    inert = {
        "auto_mapping": {"base_model_class": "MistralForCausalLM", "unsloth_fixed": True},
        "revision": "main",
        "inference_mode": False,
        "lora_dropout": 0.1,
        "runtime_config": {"ephemeral_gpu_offload": True},
        "enable_lora": None,
        "merge_weights": False,
        "eva_config": {"rho": 1.0},
    }
    with_config(broken, **inert)
    assert Adapter.open(broken).settings == Adapter.open(adapter).settings
    old = json.loads((adapter / CONFIG_NAME).read_text())
    keys = ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")
    (broken / CONFIG_NAME).write_text(json.dumps({key: old[key] for key in keys}))
    assert Adapter.open(broken).settings == Adapter.open(adapter).settings


# Names, scales, hashes.


def test_parse_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b:1", "c", "c:2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_lora("a") == (Path("a"), 1.0)
    assert parse_lora("a:0.5") == (Path("a"), 0.5)
    assert parse_lora("a:-2e-1") == (Path("a"), -0.2)
    assert parse_lora("a:0") == (Path("a"), 0.0)
    assert parse_lora("b:1") == (Path("b:1"), 1.0)
    assert parse_lora("b:1:0.25") == (Path("b:1"), 0.25)
    assert parse_lora("c:2") == (Path("c:2"), 1.0)
    assert parse_lora("c:2.0") == (Path("c"), 2.0)
    assert parse_lora("absent:0.5") == (Path("absent:0.5"), 1.0)
    assert parse_lora("a:x") == (Path("a:x"), 1.0)
    assert parse_lora("a:") == (Path("a:"), 1.0)
    assert parse_lora(":0.5") == (Path(":0.5"), 1.0)
    for scale in ("nan", "inf", "-Infinity", "1e999"):
        with pytest.raises(ConfigError, match=f"^a:{scale}: the scale .* finite number"):
            parse_lora(f"a:{scale}")


def test_a_scale_that_is_not_finite_is_refused(adapter: Path, broken: Path) -> None:
    with pytest.raises(ConfigError, match="finite number, found nan"):
        Adapter.open(adapter, math.nan)
    with_config(broken, lora_alpha=1e308)
    with pytest.raises(ConfigError, match="a factor of -inf; expected it finite"):
        Adapter.open(broken, -1e9)


def test_name(adapter: Path, tmp_path: Path) -> None:
    for folder, name in (
        ("My adapter (v2)", "My-adapter-v2"),
        ("models--org--Some-LoRA/snapshots/" + "c" * 40, "Some-LoRA"),
        ("---", "model"),
    ):
        assert Adapter.open(shutil.copytree(adapter, tmp_path / folder)).name == name


def test_every_file_that_can_change_an_export_changes_the_hash(broken: Path) -> None:
    hashes = [Adapter.open(broken).sha256()]
    for name in TEXT_FILES:
        (broken / name).write_text(name)
        hashes.append(Adapter.open(broken).sha256())
    with_config(broken, lora_alpha=9)
    hashes.append(Adapter.open(broken).sha256())
    with_tensors(broken, **{f"{Q0}.lora_A.weight": torch.ones(8, 64)})
    hashes.append(Adapter.open(broken).sha256())
    assert len(set(hashes)) == len(hashes) == 9
    (broken / "README.md").write_text("other words")
    assert Adapter.open(broken).sha256() == hashes[-1]


def test_order_and_scale_are_part_of_the_hash_of_several(adapter: Path, broken: Path) -> None:
    with_config(broken, lora_alpha=9)
    a, b = Adapter.open(adapter), Adapter.open(broken)
    hashes = [adapters_sha256(x) for x in ([], [a], [b], [a, b], [b, a], [Adapter.open(adapter, 0.5)])]
    assert len(set(hashes)) == len(hashes)
    assert adapters_sha256([a]) == adapters_sha256([Adapter.open(adapter, 1)])
