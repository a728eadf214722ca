"""What one model made of evaluation samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

from torch import Tensor

from .. import _checks


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Losses of one trained model on evaluation samples, with what is known about these.

    Args:
        losses: (n,) finite float, higher is worse.
        name: what to call the model.
        groups: n names of domains, or of prompts.
        texts: n prompts, or other texts by which a reader knows a sample.
        embeddings: (n, d) finite float, of the prompts: near means alike.
        base: (n,) >= 0, how much each sample stands for; None is equal.
    Raises: ValueError or TypeError: an argument that does not fit the losses, or losses that are not finite.
    """

    losses: Tensor
    name: str = "model"
    _: KW_ONLY
    groups: Sequence[str] | None = None
    texts: Sequence[str] | None = None
    embeddings: Tensor | None = None
    base: Tensor | None = None

    def __post_init__(self) -> None:
        _checks.finite_losses("losses", self.losses)
        if self.base is not None:
            _checks.base_weights(self.base, self.losses)
        for name, entries in (("groups", self.groups), ("texts", self.texts), ("embeddings", self.embeddings)):
            if entries is not None and len(entries) != len(self.losses):
                raise ValueError(
                    f"{name} must have {len(self.losses)} entries, as losses, got {len(entries)}. Give one per sample."
                )
        if self.embeddings is not None:
            _checks.floating("embeddings", self.embeddings)
            if self.embeddings.dim() != 2 or not bool(self.embeddings.isfinite().all()):
                raise ValueError(
                    f"embeddings must be finite and have shape (n, d), got {tuple(self.embeddings.shape)}. Give one "
                    "row per sample."
                )

    def on_cpu(self) -> Evaluation:
        """Detached, losses and base in float64."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().cpu()

        losses, base = self.losses.detach().cpu().double(), moved(self.base)
        base = None if base is None else base.double()
        return replace(self, losses=losses, base=base, embeddings=moved(self.embeddings))

    @property
    def slots(self) -> list[int] | None:
        """The groups numbered in the order in which they come."""
        if self.groups is None:
            return None
        number = {group: i for i, group in enumerate(dict.fromkeys(self.groups))}
        return [number[group] for group in self.groups]
