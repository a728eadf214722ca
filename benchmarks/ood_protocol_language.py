"""The same tasks with a language model in place of frozen features.

    python benchmarks/ood_protocol_language.py --data FOLDER --tier known --model minilm [--seeds 3] [--steps 100]
    python benchmarks/ood_protocol_language.py --data FOLDER --tier human --model smollm2 --steps 500

LoRA adapters and a reward head on MiniLM (22M), SmolLM2-135M or any `--model` PATH. Runs are JSON lines beside those
of `ood_protocol.py`, resumed in the same way; tier C is `--tier human` with a model that learns the labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from evidence.features import cache_folder
from evidence.language import BATCH, LEARNING_RATE, Averaged, Texts, Training, run_language, swapped
from evidence.methods import METHODS
from evidence.protocol import Protocol
from evidence.runs import append_rows, read_rows
from evidence.studies import BASE, Study
from evidence.tasks import Task, first_of_each, part_of
from lora_scorer import Scorer, load_tokenizer, packaged_model
from ood_protocol import OUT
from small_models import language_model

CHOSEN = ("plain", "TV .1", "chi-square .1", "inverse frequency")


def texts_of(protocol: Protocol, study: Study) -> Texts:
    """The pairs in the order of the task's rows, the better response first."""
    if study.truth is None:
        return Texts(protocol.sets.train, protocol.sets.evals)
    known = protocol.known
    train, test = (
        swapped([pairs[i] for i in part.rows.tolist()], part.wrong_way(study.truth))
        for part, pairs in ((known.train, protocol.sets.train), (known.test, protocol.sets.evals[known.evaluated]))
    )
    return Texts(train, {known.evaluated: test})


def shortened(task: Task, texts: Texts, most: int) -> tuple[Task, Texts]:
    """With the first `most` pairs of each domain of each evaluation set."""
    rows = {name: first_of_each(judged.domains, most) for name, judged in task.evals.items()}
    evals = {name: part_of(judged, rows[name]) for name, judged in task.evals.items()}
    kept = {name: [pairs[i] for i in rows[name].tolist()] for name, pairs in texts.evals.items()}
    return replace(task, evals=evals), replace(texts, evals=kept)


def loader(args: argparse.Namespace) -> Callable[[int], Scorer]:
    name = {"minilm": packaged_model, "smollm2": lambda: smollm2(args.cache)}.get(args.model, lambda: args.model)()
    tokenizer, kind = load_tokenizer(name), Averaged if args.model == "minilm" else Scorer
    precision = torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16)

    def load(seed: int) -> Scorer:
        scorer = kind(name, tokenizer, torch.device(args.device), seed)
        lighten(scorer.model)
        if args.full:
            scorer.model = scorer.model.unload().requires_grad_()
        scorer.model.forward = precision(scorer.model.forward)  # the model alone: losses and weights are float32
        return scorer

    return load


def lighten(model: torch.nn.Module) -> None:
    """No dropout, and attention by matrix products: on a CPU that halves the time of a step."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.get_base_model().set_attn_implementation("eager")


def smollm2(cache: Path) -> str:
    """SmolLM2 as a folder that any class of transformers can load."""
    folder = cache / "smollm2"
    if not folder.exists():
        packed, tokenizer = language_model(None, smoke=False)
        # What was read from a packed file counts as quantized and is not saved; a plain model with its weights is.
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(packed.state_dict())
        part = folder.with_suffix(".part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    return str(folder)


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    protocol = Protocol(args.data, args.cache, args.seeds, args.steps)
    tuned = "full" if args.full else "LoRA"
    training = Training(args.steps, args.max_length, LEARNING_RATE[tuned])
    study = Study(BASE if args.tier == "known" else None, f"{args.model} {tuned}", METHODS)
    task, texts = shortened(protocol.task(study), texts_of(protocol, study), args.most)
    load, path = loader(args), args.out / "language.jsonl"
    about = {"task": study.about, "capacity": study.capacity, "steps": args.steps, "batch": BATCH, "most": args.most}
    about |= {"max_length": args.max_length, "precision": "bfloat16" if args.bfloat16 else "float32"}
    for seed in protocol.seeds:  # all methods of a seed before the next: what there is can be compared
        for method in args.methods:
            run = about | {"method": method, "seed": seed}
            if any(run.items() <= row.items() for row in read_rows(path)):
                continue
            row = run_language(load, task, texts, METHODS[method], seed, training)
            append_rows(path, [run | row])
            print(f"{study.capacity}, {method}, seed {seed}: {row['seconds']} s", flush=True)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of preference pairs")
    add("--tier", choices=("known", "human"), default="known")
    add("--model", default="minilm", help="minilm, smollm2, a local path or a hub name (default: %(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=CHOSEN, metavar="METHOD")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=100, help="of 16 pairs (default: %(default)s)")
    add("--most", type=int, default=300, help="pairs of each domain that are judged (default: %(default)s)")
    add("--max-length", type=int, default=64, help="tokens of a sequence (default: %(default)s)")
    add("--full", action="store_true", help="train all weights instead of LoRA adapters")
    add("--bfloat16", action="store_true", help="matrix products in bfloat16 (autocast); losses stay in float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=OUT, help="folder for the rows (default: %(default)s)")
    add("--cache", type=Path, default=cache_folder(), help="of embeddings and models (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
