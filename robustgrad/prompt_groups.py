"""Worst cases that are smooth in the prompt: an adversary that moves mass between soft groups of an embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import _checks

_ROUNDS = 25  # of k-means


@dataclass(frozen=True, eq=False)
class PromptGroups:
    """Soft groups of prompts around centres of an embedding.

        membership(x)_g  =  softmax_g( cos(x, centre_g) / temperature )

    Args:
        centres: (G, d) floating, of any length.
        temperature: > 0, in units of cosine similarity. Towards 0 each prompt belongs to its nearest centre
            alone; as it grows all prompts belong to all groups alike, and nothing is left to move.
    Raises: TypeError or ValueError: an argument of another shape, type or range.

    >>> import torch
    >>> groups = PromptGroups(torch.eye(2), temperature=0.5)
    >>> groups.membership(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([[0.8808, 0.1192],
            [0.5000, 0.5000]])
    """

    centres: Tensor
    temperature: float = 0.05

    def __post_init__(self) -> None:
        _embeddings("centres", self.centres)
        _checks.number("temperature", self.temperature, 0.0, torch.inf, "0.05 is a start.", open_low=True)

    @classmethod
    def fit(cls, embeddings: Tensor, count: int, *, temperature: float = 0.05, seed: int = 0) -> PromptGroups:
        """Centres of the training prompts, by spherical k-means; the same seed gives the same centres.

        Args:
            embeddings: (n, d) floating, one frozen embedding for each prompt, n >= count.
            count: G >= 2 groups.
        Source: Dhillon & Modha (2001), started as k-means++, Arthur & Vassilvitskii (2007).
        """
        _embeddings("embeddings", embeddings)
        _checks.whole("count", count, 2, "One group leaves the adversary nothing to move.")
        if len(embeddings) < count:
            raise ValueError(f"count must be at most the {len(embeddings)} prompts, got {count}. Ask for fewer groups.")
        points = normalize(embeddings.detach().float(), dim=-1)
        centres = _spread(points, count, torch.Generator(points.device).manual_seed(seed))
        for _ in range(_ROUNDS):
            member = torch.nn.functional.one_hot((points @ centres.T).argmax(-1), count).to(points.dtype)
            total = member.T @ points
            # A centre that lost its prompts stays where it is.
            centres = torch.where(member.sum(0)[:, None] > 0, normalize(total, dim=-1), centres)
        return cls(centres, temperature)

    def similarity(self, embeddings: Tensor) -> Tensor:
        """(n, G) cosine of each prompt and centre."""
        _embeddings("embeddings", embeddings)
        if embeddings.shape[1] != self.centres.shape[1]:
            raise ValueError(
                f"embeddings must have {self.centres.shape[1]} columns as the centres, got {embeddings.shape[1]}. "
                "Embed with the encoder that the groups were fitted on."
            )
        centres = self.centres.to(embeddings.device)
        return normalize(embeddings.detach().float(), dim=-1) @ normalize(centres.float(), dim=-1).T

    def membership(self, embeddings: Tensor) -> Tensor:
        """(n, G) share of each prompt in each group, float32, rows summing to 1: for `soft_group_means`."""
        return (self.similarity(embeddings) / self.temperature).softmax(-1)

    def ids(self, embeddings: Tensor) -> Tensor:
        """(n,) nearest centre of each prompt: for `groups=`, the limit of temperature 0."""
        return self.similarity(embeddings).argmax(-1)


def soft_group_means(losses: Tensor, membership: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean loss of each soft group and the mass it has: `(means * masses).sum()` is the mean of the losses.

        masses_g = sum_j p_j M_jg          means_g = sum_j p_j M_jg l_j / masses_g          p = base / sum base

    Hand the means to a `Reweighter`, with the masses as base, and it descends

        max_alpha <q, l>   s.t.  D(alpha || masses) <= radius,   q = K^T alpha,   K_gj = p_j M_jg / masses_g

    exactly, since <K^T alpha, l> = <alpha, K l> and K l are the means. The ratio of sample j is
    sum_g M_jg alpha_g / masses_g: a mixture of the ratios of its groups, smooth in its embedding. K takes the
    masses to p, so D(q || p) <= D(alpha || masses) for each f-divergence: q stays inside the set, the worst case
    lies between the mean and that of the losses themselves, and radius 0 is plain averaging.

    Assumption: the shift acts through the embedding. The shares of the groups change; what is asked and
    labelled within a group does not. A wrong label on its own gets no more weight than its neighbours.

    Args:
        losses: (n,) floating, with their gradient; higher is worse.
        membership: (n, G) >= 0, rows summing to 1, see `PromptGroups.membership`. One-hot rows are hard groups.
        base: (n,) >= 0, the weight that the loop gives each sample; None: all equal.
    Returns: means (G,) with gradient, 0 for a group without mass; masses (G,), sum 1. Float32 or wider. A NaN
        loss that counts makes the means of its groups NaN.
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: derived here; the bound is the data-processing inequality of f-divergences.

    >>> import torch
    >>> from robustgrad import Reweighter, TotalVariation
    >>> losses = torch.tensor([1.0, 2.0, 3.0, 10.0], requires_grad=True)
    >>> membership = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.8, 0.2]])
    >>> means, masses = soft_group_means(losses, membership)
    >>> reweighter = Reweighter(TotalVariation(0.1), pool="batch")
    >>> (reweighter(means, base=masses) * masses).sum().backward()
    >>> losses.grad * 4
    tensor([1.1026, 1.0570, 0.7835, 1.0570])

    With the memory, say which entry is which group: `reweighter(means, base=masses, groups=torch.arange(G))`.
    A group then counts with its remembered mean, and total variation is capped at a top share of 1/G.
    """
    _checks.per_sample("losses", losses)
    _fitting_membership(membership, losses)
    share = torch.ones_like(losses.detach()) if base is None else base.detach()
    _checks.base_weights(share, losses.detach())
    wide = torch.promote_types(losses.dtype, torch.float32)
    share = share.to(wide) / share.to(wide).sum()
    weights = membership.detach().to(wide) * share[:, None]
    masses = weights.sum(0)
    # A sample without weight may hold anything.
    counted = torch.where(share > 0, losses.to(wide), 0.0)
    return (weights.T @ counted) / torch.where(masses > 0, masses, 1.0), masses


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points far from each other: each next one drawn in proportion to its distance from those before."""
    chosen = torch.randint(len(points), (1,), generator=generator, device=points.device)
    nearest = 1 - points @ points[chosen[0]]
    for _ in range(count - 1):
        # Prompts that are all the same leave no distance to draw by.
        odds = nearest.clamp_min(0) + 1e-12
        new = odds.multinomial(1, generator=generator)
        chosen = torch.cat([chosen, new])
        nearest = nearest.minimum(1 - points @ points[new[0]])
    return points[chosen]


def _embeddings(name: str, tensor: Tensor) -> None:
    _checks.floating(name, tensor)
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(f"{name} must have shape (n, d), got {tuple(tensor.shape)}. Give one row for each prompt.")


def _fitting_membership(membership: Tensor, losses: Tensor) -> None:
    _embeddings("membership", membership)
    if len(membership) != len(losses):
        raise ValueError(
            f"membership must have a row for each of the {len(losses)} losses, got {len(membership)} rows. "
            "Compute it from the prompts of the same batch."
        )
