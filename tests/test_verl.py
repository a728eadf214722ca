"""verl's own estimators, policy losses and configuration under the adapter.

Ray, Uvicorn and FastAPI, which verl imports to start its workers, are stood in for where they are not
installed: nothing here starts a worker.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hollow import hollow
from torch import Tensor

if find_spec("verl") is None:
    pytest.skip("needs verl; docs/other_trainers.md has the line that installs it", allow_module_level=True)
with hollow("ray", "uvicorn", "fastapi"):
    import verl
    from verl.trainer.ppo import core_algos, ray_trainer

    from robustgrad.integrations.verl import RobustAdvantages, RobustPolicyLoss
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from robustgrad import ChiSquare, TotalVariation

UIDS = np.array(["b", "a", "b", "c", "a", "b", "c", "d", "d", "d"], dtype=object)
N, T = len(UIDS), 5
SET = {"ambiguity": "ChiSquare", "radius": 0.3}
ESTIMATORS = ["gpg", "grpo", "grpo_passk", "grpo_vectorized", "opo", "reinforce_plus_plus", "rloo", "rloo_vectorized"]
ESTIMATORS += ["reinforce_plus_plus_baseline"]
POLICY = torch.linspace(0.1, 0.5, T, requires_grad=True)  # what the log-probabilities are made of
LOSSES = ["vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "dro", "cispo"]


@cache
def configuration() -> Any:
    return OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml")


def algorithm(robustgrad: Any = None, **changes: Any) -> Any:
    section = configuration().algorithm
    return OmegaConf.merge(section, changes, {} if robustgrad is None else {"robustgrad": robustgrad})


def actor(loss_mode: str, robustgrad: Any = None, **changes: Any) -> Any:
    """The actor's section as its worker gets it."""
    section = configuration().actor_rollout_ref.actor
    loss = {"loss_mode": loss_mode, "_target_": "robustgrad.integrations.verl.PolicyLossConfig", "dro_beta": 0.1}
    more = {"policy_loss": loss | {"robustgrad": robustgrad or {}}, "ppo_micro_batch_size_per_gpu": 2}
    return omega_conf_to_dataclass(OmegaConf.merge(section, more, changes))


def batch(seed: int = 0) -> Any:
    """Responses of 1 to T tokens to four prompts, and one placeholder without tokens."""
    random = torch.Generator().manual_seed(seed)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=random)).float()
    mask[-1] = 0
    rewards = torch.zeros(N, T)
    rewards[:, 0] = torch.randn(N, generator=random) + torch.tensor([1.0 * (uid > "a") for uid in UIDS])
    return verl.DataProto.from_dict({"token_level_rewards": rewards, "response_mask": mask}, {"uid": UIDS})


def prompt_ratio(data: Any) -> Tensor:
    """Each response's ratio, from the worst case over the means of its prompt; 0 for the placeholder."""
    rewards, real = data.batch["token_level_rewards"].sum(-1).numpy(), np.arange(N) < N - 1
    members = {uid: (uid == UIDS) & real for uid in np.unique(UIDS)}
    risk = np.array([-rewards[at].mean(dtype=np.float64) for at in members.values()])
    ratio, _ = oracle.solve(ChiSquare(0.3), risk, np.array([float(at.sum()) for at in members.values()]))
    assert ratio.max() > 1.2
    return torch.tensor([ratio[list(members).index(uid)] * one for uid, one in zip(UIDS, real, strict=True)])


def advantages(name: str, config: Any, data: Any) -> Tensor:
    by_std = config.norm_adv_by_std_in_grpo
    done = ray_trainer.compute_advantage(data, name, config=config, norm_adv_by_std_in_grpo=by_std)
    return done.batch["advantages"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_are_those_of_verl_times_the_ratio_of_the_prompt(name: str) -> None:
    want = advantages(name, algorithm(), batch()) * prompt_ratio(batch()).unsqueeze(-1)
    core_algos.ADV_ESTIMATOR_REGISTRY[f"robust_{name}"].reweighter = None
    got = advantages(f"robust_{name}", algorithm(SET), batch())
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
    assert got.abs().sum() > 0


def test_the_list_is_what_verl_has() -> None:
    robust = {name for name in core_algos.ADV_ESTIMATOR_REGISTRY if name.startswith("robust_")}
    assert robust == {f"robust_{name}" for name in ESTIMATORS}
    assert {f"robust_{name}" for name in LOSSES} < core_algos.POLICY_LOSS_REGISTRY.keys()


def test_grpo_without_the_standard_deviation() -> None:
    """verl hands `norm_adv_by_std_in_grpo` to "grpo" alone."""
    changed = {"norm_adv_by_std_in_grpo": False}
    core_algos.ADV_ESTIMATOR_REGISTRY["robust_grpo"].reweighter = None
    got = advantages("robust_grpo", algorithm(SET, **changed), batch())
    want = advantages("grpo", algorithm(**changed), batch()) * prompt_ratio(batch()).unsqueeze(-1)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, advantages("robust_grpo", algorithm(SET), batch()), atol=1e-3)


def test_memory_tells_the_prompts_of_two_batches_apart() -> None:
    estimate = RobustAdvantages("grpo")
    config = algorithm(SET | {"pool": "memory", "memory": 64})
    for seed in range(20):
        data = batch(seed).batch
        estimate(data["token_level_rewards"], data["response_mask"], UIDS, config)
    assert not estimate.reweighter.metrics()["plain"]
    remembered = estimate.reweighter.state_dict()["pool"]["memory"]["samples"]["groups"]
    assert len(remembered.unique()) > 20


def rows(seed: int = 3) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    old = -torch.rand(N, T, generator=random)
    mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=random)
    advantages = torch.randn(N, 1, generator=random).expand(N, T).contiguous()
    log_prob = old + POLICY * torch.randn(N, T, generator=random)
    return {"old_log_prob": old, "log_prob": log_prob, "advantages": advantages, "response_mask": mask}


def gradient(loss: Any) -> Tensor:
    return torch.autograd.grad(loss, POLICY, retain_graph=True)[0]


def loss_of(name: str, config: Any, data: dict[str, Tensor], **more: Any) -> Tensor:
    return core_algos.get_policy_loss_fn(name)(config=config, rollout_is_weights=None, **data, **more)[0]


def normalised(config: Any, micro_batches: int, dp_size: int = 1) -> Any:
    """What the worker writes there: totals over the mini-batch and all ranks."""
    tokens, responses = int(rows()["response_mask"].sum()) * micro_batches, N * micro_batches
    config.global_batch_info.update(dp_size=dp_size, batch_num_tokens=tokens, global_batch_size=responses)
    return config


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss_is_that_of_verl_with_the_gradient_reweighted(name: str, mode: str) -> None:
    """With totals given, the loss of a batch is the sum over its rows; "geo_mean" takes their mean all the same."""
    data, config = rows(), normalised(actor(name, SET | {"pool": "batch"}), micro_batches=3, dp_size=2)
    alone = [
        loss_of(name, config, {key: value[i : i + 1] for key, value in data.items()}, loss_agg_mode=mode)
        for i in range(N)
    ]
    ratio, _ = oracle.solve(ChiSquare(0.3), np.array([float(one.detach()) for one in alone]))
    want = gradient(sum(float(r) * one for r, one in zip(ratio, alone, strict=True)))
    want = want / N if name == "geo_mean" else want
    loss, _ = RobustPolicyLoss(name)(config=config, rollout_is_weights=None, loss_agg_mode=mode, **data)
    got = gradient(loss)
    assert ratio.max() > 1.2
    torch.testing.assert_close(loss, loss_of(name, config, data, loss_agg_mode=mode), rtol=0, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_policy_loss_has_the_units_of_a_whole_mini_batch() -> None:
    """Whatever the cut, a response enters the memory with the same loss."""
    seen = []
    for cut in (N, 2):
        data, loss_fn = rows(), RobustPolicyLoss("vanilla")
        config = normalised(actor("vanilla", SET), micro_batches=1)
        for i in range(0, N, cut):
            part = {key: value[i : i + cut] for key, value in data.items()}
            loss_fn(config=config, rollout_is_weights=None, loss_agg_mode="token-mean", **part)
        seen.append(loss_fn.reweighter.state_dict()["pool"]["waiting"]["scores"])
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=1e-7)


def test_policy_loss_beside_other_terms_and_without_gradient() -> None:
    """The KL and entropy terms that verl adds keep their weight; evaluation is not seen."""
    data, config = rows(), normalised(actor("vanilla", SET | {"pool": "batch"}), micro_batches=1)
    robust = RobustPolicyLoss("vanilla")
    arguments = {"config": config, "rollout_is_weights": None, "loss_agg_mode": "token-mean"}
    with torch.no_grad():
        robust(**arguments, **data)
    assert robust.reweighter.metrics() == {}
    penalty = core_algos.agg_loss(data["log_prob"].square(), data["response_mask"], "token-mean")
    together = gradient(robust(**arguments, **data)[0] + penalty)
    torch.testing.assert_close(together, gradient(robust(**arguments, **data)[0]) + gradient(penalty))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (None, "algorithm.robustgrad must name an ambiguity set, got None"),
        ({"radius": 0.1}, "must name an ambiguity set"),
        ({"ambiguity": "Wasserstein"}, "must be one of TotalVariation, ChiSquare, KL, CVaR, got 'Wasserstein'"),
        ({"ambiguity": "CVaR", "radius": 0.1}, r"keys of .* got \['radius'\]"),
        ({"ambiguity": "CVaR", "alpha": 2.0}, "alpha must be in"),
        (SET | {"pool": "epoch"}, "pool must be"),
    ],
)
def test_a_wrong_configuration_says_what_to_write(wrong: Any, words: str) -> None:
    data = batch().batch
    with pytest.raises((ValueError, TypeError), match=words):
        RobustAdvantages("grpo")(data["token_level_rewards"], data["response_mask"], UIDS, algorithm(wrong))


@pytest.mark.parametrize("name", ["gae", "remax", "gdpo", "optimal_token_baseline", "tir_optimal_token_baseline"])
def test_estimators_that_verl_calls_by_name_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"name must not be '{name}'"):
        RobustAdvantages(name)


def test_megatron_is_refused() -> None:
    with pytest.raises(ValueError, match=r"actor.strategy must not be megatron"):
        loss_of("robust_vanilla", SimpleNamespace(strategy="megatron"), rows(), loss_agg_mode="token-mean")


def test_window_needs_two_passes_that_verl_does_not_run() -> None:
    with pytest.raises(ValueError, match=r'pool must be "memory" or "batch"'):
        loss_of("robust_vanilla", actor("vanilla", SET | {"pool": "window"}), rows(), loss_agg_mode="token-mean")


def test_verl_loads_the_plugin_itself() -> None:
    code = (
        "from hollow import hollow\n"
        "with hollow('ray', 'uvicorn', 'fastapi'):\n"
        "    from verl.trainer.ppo import core_algos\n"
        "assert 'robust_grpo' in core_algos.ADV_ESTIMATOR_REGISTRY\n"
        "assert 'robust_vanilla' in core_algos.POLICY_LOSS_REGISTRY\n"
    )
    environment = os.environ | {
        "VERL_USE_EXTERNAL_MODULES": "robustgrad.integrations.verl",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_total_variation_and_options_are_read() -> None:
    loss_fn = RobustPolicyLoss("vanilla")
    config = actor("vanilla", {"ambiguity": "TotalVariation", "radius": 0.1, "cap": 4, "memory": 128})
    loss_fn(config=config, rollout_is_weights=None, loss_agg_mode="token-mean", **rows())
    assert loss_fn.reweighter.ambiguity == TotalVariation(0.1, cap=4)
    assert "memory=128" in repr(loss_fn.reweighter)
