"""One session's ring: where it is, and how many tokens it holds."""

from dataclasses import dataclass
from pathlib import Path

from mistral_trt.runtime.cache import RowSnapshot


@dataclass(eq=False)
class SessionRing:
    """In `row`, `snapshot`, `file`, or nowhere: then position is 0, and `lost` says why if it held anything.

    Only the modules beside this one write it, on the scheduler's thread. Two sessions, one forked from the
    other, may have one snapshot or one file: neither is ever written to.
    """

    position: int = 0
    row: int | None = None
    snapshot: RowSnapshot | None = None
    file: Path | None = None
    lost: str | None = None
