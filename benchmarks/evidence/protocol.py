"""One run after another: a study and a method in, a row for each seed out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from preference_pairs import Pair

from robustgrad.prompt_groups import PromptGroups

from .choices import CHOICES
from .choosing import Choosing
from .features import Features, embed_sets
from .heads import Parameters, leads
from .human import human_task
from .measures import measured, outcomes
from .methods import Driven, Method
from .runs import Row, rounded
from .sets import Sets, read_folder
from .studies import BASE, GROUPS, SHARES, Study
from .tasks import Task, numbered
from .training import fit
from .truth import KnownPairs, Truth
from .words import word_features

_SIZE = 4000  # training pairs of the known tier


class Protocol:
    """The data of all studies, read and embedded once."""

    def __init__(self, data: Path, cache: Path, seeds: int, steps: int) -> None:
        self.sets = read_folder(data)
        self.features = embed_sets(self.sets, cache)
        responses = {name: own.without_prompts() for name, own in self.features.items()}
        self.seen = {
            "linear": responses,
            "mlp": self.features,
            "bag of words": word_features(self.sets, responses),
        }
        self.groups = PromptGroups.fit(self.features["train"].prompt, min(GROUPS, len(self.sets.train)))
        self.known = known_pairs(self.sets, self.features)
        self.size = 0 if self.known is None else min(_SIZE, self.known.largest(SHARES))
        self.seeds, self.steps = range(seeds), steps
        self._choosing = lru_cache(maxsize=1)(self._new_choosing)  # one study's choices come one after another

    def can(self, study: Study) -> bool:
        return study.truth is None or self.known is not None

    def task(self, study: Study) -> Task:
        seen = self.seen.get(study.capacity, self.features)
        if study.truth is None:
            return human_task(self.sets, self.features, self.seeds, self.groups, seen)
        return self.known.task(study.truth, self.seeds, self.size, self.groups, seen)

    def run(self, study: Study, method: str) -> list[Row]:
        """All seeds of a method in a study; beside the bag of words the other floor."""
        began, task = time.perf_counter(), self.task(study)
        methods = self._methods(study, method, task)
        iterates = fit(task, methods, study.capacity, self.seeds, self.steps)
        about = {"task": study.about, "capacity": study.capacity, "method": method}
        chosen = [own.at_the_end if isinstance(own, Driven) else {} for own in methods]
        rows = [about | row | own for row, own in zip(_rows(task, iterates, self.seeds), chosen, strict=True)]
        seconds = round((time.perf_counter() - began) / len(rows), 3)
        floor = [{"task": study.about} | longer_wins(task)] if study.capacity == "bag of words" else []
        return [row | {"seconds": seconds} for row in rows] + floor

    def _methods(self, study: Study, method: str, task: Task) -> list[Method]:
        """One for each seed."""
        if method in CHOICES:
            return self._choosing(study.truth, study.capacity).methods(method)
        return [study.methods[method](task.counts(seed)) for seed in self.seeds]

    def _new_choosing(self, truth: Truth, capacity: str) -> Choosing:
        task = self.task(Study(truth, capacity, {}))
        prompts = self.known.training_prompts(), self.known.target_prompts()
        return Choosing(task, capacity, self.seeds, self.steps, *prompts)

    def about(self) -> Row:
        """What a reader of the rows has to know: the sets, and the domain of every pair in the order of its bits."""
        known, by_group = {}, []
        if self.known is not None:
            by_group = self.known.minority_by_group(self.groups, BASE.share)
            domains = [self.known.domains[which] for which in self.known.test.domain.tolist()]
            known = {self.known.evaluated: _coded(domains)}
        return {
            "train": dict(Counter(pair.domain for pair in self.sets.train).most_common()),
            "evals": {name: _coded([pair.domain for pair in pairs]) for name, pairs in self.sets.evals.items()},
            "known": known,
            "known_size": self.size,
            "minority_by_group": by_group,
            "seeds": len(self.seeds),
            "steps": self.steps,
        }


def known_pairs(sets: Sets, features: dict[str, Features]) -> KnownPairs | None:
    """On the evaluation set with most pairs of the two most frequent domains; None where pairs of both are missing."""
    two = numbered([pair.domain for pair in sets.train])[0][:2]

    def fewest(pairs: list[Pair]) -> int:
        counts = Counter(pair.domain for pair in pairs)
        return min(counts[domain] for domain in two)

    evaluated = max(sets.evals, key=lambda name: fewest(sets.evals[name]))
    if len(two) < 2 or not fewest(sets.validation) or not fewest(sets.evals[evaluated]):
        return None
    return KnownPairs(sets, features, evaluated)


def _coded(domains: list[str]) -> dict[str, object]:
    """The names, and the number of each pair's domain."""
    names, number = numbered(domains)
    return {"names": names, "of": " ".join(map(str, number.tolist()))}


def _rows(task: Task, iterates: dict[str, Parameters], seeds: range) -> Iterator[Row]:
    with torch.no_grad():
        lead = {
            iterate: {name: leads(parameters, judged.pairs) for name, judged in task.evals.items()}
            for iterate, parameters in iterates.items()
        }
    for seed in seeds:
        measures = {
            iterate: {name: measured(own[seed], task.evals[name]) for name, own in by_set.items()}
            for iterate, by_set in lead.items()
        }
        by_pair = {name: outcomes(own[seed]) for name, own in lead["last"].items()}
        yield {
            "seed": seed,
            "measures": rounded(measures),
            "outcomes": by_pair,
        }


def longer_wins(task: Task) -> Row:
    """The longer response wins, whatever it says."""
    lead = {name: judged.longer for name, judged in task.evals.items()}
    return {
        "capacity": "none",
        "method": "longer wins",
        "seed": 0,
        "measures": rounded({"last": {name: measured(lead[name], judged) for name, judged in task.evals.items()}}),
        "outcomes": {name: outcomes(own) for name, own in lead.items()},
    }
