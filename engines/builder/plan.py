"""Decode graph + target → a TensorRT plan in a file, parsed, audited and built under a strict log."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mistral_trt.contract import GraphContract
from mistral_trt.engines.build_log import BuilderLog
from mistral_trt.engines.builder.callbacks import (
    PhaseTree,
    PlanSink,
    make_monitor,
    make_writer,
    only_build,
)
from mistral_trt.engines.builder.compiled import compiled_summary
from mistral_trt.engines.builder.heap import keeping_heap
from mistral_trt.engines.flavor import RTX, Flavor
from mistral_trt.engines.network.blame import blame
from mistral_trt.engines.network.parse import ParsedNetwork, add_profiles, one_line, parse_network
from mistral_trt.engines.network.placeholders import replace_by_placeholders, set_external
from mistral_trt.engines.network.quantized import Quantization
from mistral_trt.engines.targets import TargetSet
from mistral_trt.errors import BuildError
from mistral_trt.progress import note, track
from mistral_trt.weight_index import RefitWeight

_WASTE = {"ring_copies": "copies whole rings", "weights_dequantized": "dequantizes whole weights"}
_POLL_S = 0.2
_STOPPING = "stopping the build at its next step"
_STILL_STOPPING = "the build is stopping; TensorRT ends only between its steps, which can take a minute"
_T = TypeVar("_T")
_LOG = logging.getLogger("mistral_trt")


@dataclass(frozen=True)
class Plan:
    """A plan that was written.

    details: what its build says of it, for the manifest: `network_layers`, layer type → count in the parsed
    network; `audit`, what was looked at before the build; `compiled`, see `compiled.compiled_summary`.
    """

    sha256: str
    bytes: int
    details: Mapping[str, Any]


def build_plan(
    trt: Any,
    onnx: Path,
    contract: GraphContract,
    targets: TargetSet,
    flavor: Flavor,
    file: BinaryIO,
    *,
    quantization: Quantization | None = None,
    external: Sequence[RefitWeight] | None = None,
) -> Plan:
    """Parse, audit and build; the plan goes to `file` as it is made.

    external: the weights to leave out of the plan; None leaves all in.
    Ctrl-C ends the build at its next step. Raises BuildError with TensorRT's own line.
    """
    log, cancel = BuilderLog(), threading.Event()
    sink = PlanSink(file, cancel)
    with only_build(trt, log) as logger, track(f"building for {targets.name}", 100, unit="%") as advance:
        phases = PhaseTree(advance)

        def work() -> ParsedNetwork:
            parsed = parse_network(trt, onnx, contract, logger, log, quantization=quantization)
            config = builder_config(trt, parsed.builder, contract, targets, flavor)
            if external is not None:  # after the audit, which knows the parser's own constants
                replace_by_placeholders(trt, parsed.network, external)
                set_external(trt, config)
            # Named, because TensorRT does not keep its callbacks alive.
            monitor, writer = make_monitor(trt, phases, cancel), make_writer(trt, sink)
            config.progress_monitor = monitor
            built = parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer)
            require_clean(built, log, sink)
            return parsed

        # Weights inside are copied in pieces of every size: kept blocks then add to the peak.
        with nullcontext() if external is None else keeping_heap():
            parsed = interruptible(work, cancel)
        phases.finish()
    details = {
        "network_layers": dict(parsed.layers),
        "audit": parsed.audit.to_json(),
        "compiled": compiled_summary(log.verbose, contract),
    }
    return Plan(sink.digest.hexdigest(), sink.bytes, details)


def builder_config(
    trt: Any, builder: Any, contract: GraphContract, targets: TargetSet, flavor: Flavor
) -> Any:
    """Profiles and targets. Full TensorRT has no target to set: it builds for the GPU it runs on."""
    config = builder.create_builder_config()
    add_profiles(builder, config, contract)
    # The report of the compiled layers is the only look into a plan that needs no GPU.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if flavor == RTX:
        config.num_compute_capabilities = len(targets.sms)
        for index, sm in enumerate(targets.sms):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, sm), index):
                raise BuildError(f"{flavor.name} {trt.__version__} does not take {sm} as a target")
    return config


def require_clean(built: bool, log: BuilderLog, sink: PlanSink) -> None:
    """Raise unless TensorRT built a plan, wrote all of it and had nothing to say against it."""
    if sink.error is not None:
        raise sink.error
    if log.problems:
        raise BuildError(f"TensorRT did not build cleanly: {blame(one_line(log.problems[0]))}")
    if not built:
        raise BuildError("TensorRT built no plan and gave no reason")


def warn_of_waste(plan: Plan) -> None:
    """Say so if the compiled plan moves whole rings or weights: it is right, but every step pays for it."""
    compiled = plan.details.get("compiled", {})
    for fact, what in _WASTE.items():
        found = {name: count for name, count in compiled.get(fact, {}).items() if count}
        if found:
            _LOG.warning("the plan %s in every step (%s), which costs time", what, found)


def interruptible(work: Callable[[], _T], cancel: threading.Event) -> _T:
    """Run `work` in a thread, so that Ctrl-C reaches us and not a callback of TensorRT's.

    On Ctrl-C sets `cancel`, waits for `work` to end and raises KeyboardInterrupt. It waits however often that
    is pressed: TensorRT writes into a file that is closed, and a folder that is removed, when this returns.
    """
    with ThreadPoolExecutor(max_workers=1) as pool, counted_interrupts() as pressed:
        future, said = pool.submit(work), 0
        try:
            while wait([future], _POLL_S).not_done:
                if len(pressed) > said:
                    cancel.set()
                    note(_STOPPING if said == 0 else _STILL_STOPPING)
                    said = len(pressed)
        except BaseException:  # of a handler of the program's own
            cancel.set()
            raise
    if pressed:
        raise KeyboardInterrupt
    return future.result()


@contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """Ctrl-C is added to the list and raises nothing.

    Not where it means something else than KeyboardInterrupt, nor outside the main thread: that alone gets it.
    """
    pressed: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
