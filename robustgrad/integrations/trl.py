"""Makes TRL's trainers distributionally robust: reward models, DPO, KTO, SFT, GRPO, RLOO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ambiguity import AmbiguitySet
from . import _checks, _columns, hf_trainer
from ._rollouts import RolloutTrainer
from .hf_trainer import CapturingTrainer, RobustTrainer, attach, unrobustify

__all__ = ["robustify", "unrobustify"]


def robustify(trainer: Any, ambiguity: AmbiguitySet, **options: Any) -> Any:
    """Make a TRL trainer's gradients follow the worst case over an ambiguity set; returns the trainer.

    A sample is a preference pair (RewardTrainer, DPOTrainer, and the experimental CPO, ORPO and OnlineDPO, which
    generates its pairs and so has no window), a judged completion (KTOTrainer) or an example (SFTTrainer),
    whatever the micro-batch and the accumulation. For GRPOTrainer, RLOOTrainer and GMPOTrainer it is a prompt, which
    the adversary picks by minus its mean reward: the ratio multiplies the advantages of the whole rollout
    (pool="window" is that rollout), so that the logged policy loss is the reweighted one, and a KL term in
    the loss keeps its own weight. Everything else as in `robustgrad.integrations.hf_trainer.robustify`, which
    this calls for a plain `transformers.Trainer`.

    Args:
        trainer: an instance of one of these, or of a subclass of your own, before `trainer.train()`.
        ambiguity, options: as there. For rollouts `scores` and `groups` name a column of the dataset, or are
            functions of the list of its rows, one for each completion.
    Raises: as there; and for losses without samples: SFT packing, DPO's `aot` and `sft` terms.
    """
    _checks.is_trainer(trainer)
    of_trl = [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    if not of_trl:
        return hf_trainer.robustify(trainer, ambiguity, **options)
    # TRL's own subclasses make other losses than their parents.
    if of_trl[0] not in _ROBUST:
        raise TypeError(
            f"trainer must be one of {', '.join(_ROBUST)}, got {type(trainer).__name__}. "
            "For its own loop use robustgrad.Reweighter where its losses are made."
        )
    return attach(trainer, _ROBUST[of_trl[0]](trainer, ambiguity, **options))


class _Pairs(CapturingTrainer):
    """The batch is all chosen ones, then all rejected ones."""

    def rows(self, inputs: dict[str, Any]) -> int:
        return len(inputs["input_ids"]) // 2


class _DPO(_Pairs):
    def __init__(self, trainer: Any, ambiguity: AmbiguitySet, **options: Any) -> None:
        _checks.not_compiled(trainer)
        _checks.dpo_losses(trainer.loss_types, options.get("auxiliary") == "keep")
        super().__init__(trainer, ambiguity, **options)


class _KTO(CapturingTrainer):
    def __init__(self, trainer: Any, ambiguity: AmbiguitySet, **options: Any) -> None:
        _checks.not_compiled(trainer)
        super().__init__(trainer, ambiguity, **options)

    def order(self, inputs: dict[str, Any]) -> Tensor:
        # The losses come sorted: desirable completions first.
        label = torch.as_tensor(inputs["label"], dtype=torch.bool)
        return (~label).byte().argsort(stable=True)


class _SFT(CapturingTrainer):
    def __init__(self, trainer: Any, ambiguity: AmbiguitySet, **options: Any) -> None:
        _checks.not_compiled(trainer)
        _checks.not_packed(trainer.args)
        super().__init__(trainer, ambiguity, **options)


class _OnlineDPO(CapturingTrainer):
    """Its loss is made and sent back within training_step, of pairs generated there."""

    patched = (*RobustTrainer.patched, "training_step")

    def __init__(self, trainer: Any, ambiguity: AmbiguitySet, **options: Any) -> None:
        _checks.no_second_pass(trainer, options.get("pool"))
        super().__init__(trainer, ambiguity, **options)

    def rows(self, inputs: dict[str, Any]) -> int:
        return len(inputs["prompt"])

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.carried = _columns.take(inputs)
        with self.capture(inputs):
            loss = self.original["training_step"](model, inputs, num_items_in_batch)
        self.calls += 1
        return loss


# By name: the experimental ones warn as soon as they are imported.
_ROBUST: dict[str, type[RobustTrainer]] = {
    "RewardTrainer": _Pairs,
    "DPOTrainer": _DPO,
    "KTOTrainer": _KTO,
    "SFTTrainer": _SFT,
    "GRPOTrainer": RolloutTrainer,
    "RLOOTrainer": RolloutTrainer,
    "GMPOTrainer": RolloutTrainer,
    "CPOTrainer": CapturingTrainer,
    "ORPOTrainer": CapturingTrainer,
    "OnlineDPOTrainer": _OnlineDPO,
}
