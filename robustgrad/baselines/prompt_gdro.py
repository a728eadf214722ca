"""Prompt-GDRO: exponential weights on bins of prompts, by a moving average of their mean losses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from ._group_checks import group_ids


class PromptGDRO:
    """The first adversary of multi-adversary group DRO: bins of prompts that stay hard weigh more.

        S_b <- (1 - decay) S_b + decay (mean loss of the batch's members of b)      for the bins in the batch
        w_b = exp(step_size clip(S_b, -clip, clip)),     q_b = (1 - mixing) w_b / sum w + mixing / B

    A score is a mean, not a sum, and moves only when its bin comes: frequent bins have no lead over rare ones.
    To the bins of `DifficultyBins`, or to any groups, it gives

        form="normalised":   min(w_b, cap) / its mean over the batch        mean 1
        form="paper":        min(w_b, cap)                                  as the paper scales the advantages

    whose constant factor the paper leaves to the learning rate; it grows with the losses. The authors' code brings
    the ratios to a mean of 1 too: of q_b over the bins of the batch, with the cap after that.

    Args:
        bins: B, ids are 0 .. B - 1.
        step_size: >= 0, eta_q. It multiplies a loss. 0 is plain averaging.
        decay: in (0, 1], the weight of the newest mean (the paper's beta).
        clip: > 0, C, in units of the loss.
        mixing: in [0, 1], gamma: the share of `weights` that is uniform.
        cap: > 0, omega_max.
        form: "normalised" or "paper".
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: arXiv 2601.19280, equations 12 to 16. Its appendix A.2.1 has 10 bins, step_size 0.65, decay 0.12, mixing
        0.01, cap 15, and divides a bin's mean loss by its share of the batch, an option of the paper that is left
        out here; clip is not given.

    >>> import torch
    >>> gdro = PromptGDRO(2, step_size=1.0, decay=1.0)
    >>> gdro.ratio(torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1]))
    tensor([0.6995, 0.6995, 0.6995, 1.9015])
    """

    def __init__(
        self,
        bins: int,
        *,
        step_size: float = 1.0,
        decay: float = 0.1,
        clip: float = 10.0,
        mixing: float = 0.0,
        cap: float = 10.0,
        form: Literal["normalised", "paper"] = "normalised",
    ) -> None:
        _checks.whole("bins", bins, 1, "Bins are numbered from 0.")
        self.step_size = _checks.number("step_size", step_size, 0.0, torch.inf, "0 is plain averaging.")
        self.decay = _checks.number("decay", decay, 0.0, 1.0, "1 forgets at once.", open_low=True)
        self.clip = _checks.number("clip", clip, 0.0, torch.inf, "It bounds the scores.", open_low=True)
        self.mixing = _checks.number("mixing", mixing, 0.0, 1.0, "0 mixes nothing in.")
        self.cap = _checks.number("cap", cap, 0.0, torch.inf, "It bounds the ratios.", open_low=True)
        _checks.choice("form", form, ("normalised", "paper"))
        self.form, self.scores = form, torch.zeros(bins)

    @property
    def weights(self) -> Tensor:
        """(B,) q, sum 1."""
        return (1 - self.mixing) * self._logits().softmax(0) + self.mixing / len(self.scores)

    def ratio(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Update the scores by this batch, then give every sample's ratio, (n,), detached.

        Args:
            losses: (n,) higher is worse; of policies minus the reward, or the losses of the surrogate.
            groups: (n,) integer ids of the bins, 0 .. B - 1.
        Returns: (n,) float32. A batch with a NaN or infinite loss gives NaN and leaves the scores alone.
        """
        _checks.per_sample("losses", losses)
        group_ids(groups, losses, len(self.scores))
        losses, groups = losses.detach().float(), groups.long()
        self.scores = self.scores.to(losses.device)
        zeros = torch.zeros_like(self.scores)
        total, members = zeros.index_add(0, groups, losses), zeros.index_add(0, groups, torch.ones_like(losses))
        moved = self.scores + self.decay * (total / members.clamp_min(1) - self.scores)
        # One bad batch must not stay in the scores for good.
        self.scores = torch.where((members > 0) & total.isfinite().all(), moved, self.scores)
        ratio = self._logits().exp().clamp_max(self.cap)[groups]
        ratio = ratio / ratio.mean() if self.form == "normalised" else ratio
        return ratio + (total * 0).sum()

    def _logits(self) -> Tensor:
        return self.step_size * self.scores.clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises: ValueError: the state is of another number of bins."""
        if state["scores"].shape != self.scores.shape:
            raise ValueError(
                f"state must hold {len(self.scores)} bins, got {len(state['scores'])}. Build it with its bins."
            )
        self.scores = state["scores"]
