"""Walks over the autograd graph: what feeds a scalar, and what the rows of a tensor are."""

from __future__ import annotations

import math
from typing import Any

Node = Any  # torch.autograd.graph.Node, whose subclasses have no types
_FAR = 256  # nodes looked at; a sample's own losses are a handful of operations away


_MIXING = ("Mm", "Mv", "Addm", "Bmm", "Dot")  # samples times parameters, whatever the shapes


def shape(node: Node, output: int = 0) -> tuple[int, ...] | None:
    """Shape of a node's output; None where torch does not say."""
    # The only place where torch says so; without it nothing is found, which is an error further on.
    metadata = getattr(node, "_input_metadata", None)
    return tuple(metadata[output].shape) if metadata and output < len(metadata) else None


def ancestors(node: Node, oldest: int) -> set[Node]:
    """The nodes that a node was made of, as far back as sequence number `oldest`."""
    seen, waiting = set(), [node]
    while waiting:
        for source, _ in waiting.pop().next_functions:
            if source is not None and source not in seen and source._sequence_nr() >= oldest:
                seen.add(source)
                waiting.append(source)
    return seen


def feeding(scalar: Node, known: set[Node]) -> tuple[set[Node], list[str]]:
    """Follow a scalar back through scalars: the known nodes it comes from, and the names of those at which
    the scalars end otherwise."""
    found: set[Node] = set()
    ends: list[str] = []
    seen, waiting = {scalar}, [scalar]
    while waiting:
        node = waiting.pop()
        if node in known:
            found.add(node)
            continue
        sources = [(source, output) for source, output in node.next_functions if source is not None]
        scalars = [source for source, output in sources if shape(source, output) == ()]
        if len(scalars) < len(sources) or not sources:
            ends.append(node.name())
        waiting += [source for source in scalars if source not in seen]
        seen.update(scalars)
    return found, ends


def samples_in(node: Node | None, rows: int, expected: int | None = None) -> int | str:
    """How many samples the `rows` rows of a node's output are, or why they are none.

    Follows operations that keep the rows. Where they were flattened from (samples, tokens), the samples
    count; rows that were expanded from one number, sorted, picked by a mask, or are those of a parameter
    belong to no sample. A compiled model shows no operations: there the expected number counts, if it fits.
    """
    seen, waiting, computed = {node}, [node] if node is not None else [], False
    while waiting and len(seen) < _FAR:
        node = waiting.pop()
        name, to = node.name(), shape(node) or ()
        if name.startswith("CompiledFunction"):
            return expected if expected and rows % expected == 0 else rows
        for source, output in node.next_functions:
            of = None if source is None else shape(source, output)
            if of is None or source in seen:
                continue
            problem = _no_samples(name, of, to)
            if problem:
                return problem
            if _flattens(name, of, rows):
                return of[0]
            # The batch is among the first two dimensions until the model itself begins.
            if of[:1] == (rows,) and len(of) <= 2:
                seen.add(source)
                waiting.append(source)
            else:
                computed = True
        computed = computed or name.startswith(_MIXING)
    return rows if computed or waiting else "a parameter itself"


def _no_samples(name: str, of: tuple[int, ...], to: tuple[int, ...]) -> str | None:
    if name.startswith("Expand") and math.prod(of) == 1:
        return "one number expanded to all rows"
    if name.startswith("Sort") and len(to) == 1:
        return "sorted, so that rows mix samples"
    if name.startswith(("Index", "MaskedSelect")) and len(of) > len(to) and of[0] != to[0]:
        return f"picked out of {of} by a mask"
    return None


def _flattens(name: str, of: tuple[int, ...], rows: int) -> bool:
    return name.startswith(("View", "Reshape", "UnsafeView")) and len(of) > 1 and of[0] != rows == of[0] * of[1]
