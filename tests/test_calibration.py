"""Calibration layer by layer finds what ModelOpt finds on the whole model, and goes on where it stopped."""

import fcntl
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MistralForCausalLM

from mistral_trt.contract import QUANTIZED
from mistral_trt.errors import CalibrationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.quantization import calibration as module
from mistral_trt.export.quantization.calibration import calibrate
from mistral_trt.export.quantization.layers import LayerStream, first_tokens
from mistral_trt.export.quantization.scales import LinearScales, load_scales, save_scales
from mistral_trt.export.quantization.scheme import LM_HEAD_MODULE, Scheme, linear_names, scheme_for
from mistral_trt.export.quantization.store import CalibrationStore, open_store
from tests.checkpoints import altered
from tests.conftest import Folder
from tests.models import TINY

mtq = pytest.importorskip("modelopt.torch.quantization")  # quietly: importing it warns of torch's plans
fusion = pytest.importorskip("modelopt.torch.export.quant_utils")

W, T = 8, 32
NAMES = linear_names(TINY)
SHARED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of the tests, empty each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mistral-trt" / "calibration"


@pytest.fixture
def store(tmp_path: Path) -> CalibrationStore:
    folder = tmp_path / "store"
    folder.mkdir()
    return CalibrationStore(folder)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint()


def tokens(samples: int = 4, length: int = T) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (samples, length), generator=torch.Generator().manual_seed(5))


def stream_of(checkpoint: Path, *, sliding_window: int = W) -> "CountingStream":
    return CountingStream(Checkpoint.open(checkpoint), sliding_window=sliding_window)


class CountingStream(LayerStream):
    """A stream that remembers which layers were asked for, and may fail at one."""

    def __init__(self, checkpoint: Checkpoint, *, sliding_window: int, fails_at: int = -1) -> None:
        super().__init__(checkpoint, sliding_window=sliding_window)
        self.asked: list[int] = []
        self.fails_at = fails_at

    def layer(self, index: int) -> nn.Module:
        self.asked.append(index)
        if index == self.fails_at:
            raise KeyboardInterrupt
        return super().layer(index)


# ---------------------------------------------------------------- ModelOpt on the whole model


@dataclass
class Whole:
    """The whole model quantized by ModelOpt, and what its linears read and gave before.

    linears: by name.  inputs, outputs: of the model as it is.
    """

    linears: dict[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def pre_quant_scale(self, name: str) -> Tensor | None:
        found: Tensor | None = self.linears[name].input_quantizer.pre_quant_scale
        return found

    def weight_amax(self, name: str) -> Tensor:
        amax: Tensor = self.linears[name].weight_quantizer.amax
        rows = 1 if amax.numel() == 1 else len(self.linears[name].weight)
        return amax.reshape(rows, -1)

    def error(self, name: str) -> float:
        """Of the quantized output, relative."""
        exact = self.outputs[name]
        with torch.no_grad():
            difference = self.linears[name](self.inputs[name]) - exact
        return float(difference.square().mean().sqrt() / exact.square().mean().sqrt())


def quantize_whole(checkpoint: Path, ids: Tensor, scheme: Scheme, searched: Tensor | None = None) -> Whole:
    """searched: what AWQ's second look is at, None for all again."""
    model = MistralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    found = Whole({name: modules[name] for name in NAMES})
    looks = [ids, ids if searched is None else searched]
    handles = []
    for name, linear in found.linears.items():

        def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            found.inputs[name], found.outputs[name] = args[0], out

        handles.append(linear.register_forward_hook(keep))
    model(looks[-1], use_cache=False)
    for handle in handles:
        handle.remove()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lm_head is not calibrated, skip smoothing")
        mtq.quantize(model, scheme.modelopt_config(), lambda whole: whole(looks.pop(0), use_cache=False))
    if "AWQ" in scheme.algorithm:
        for i in range(TINY.num_hidden_layers):
            for group in SHARED:
                fusion.preprocess_linear_fusion([found.linears[f"model.layers.{i}.{kind}"] for kind in group])
    return found


def agree(found: dict[str, LinearScales], whole: Whole) -> None:
    """Every number of every linear, to 1e-5 of itself."""
    assert list(found) == NAMES
    for name, scales in found.items():
        expected = whole.pre_quant_scale(name)
        assert (scales.pre_quant_scale is None) == (expected is None)
        if scales.pre_quant_scale is not None:
            torch.testing.assert_close(scales.pre_quant_scale, expected, rtol=1e-5, atol=0, msg=name)
        torch.testing.assert_close(scales.weight_amax, whole.weight_amax(name), rtol=1e-5, atol=0, msg=name)
        amax = whole.linears[name].input_quantizer.amax
        assert (scales.input_amax is None) == (amax is None)
        if scales.input_amax is not None:
            torch.testing.assert_close(scales.input_amax, amax.reshape(()), rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_layer_by_layer_is_modelopt_on_the_whole_model(
    checkpoint: Path, store: CalibrationStore, precision: str
) -> None:
    scheme = scheme_for(precision, TINY)
    found = calibrate(stream_of(checkpoint), tokens(), scheme, store)
    whole = quantize_whole(checkpoint, tokens(), scheme)
    agree(found, whole)
    for name, scales in found.items():
        largest = whole.outputs[name].abs().flatten(0, 1).amax(0)
        torch.testing.assert_close(scales.output_amax, largest, rtol=1e-4, atol=1e-6)
        assert float(scales.error) == pytest.approx(whole.error(name), rel=1e-2), name


@pytest.mark.parametrize("precision", QUANTIZED)
def test_another_window_gives_other_scales(checkpoint: Path, store: CalibrationStore, precision: str) -> None:
    """The comparison above sees a window that is off by one."""
    scheme = scheme_for(precision, TINY)
    found = calibrate(stream_of(checkpoint, sliding_window=W + 1), tokens(), scheme, store)
    with pytest.raises(AssertionError):
        agree(found, quantize_whole(checkpoint, tokens(), scheme))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_batches_do_not_matter(
    checkpoint: Path, store: CalibrationStore, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr("mistral_trt.export.quantization.layers.TOKENS_AT_ONCE", 2 * T)
    scheme = scheme_for(precision, TINY)
    found = calibrate(stream_of(checkpoint), tokens(), scheme, store)
    agree(found, quantize_whole(checkpoint, tokens(), scheme))


def test_awq_searches_on_the_first_tokens_and_looks_at_all(
    checkpoint: Path, store: CalibrationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEARCHED_TOKENS", 2 * T)
    scheme = scheme_for("int4", TINY)
    found = calibrate(stream_of(checkpoint), tokens(), scheme, store)
    agree(found, quantize_whole(checkpoint, tokens(), scheme, searched=tokens()[:2]))


@pytest.mark.parametrize(
    ("samples", "length", "count", "shape"),
    [(4, 8, 16, (2, 8)), (4, 8, 100, (4, 8)), (4, 8, 20, (2, 8)), (4, 8, 5, (1, 5)), (1, 8, 8, (1, 8))],
)
def test_the_first_tokens_are_whole_samples(
    samples: int, length: int, count: int, shape: tuple[int, int]
) -> None:
    hidden = torch.arange(samples * length).view(samples, length)
    found = first_tokens(hidden, count)
    assert found.shape == shape
    assert torch.equal(found, hidden[: shape[0], : shape[1]])


def test_linears_that_read_one_input_share_a_scale_and_keep_their_own(
    checkpoint: Path, store: CalibrationStore
) -> None:
    found = calibrate(stream_of(checkpoint), tokens(), scheme_for("int4", TINY), store)
    for group in SHARED:
        members = [found[f"model.layers.0.{kind}"] for kind in group]
        shared, *others = (scales.pre_quant_scale for scales in members)
        assert shared is not None
        assert all(other is not None and torch.equal(other, shared) for other in others)
        owns = [shared if scales.own_scale is None else scales.own_scale for scales in members]
        torch.testing.assert_close(torch.stack(owns).mean(0), shared)
        assert not torch.equal(owns[0], owns[1])
    for kind in ("self_attn.o_proj", "mlp.down_proj"):
        assert found[f"model.layers.0.{kind}"].own_scale is None


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_is_calibrated_on_what_the_last_layer_gives(
    tiny_checkpoint: Folder, store: CalibrationStore, precision: str, tied: bool
) -> None:
    checkpoint = tiny_checkpoint(tie_word_embeddings=tied)
    scheme = scheme_for(precision, TINY)
    found = calibrate(stream_of(checkpoint), tokens(), scheme, store, lm_head=True)
    assert list(found) == [*NAMES, LM_HEAD_MODULE]
    model = MistralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model(tokens()).last_hidden_state.flatten(0, 1)
    alone = nn.ModuleDict({"x": nn.Linear(64, 97, bias=False)})
    alone["x"].weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        mtq.quantize(alone, scheme.modelopt_config(), lambda holder: holder["x"](hidden))
    head, linear = found[LM_HEAD_MODULE], Whole({"x": alone["x"]})
    torch.testing.assert_close(head.weight_amax, linear.weight_amax("x"), rtol=1e-5, atol=0)
    amax = linear.linears["x"].input_quantizer.amax
    for value, other in ((head.pre_quant_scale, linear.pre_quant_scale("x")), (head.input_amax, amax)):
        assert (value is None) == (other is None)
        if value is not None and other is not None:
            torch.testing.assert_close(value, other.reshape(value.shape), rtol=1e-5, atol=0)
    largest = (hidden[:256] @ model.lm_head.weight.detach().T).abs().amax(0)
    torch.testing.assert_close(head.output_amax, largest, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- stopped and gone on with


def same(found: dict[str, LinearScales], expected: dict[str, LinearScales]) -> None:
    """Bit for bit."""
    assert list(found) == list(expected)
    for name, scales in found.items():
        for key, value in vars(scales).items():
            other = getattr(expected[name], key)
            assert (value is None) == (other is None)
            assert value is None or torch.equal(value, other), (name, key)


@pytest.mark.parametrize(
    ("precision", "fails_at", "lm_head"), [("int4", 1, False), ("int8", 1, True), ("fp8", 0, False)]
)
def test_a_stopped_calibration_goes_on_at_the_layer_it_stopped_in(
    checkpoint: Path,
    store: CalibrationStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    fails_at: int,
    lm_head: bool,
) -> None:
    scheme = scheme_for(precision, TINY)
    first = stream_of(checkpoint)
    first.fails_at = fails_at
    with pytest.raises(KeyboardInterrupt):
        calibrate(first, tokens(), scheme, store, lm_head=lm_head)
    again = stream_of(checkpoint)
    with caplog.at_level(logging.INFO, "mistral_trt"):
        found = calibrate(again, tokens(), scheme, store, lm_head=lm_head)
    assert again.asked == [0, 1][fails_at:]
    assert any("goes on at layer 1" in text for text in caplog.messages) == (fails_at == 1)
    (tmp_path / "other").mkdir()
    uninterrupted = CalibrationStore(tmp_path / "other")
    same(found, calibrate(stream_of(checkpoint), tokens(), scheme, uninterrupted, lm_head=lm_head))
    assert sorted(path.name for path in store.folder.iterdir()) == [
        f"part-{part:03d}.safetensors" for part in range(2 + lm_head)
    ]


def test_a_finished_calibration_is_not_made_again(checkpoint: Path, store: CalibrationStore) -> None:
    scheme = scheme_for("int8-weight-only", TINY)
    found = calibrate(stream_of(checkpoint), tokens(), scheme, store)
    again = stream_of(checkpoint)
    same(calibrate(again, tokens(), scheme, store), found)
    assert again.asked == []


def test_only_the_head_is_missing(checkpoint: Path, store: CalibrationStore) -> None:
    """What was calibrated without the head lacks the head's input, and is made anew."""
    scheme = scheme_for("int8-weight-only", TINY)
    calibrate(stream_of(checkpoint), tokens(), scheme, store)
    stream = stream_of(checkpoint)
    found = calibrate(stream, tokens(), scheme, store, lm_head=True)
    assert LM_HEAD_MODULE in found
    assert stream.asked == [0, 1]


def test_hidden_states_are_kept_between_layers_only(checkpoint: Path, store: CalibrationStore) -> None:
    stream = stream_of(checkpoint)
    stream.fails_at = 1
    with pytest.raises(KeyboardInterrupt):
        calibrate(stream, tokens(), scheme_for("fp8", TINY), store)
    kept = store.load_hidden()
    assert kept is not None
    part, hidden = kept
    with torch.no_grad():
        model = MistralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        states = model.model(tokens(), output_hidden_states=True).hidden_states
    assert part == 1
    torch.testing.assert_close(hidden, states[1], rtol=1e-4, atol=1e-5)


def test_hidden_states_are_removed_though_the_run_was_stopped_before(
    checkpoint: Path, store: CalibrationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: CalibrationStore) -> None:
        raise KeyboardInterrupt

    scheme = scheme_for("int8-weight-only", TINY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CalibrationStore, "finish", stop)
        calibrate(stream_of(checkpoint), tokens(), scheme, store)
    calibrate(stream_of(checkpoint), tokens(), scheme, store)
    assert store.load_hidden() is None


def test_scales_survive_their_file(tmp_path: Path) -> None:
    scales = {
        "a.b": LinearScales(torch.rand(3, 2), torch.rand(3), torch.rand(())),
        "lm_head": LinearScales(
            torch.rand(1, 1), torch.rand(2), torch.rand(()), torch.rand(()), torch.rand(4), torch.rand(4)
        ),
    }
    save_scales(tmp_path / "x.safetensors", scales)
    found = load_scales(tmp_path / "x.safetensors")
    same(dict(sorted(found.items())), scales)
    assert set(load_file(tmp_path / "x.safetensors")) >= {"a.b/error", "lm_head/own_scale"}


# ---------------------------------------------------------------- the store


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """The lock of a store, held as another process would."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(folder, (1, 1))
        yield


def stores(cache: Path, count: int) -> list[Path]:
    """Stores of others, the first one the oldest."""
    found = []
    for i in range(count):
        folder = cache / f"other-{i}"
        folder.mkdir(parents=True)
        (folder / "part-000.safetensors").write_bytes(b"x")
        os.utime(folder, (1e9 + i, 1e9 + i))
        found.append(folder)
    return found


def test_a_store_is_named_after_its_key(cache: Path) -> None:
    with open_store("abc") as store:
        assert store.folder == cache / "abc"
        assert store.load(1) is None and store.load_hidden() is None
        store.finish()


def test_of_other_stores_the_newest_four_remain(cache: Path) -> None:
    others = stores(cache, 7)
    with open_store("mine"):
        pass
    assert [folder.is_dir() for folder in others] == [False] * 3 + [True] * 4
    assert (others[-1] / "part-000.safetensors").is_file()
    with open_store("other-3"):  # its own does not count
        assert {path.name for path in cache.iterdir()} == {"mine", *(f"other-{i}" for i in range(3, 7))}


def test_a_store_in_use_is_not_forgotten(cache: Path) -> None:
    others = stores(cache, 7)
    with in_use(others[1]), open_store("mine"):
        pass
    assert [folder.is_dir() for folder in others] == [False, True, False] + [True] * 4


def test_what_is_no_store_does_not_hurt(cache: Path) -> None:
    stores(cache, 5)
    (cache / "a-file").write_text("x")
    os.utime(cache / "a-file", (1, 1))
    with open_store("mine"):
        pass
    assert (cache / "a-file").is_file()


def test_a_second_run_of_the_same_calibration_waits(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache / "key").mkdir(parents=True)
    opened = threading.Event()

    def run() -> None:
        with open_store("key"):
            opened.set()

    with caplog.at_level(logging.INFO, "mistral_trt"):
        with in_use(cache / "key"):
            thread = threading.Thread(target=run)
            thread.start()
            while not any("waiting for it" in text for text in caplog.messages):
                time.sleep(0.001)
            assert not opened.wait(0.1)
        thread.join(30)
    assert opened.is_set()


def test_another_calibration_does_not_wait(cache: Path) -> None:
    (cache / "key").mkdir(parents=True)
    with in_use(cache / "key"), open_store("another") as store:
        assert store.folder.is_dir()


# ---------------------------------------------------------------- errors


DOWN, UP, GATE = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("down", "up", "gate"))
DAMAGED: dict[str, dict[str, Tensor]] = {
    "a layer's output overflows": {DOWN: torch.full((64, 96), 3e37)},
    "an input overflows": {UP: torch.full((96, 64), 1e25), GATE: torch.full((96, 64), 1e25)},
    "a weight is NaN": {UP: torch.full((96, 64), torch.nan)},
}


@pytest.mark.parametrize(
    ("damage", "precision"),
    [(damage, precision) for damage in DAMAGED for precision in QUANTIZED],
)
def test_what_is_not_finite_is_refused(
    tiny_checkpoint: Folder, tmp_path: Path, store: CalibrationStore, damage: str, precision: str
) -> None:
    folder = altered(tiny_checkpoint(num_hidden_layers=1), tmp_path / "x", tensors=DAMAGED[damage])
    with pytest.raises(CalibrationError, match="not finite"):
        calibrate(stream_of(folder), tokens(), scheme_for(precision, TINY), store)
    assert store.load(1) is None
