"""The pools by their names."""

from __future__ import annotations

from .ambiguity import AmbiguitySet
from .distributed import Ranks
from .memory import MemoryPool
from .pool import BatchPool, Pool
from .schedule import Schedule
from .window import WindowPool

POOLS = ("memory", "window", "batch")


def make_pool(name: str, ambiguity: AmbiguitySet | Schedule, ranks: Ranks, memory: int | None) -> Pool:
    if name == "memory":
        return MemoryPool(ambiguity, ranks, memory)
    return WindowPool(ambiguity, ranks) if name == "window" else BatchPool(ambiguity, ranks)
