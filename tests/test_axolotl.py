"""axolotl's own plugin manager, configuration, builders and trainers with the plugin.

Beside the TRL and transformers that the other tests use, which are newer than those axolotl asks for. What
it imports for GPUs, telemetry and packing is stood in for where it is not installed: numba, Triton, PostHog,
evaluate, wandb, and TRL's process reward models.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hollow import hollow

if find_spec("axolotl") is None:
    pytest.skip("needs axolotl; docs/other_trainers.md has the line that installs it", allow_module_level=True)
import tiny
from trainer_cases import DPO, REWARD, expected, log_probability
from trainer_steps import SET, gradient, steps, worst
from transformers import Trainer

learning_rate = Trainer._get_learning_rate
with hollow("numba", "triton", "posthog", "evaluate", "wandb", "trl.experimental.prm"):
    from axolotl.core.builders import HFCausalTrainerBuilder, HFRLTrainerBuilder
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.enums import RLType

    from robustgrad.integrations.axolotl import RobustgradPlugin
Trainer._get_learning_rate = learning_rate  # axolotl replaces it for everybody

pytestmark = tiny.OTHERS_WARNINGS
PLUGIN = "robustgrad.integrations.axolotl.RobustgradPlugin"
SECTION = {"ambiguity": "ChiSquare", "radius": SET.radius, "pool": "window"}
CUTS = pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)], ids=str)


def configuration(folder: Path, micro_batch: int = 2, accumulation: int = 4, **changes: Any) -> Any:
    """What stands in the YAML file."""
    return DictDefault(
        {
            "plugins": [PLUGIN],
            "robustgrad": SECTION,
            "micro_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
            "num_epochs": 1,
            "learning_rate": 1e-2,
            "optimizer": "sgd",
            "lr_scheduler": "constant",
            "output_dir": str(folder),
            "sequence_len": 64,
            "use_cpu": True,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            "context_parallel_size": 1,
            "val_set_size": 0,
            "report_to": "none",
            "special_tokens": {},
        }
        | changes
    )


def manager(cfg: Any) -> PluginManager:
    """What `axolotl train` does with the plugins of a configuration, before anything is loaded."""
    PluginManager._instance = None
    plugins = PluginManager.get_instance()
    plugins.cfg = cfg
    for name in cfg.plugins:
        plugins.register(name)
    for plugin in plugins.plugins.values():
        plugin.register(cfg)
    return plugins


def train(builder: Any, cfg: Any, data: Any) -> tuple[Trainer, torch.Tensor]:
    """What `axolotl train` does then; gives the gradient of the first step."""
    plugins = manager(cfg)
    builder.train_dataset = data
    trainer = builder.build(1)
    plugins.post_trainer_create(cfg, trainer)
    return trainer, steps(trainer)[0]


@CUTS
def test_dpo(micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    """Its trainer discards an optimizer that is handed to it; the plugin does not need one."""
    cfg = configuration(tmp_path, micro_batch, accumulation, rl=RLType.DPO, learning_rate=0.0)
    builder = HFRLTrainerBuilder(cfg, tiny.causal_lm(), tiny.tokenizer(), None)
    builder.model_ref = tiny.causal_lm(1)
    trainer, got = train(builder, cfg, tiny.pairs())
    assert type(trainer).__name__ == "AxolotlDPOTrainer"
    assert tiny.relative_error(got, expected(DPO, trainer)) < 1e-5
    assert trainer.state.log_history[0]["robust/gap"] > 0


def tokenized() -> Any:
    tokenizer = tiny.tokenizer()

    def row(example: dict[str, str]) -> dict[str, list[int]]:
        ids = [*tokenizer(example["text"])["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}

    return tiny.sentences().map(row, remove_columns=["text"])


@CUTS
def test_fine_tuning(micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    """Here the trainer averages the token means of micro-batches: that is the loss which the adversary weights."""
    cfg = configuration(tmp_path, micro_batch, accumulation, learning_rate=0.0, curriculum_sampling=True)
    builder, data = HFCausalTrainerBuilder(cfg, tiny.causal_lm(), tiny.tokenizer(), None), tokenized()
    trainer, got = train(builder, cfg, data)
    assert type(trainer).__name__ == "AxolotlTrainer"
    assert not trainer.model_accepts_loss_kwargs
    rows = [row["input_ids"] for row in data]
    count = torch.tensor([float(len(ids) - 1) for ids in rows]).reshape(-1, micro_batch).mean(-1)
    nats = torch.stack([-log_probability(trainer.model, ids[:1], ids[1:]) for ids in rows])
    losses = nats / count.repeat_interleave(micro_batch)
    assert tiny.relative_error(got, gradient(worst(losses), trainer.model)) < 1e-5


@CUTS
def test_reward_model(micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    cfg = configuration(tmp_path, micro_batch, accumulation, reward_model=True, learning_rate=0.0)
    builder = HFCausalTrainerBuilder(cfg, tiny.classifier(), tiny.tokenizer(), None)
    trainer, got = train(builder, cfg, tiny.pairs())
    assert type(trainer).__name__ == "AxolotlRewardTrainer"
    assert tiny.relative_error(got, expected(REWARD, trainer)) < 1e-5


def test_the_memory_is_the_default(tmp_path: Path) -> None:
    cfg = configuration(tmp_path, rl=RLType.DPO, robustgrad={"ambiguity": "TotalVariation", "radius": 0.1, "cap": 4})
    builder = HFRLTrainerBuilder(cfg, tiny.causal_lm(), tiny.tokenizer(), None)
    builder.model_ref = tiny.causal_lm(1)
    trainer, _ = train(builder, cfg, tiny.pairs())
    assert repr(trainer.reweighter) == "Reweighter(TotalVariation(radius=0.1, cap=4), pool='memory')"


def test_the_section_is_part_of_the_configuration(tmp_path: Path) -> None:
    manager(configuration(tmp_path))
    checked, _ = merge_input_args()
    assert "robustgrad" in checked.model_fields


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"robustgrad": None}, "robustgrad must name an ambiguity set, got None"),
        ({"robustgrad": {"ambiguity": "TV"}}, "robustgrad.ambiguity must be one of TotalVariation, ChiSquare"),
        ({"robustgrad": {"ambiguity": "KL", "radius": -1.0}}, "radius must be"),
        ({"robustgrad": {"ambiguity": "KL", "radius": 0.1, "poll": "memory"}}, r"got \['poll'\]"),
        ({"sample_packing": True}, "sample_packing must be false, got true"),
    ],
)
def test_a_wrong_file_says_what_to_write(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        RobustgradPlugin().register(configuration(tmp_path, **changes))
