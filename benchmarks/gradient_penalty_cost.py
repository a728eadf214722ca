"""What does the Wasserstein gradient penalty cost, beside the plain loss?

    python benchmarks/gradient_penalty_cost.py [--model PATH.gguf] [--device cuda] [--out benchmarks/results]

Forward and backward of the DPO loss of a language model with LoRA adapters: plain, reweighted by an ambiguity
set, and with `wasserstein_loss` on the input embeddings (a second backward). Interleaved rounds; a time is the
median. Without --model a random Llama of about 10 million parameters. Writes a CSV.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from weight_solver_throughput import interleaved, machine

from robustgrad import ChiSquare, Reweighter
from robustgrad.gradient_penalty import embedding_outputs, squared_norm_losses, wasserstein_loss
from robustgrad.objectives import dpo, sequence_log_probs


def load(path: str | None, attention: str, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if path is None:
        config = transformers.LlamaConfig(vocab_size=8192, hidden_size=256, intermediate_size=768,
                                          num_hidden_layers=6, num_attention_heads=4,
                                          attn_implementation=attention)  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        file = Path(path)
        where = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent if where else path, attn_implementation=attention, dtype=torch.float32, **where
        )
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    models = {name: load(args.model, name, args.device) for name in ("sdpa", "eager")}
    tokens = torch.randint(1000, (2 * args.pairs, args.length), device=args.device)
    mask, reference = torch.ones_like(tokens, dtype=torch.bool), torch.zeros(args.pairs, device=args.device)
    reweighter = Reweighter(ChiSquare(0.5))

    def losses(model: torch.nn.Module) -> Tensor:
        chosen, rejected = sequence_log_probs(model(input_ids=tokens).logits, tokens, mask).chunk(2)
        return dpo(chosen, rejected, reference, reference)

    def penalised(norm: str) -> Tensor:
        with embedding_outputs(models["eager"].get_input_embeddings()) as inputs:
            given = losses(models["eager"])
        if norm == "group":
            return wasserstein_loss(given, inputs, radius=0.01)
        return squared_norm_losses(given, inputs, coefficient=0.01).mean()

    spent = interleaved(
        {
            "plain, fused attention": lambda: losses(models["sdpa"]).mean().backward(),
            "plain, eager attention": lambda: losses(models["eager"]).mean().backward(),
            "chi-square": lambda: reweighter(losses(models["eager"])).mean().backward(),
            "Wasserstein, group norm": lambda: penalised("group").backward(),
            "Wasserstein, per sample": lambda: penalised("sample").backward(),
        },
        1 if args.quick else args.rounds,
        args.device,
    )
    base = spent["plain, eager attention"]
    size = sum(p.numel() for p in models["eager"].parameters())
    about = {"parameters": size, "pairs": args.pairs, "length": args.length, **machine(args.device)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = [{"loss": name, "ms": round(us / 1e3, 1), "times_plain": round(us / base, 2)} for name, us in spent.items()]
    for row in rows:
        print(f"{row['loss']:26} {row['ms']:>10} ms {row['times_plain']:>6} x")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"gradient_penalty_cost_{args.device}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | about for row in rows)


if __name__ == "__main__":
    sys.exit(main())
