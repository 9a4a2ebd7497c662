"""`adapter_config.json` of a PEFT LoRA adapter → which modules it changes, with what rank and factor.

The rules are those of peft 0.21.2, quirks included: which names match is part of what an adapter means.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from mistral_trt.errors import ConfigError
from mistral_trt.export.text_parsing import read_json
from mistral_trt.progress import note

LINEAR = r"model\.layers\.(?:0|[1-9][0-9]*)\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
"""Names of the decoder's linear modules, but for the head: what "all-linear" stands for."""

_DEFAULT_TARGETS = ["q_proj", "v_proj"]  # peft's for model_type "mistral", if target_modules is null
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
_READ = frozenset(
    "peft_type task_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules "
    "modules_to_save layers_to_transform layers_pattern fan_in_fan_out init_lora_weights bias "
    "ensure_weight_tying base_model_name_or_path".split()
)
_INERT = frozenset(
    "auto_mapping corda_config eva_config inference_mode loftq_config lora_dropout lora_ga_config "
    "megatron_core peft_version qalora_group_size revision runtime_config".split()
)
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

_MERGE = (
    'merge it with: python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')\"   "
    "and export {folder}-merged"
)
_NO_MERGE = "no merged weights can do the same; train without it"
_REFUSED = {
    "use_dora": ("DoRA rescales the rows of a weight", _MERGE),
    "kasa_config": ("KaSA truncates the base weights", _MERGE),
    "velora_config": ("VeLoRA has tensors of its own", _MERGE),
    "monteclora_config": ("MonteCLoRA has tensors of its own", _MERGE),
    "use_bdlora": ("BD-LoRA stores the factors as blocks", _MERGE),
    "target_parameters": ("it adapts bare parameters, which the decoder does not have", _MERGE),
    "trainable_token_indices": ("it replaces single rows of the embedding", _MERGE),
    "lora_bias": ("the decoder has no biases to add one to", _NO_MERGE),
    "alora_invocation_tokens": ("an activated LoRA starts in the middle of a text", _NO_MERGE),
    "arrow_config": ("Arrow chooses between adapters at every token", _NO_MERGE),
    "layer_replication": ("it repeats layers of the base model", _NO_MERGE),
    "megatron_config": ("its layers are Megatron's", _NO_MERGE),
    "use_qalora": ("QALoRA adapts a quantized model", _NO_MERGE),
}

_Matcher: TypeAlias = re.Pattern[str] | frozenset[str]
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class LoraSettings:
    """`adapter_config.json`, checked.

    layers: indices that the names of `target_modules` are limited to; empty for all.
    shielded: patterns of the modules that `modules_to_save` keeps LoRA away from.
    """

    base_model: str
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Sequence[tuple[re.Pattern[str], int]]
    alpha_pattern: Sequence[tuple[re.Pattern[str], float]]
    target_modules: _Matcher
    exclude_modules: _Matcher
    modules_to_save: tuple[str, ...]
    shielded: Sequence[re.Pattern[str]]
    layers: frozenset[int]
    layers_pattern: Sequence[re.Pattern[str]]
    ensure_weight_tying: bool

    @classmethod
    def read(cls, path: Path) -> "LoraSettings":
        """Raises CheckpointError for a file that is not JSON, ConfigError for what is not supported."""
        raw = read_json(path)
        _refuse_unsupported(path, raw)
        layers, numbered = _layers(path, raw)
        saved = _strings(path, "modules_to_save", raw.get("modules_to_save"))
        targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = LINEAR
        return cls(
            base_model=str(raw.get("base_model_name_or_path") or "none"),
            r=_rank(path, "r", raw.get("r")),
            lora_alpha=_number(path, "lora_alpha", raw.get("lora_alpha")),
            use_rslora=_flag(path, raw, "use_rslora"),
            rank_pattern=_patterns(path, raw, "rank_pattern", _rank),
            alpha_pattern=_patterns(path, raw, "alpha_pattern", _number),
            target_modules=_matcher(path, "target_modules", _DEFAULT_TARGETS if targets is None else targets),
            exclude_modules=_matcher(path, "exclude_modules", excluded or []),
            modules_to_save=saved,
            shielded=[_compile(path, "modules_to_save", m, rf"(^|.*\.){m}($|\..*)") for m in saved],
            layers=layers,
            layers_pattern=numbered,
            ensure_weight_tying=_flag(path, raw, "ensure_weight_tying"),
        )

    def targets(self, module: str) -> bool:
        """Whether the module gets a LoRA (peft/tuners/tuners_utils.py, check_target_module_exists)."""
        if _matches(self.exclude_modules, module) or any(p.match(module) for p in self.shielded):
            return False
        if not _matches(self.target_modules, module):
            return False
        if not self.layers or isinstance(self.target_modules, re.Pattern) or module in self.target_modules:
            return True
        found = next((m for p in self.layers_pattern if (m := p.match(module))), None)
        return found is not None and found["idx"] is not None and int(found["idx"]) in self.layers

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` ends the path of the module or of one around it, as in peft.

        "norm" saves model.norm, and model.layers.0.input_layernorm too: no dot is needed before it.
        """
        names = module.split(".")
        return any(".".join(names[: i + 1]).endswith(self.modules_to_save) for i in range(len(names)))

    def rank(self, module: str) -> int:
        return next((r for pattern, r in self.rank_pattern if pattern.match(module)), self.r)

    def factor(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) if rank-stabilised."""
        alpha, rank = next(iter(self.alphas(module)), self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def alphas(self, module: str) -> list[float]:
        """Different alphas whose patterns match the module; the first counts."""
        return list(dict.fromkeys(alpha for pattern, alpha in self.alpha_pattern if pattern.match(module)))


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    def refuse(key: str, why: str, remedy: str = _MERGE) -> None:
        found = f"{key} = {reprlib.repr(raw.get(key))}"
        raise ConfigError(f"{path}: {found} is not supported: {why}; {remedy.format(folder=path.parent)}")

    if raw.get("peft_type") != "LORA":
        refuse("peft_type", "expected 'LORA'")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        refuse("task_type", "expected 'CAUSAL_LM'", "pass an adapter of the language model itself")
    for key, value in raw.items():
        if key in _READ | _INERT or value is None or value is False or value in ("", [], {}):
            continue
        refuse(key, *_REFUSED.get(key, ("what it changes is not known here", _MERGE)))
    if raw.get("bias") not in (None, "none"):
        refuse("bias", "the decoder has no biases, expected 'none'")
    init = raw.get("init_lora_weights")
    if init is not None and not isinstance(init, bool) and init not in _PLAIN_INITS:
        refuse(
            "init_lora_weights",
            f"expected true, false, {', '.join(_PLAIN_INITS)}, which leave the base weights as they are",
            "merge it where it was trained, with its own base weights "
            "(model.merge_and_unload().save_pretrained(...)), and export the result",
        )
    if _flag(path, raw, "fan_in_fan_out"):
        note(f"{path}: fan_in_fan_out is true, but the decoder's linears are [out, in]; taken as false")


def _layers(path: Path, raw: Mapping[str, Any]) -> tuple[frozenset[int], list[re.Pattern[str]]]:
    """Layer indices and the patterns that find one in a module's name."""
    chosen, names = raw.get("layers_to_transform"), raw.get("layers_pattern")
    names = _strings(path, "layers_pattern", [names] if isinstance(names, str) and names else names)
    if isinstance(raw.get("target_modules"), str) and (chosen is not None or names):
        raise ConfigError(
            f"{path}: layers_to_transform and layers_pattern need a list in target_modules, found a pattern"
        )
    if names and chosen is None:
        raise ConfigError(f"{path}: layers_pattern needs layers_to_transform, found null")
    indices = [] if chosen is None else chosen if isinstance(chosen, list) else [chosen]
    if not all(type(index) is int for index in indices):
        raise ConfigError(f"{path}: layers_to_transform must be layer indices, found {reprlib.repr(chosen)}")
    numbered = [_compile(path, "layers_pattern", n, rf"(?:^|.*?\.){n}\.(?P<idx>\d+)\.") for n in names]
    return frozenset(indices), numbered or [re.compile(_ANY_LAYER)]


def _matches(matcher: _Matcher, module: str) -> bool:
    if isinstance(matcher, re.Pattern):
        return matcher.fullmatch(module) is not None
    return module in matcher or any(module.endswith(f".{name}") for name in matcher)


def _matcher(path: Path, key: str, value: Any) -> _Matcher:
    if isinstance(value, str):
        return _compile(path, key, value, value)
    return frozenset(_strings(path, key, value))


def _strings(path: Path, key: str, value: Any) -> tuple[str, ...]:
    value = [] if value is None or value == "" else value
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{path}: {key} must be a list of names, found {reprlib.repr(value)}")
    return tuple(value)


def _patterns(
    path: Path, raw: Mapping[str, Any], key: str, read: Callable[[Path, str, Any], _Number]
) -> list[tuple[re.Pattern[str], _Number]]:
    """Pattern → number in the file's order, the first match counts (peft/utils/other.py, get_pattern_key)."""
    value = {} if raw.get(key) is None else raw[key]
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} must be an object of numbers, found {reprlib.repr(value)}")
    return [
        (_compile(path, key, name, rf"(.*\.)?({name})$"), read(path, f"{key}[{reprlib.repr(name)}]", number))
        for name, number in value.items()
    ]


def _compile(path: Path, key: str, text: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{path}: {key} holds {reprlib.repr(text)}, which is not a regular expression ({error})"
        ) from error


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {key} must be a whole number >= 1, found {reprlib.repr(value)}")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{path}: {key} must be a finite number, found {reprlib.repr(value)}")
    return number


def _flag(path: Path, raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{path}: {key} must be true or false, found {reprlib.repr(value)}")
    return bool(value)
