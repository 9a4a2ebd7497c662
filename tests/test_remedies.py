"""What a refused build is told to do instead is accepted: each offer is read from the message and tried."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mistral_trt.contract import CACHE_DTYPES, QUANTIZED, plan_contract
from mistral_trt.engines import flavor as flavors
from mistral_trt.engines.flavor import Flavor
from mistral_trt.engines.gpu import RtxSupport, find_gpu, load_catalogue
from mistral_trt.engines.planning import settle as settle_module
from mistral_trt.engines.planning.settle import Job, settle
from mistral_trt.engines.planning.sizes import linear_elements, quantized_linear_bytes
from mistral_trt.errors import BuildError, GpuError, MissingDependencyError
from mistral_trt.manifest import Manifest
from mistral_trt.tensorrt_names import FULL, RTX
from tests.test_budget import MISTRAL_7B

GB = 1_000_000_000
AMPLE = 10**15
FINAL = "no GPU of the catalogue is large enough"


@dataclass(frozen=True)
class World:
    """An ONNX folder and the machine it is on.  gpus: names of the machine's own."""

    precision: str = "fp16"
    layers: int = 32
    rows: int = 4
    memory: int = AMPLE
    disk: int = AMPLE
    linked: bool = True
    installed: tuple[str, ...] = (RTX,)
    gpus: tuple[str, ...] = ()

    @property
    def source(self) -> Manifest:
        config = replace(MISTRAL_7B, num_hidden_layers=self.layers)
        contract = plan_contract(config, precision=self.precision, max_batch_size=self.rows)
        floats = 2 * (linear_elements(config) + 2 * 32000 * 4096)
        details: dict[str, object] = {"weights_bytes": floats}
        if self.precision in QUANTIZED:
            codes = "int8" if self.precision == "fp8" else self.precision
            quantized = quantized_linear_bytes(config, codes)
            scheme = {"precision": self.precision, "weights": "int8", "activations": None, "block_size": None}
            details = {
                "weights_bytes": floats - 2 * linear_elements(config) + quantized,
                "quantization": {
                    "scheme": scheme,
                    "quantized": ["w"],
                    "kept": [],
                    "quantized_bytes": quantized,
                },
            }
        return Manifest("onnx", {}, {}, contract, {}, details)


@dataclass(frozen=True)
class Ask:
    """The command that is typed.  rows: None for the folder's own."""

    gpus: tuple[str, ...]
    flavor: str = "auto"
    weights: str = "auto"
    rows: int | None = None
    polygraphy: bool = False


Try = tuple[World, Ask]


def run(world: World, ask: Ask) -> Job:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settle_module, "read_manifest", lambda *_, **__: world.source)
        patch.setattr(settle_module, "available_memory_bytes", lambda: world.memory)
        patch.setattr(settle_module, "free_disk_bytes", lambda out: world.disk)
        patch.setattr(settle_module, "can_link", lambda *_: world.linked)
        patch.setattr(Flavor, "installed", property(lambda self: self.name in world.installed))
        patch.setattr(Flavor, "load", lambda self: SimpleNamespace(__version__="99.0"))
        patch.setattr(flavors, "local_gpus", lambda: list(world.gpus))
        return settle(
            Path("onnx"),
            ",".join(ask.gpus),
            Path("engine"),
            flavor=ask.flavor,
            weights=ask.weights,
            max_batch_size=ask.rows,
            polygraphy=ask.polygraphy,
        )


def refusal(world: World, ask: Ask) -> str | None:
    """None if the build may begin, or cannot for want of a package."""
    try:
        run(world, ask)
    except (BuildError, GpuError) as error:
        return str(error)
    except MissingDependencyError:
        return None
    return None


def listed(text: str) -> list[str]:
    """fp16, bf16 or int4 → each."""
    return re.split(r", | or ", text)


def there(world: World, gpu: str) -> World:
    """A machine that has that GPU, full TensorRT and room for everything."""
    own = (find_gpu(gpu).name,)
    return replace(world, memory=AMPLE, disk=AMPLE, linked=True, installed=(FULL, RTX), gpus=own)


def typed(world: World, ask: Ask, command: str) -> Ask:
    """What a whole command asks for."""
    words = dict(re.findall(r"--(gpu|flavor|weights|max-batch-size) (\S+)", command))
    rows = words.get("max-batch-size")
    return Ask(
        tuple(words["gpu"].split(",")),
        words.get("flavor", "auto"),
        words.get("weights", "auto"),
        ask.rows if rows is None else int(rows),
        "--polygraphy" in command,
    )


def offers(world: World, ask: Ask, message: str) -> Iterator[list[Try]]:
    """Each alternative of a message as the builds that it comes to, all of which are promised."""
    for text in message.rpartition("usable; ")[2].split(", or "):
        tries = list(tries_of(world, ask, text))
        assert tries or text == FINAL, f"nothing to do in {text!r} of {message!r}"
        yield tries


def tries_of(world: World, ask: Ask, text: str) -> Iterator[Try]:
    where = re.search(r"on a machine with ([\d.]+) GB of memory and ([\d.]+) GB of free disk", text)
    if where:
        memory, disk = (int((float(amount) + 0.005) * GB) + 1 for amount in where.groups())
        world = replace(world, memory=memory, disk=disk)
    if "free some" in text:
        memory = AMPLE if "machine that has that much" in text else world.memory
        yield replace(world, disk=AMPLE, memory=memory), ask
        return
    exports = re.search(r"export with (?:--precision|a precision that all of them run:) ([a-z0-9, -]+)", text)
    names = re.split(r" and | then |, on ", exports[1])[0].strip(", ") if exports else world.precision
    for precision in listed(names):
        yield from built(replace(world, precision=precision), ask, text, bool(exports))


def built(world: World, ask: Ask, text: str, changed: bool) -> Iterator[Try]:
    """The builds that follow the export, if there is one."""
    commands = re.findall(r"mistral-trt build ONNX_DIR (.*?) --out DIR", text)
    for command in commands:
        other = typed(world, ask, command)
        yield (there(world, other.gpus[0]) if f"--flavor {FULL} " in f"{command} " else world), other
    if commands:
        return
    if "on its own machine" in text:
        yield from ((there(world, gpu), replace(ask, gpus=(gpu,))) for gpu in ask.gpus)
        return
    if elsewhere := re.search(rf"whose GPU is an (.*?), build for that one with --flavor {FULL}", text):
        for name in listed(elsewhere[1]):
            place = re.search(r"and use --weights (\w+)", text)
            weights = place[1] if place else ask.weights
            yield there(world, name), replace(ask, gpus=(name,), flavor=FULL, weights=weights)
        return
    options = dict(re.findall(r"(?:use|and) --(max-batch-size|weights) ([\w]+)", text))
    flavor = re.search(r"build (?:here )?with --flavor (\S+)", text)
    other = replace(
        ask,
        rows=int(options["max-batch-size"]) if "max-batch-size" in options else ask.rows,
        weights=options.get("weights", ask.weights),
        polygraphy=ask.polygraphy and "leave out --polygraphy" not in text,
        flavor=flavor[1] if flavor else "auto" if "leave out --flavor" in text else ask.flavor,
    )
    if alone := re.search(r"build for --gpu (.*) alone", text):
        yield world, replace(other, gpus=tuple(alone[1].split(",")))
    elif others := re.search(r"build for --gpu (.*?)(?: and use|, on a machine|$)", text):
        yield from ((world, replace(other, gpus=(key,))) for key in listed(others[1]))
    elif changed or other != ask:
        yield world, other


def check(world: World, ask: Ask) -> None:
    """Follow each offer of a refusal, if there is one. What is away from this machine is tried there."""
    message = refusal(world, ask)
    if message and message == refusal(*small(world, ask)):  # of the GPUs alone
        world, ask = small(world, ask)
        world, ask = at_home(world, ask) if "export with" in message else (world, ask)
    for tries in offers(world, ask, message) if message else ():
        for there, other in tries:
            again = refusal(there, other)
            assert again is None, f"{ask} in {world}\nsaid   {message}\nand to {other} in {there}\n{again}"


def small(world: World, ask: Ask) -> Try:
    """The same GPUs, precision and flavor, of a model that fits them all and with nothing else asked."""
    fits = replace(world, layers=1, rows=1, memory=AMPLE, disk=AMPLE, linked=True)
    return fits, Ask(ask.gpus, ask.flavor)


def at_home(world: World, ask: Ask) -> Try:
    """Where full TensorRT can build, if nothing else does: that it cannot here is a refusal of its own."""
    alone = find_gpu(ask.gpus[0])
    only_full = alone.rtx_support is RtxSupport.IMPOSSIBLE
    if len(ask.gpus) > 1 or not (only_full or ask.flavor == FULL):
        return world, ask
    return there(world, alone.key), replace(ask, flavor=FULL)


gpus = st.lists(st.sampled_from(list(load_catalogue())), min_size=1, max_size=3, unique=True).map(tuple)
machines = st.sampled_from(
    [(), ("NVIDIA A10G",), ("NVIDIA H100 80GB HBM3",), ("Tesla T4",), ("NVIDIA L4",) * 2]
)
worlds = st.builds(
    World,
    precision=st.sampled_from(list(CACHE_DTYPES)),
    layers=st.sampled_from([2, 32, 60, 200, 1000]),
    rows=st.sampled_from([1, 4, 16, 64, 1000]),
    memory=st.one_of(st.just(AMPLE), st.integers(GB // 10, 60 * GB)),
    disk=st.one_of(st.just(AMPLE), st.integers(GB // 100, 40 * GB)),
    linked=st.booleans(),
    installed=st.sampled_from([(RTX,), (FULL, RTX)]),
    gpus=machines,
)
asks = st.builds(
    Ask,
    gpus=gpus,
    flavor=st.sampled_from(["auto", "auto", FULL, RTX]),
    weights=st.sampled_from(["auto", "embedded", "external"]),
    rows=st.sampled_from([None, None, 1, 32]),
    polygraphy=st.booleans(),
)
SHARED = Ask(("a10g", "l4"), weights="embedded")


@settings(max_examples=150)
@given(worlds, asks)
@example(World(memory=20 * GB), SHARED)
@example(World(memory=20 * GB), replace(SHARED, weights="external"))
@example(World(memory=GB // 2), replace(SHARED, weights="external"))
@example(World(precision="int8-weight-only", installed=(FULL, RTX), gpus=("NVIDIA T4",)), Ask(("t4",)))
@example(World(precision="bf16"), Ask(("t4", "h100", "l4")))
@example(World(precision="fp32"), Ask(("t4",)))
@example(World(rows=64, memory=3 * GB), Ask(("a10g",), weights="embedded"))
def test_what_a_refusal_offers_is_accepted(world: World, ask: Ask) -> None:
    check(world, ask)


@pytest.mark.parametrize("weights", ["auto", "embedded"])
def test_one_plan_for_several_gpus_is_not_sent_to_external_weights(weights: str) -> None:
    """TensorRT-RTX has no such plan; each GPU alone has one."""
    message = refusal(World(memory=20 * GB), replace(SHARED, weights=weights)) or ""
    first, second = message.split(", or ")
    place = " --weights external" if weights == "embedded" else ""
    assert first.endswith(
        "and 20.00 GB is available; build one engine for each compute capability: mistral-trt build ONNX_DIR "
        f"--gpu a10g --flavor tensorrt-rtx{place} --max-batch-size 4 --out DIR; mistral-trt build ONNX_DIR "
        f"--gpu l4 --flavor tensorrt-rtx{place} --max-batch-size 4 --out DIR"
    )
    assert second == "export with --precision int8"


def test_embedded_weights_are_offered_only_where_they_fit() -> None:
    ask = replace(SHARED, weights="external")
    assert "use --weights embedded, or build one engine" in (refusal(World(), ask) or "")
    assert "; use --weights embedded" not in (refusal(World(memory=20 * GB), ask) or "")
    none = refusal(World(memory=GB // 2), ask) or ""
    assert re.search(r"build one engine for each .*, on a machine with 1\.\d\d GB of memory and", none)


def test_polygraphy_asks_for_a_plan_that_holds_its_weights() -> None:
    ask = Ask(("a10g",), polygraphy=True)
    assert run(World(), ask).budget.weights == "embedded"
    small = World(memory=20 * GB)
    assert run(small, replace(ask, polygraphy=False)).budget.weights == "external"
    assert (refusal(small, ask) or "").endswith(
        "and 20.00 GB is available; leave out --polygraphy, which needs the weights in the plan, or export "
        "with --precision int8"
    )
    assert (refusal(World(), replace(ask, weights="external")) or "") == (
        "Polygraphy loads a plan with its weights and does not refit one; use --weights embedded, or leave "
        "out --polygraphy, which needs the weights in the plan"
    )


def test_a_gpu_of_full_tensorrt_alone_is_not_offered_as_one_to_build_for_here() -> None:
    message = refusal(World(layers=60, precision="int4", rows=500), Ask(("h100",), flavor="auto")) or ""
    assert "on a machine whose GPU is an NVIDIA H100 SXM, run: pip install" in message
    large = refusal(World(layers=800, rows=1, precision="int4"), Ask(("l40s",), flavor=RTX)) or ""
    assert "H200, build for that one with --flavor tensorrt" in large


def test_an_offer_that_is_refused_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way it was: external weights, whatever the number of GPUs."""
    monkeypatch.setattr(settle_module, "remedy", lambda *_: "use --weights external")
    with pytest.raises(AssertionError, match="cannot leave its weights out"):
        check(World(memory=20 * GB), SHARED)
    monkeypatch.setattr(settle_module, "remedy", lambda *_: "think again")
    with pytest.raises(AssertionError, match="nothing to do in"):
        check(World(memory=20 * GB), Ask(("a10g",), weights="embedded"))
