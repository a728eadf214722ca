"""The ratio without a hook is what the hook multiplies a gradient by, for every pool, and leaves the same state."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation

SETS = [TotalVariation(0.3), ChiSquare(0.5), KL(0.3), CVaR(0.4), TotalVariation(0.3, cap=2.0), KL(temperature=0.5)]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)
each_pool = pytest.mark.parametrize("pool", ["memory", "window", "batch"])


def calls(n: int = 12, number: int = 10) -> list[Tensor]:
    return list(torch.randn(number, n, generator=torch.Generator().manual_seed(0)))


def arguments_of(kind: str, scores: Tensor) -> dict[str, Any]:
    n = len(scores)
    return {
        "plain": {},
        "groups": {"groups": torch.arange(n) // 3},
        "base": {"base": torch.linspace(1, 2, n)},
        "mask": {"mask": torch.arange(n) % 4 != 1},
        "base and mask": {"base": torch.linspace(1, 2, n), "mask": torch.arange(n) % 4 != 1},
    }[kind]


def hooked(reweighter: Reweighter, scores: Tensor, **arguments: Any) -> Tensor:
    """What the hook multiplies a gradient of ones by."""
    leaf = scores.clone().requires_grad_()
    reweighter(leaf, **arguments).sum().backward()
    return leaf.grad


def surveyed(reweighter: Reweighter, scores: Tensor, **arguments: Any) -> None:
    if reweighter.pool == "window":
        with reweighter.survey(nn.Identity()):
            reweighter(scores, **arguments)


def assert_same_state(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same_state(one[name], other[name])
    elif isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    else:
        assert one == other


@each_set
@each_pool
@pytest.mark.parametrize("kind", ["plain", "groups", "base", "mask", "base and mask"])
def test_it_is_what_the_hook_multiplies_by(ambiguity: AmbiguitySet, pool: str, kind: str) -> None:
    with_hook, without = Reweighter(ambiguity, pool=pool), Reweighter(ambiguity, pool=pool)
    for scores in calls():  # the memory is filled after 6 of them
        arguments = arguments_of(kind, scores)
        surveyed(with_hook, scores, **arguments)
        surveyed(without, scores, **arguments)
        expected = hooked(with_hook, scores, **arguments)
        with torch.no_grad():
            found = without.ratio(scores, **arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        with_hook.step()
        without.step()
        assert_same_state(without.metrics(), with_hook.metrics())
        assert_same_state(without.state_dict(), with_hook.state_dict())


@pytest.mark.parametrize("units", ["token", "sequence", "spans"])
def test_tokens(units: str) -> None:
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    arguments = {
        "units": torch.arange(24).reshape(4, 6) // 2 if units == "spans" else units,
        "mask": torch.arange(6) < torch.tensor([[6], [3], [4], [1]]),
    }
    found = Reweighter(CVaR(0.4), pool="batch").ratio(scores, **arguments)
    expected = hooked(Reweighter(CVaR(0.4), pool="batch"), scores, **arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.shape == (4, 6) and (found[~arguments["mask"]] == 0).all()


def test_a_policy_gradient_of_several_calls_is_the_weighted_sum() -> None:
    """Advantages times ratios, exactly over the whole step, without a loss that the hook could sit on."""
    ambiguity, policy = ChiSquare(0.5), nn.Linear(3, 1)
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    rewards, advantages = x.sum(-1), x[:, 0] - x[:, 1]
    reweighter = Reweighter(ambiguity, pool="window")

    def loss_fn(part: Tensor) -> Tensor:
        scaled = reweighter.ratio(-rewards[part]) * advantages[part]
        return -(scaled * policy(x[part]).squeeze(-1)).sum() / 12

    for loss in reweighter.window(loss_fn, torch.arange(12).split(5), model=policy):
        loss.backward()
    weights = ambiguity.solve(-rewards).weights
    expected = -(weights * advantages) @ x
    torch.testing.assert_close(policy.weight.grad[0], expected, rtol=1e-5, atol=1e-6)


def test_inside_a_survey_it_is_one() -> None:
    reweighter = Reweighter(CVaR(0.5), pool="window")
    with reweighter.survey(nn.Identity()):
        assert reweighter.ratio(torch.tensor([1.0, 2.0])).tolist() == [1.0, 1.0]
        assert reweighter.ratio(torch.tensor([3.0, 4.0, 0.0]), mask=torch.tensor([True, True, False])).tolist() == [
            1.0, 1.0, 0.0,
        ]  # fmt: skip
    assert reweighter.ratio(torch.tensor([1.0, 2.0])).tolist() == [0.0, 0.0]
    assert reweighter.ratio(torch.tensor([3.0, 4.0, 0.0]), mask=torch.tensor([True, True, False])).tolist() == [
        2.0, 2.0, 0.0,
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="must have been surveyed"):
        reweighter.ratio(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shape_type_and_no_gradient(dtype: torch.dtype) -> None:
    scores = torch.linspace(0, 1, 6).to(dtype).reshape(6, 1).requires_grad_()
    ratio = Reweighter(CVaR(0.5), pool="batch").ratio(scores)
    assert ratio.tolist() == [[0.0]] * 3 + [[2.0]] * 3
    assert ratio.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not ratio.requires_grad


@each_pool
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_scores_are_nan_and_counted(pool: str, bad: float) -> None:
    reweighter, scores = Reweighter(ChiSquare(0.3), pool=pool), torch.linspace(0, 1, 80)
    scores[5] = bad
    for time in range(1, 3):
        surveyed(reweighter, scores)
        assert reweighter.ratio(scores)[5].isnan()
        assert reweighter.metrics()["nonfinite"] == time
        reweighter.step()


def test_raising_on_nonfinite_changes_no_state() -> None:
    reweighter = Reweighter(CVaR(0.5), on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"NaN or \+inf at \[1\] of 2"):
        reweighter.ratio(torch.tensor([0.0, torch.inf]))
    assert reweighter.metrics() == {}


def test_calls_and_ratios_share_one_memory() -> None:
    reweighter = Reweighter(CVaR(0.2))
    reweighter(torch.linspace(0, 1, 100).requires_grad_())
    reweighter.step()
    assert reweighter.ratio(torch.tensor([0.1, 0.95])).tolist() == pytest.approx([0, 5])
    with pytest.raises(ValueError, match="groups must be given in every call or in none"):
        reweighter.ratio(torch.rand(2), groups=torch.arange(2))


@pytest.mark.parametrize(
    ("scores", "arguments", "message"),
    [
        (torch.rand(()), {}, r"scores must have shape \(n,\).*scalar"),
        (torch.rand(0), {}, "scores must have at least one entry"),
        (torch.rand(3, 3), {}, r"scores must have shape \(n,\) or \(n, 1\).*squeeze"),
        (torch.arange(3), {}, "scores must be float16"),
        ([1.0], {}, r"scores must be a torch\.Tensor"),
        (torch.rand(3), {"groups": torch.rand(3)}, "groups must be integer"),
        (torch.rand(3), {"mask": torch.ones(3)}, "mask must be bool"),
        (torch.rand(3), {"base": -torch.ones(3)}, "base must be finite and not negative"),
        (torch.rand(3), {"units": "token"}, r"losses must have shape \(b, t\) with units="),
    ],
)
def test_wrong_arguments_change_no_state(scores: Any, arguments: dict[str, Any], message: str) -> None:
    reweighter = Reweighter(CVaR(0.5))
    with pytest.raises((ValueError, TypeError), match=message):
        reweighter.ratio(scores, **arguments)
    assert reweighter.metrics() == {}


@pytest.mark.parametrize("way", ["ratio", "hook"])
def test_the_warning_points_at_the_line_of_the_loop(way: str) -> None:
    reweighter = Reweighter(CVaR(0.5), pool="batch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "ratio":
            reweighter.ratio(torch.rand(2))
        else:
            reweighter(torch.rand(2, requires_grad=True))
    (warning,) = caught
    assert warning.filename == __file__
