"""A build that is refused → the nearest ones that would not be, in words.

What is offered has been tried first (`wish.obstacle`), on this machine and with all that is kept as it was
asked: no remedy is refused in its turn. Of two it offers the second gives up nothing that the first does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from mistral_trt.contract import DTYPE_BYTES, QUANTIZED
from mistral_trt.engines.flavor import AUTO, FULL, RTX, Flavor, builders_here
from mistral_trt.engines.gpu import GpuTarget, load_catalogue
from mistral_trt.engines.planning.budget import Budget, gigabytes
from mistral_trt.engines.planning.host import Host
from mistral_trt.engines.planning.sizes import linear_elements, quantized_linear_bytes
from mistral_trt.engines.planning.wish import DISK, MEMORY, Wish, obstacle, place_weights
from mistral_trt.engines.precision import buildable, either
from mistral_trt.engines.targets import TargetSet
from mistral_trt.weight_index import EMBEDDED, EXTERNAL

_SMALLER = ("int8", "int8-weight-only", "int4")  # from the widest codes to the narrowest
_AS_WIDE = {
    "int8": ("int8", "int8-weight-only"),
    "int8-weight-only": ("int8", "int8-weight-only"),
    "fp8": ("int8", "int8-weight-only"),
    "int4": _SMALLER,
}
"""Precision → those of them that make no weight smaller."""

_AMPLE = Host(memory_bytes=1 << 60, disk_bytes=1 << 60)


@dataclass(frozen=True)
class Change:
    """How another build differs from the one that is asked for; what is None or False stays.

    apart: a plan for each compute capability instead of one for all.  bare: without Polygraphy's commands.
    """

    precision: str | None = None
    rows: int | None = None
    weights: str | None = None
    apart: bool = False
    bare: bool = False

    @property
    def parts(self) -> frozenset[str]:
        """Names of what is another."""
        return frozenset(name for name, value in vars(self).items() if value)

    @property
    def distance(self) -> int:
        """The more, the further from what was asked: another precision is another model, and an export."""
        return len(self.parts) + 2 * (self.precision is not None)


def remedy(wish: Wish, host: Host, out: Path) -> str:
    """What to do instead of a build that `wish.obstacle` refuses."""
    refused = obstacle(wish, host)
    offers = [_words(change, wish) for change in nearest(wish, host)]
    if refused and refused.kind == DISK:
        offers.insert(0, f"free some or choose another --out than {out}")
    elif refused and refused.kind == MEMORY and not offers:
        offers.append("free some or build on a machine that has that much")
    return ", or ".join(offers or _elsewhere(wish)) or _larger(wish, host)


def nearest(wish: Wish, host: Host) -> list[Change]:
    """The nearest change that is accepted, and the next that has no part of it."""
    accepted = sorted((change for change, _ in changes(wish, host)), key=lambda change: change.distance)
    others = [change for change in accepted if not change.parts & accepted[0].parts]
    return accepted[:1] + others[:1]


def changes(wish: Wish, host: Host) -> Iterator[tuple[Change, list[Wish]]]:
    """Every change after which the build is accepted, and the builds that it makes of it."""
    for precision, budget in [(None, wish.budget), *smaller_budgets(wish)]:
        rows = None if budget.fits(wish.targets.smallest) else budget.rows_that_fit(wish.targets.smallest)
        aparts, bares = ((False, True) if may else (False,) for may in (wish.is_shared, wish.polygraphy))
        for apart, bare, weights in product(aparts, bares, _places(wish) if rows != 0 else ()):
            change = Change(precision, rows, weights, apart, bare)
            tried = changed(wish, change, budget)
            if change.parts and all(obstacle(other, host) is None for other in tried):
                yield change, tried


def changed(wish: Wish, change: Change, budget: Budget) -> list[Wish]:
    """The builds that a change makes of one.  budget: in the precision that it has then."""
    sets = _apart(wish) if change.apart else [wish.targets]
    fitting = budget if change.rows is None else budget.with_rows(change.rows)
    other = replace(
        wish,
        weights=change.weights or wish.weights,
        budget=fitting,
        polygraphy=wish.polygraphy and not change.bare,
    )
    return [replace(other, targets=targets) for targets in sets]


def smaller_budgets(wish: Wish) -> Iterator[tuple[str, Budget]]:
    """The same model in each precision that these GPUs can have and that has smaller weights, all linears in
    it.
    """
    contract, config = wish.budget.contract, wish.budget.contract.config
    linears = wish.budget.quantized_bytes
    if contract.precision not in QUANTIZED:
        linears = linear_elements(config) * DTYPE_BYTES[contract.cache_dtype]
    possible = buildable(wish.targets.targets, wish.builder.name)
    for precision in _SMALLER:
        if precision in possible and precision not in _AS_WIDE.get(contract.precision, ()):
            quantized = quantized_linear_bytes(config, precision)
            weights = max(0, wish.budget.weights_bytes - linears) + quantized
            other = replace(contract, precision=precision)
            yield (
                precision,
                replace(wish.budget, contract=other, weights_bytes=weights, quantized_bytes=quantized),
            )


def _places(wish: Wish) -> tuple[str | None, ...]:
    """Where else the weights could be; "auto" has looked there already."""
    if wish.weights == AUTO:
        return (None,)
    return None, EMBEDDED if wish.weights == EXTERNAL else EXTERNAL


def _apart(wish: Wish) -> list[TargetSet]:
    gpus = wish.targets.targets
    return [TargetSet(tuple(gpu for gpu in gpus if gpu.sm == sm)) for sm in wish.targets.sms]


def _words(change: Change, wish: Wish) -> str:
    options = [] if change.rows is None else [f"--max-batch-size {change.rows}"]
    options += [f"--weights {change.weights}"] if change.weights else []
    export = f"export with --precision {change.precision}" if change.precision else ""
    if change.apart:
        commands = "; ".join(_command(targets, change, wish) for targets in _apart(wish))
        build = f"build one engine for each compute capability: {commands}"
        return f"{export} and {build}" if export else build
    if change.parts == {"weights"} and change.weights == EXTERNAL:
        needed = gigabytes(replace(wish.budget, weights=EXTERNAL).build_memory_bytes)
        return f"use --weights {EXTERNAL}, which needs {needed} of memory"
    use = f"use {' and '.join(options)}" if options else ""
    bare = "leave out --polygraphy, which needs the weights in the plan" if change.bare else ""
    return " and ".join(part for part in (export, use, bare) if part)


def _command(targets: TargetSet, change: Change, wish: Wish) -> str:
    """All of it, as nothing says what of the asked command was a default."""
    rows = wish.budget.max_batch_size if change.rows is None else change.rows
    weights = change.weights or wish.weights
    options = [f"--gpu {','.join(gpu.key for gpu in targets.targets)}", f"--flavor {RTX.name}"]
    options += [] if weights == AUTO else [f"--weights {weights}"]
    options += ["--polygraphy"] if wish.polygraphy and not change.bare else []
    return f"mistral-trt build ONNX_DIR {' '.join(options)} --max-batch-size {rows} --out DIR"


def _elsewhere(wish: Wish) -> list[str]:
    """The change that takes the least memory, on a machine that has it; none if that would not help."""
    found = [(change, *_needs(tried)) for change, tried in changes(wish, _AMPLE)]
    if not found:
        return []
    change, memory, disk = min(found, key=lambda need: (*need[1:], need[0].distance))
    return [f"{_words(change, wish)}, {_machine(memory, disk)}"]


def _needs(wishes: Sequence[Wish]) -> tuple[int, int]:
    """Bytes of memory and of disk that any of these builds takes of a machine that has enough."""
    budgets = [place_weights(wish, _AMPLE) for wish in wishes]
    return max(b.build_memory_bytes for b in budgets), max(b.disk_bytes(linked=False) for b in budgets)


def _machine(memory: int, disk: int) -> str:
    return f"on a machine with {gigabytes(memory)} of memory and {gigabytes(disk)} of free disk"


def _larger(wish: Wish, host: Host) -> str:
    """GPUs that the engine would fit: those it can be built for here, and those it cannot."""
    by_memory = sorted(load_catalogue().values(), key=lambda gpu: (gpu.memory_bytes, gpu.key))
    builders = builders_here(by_memory, wish.flavor)
    here = [gpu for gpu in by_memory if gpu.key in builders]
    away = [gpu for gpu in by_memory if gpu.key not in builders]
    offers: list[str] = []
    for room, place in product((host, _AMPLE), _places(wish)):
        keys = [gpu.key for gpu in here if _accepts(gpu, builders[gpu.key], wish, place, room)]
        if keys and not offers:
            needs = _needs([replace(wish, weights=place or wish.weights)])
            machine = f", {_machine(*needs)}" if room == _AMPLE else ""
            offers.append(f"build for --gpu {either(keys)}{_and_place(place)}{machine}")
    for place in _places(wish):
        names = [gpu.name for gpu in away if _accepts(gpu, FULL, wish, place, _AMPLE)]
        if names:
            machine = f"on a machine whose GPU is an {either(names)}"
            offers.append(f"{machine}, build for that one with --flavor {FULL.name}{_and_place(place)}")
            break
    return ", or ".join(offers) or "no GPU of the catalogue is large enough"


def _accepts(gpu: GpuTarget, builder: Flavor, wish: Wish, place: str | None, host: Host) -> bool:
    """Whether the build is accepted for that GPU instead."""
    if wish.budget.contract.precision not in buildable([gpu], builder.name):
        return False
    weights = place or wish.weights
    alone = replace(wish, targets=TargetSet((gpu,)), builder=builder, weights=weights)
    return obstacle(alone, host) is None


def _and_place(place: str | None) -> str:
    return f" and use --weights {place}" if place else ""
