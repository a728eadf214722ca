"""One batch over many ranks: their samples meet, and each rank finds its own slice again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .samples import Samples


class Ranks:
    """The data-parallel ranks whose losses compete with each other.

    Args:
        process_group: None: all ranks, where there is more than one. A ProcessGroup or a one-dimensional
            DeviceMesh: those of it; a mesh of more dimensions needs one that is named "dp".
    Every rank of the group has to take part in every exchange, with an empty call if it has no samples.
    """

    def __init__(self, process_group: Any = None) -> None:
        self._group = _group(process_group)

    @property
    def group(self) -> Any:
        """The group to exchange with; None where a rank is alone. The default is looked up anew each
        time: a Reweighter may be made before the ranks know each other."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self._group is None else self._group
        return group if dist.get_world_size(group) > 1 else None

    def gather(self, samples: Samples) -> tuple[Samples, slice]:
        """The samples of all ranks, in the order of the ranks, and where the own ones lie.

        Two collectives, of the sizes and of the samples, and one host sync: sizes may differ, down to 0.
        Raises: RuntimeError: not all ranks came, within the time-out of the process group.
        ValueError, on all ranks: groups were given on some of them only.
        """
        group = self.group
        if group is None:
            return samples, slice(None)
        own = len(samples.scores)
        head = torch.tensor([own, samples.groups is not None], device=samples.scores.device)
        sizes, grouped = zip(*_all_gather(head, group).tolist(), strict=True)
        _check_same_groups([bool(flag) for flag, size in zip(grouped, sizes, strict=True) if size])
        start = sum(sizes[: dist.get_rank(group)])
        if sum(sizes) == 0:
            return samples, slice(None)
        rows = _packed(samples)
        padded = torch.cat((rows, rows.new_zeros(max(sizes) - own, rows.shape[-1])))
        parts = _all_gather(padded, group)
        together = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return _unpacked(together, any(grouped), samples.ratio is not None), slice(start, start + own)

    def anywhere(self, flag: Tensor) -> Tensor:
        """Whether the 0-dim flag is set on any rank, the same answer on all of them."""
        group = self.group
        return flag if group is None else _all_gather(flag.byte().reshape(1), group).any()

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a process group is a connection, there is no second one

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        _check_picklable(self._group)
        return Ranks, ()


def _group(given: Any) -> Any:
    """The process group that was meant; checked where this can be checked."""
    if given is None:
        return None
    names = getattr(given, "mesh_dim_names", None) or ()
    if hasattr(given, "get_group") and hasattr(given, "ndim"):
        _check_data_parallel_mesh(given.ndim, names)
        return given.get_group() if given.ndim == 1 else given.get_group("dp")
    _check_process_group(given)
    return given


def _all_gather(tensor: Tensor, group: Any) -> Tensor:
    """(ranks, *shape): the same shape everywhere."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    with _all_present():
        dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)


@contextmanager
def _all_present() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "every rank must call as often as the others and step together, got a rank that did not come. "
            "Give a rank without samples an empty call, losses of shape (0,); look for a rank that died; a "
            "slow one needs init_process_group(timeout=...)."
        ) from error


def _packed(samples: Samples) -> Tensor:
    """(n, 4) scores, weights, the bits of the groups, ratios: one tensor to send."""
    zero = torch.zeros_like(samples.scores)
    # As bits, not as numbers: an id above 2^53 would lose its last digits.
    groups = zero if samples.groups is None else samples.groups.long().view(zero.dtype)
    return torch.stack((samples.scores, samples.weights, groups, zero if samples.ratio is None else samples.ratio), -1)


def _unpacked(rows: Tensor, grouped: bool, given: bool) -> Samples:
    scores, weight, groups, ratio = rows.unbind(-1)
    return Samples(scores, weight, groups.contiguous().view(torch.int64) if grouped else None, ratio if given else None)


def _check_same_groups(grouped: list[bool]) -> None:
    if len(set(grouped)) > 1:
        raise ValueError(
            f"groups must be given on every rank or on none, got {grouped.count(True)} of {len(grouped)} ranks with "
            "groups. Give them everywhere."
        )


def _check_process_group(group: object) -> None:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a ProcessGroup or DeviceMesh, got {type(group).__name__} {group!r}. "
            "Leave it out for all ranks."
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"process_group must hold this rank {dist.get_rank()}, got a group without it. Give each rank its own "
            "data-parallel group."
        )


def _check_data_parallel_mesh(ndim: int, names: tuple[str, ...]) -> None:
    if ndim != 1 and "dp" not in names:
        raise ValueError(
            f"process_group must be the data-parallel part of a mesh, got {ndim} dimensions {names}. Ranks along "
            "the others hold the same samples: give mesh[NAME], flattened where there are two such names."
        )


def _check_picklable(group: object) -> None:
    if group is not None:
        raise TypeError(
            "process_group must be left out of what is pickled, got a group, which is a live connection. Save "
            "reweighter.state_dict() instead."
        )
