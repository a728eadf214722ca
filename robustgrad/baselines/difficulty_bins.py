"""Bins of prompts by how often the policy solves them, kept up to date while it learns."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks


class DifficultyBins:
    """Groups prompts by a moving pass@k: the share of recent visits at which any of k answers was right.

        pass_x = mean of the last `window` visits to x of [any of its answers was right]
        bin of x = floor(bins pass_x), the last one closed;    kept until pass_x leaves it by more than `margin`

    The margin keeps a prompt on a boundary from changing its bin with every answer. Bookkeeping in Python: it
    reads its arguments, once per rollout.

    Args:
        bins: B of equal width on [0, 1]; 0 is the hardest.
        window: H, visits that count.
        margin: >= 0, in units of pass@k.
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: arXiv 2601.19280, equations 10 and 11 and the hysteresis below them; it bins by tenths. The authors'
        scripts for Prompt-GDRO have a window of 50 or 100 and a margin of 0.03.

    >>> import torch
    >>> bins = DifficultyBins(2, window=4)
    >>> bins.update([7, 7, 9, 9], torch.tensor([False, True, False, False]))
    tensor([1, 1, 0, 0])
    """

    def __init__(self, bins: int = 10, *, window: int = 8, margin: float = 0.0) -> None:
        self.bins = _checks.whole("bins", bins, 1, "10 is the paper's.")
        self.window = _checks.whole("window", window, 1, "It counts visits.")
        self.margin = _checks.number("margin", margin, 0.0, 1.0, "0 changes bins at their boundaries.")
        self._visits: dict[int, deque[bool]] = {}
        self._bin: dict[int, int] = {}

    def update(self, prompts: Sequence[int] | Tensor, right: Sequence[bool] | Tensor) -> Tensor:
        """Take in one rollout, then give the bin of every response, (n,) integer ids on the device of `right`.

        Args:
            prompts: (n,) integer ids of the prompts, the same in every rollout.
            right: (n,) bool, whether the response solves its prompt.
        """
        ids, solved = torch.as_tensor(prompts), torch.as_tensor(right)
        if ids.dim() != 1 or solved.shape != ids.shape or solved.dtype != torch.bool:
            raise ValueError(
                f"prompts and right must be (n,) ids and (n,) bool, got {tuple(ids.shape)} {ids.dtype} and "
                f"{tuple(solved.shape)} {solved.dtype}. Give one of each per response."
            )
        any_right: dict[int, bool] = {}
        for prompt, good in zip(ids.tolist(), solved.tolist(), strict=True):
            any_right[prompt] = any_right.get(prompt, False) or good
        for prompt, good in any_right.items():
            self._visits.setdefault(prompt, deque(maxlen=self.window)).append(good)
            self._bin[prompt] = self._place(prompt)
        return torch.tensor([self._bin[prompt] for prompt in ids.tolist()], dtype=torch.long, device=solved.device)

    def look_up(self, prompts: Sequence[int] | Tensor) -> Tensor:
        """The bin of every prompt as it stands, (n,) on the CPU. New ones are among the hardest, bin 0."""
        return torch.tensor(
            [self._bin.get(prompt, 0) for prompt in torch.as_tensor(prompts).tolist()], dtype=torch.long
        )

    def _place(self, prompt: int) -> int:
        visits, old = self._visits[prompt], self._bin.get(prompt)
        share = sum(visits) / len(visits)
        if old is not None and old / self.bins - self.margin <= share < (old + 1) / self.bins + self.margin:
            return old
        return min(int(share * self.bins), self.bins - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"visits": {prompt: list(visits) for prompt, visits in self._visits.items()}, "bin": dict(self._bin)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._visits = {prompt: deque(visits, maxlen=self.window) for prompt, visits in state["visits"].items()}
        self._bin = dict(state["bin"])
