"""Rollout-GDRO: a bandit for every bin of prompts chooses how many responses each of its prompts gets."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _checks
from ._exact_budget import best_on_budget
from ._group_checks import group_ids


class RolloutGDRO:
    """The second adversary of multi-adversary group DRO: rollouts go where they help, on an exact budget.

        max_n  sum_b q_b J_b(n_b)    s.t.   sum_b q_b n_b = mean,   n_b in {low, .., high}

    q_b is the share of bin b in the batch of prompts, and J_b(n) minus the mean loss of its responses when each of
    its prompts gets n. Only the J_b of the chosen n_b is seen, so every bin keeps a score S_b(n) for each count:

        p_b(n) = (1 - mixing) softmax(step_size S_b)(n) + mixing / (high - low + 1)
        n      = the counts of greatest prod_b p_b(n_b) that spend the budget exactly; of equals, those nearest mean

    and, once the responses are there, for the n = n_b of every bin in the batch

        form="paper":      S_b(n) <- (1 - decay) S_b(n) + decay (J_b - price n)
        form="released":   S_b(n) <- S_b(n) - J_b - price (n - mean)
        price <- price + price_step (responses per prompt - mean)

    Give losses that are not negative and that a count can reduce, such as the variance of a prompt's rewards over
    n. The paper gives policy losses, but the mean of n responses is expected to be the same for every n, and with
    advantages that are normalised within a prompt it is 0 until the policy moves (both derived). A count that was
    never tried has the score 0: with "paper", losses above 0 make a bin try others and losses below keep it at the
    first; with "released", whose sign of J is the other way round, losses above 0 keep it. As the budget is spent
    exactly, the price moves only where responses were dropped or added on the way (derived).

    Where the variance of every bin is known, `rollout_counts` has the best split in closed form. Bookkeeping on the
    CPU: it reads its arguments, once per rollout.

    Args:
        bins: B, ids are 0 .. B - 1.
        mean: the budget: responses per prompt of a batch on average, whole.
        low, high: bounds of a count, 1 <= low <= mean <= high, whole.
        step_size: >= 0, eta. It multiplies a loss. 0 is `mean` for every prompt.
        mixing: in [0, 1], gamma: the share of the probabilities that is uniform.
        decay: in (0, 1], the weight of the newest J; "released" has none.
        price_step: >= 0, alpha_mu, per response.
        form: "paper" or "released".
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: arXiv 2601.19280, equations 17 to 21; the defaults are its appendix A.2.2. That the average of A.2.2 is
        that of equation 12 is read into it, and how it tells equals apart is not said. "released" is the authors'
        code (kishanpb/verl-gdro), without its fallbacks.

    >>> import torch
    >>> gdro, groups = RolloutGDRO(2, low=2, high=6), torch.tensor([0, 0, 1, 1])
    >>> for _ in range(20):  # the more responses the smaller the loss, in bin 1 nine times as much
    ...     counts = gdro.counts(groups)
    ...     losses = torch.tensor([1.0, 9.0])[groups] / counts
    ...     gdro.update(losses.repeat_interleave(counts), groups.repeat_interleave(counts))
    >>> counts
    tensor([2, 2, 6, 6])
    """

    def __init__(
        self,
        bins: int,
        *,
        mean: int = 4,
        low: int = 2,
        high: int = 12,
        step_size: float = 0.65,
        mixing: float = 0.01,
        decay: float = 0.4,
        price_step: float = 0.05,
        form: Literal["paper", "released"] = "paper",
    ) -> None:
        _checks.whole("bins", bins, 1, "Bins are numbered from 0.")
        self.low = _checks.whole("low", low, 1, "A prompt needs a response.")
        self.mean = _checks.whole("mean", mean, low, "It is the budget per prompt, at least low.")
        self.high = _checks.whole("high", high, mean, "It is at least mean.")
        self.step_size = _checks.number("step_size", step_size, 0.0, torch.inf, "0 is mean for every prompt.")
        self.mixing = _checks.number("mixing", mixing, 0.0, 1.0, "0 mixes nothing in.")
        self.decay = _checks.number("decay", decay, 0.0, 1.0, "1 forgets at once.", open_low=True)
        self.price_step = _checks.number("price_step", price_step, 0.0, torch.inf, "0 keeps the price at 0.")
        _checks.choice("form", form, ("paper", "released"))
        self.form, self.price = form, 0.0
        self.scores = torch.zeros(bins, high - low + 1, dtype=torch.float64)
        self._chosen, self._prompts = torch.zeros(bins, dtype=torch.long), 0  # counts of the last batch; 0: not in it

    @property
    def log_probs(self) -> Tensor:
        """(B, high - low + 1) log p, float64; a column for each count."""
        softmax = (self.step_size * self.scores).log_softmax(-1)
        log_mixing, log_rest = (math.log(part) if part else -math.inf for part in (self.mixing, 1 - self.mixing))
        uniform = torch.full_like(softmax, log_mixing - math.log(softmax.shape[1]))
        return torch.logaddexp(log_rest + softmax, uniform)

    def counts(self, groups: Tensor) -> Tensor:
        """Responses to draw for every prompt of a batch, (m,) whole numbers whose sum is m mean.

        Args:
            groups: (m,) integer ids of the prompts' bins, 0 .. B - 1.
        """
        group_ids(groups, groups, len(self.scores))
        if groups.dim() != 1 or len(groups) == 0:
            raise ValueError(f"groups must be (m,) ids, m > 0, got shape {tuple(groups.shape)}. Give one per prompt.")
        sizes = groups.cpu().long().bincount(minlength=len(self.scores))
        here, counts = sizes.nonzero().flatten(), torch.arange(self.low, self.high + 1)
        costs = sizes[here, None] * counts
        near = -sizes[here, None] * (counts - self.mean).double() ** 2
        best = best_on_budget(torch.stack([self.log_probs[here], near]), costs, self.mean * len(groups))
        self._chosen, self._prompts = torch.zeros_like(self._chosen).index_copy(0, here, counts[best]), len(groups)
        return self._chosen.to(groups.device)[groups.long()]

    def update(self, losses: Tensor, groups: Tensor) -> None:
        """Learn from the responses to the prompts that `counts` was asked about last.

        Args:
            losses: (n,) finite, higher is worse, one per response; of all micro-batches and ranks together.
            groups: (n,) their bins, as given to `counts`.
        Raises: ValueError: `counts` was not asked about a bin.
        """
        _checks.finite_losses("losses", losses)
        group_ids(groups, losses, len(self.scores))
        values, ids = losses.detach().cpu().double(), groups.cpu().long()
        if unasked := sorted(set(ids[self._chosen[ids] == 0].tolist())):
            raise ValueError(f"groups must be bins that counts() was asked about, got {unasked}. Ask it first.")
        members = ids.bincount(minlength=len(self.scores))
        here = members.nonzero().flatten()
        utility = -torch.zeros_like(self.scores[:, 0]).index_add(0, ids, values)[here] / members[here]
        self._learn(here, self._chosen[here], utility)
        self.price += self.price_step * (len(losses) / self._prompts - self.mean)

    def _learn(self, bins: Tensor, counts: Tensor, utility: Tensor) -> None:
        at = bins, counts - self.low
        if self.form == "paper":
            self.scores[at] += self.decay * (utility - self.price * counts - self.scores[at])
        else:
            self.scores[at] -= utility + self.price * (counts - self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores.clone(), "price": self.price, "chosen": self._chosen, "prompts": self._prompts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError: the state is of other bins or bounds."""
        if state["scores"].shape != self.scores.shape:
            raise ValueError(
                f"state must hold {tuple(self.scores.shape)} scores, got {tuple(state['scores'].shape)}. "
                "Build it with its bins, low and high."
            )
        self.scores, self.price = state["scores"].to("cpu", copy=True), state["price"]
        self._chosen, self._prompts = state["chosen"].cpu(), state["prompts"]
