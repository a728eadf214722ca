"""Rewards of the policy examples: reward models and classifiers as transformers loads them, from local folders."""

from __future__ import annotations

import importlib
import json
import math
import re
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

EXAMPLES = Path(__file__).parents[1] / "examples"
missing = [name for name in ("transformers", "peft", "rich") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
    # peft and transformers call names that the other has deprecated.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
CPU = torch.device("cpu")
PROMPTS, RESPONSES = ["Hello?", "What is it, then?", "Hello?"], ["Yes.", "Something that is longer.", "No."]
DOMAINS = ["support"] * 3
# A model with code of its own, whose outputs carry several rewards and their score.
CODE = """
from dataclasses import dataclass
from transformers import LlamaForSequenceClassification
from transformers.utils import ModelOutput
import torch

@dataclass
class Gated(ModelOutput):
    logits: torch.Tensor = None
    rewards: torch.Tensor = None
    score: torch.Tensor = None

class GatedRewards(LlamaForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        rewards = super().forward(input_ids=input_ids, attention_mask=attention_mask).logits
        score = rewards.softmax(-1).max(-1).values
        return Gated(logits=score[:, None], rewards=rewards, score=score)
"""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Import modules of examples/ by name; Ctrl-C means what it meant before."""
    monkeypatch.syspath_prepend(EXAMPLES)
    before = signal.getsignal(signal.SIGINT)
    yield importlib.import_module
    signal.signal(signal.SIGINT, before)


def saved(folder: Path, labels: int, chat: bool = False, **changes: Any) -> Any:
    """A random classifier of bytes in a folder; returns the model."""
    import transformers

    torch.manual_seed(labels)
    tokenizer = transformers.ByT5Tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=labels, pad_token_id=0, initializer_range=0.3, **changes,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def logits(model: Any, texts: list[str]) -> Tensor:
    """One text after the other, without padding."""
    import transformers

    tokenizer = transformers.ByT5Tokenizer()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts])


TEXTS = [f"{prompt} {response}" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def test_one_logit_is_the_reward(example, tmp_path: Path) -> None:
    model = saved(tmp_path, 1)
    reward = example("rewards").ModelReward(str(tmp_path), None, CPU)
    assert_close(reward(PROMPTS, DOMAINS, RESPONSES), logits(model, TEXTS)[:, 0])
    assert_close(reward(PROMPTS, DOMAINS, RESPONSES, size=1), logits(model, TEXTS)[:, 0])


EMOTIONS = {"id2label": dict(enumerate(["sadness", "joy", "love", "anger", "fear"]))}


def test_probability_of_a_label(example, tmp_path: Path) -> None:
    model = saved(tmp_path, 5, **EMOTIONS)
    reward = example("rewards").ModelReward(str(tmp_path), {"Joy": 1.0}, CPU)
    assert_close(reward(PROMPTS, DOMAINS, RESPONSES), logits(model, TEXTS).softmax(-1)[:, 1])


def test_mixed_labels_of_a_model_where_several_may_hold(example, tmp_path: Path) -> None:
    """The reward of the Emotion experiments: a convex mixture of two sigmoids."""
    model = saved(tmp_path, 5, problem_type="multi_label_classification", **EMOTIONS)
    reward = example("rewards").ModelReward(str(tmp_path), {"fear": 0.25, "3": 0.75}, CPU)
    each = logits(model, TEXTS).sigmoid()
    assert_close(reward(PROMPTS, DOMAINS, RESPONSES), 0.25 * each[:, 4] + 0.75 * each[:, 3])


def test_the_models_chat_format(example, tmp_path: Path) -> None:
    model = saved(tmp_path, 1, chat=True)
    reward = example("rewards").ModelReward(str(tmp_path), None, CPU)
    texts = [f"[user] {p} [assistant] {r} " for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert_close(reward(PROMPTS, DOMAINS, RESPONSES), logits(model, texts)[:, 0])


@pytest.mark.parametrize(("labels", "column"), [(None, "score"), ({"2": 1.0}, 2), ({"0": 0.1, "1": 0.9}, None)])
def test_a_model_that_brings_its_own_rewards(example, tmp_path: Path, labels: Any, column: Any) -> None:
    model = saved(tmp_path, 3)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_gated.GatedRewards"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_gated.py").write_text(CODE)
    reward = example("rewards").ModelReward(str(tmp_path), labels, CPU, trust_remote_code=True)
    each = logits(model, TEXTS)
    score = each.softmax(-1).max(-1).values
    expected = 0.1 * each[:, 0] + 0.9 * each[:, 1] if column is None else score if column == "score" else each[:, 2]
    assert_close(reward(PROMPTS, DOMAINS, RESPONSES), expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "--reward-label must be given for a model with labels ['sadness', 'joy'"),
        ({"pride": 1.0}, "or a number below 5, got 'pride'"),
        ({"5": 1.0}, "or a number below 5, got '5'"),
    ],
)
def test_wrong_labels(example, tmp_path: Path, labels: Any, message: str) -> None:
    saved(tmp_path, 5, **EMOTIONS)
    with pytest.raises(ValueError, match=re.escape(message)):
        example("rewards").ModelReward(str(tmp_path), labels, CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward-model", "./no/such/folder"], "cannot load --reward-model ./no/such/folder"),
        (["--reward-label", "joy"], "--reward-model must be given with --reward-label"),
    ],
)
def test_wrong_use_ends_with_a_sentence(
    example, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        example("npg").main(["--smoke", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["joy", "joy=0.5", "joy=much"])
def test_labels_with_factors(example, text: str) -> None:
    if text.endswith("much"):
        with pytest.raises(ValueError, match="could not convert string to float"):
            example("rewards").label_factor(text)
    else:
        assert example("rewards").label_factor(text) == ("joy", 0.5 if "=" in text else 1.0)


def test_the_worst_of_several_models(example, tmp_path: Path) -> None:
    rewards = example("rewards")
    models = [saved(tmp_path / str(seed), 1, tie_word_embeddings=bool(seed)) for seed in range(2)]
    torch.manual_seed(9)
    torch.nn.init.normal_(models[1].score.weight)
    models[1].save_pretrained(tmp_path / "1")
    members = [rewards.ModelReward(str(tmp_path / name), None, CPU) for name in "01"]
    each = torch.stack([member(PROMPTS, DOMAINS, RESPONSES) for member in members])
    assert not torch.allclose(each[0], each[1])
    worst = rewards.EnsembleReward(members, 0.5)(PROMPTS, DOMAINS, RESPONSES)
    assert_close(worst, -0.5 * (-each / 0.5).exp().mean(0).log())


def test_the_emotion_settings_run(example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, on a tiny classifier and policy, and with fewer prompts."""
    monkeypatch.chdir(EXAMPLES.parent)
    saved(tmp_path / "emotion", 5, problem_type="multi_label_classification", **EMOTIONS)
    arguments = ["--smoke", "@examples/settings/dro_rebel_emotion_gpt2.txt", "--model", "tiny", "--reward-model"]
    small = [
        "--prompts",
        "12",
        "--micro-batch",
        "12",
        "--steps",
        "2",
        "--new-tokens",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    assert example("rebel").main([*arguments, str(tmp_path / "emotion"), *small]) == 0
    log = [json.loads(line) for line in (tmp_path / "out/robust/log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and log[0]["ess"] < 12 and log[0]["max ratio"] > 1
    settings = json.loads((tmp_path / "out/results.json").read_text())["settings"]
    assert settings["ambiguity"] == "ChiSquare(radius=0.01)"
    assert settings["reward_label"] == [["fear", 0.5], ["anger", 0.5]]


def test_the_grm_settings_run(example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, on a tiny model of bfloat16."""
    monkeypatch.chdir(EXAMPLES.parent)
    saved(tmp_path / "base", 1)
    arguments = ["--smoke", "@examples/settings/grm_gemma_2b.txt", "--model", str(tmp_path / "base")]
    out = tmp_path / "out"
    assert example("reward_model").main([*arguments, "--max-length", "32", "--steps", "4", "--out", str(out)]) == 0
    adapter = json.loads((out / "robust" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (32, 64, 0.05)
    assert set(adapter["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_cosine_with_warm_up(example) -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    args = SimpleNamespace(schedule="cosine", warmup=0.2)
    schedule, rates = example("reward_model").learning_rates(optimizer, args, 10), []
    for _ in range(11):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    by_hand = [0.0, 1.0, *(1 + math.cos(math.pi * i / 8) for i in range(9))]
    assert rates == pytest.approx(by_hand, abs=1e-12)


def test_a_reward_model_that_was_trained_here_scores_the_rollouts(example, tmp_path: Path) -> None:
    """reward_model.py saves, ppo.py loads: the same rewards, and a run on them."""
    saved(tmp_path / "base", 1)
    trained = tmp_path / "trained"
    arguments = ["--smoke", "--model", str(tmp_path / "base"), "--steps", "2", "--lr", "0.05"]
    assert example("reward_model").main([*arguments, "--out", str(trained)]) == 0

    scoring, made = example("lora_scorer"), example("preference_pairs")
    folder = str(trained / "robust")
    reward = example("rewards").ModelReward(folder, None, CPU)
    tokenizer, model = scoring.saved_scorer(folder)
    pairs = [made.Pair(prompt, response, "x", "d") for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    ids = [torch.tensor([chosen]) for chosen, _ in scoring.encode(tokenizer, pairs, 128)]
    with torch.no_grad():
        expected = torch.cat([model.eval()(one).logits[:, 0] for one in ids])
    assert_close(reward(PROMPTS, DOMAINS, RESPONSES), expected)
    untrained = example("rewards").ModelReward(str(tmp_path / "base"), None, CPU)
    assert not torch.allclose(reward(PROMPTS, DOMAINS, RESPONSES), untrained(PROMPTS, DOMAINS, RESPONSES))

    out = tmp_path / "ppo"
    assert example("ppo").main(["--smoke", "--steps", "2", "--reward-model", folder, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["reward_model"] == [folder]
    values = [value for row in results["rewards"].values() for value in row.values()]
    assert all(math.isfinite(value) for value in values) and len({round(value, 6) for value in values}) > 4
