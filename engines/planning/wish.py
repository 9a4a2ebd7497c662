"""What is asked of a build + what the machine has → where its weights will be, or what is in the way.

All of it is arithmetic on what is given, so a build that nobody asked for can be tried too: `remedy` does so.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from mistral_trt.engines.flavor import AUTO, Flavor
from mistral_trt.engines.planning.budget import Budget, build_parts, gigabytes, usable_bytes
from mistral_trt.engines.planning.host import Host
from mistral_trt.engines.targets import TargetSet
from mistral_trt.errors import BuildError
from mistral_trt.weight_index import EMBEDDED, EXTERNAL

WEIGHTS = (AUTO, EMBEDDED, EXTERNAL)
"""Where the weights may be asked for: in the plan, beside it, or wherever the build then fits."""

DEVICE, SHARED, POLYGRAPHY, MEMORY, DISK = "device", "shared", "polygraphy", "memory", "disk"


@dataclass(frozen=True)
class Wish:
    """A build that is asked for.

    flavor, weights: as asked, "auto" among them.  builder: the TensorRT that will build.
    budget: what it needs with its weights embedded.  polygraphy: its commands are asked for too, and they
    load a plan as it is.
    """

    targets: TargetSet
    flavor: str
    builder: Flavor
    weights: str
    budget: Budget
    polygraphy: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise BuildError(f"weights must be one of {', '.join(WEIGHTS)}, found {self.weights!r}")

    @property
    def is_shared(self) -> bool:
        """Whether one plan is to serve several compute capabilities."""
        return len(self.targets.sms) > 1


class Obstacle(NamedTuple):
    """Why a build cannot be.  kind: one of the words above.  words: that in a clause."""

    kind: str
    words: str


def obstacle(wish: Wish, host: Host) -> Obstacle | None:
    """The first thing that is in the way of a build; None if it may begin."""
    if not wish.budget.fits(wish.targets.smallest):
        return Obstacle(DEVICE, _device_words(wish))
    if wish.is_shared and wish.weights == EXTERNAL:
        # TensorRT-RTX 1.7.1 fails inside on a single refittable weight ("CHECK(sm_vers_.size() == 1)"), and
        # so does every later build of the process.
        capabilities = ", ".join(wish.targets.compute_capabilities)
        return Obstacle(
            SHARED,
            f"a plan for several compute capabilities ({capabilities}) cannot leave its weights out: "
            "TensorRT-RTX does not build it",
        )
    if wish.polygraphy and wish.weights == EXTERNAL:
        return Obstacle(POLYGRAPHY, "Polygraphy loads a plan with its weights and does not refit one")
    return shortage(place_weights(wish, host), host)


def place_weights(wish: Wish, host: Host) -> Budget:
    """The budget with its weights where they will be: "embedded" in the plan, or "external" to it.

    "auto" is embedded where the machine has the memory and the disk for it, or nothing else is possible.
    """
    inside, outside = (replace(wish.budget, weights=place) for place in (EMBEDDED, EXTERNAL))
    if wish.weights == AUTO and not wish.is_shared and not wish.polygraphy:
        return inside if shortage(inside, host) is None else outside
    return outside if wish.weights == EXTERNAL else inside


def shortage(budget: Budget, host: Host) -> Obstacle | None:
    """What the machine lacks for the build; None if nothing."""
    if budget.build_memory_bytes > host.memory_bytes:
        return Obstacle(
            MEMORY,
            f"predicted: the build needs {gigabytes(budget.build_memory_bytes)} of memory "
            f"({build_parts(budget)}), and {gigabytes(host.memory_bytes)} is available",
        )
    needed = budget.disk_bytes(linked=host.linked)
    if needed > host.disk_bytes:
        alone = host.linked or budget.weights == EMBEDDED
        what = "the plan needs" if alone else "the plan and its weights need"
        free = f"{gigabytes(host.disk_bytes)} is free"
        return Obstacle(DISK, f"predicted: {what} {gigabytes(needed)} of disk, and {free}")
    return None


def _device_words(wish: Wish) -> str:
    budget, gpu = wish.budget, wish.targets.smallest
    rows = budget.max_batch_size
    what = f"{rows} rows of ring need" if rows > 1 else "1 row of ring needs"
    rest = budget.activation_bytes + budget.logits_bytes
    return (
        f"predicted: {what} {_gb(budget.rings_bytes)} beside {_gb(budget.weights_bytes)} of weights and "
        f"{_gb(rest)} of activations and logits; {gpu.key} has {_gb(usable_bytes(gpu))} usable"
    )


def _gb(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB"
