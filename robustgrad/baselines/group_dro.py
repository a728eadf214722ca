"""Group DRO: weights over known groups, raised multiplicatively where the loss is high."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import _checks


class GroupDRO:
    """Online mirror ascent on the weights of groups; also GR-DPO and GR-IPO, by the losses it is given.

        alpha_g prop. to alpha_g exp(step_size (L_g + adjustment / sqrt(N_g)))        before each step
        group_loss="mean":     L_g mean loss of the batch's members,     ratio alpha_g n / n_g
        group_loss="scaled":   L_g = (N / N_g) (1/n) sum of them,        ratio alpha_g N / N_g

    N_g samples of group g among N of the training set, n_g among n of the batch. A group that the batch does
    not hold has L_g = 0, as in both released codes. "scaled" is unbiased for the mean of the group. The
    mean of the ratios is 1 over many batches ("scaled"), or in a batch that holds all groups ("mean").

    Args:
        counts: (G,) N_g, all above 0; ids are 0 .. G - 1.
        step_size: >= 0, eta. It multiplies a loss, so it depends on the loss's scale. 0 keeps the weights equal.
        adjustment: >= 0, C: small groups generalise worse.
        group_loss: "mean" (Sagawa et al.) or "scaled" (GR-DPO).
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: arXiv 1911.08731, Algorithm 1 and its group adjustments; arXiv 2405.20304 and its code.

    >>> import torch
    >>> group_dro = GroupDRO([3, 1], step_size=1.0)
    >>> losses, groups = torch.tensor([0.0, 0.0, 0.0, 2.0]), torch.tensor([0, 0, 0, 1])
    >>> group_dro.ratio(losses, groups)
    tensor([0.1589, 0.1589, 0.1589, 3.5232])
    """

    def __init__(
        self,
        counts: Sequence[int] | Tensor,
        *,
        step_size: float = 0.01,
        adjustment: float = 0.0,
        group_loss: Literal["mean", "scaled"] = "mean",
    ) -> None:
        self.counts = torch.as_tensor(counts, dtype=torch.float32)
        _checks.group_counts(self.counts)
        self.step_size = _checks.number("step_size", step_size, 0.0, torch.inf, "0.01 is usual.")
        self.adjustment = _checks.number("adjustment", adjustment, 0.0, torch.inf, "0 is none.")
        _checks.choice("group_loss", group_loss, ("mean", "scaled"))
        self.group_loss = group_loss
        self._log_weights = -self.counts.new_tensor(len(self.counts)).log().expand(len(self.counts))

    @property
    def weights(self) -> Tensor:
        """(G,) alpha, sum 1."""
        return self._log_weights.exp()

    def ratio(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Update the weights of the groups by this batch, then give every sample's ratio, (n,), detached.

        Args:
            losses: (n,) higher is worse.
            groups: (n,) integer ids, 0 .. G - 1.
        Returns: (n,) float32. A batch with a NaN or infinite loss gives NaN and leaves the weights alone.
        """
        _checks.per_sample("losses", losses)
        _checks.group_ids(groups, losses, len(self.counts))
        losses, groups = losses.detach().float(), groups.long()
        self._to(losses.device)
        zeros = torch.zeros_like(self.counts)
        total, members = zeros.index_add(0, groups, losses), zeros.index_add(0, groups, torch.ones_like(losses))
        if self.group_loss == "mean":
            share = members / len(losses)
            group_losses = total / members.clamp_min(1)
        else:
            share = self.counts / self.counts.sum()
            group_losses = total / (share * len(losses))
        self._ascend(group_losses)
        return (self.weights / share)[groups] + (group_losses * 0).sum()

    def _ascend(self, group_losses: Tensor) -> None:
        gain = self.step_size * (group_losses + self.adjustment / self.counts.sqrt())
        # One bad batch must not stay in the weights for good.
        gain = torch.where(group_losses.isfinite().all(), gain, 0.0)
        self._log_weights = (self._log_weights + gain).log_softmax(0)

    def _to(self, device: torch.device) -> None:
        self.counts, self._log_weights = self.counts.to(device), self._log_weights.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"log_weights": self._log_weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises: ValueError: the state is of another number of groups."""
        if state["log_weights"].shape != self.counts.shape:
            raise ValueError(
                f"state must hold {len(self.counts)} groups, got {len(state['log_weights'])}. Build it with its counts."
            )
        self._log_weights = state["log_weights"]
