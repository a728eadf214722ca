"""Does robustness help out of distribution, when, and against which cheap alternatives?

    python benchmarks/ood_protocol.py --data FOLDER [--out runs/ood_protocol] [--seeds 10] [--jobs 2]
    python benchmarks/evidence_page.py --results runs/ood_protocol --page runs/ood_protocol/page.md

Ours are in benchmarks/results/ood_protocol, and docs/evidence.md is the page of them.

FOLDER holds `train.jsonl` (or .jsonl.gz), perhaps `validation.jsonl`, and any number of other files of pairs with
prompt, chosen, rejected and perhaps domain: each of them is an evaluation set, and chooses nothing. Every method
trains once, on the same batches. Two tiers, kept apart:

    known    real texts of the two most frequent domains, labels from known scores (see evidence/truth.py), judged on
             the evaluation set that has most pairs of the two
    human    the labels of the files, on all evaluation sets

Models are heads on frozen MiniLM features; `ood_protocol_language.py` trains language models. Every run is a JSON
line. What is there already is not run again, so an interrupted command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from evidence.features import cache_folder
from evidence.protocol import Protocol
from evidence.runs import Row, append_rows, read_rows
from evidence.studies import Study, studies
from measuring import machine

OUT = Path("runs/ood_protocol")
Job = tuple[int, str]  # the place of a study among all, and a method
_given: tuple[object, ...] = ()  # what this process was started with
_protocol: Protocol
_studies: list[Study]


def start(smoke: bool, *arguments: object) -> None:
    global _given, _protocol, _studies
    if _given == (smoke, *arguments):
        return  # a forked process has it already
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*batch pool of")  # what the pools are compared for
    _given, _protocol, _studies = (smoke, *arguments), Protocol(*arguments), studies(smoke)


def run(job: Job) -> list[Row]:
    place, method = job
    return _protocol.run(_studies[place], method)


def missing(rows: list[Row]) -> list[Job]:
    """Runs that are in no row yet; two studies may ask for the same one."""
    there = {(json.dumps(row["task"]), row["capacity"], row["method"]) for row in rows}
    jobs = []
    for place, study in enumerate(_studies):
        for method in study.methods if _protocol.can(study) else ():
            key = (json.dumps(study.about), study.capacity, method)
            if key not in there:
                there.add(key)
                jobs.append((place, method))
    return jobs


def describe(folder: Path) -> None:
    """Write beside the rows what they are about. Raises: ValueError: those there are about something else."""
    path, about = folder / "about.json", _protocol.about()
    if path.exists() and not about.items() <= json.loads(path.read_text(encoding="utf-8")).items():
        raise ValueError(f"{folder} holds runs of other data, seeds or steps. Give another folder: --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | machine("cpu"), indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of preference pairs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the rows (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="of embeddings (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=250, help="of 64 pairs (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="two seeds of four steps, a few runs of each kind")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.steps, args.jobs = 2, 4, 1
    arguments = (args.smoke, args.data, args.cache, args.seeds, args.steps)
    try:
        start(*arguments)
        describe(args.out)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    path = args.out / "runs.jsonl"
    jobs = missing(read_rows(path))
    if _protocol.known is None:
        print("No known tier: it takes two domains, each in train, validation and one evaluation set.")
    print(f"{len(jobs)} runs of {args.seeds} seeds to do", flush=True)
    pool = ProcessPoolExecutor(args.jobs, initializer=start, initargs=arguments)
    try:
        results = map(run, jobs) if args.jobs == 1 else pool.map(run, jobs)
        for number, ((place, method), rows) in enumerate(zip(jobs, results, strict=True), start=1):
            append_rows(path, rows)
            study, spent = _studies[place], f"{rows[0]['seconds']} s a seed"
            print(f"{number} of {len(jobs)}: {study.capacity}, {study.about}, {method}: {spent}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the runs in progress alone


if __name__ == "__main__":
    main()
