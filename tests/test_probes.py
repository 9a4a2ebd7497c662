"""The positions where a ring would break."""

from mistral_trt.contract import GraphContract, Ring
from mistral_trt.validate.scenarios.probes import probes, wraps
from tests.models import TINY

CONFIG = TINY


def contract(window: int, chunk: int, max_context: int | None = None) -> GraphContract:
    return GraphContract(CONFIG, "fp32", Ring(window, chunk), 1, max_context)


def names(window: int, chunk: int, length: int, max_context: int | None = None) -> dict[str, int]:
    return {probe.name: probe.position for probe in probes(contract(window, chunk, max_context), length)}


def test_probes_sit_where_rings_break() -> None:
    assert names(512, 256, 2312) == {
        "C-1": 255, "C": 256, "C+1": 257, "W-1": 511, "W": 512, "W+1": 513,
        "R-1": 767, "R": 768, "R+1": 769, "2W": 1024, "2R = 3W": 1536,
    }  # fmt: skip
    assert names(8, 4, 20)["2W"] == 16
    assert "2R = 3W" not in names(8, 4, 20)


def test_a_ring_that_never_wraps_is_probed_at_chunk_edges_and_its_end() -> None:
    assert names(40, 4, 40, max_context=40) == {"C-1": 3, "C": 4, "C+1": 5, "end": 39}
    assert wraps(contract(40, 4, max_context=40), 40) == []
