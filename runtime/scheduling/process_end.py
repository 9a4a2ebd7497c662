"""A process that ends or forks → its engines' threads are ended first, or given up in the child."""

import atexit
import os
import weakref
from typing import Protocol

_LONGEST_STEP_S = 10.0


class Watched(Protocol):
    def close(self, timeout_s: float | None = None) -> None:
        """End the thread, waiting so long for a step that is under way."""

    def abandon(self) -> None:
        """In the child of a fork, where the thread is not: take nothing any more."""


_watched: "weakref.WeakSet[Watched]" = weakref.WeakSet()


def watch(thread_owner: Watched) -> None:
    """Have it told, as long as anyone else refers to it."""
    _watched.add(thread_owner)


@atexit.register
def close_all() -> None:
    """End the threads before the interpreter ends: native code must not run on while it does."""
    for owner in list(_watched):
        owner.close(timeout_s=_LONGEST_STEP_S)


def abandon_all() -> None:
    for owner in list(_watched):
        owner.abandon()


os.register_at_fork(after_in_child=abandon_all)
