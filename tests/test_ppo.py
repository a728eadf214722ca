"""PPO's losses, the KL penalty, advantages and whitening: against TRL, loops and differences."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from trl_losses import grpo_losses, needs_trl, quiet

from robustgrad.objectives import (
    clipped_surrogate,
    generalized_advantages,
    group_advantages,
    kl_estimate,
    penalised_rewards,
    sequence_mean,
    value_loss,
    whiten,
)


def rollout(n: int = 5, tokens: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    old = -2 * torch.rand(n, tokens, dtype=dtype, generator=generator)
    lengths = torch.randint(1, tokens + 1, (n, 1), generator=generator)
    return {
        "old": old, "new": old + 0.3 * normal(n, tokens), "reference": old + 0.3 * normal(n, tokens),
        "advantages": normal(n), "values": normal(n, tokens), "rewards": normal(n),
        "mask": torch.arange(tokens) < lengths,
    }  # fmt: skip


# --- the clipped surrogate ---


@needs_trl
@quiet
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("high", [0.2, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_surrogate_and_kl_are_those_of_trl(level: str, high: float, beta: float) -> None:
    r = rollout()
    options = {"beta": beta, "clip": 0.2, "clip_high": high, "level": level}
    theirs = grpo_losses(r["new"], r["old"], r["reference"], r["advantages"], r["mask"], **options)
    penalty = beta * sequence_mean(kl_estimate(r["new"], r["reference"]), r["mask"])
    if level == "token":
        surrogate = clipped_surrogate(r["new"], r["old"], r["advantages"], clip=0.2, clip_high=high)
        losses = sequence_mean(surrogate, r["mask"])
    else:
        means = (sequence_mean(r[name], r["mask"]) for name in ("new", "old"))
        losses = clipped_surrogate(*means, r["advantages"], clip=0.2, clip_high=high)
    assert_close(losses + penalty, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("w", "advantage", "loss"), [(1.5, 2, -2.4), (0.5, 2, -1), (1.5, -2, 3), (0.5, -2, 1.6), (1.1, 2, -2.2)]
)
def test_surrogate_by_hand(w: float, advantage: float, loss: float) -> None:
    got = clipped_surrogate(torch.tensor([math.log(w)]), torch.zeros(1), torch.tensor([float(advantage)]))
    assert_close(got, torch.tensor([float(loss)]))


def test_surrogate_gradients_against_differences() -> None:
    r = rollout(dtype=torch.float64)
    old, new = r["old"], r["new"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, old, r["advantages"]), [new])


def test_surrogate_is_homogeneous_in_the_advantages() -> None:
    r = rollout(dtype=torch.float64)
    ratio = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.7], dtype=torch.float64)
    scaled = clipped_surrogate(r["new"], r["old"], ratio * r["advantages"])
    assert_close(scaled, ratio[:, None] * clipped_surrogate(r["new"], r["old"], r["advantages"]))


def test_token_advantages_may_differ_within_a_sequence() -> None:
    r = rollout()
    everywhere = r["advantages"][:, None].expand(-1, 6)
    assert torch.equal(
        clipped_surrogate(r["new"], r["old"], everywhere), clipped_surrogate(r["new"], r["old"], r["advantages"])
    )


def test_old_and_new_advantages_and_clips_have_an_effect() -> None:
    r = rollout()
    plain = clipped_surrogate(r["new"], r["old"], r["advantages"])
    assert not torch.equal(plain, clipped_surrogate(r["new"], r["new"], r["advantages"]))
    assert not torch.equal(plain, clipped_surrogate(r["new"], r["old"], r["advantages"], clip=0.01))
    assert not torch.equal(plain, clipped_surrogate(r["new"], r["old"], r["advantages"], clip_high=0.01))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": 0.0}, "clip must be in (0, 1), got 0.0"),
        ({"clip": 1.0}, "clip must be in (0, 1), got 1.0"),
        ({"clip_high": 0.0}, "clip_high must be in (0, inf), got 0.0"),
        ({"old_log_probs": torch.zeros(5, 1)}, "old_log_probs must have the shape of log_probs (5, 6), got (5, 1)"),
        ({"advantages": torch.zeros(5, 1)}, "advantages must have the shape of log_probs (5, 6), got (5, 1)"),
        ({"advantages": torch.zeros(6)}, "advantages must have the shape of log_probs (5, 6), got (6,)"),
    ],
)
def test_surrogate_refuses(change: dict[str, object], message: str) -> None:
    r = rollout()
    arguments = {"log_probs": r["new"], "old_log_probs": r["old"], "advantages": r["advantages"]} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        clipped_surrogate(**arguments)


# --- the critic ---


def test_value_loss_by_hand() -> None:
    values, old, returns = torch.tensor([1.0, 1.0, 0.1]), torch.zeros(3), torch.tensor([1.0, 3.0, 0.0])
    assert_close(value_loss(values, old, returns, clip=0.2), torch.tensor([0.32, 3.92, 0.005]))
    assert_close(value_loss(values, old, returns, clip=None), torch.tensor([0.0, 2.0, 0.005]))


def test_value_loss_gradients_against_differences() -> None:
    r = rollout(dtype=torch.float64)
    values, old = r["values"].requires_grad_(), r["new"]
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, r["reference"]), [values])


def test_value_loss_refuses() -> None:
    with pytest.raises(ValueError, match=re.escape("clip must be in (0, inf), got 0.0. Use None")):
        value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip=0.0)
    with pytest.raises(ValueError, match=re.escape("returns must have the shape of values (2,), got (1,)")):
        value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))


# --- the KL penalty ---


def test_kl_estimates_are_those_of_a_distribution() -> None:
    """Means under pi over all outcomes: k1 and k3 give the KL, and the gradient of k2 is its gradient."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.4, -0.2], dtype=torch.float64).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    kl = (probs * (log_probs - reference)).sum()
    for kind in ("k1", "k3"):
        assert_close((probs * kl_estimate(log_probs, reference, kind=kind)).sum(), kl)
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (k2,) = torch.autograd.grad((probs.detach() * kl_estimate(log_probs, reference, kind="k2")).sum(), logits)
    assert_close(k2, exact)


def test_k3_keeps_its_digits_at_a_small_gap() -> None:
    gap = torch.tensor([1e-4])
    assert_close(kl_estimate(gap, torch.zeros(1)), gap.square() / 2, rtol=1e-3, atol=0)


def test_penalised_rewards_against_a_loop() -> None:
    r = rollout()
    kl = kl_estimate(r["new"], r["reference"], kind="k1")
    got = penalised_rewards(r["rewards"], kl, r["mask"], beta=0.3)
    expected = torch.zeros_like(kl)
    for i, length in enumerate(r["mask"].sum(-1)):
        expected[i, :length] = -0.3 * kl[i, :length]
        expected[i, length - 1] += r["rewards"][i]
    assert_close(got, expected)
    assert_close(got.sum(-1), r["rewards"] - 0.3 * torch.where(r["mask"], kl, 0).sum(-1))


def test_penalised_rewards_on_hostile_masks() -> None:
    """Padding on the left, a single token, no token at all; NaN beside them."""
    mask = torch.tensor([[False, True, True, False], [False, False, True, False], [False, False, False, False]])
    kl = torch.tensor([[torch.nan, 1.0, 1.0, torch.inf]]).expand(3, -1)
    expected = torch.tensor([[0.0, -0.5, 1.5, 0.0], [0.0, 0.0, 1.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert_close(penalised_rewards(torch.tensor([2.0, 2.0, 2.0]), kl, mask, beta=0.5), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -0.1}, "beta must be in [0, inf), got -0.1. Use 0 for no penalty."),
        ({"rewards": torch.zeros(4)}, "kl must have shape (n, T) with n = 4 as rewards, got (5, 6)"),
        ({"mask": torch.ones(5, 5).bool()}, "mask must have the shape of kl (5, 6), got (5, 5)"),
    ],
)
def test_penalised_rewards_refuses(change: dict[str, object], message: str) -> None:
    r = rollout()
    arguments = {"rewards": r["rewards"], "kl": r["new"], "mask": r["mask"], "beta": 0.1} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        penalised_rewards(**arguments)
    with pytest.raises(ValueError, match="kind must be 'k3' or 'k2' or 'k1', got 'k4'"):
        kl_estimate(r["new"], r["old"], kind="k4")


# --- advantages ---


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 1.0), (0.9, 0.0), (1.0, 1.0)])
def test_advantages_are_the_sum_of_their_definition(discount: float, trace: float) -> None:
    r = rollout(dtype=torch.float64)
    rewards, values, mask = r["new"], r["values"], r["mask"]
    advantages, returns = generalized_advantages(rewards, values, mask, discount=discount, trace=trace)
    for i, length in enumerate(mask.sum(-1).tolist()):
        v = [*values[i, :length].tolist(), 0.0]
        delta = [rewards[i, t].item() + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((discount * trace) ** k * delta[t + k] for k in range(length - t))
            assert advantages[i, t].item() == pytest.approx(expected)
            assert returns[i, t].item() == pytest.approx(expected + v[t])
        assert (advantages[i, length:] == 0).all()


def test_padding_of_a_rollout_may_hold_anything() -> None:
    r = rollout()
    dirty = torch.where(r["mask"], r["values"], torch.nan)
    clean = generalized_advantages(r["new"], r["values"], r["mask"])
    for got, want in zip(generalized_advantages(r["new"], dirty, r["mask"]), clean, strict=True):
        assert_close(got, torch.where(r["mask"], want, 0.0))
    assert_close(whiten(dirty, r["mask"]), whiten(r["values"], r["mask"]))


def test_whitening() -> None:
    r = rollout(dtype=torch.float64)
    white = whiten(r["values"], r["mask"])[r["mask"]]
    assert_close(white.mean(), torch.zeros((), dtype=torch.float64))
    assert_close(white.var(correction=0), torch.ones((), dtype=torch.float64), rtol=1e-6, atol=0)
    kept = whiten(r["values"], r["mask"], center=False)[r["mask"]]
    assert_close(kept.mean(), r["values"][r["mask"]].mean())
    assert_close(whiten(torch.full((3,), 2.0), torch.ones(3).bool()), torch.zeros(3))


def test_advantages_refuse() -> None:
    r = rollout()
    with pytest.raises(ValueError, match=re.escape("trace must be in [0, 1], got 1.5")):
        generalized_advantages(r["new"], r["values"], r["mask"], trace=1.5)
    with pytest.raises(ValueError, match=re.escape("values must have the shape of rewards (5, 6), got (5,)")):
        generalized_advantages(r["new"], r["rewards"], r["mask"])
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        whiten(r["values"], r["mask"].float())


# --- group advantages ---


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_those_of_trl(scale: str) -> None:
    """Against the lines of GRPOTrainer 1.16 for equally large groups in order."""
    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).flatten()
    rows = rewards.view(-1, 4)
    std = rewards.std() if scale == "batch" else rows.std(dim=1).repeat_interleave(4)
    expected = rewards - rows.mean(dim=1).repeat_interleave(4)
    if scale != "none":
        expected = expected / (std + 1e-4)
    got = group_advantages(rewards, torch.arange(6).repeat_interleave(4), scale=scale)
    assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_groups_in_any_order_and_size() -> None:
    rewards, groups = torch.tensor([1.0, 5.0, 3.0, 9.0, 2.0]), torch.tensor([7, -2, 7, 40, -2])
    expected = torch.tensor([-1.0, 1.5, 1.0, 0.0, -1.5])
    assert_close(group_advantages(rewards, groups, scale="none"), expected)
    # Unbiased: a pair (a, b) has the standard deviation |a - b| / sqrt(2).
    assert_close(group_advantages(rewards, groups, eps=0.0)[[0, 1, 2]], torch.tensor([-1.0, 1.0, 1.0]) / 2**0.5)
    assert group_advantages(rewards, groups)[3] == 0


def test_nan_stays_in_its_group() -> None:
    got = group_advantages(torch.tensor([1.0, torch.nan, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]))
    assert got[:2].isnan().all() and got[2:].isfinite().all()


def test_group_advantages_refuse() -> None:
    with pytest.raises(ValueError, match=r"groups must be the prompt's integer id.*got None"):
        group_advantages(torch.zeros(3), None)
    with pytest.raises(TypeError, match="groups must be integer ids"):
        group_advantages(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="scale must be 'group' or 'batch' or 'none', got 'std'"):
        group_advantages(torch.zeros(3), torch.zeros(3).long(), scale="std")
