"""axolotl: a plugin that makes the trainer robust, configured in the same YAML file.

plugins:
  - robustgrad.integrations.axolotl.RobustgradPlugin
robustgrad:
  ambiguity: TotalVariation        # or ChiSquare, KL, CVaR, with their own numbers
  radius: 0.1
  pool: memory                     # may be left out, as may the others of `robustify`
"""

from __future__ import annotations

from typing import Any

from . import _config
from .trl import robustify

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError as error:
    raise ImportError("axolotl is missing. Install it as its own documentation says.") from error

__all__ = ["RobustgradArgs", "RobustgradPlugin"]

_OPTIONS = ("pool", "memory", "scores", "groups", "auxiliary", "survey", "on_nonfinite")


class RobustgradArgs(BaseModel):  # type: ignore[misc]  # pydantic's types are not at hand
    """The key that the plugin adds to axolotl's configuration."""

    robustgrad: dict[str, Any] | None = None


class RobustgradPlugin(BasePlugin):  # type: ignore[misc]  # axolotl has no types
    """Calls `robustgrad.integrations.trl.robustify` on the trainer that axolotl makes.

    For plain fine-tuning (no `rl:`) a sample is an example; for `rl: dpo`, `ipo`, `kto`, `orpo`, `simpo`, and
    reward models a pair or a judged completion; for `rl: grpo` a prompt. The optimizer stays the one that
    axolotl makes; a RobustOptimizer handed to its DPO trainer would be thrown away there.

    Under `robustgrad:` stands the set, and what `robustify` takes: pool, memory, auxiliary, survey,
    on_nonfinite, and columns of the dataset as `scores` and `groups`.
    Raises: ValueError: before anything is loaded, a `robustgrad:` section that is missing or wrong, or
        `sample_packing: true`, which puts several examples into one row; what `robustify` raises for the trainer.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Called with the configuration as it stands in the file."""
        _read(cfg)
        if cfg.get("sample_packing"):
            raise ValueError(
                "sample_packing must be false, got true: it puts several examples into one row, and their losses can "
                "no longer be told apart. Set sample_packing: false."
            )

    def get_input_args(self) -> str:
        return f"{__name__}.{RobustgradArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        ambiguity, options = _read(cfg)
        robustify(trainer, ambiguity, **options)


def _read(cfg: Any) -> Any:
    return _config.read(cfg.get("robustgrad"), _OPTIONS, "robustgrad")
