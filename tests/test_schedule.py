"""A set that changes during training: which one each optimizer step gets, and that a resumed run goes on the same."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, RobustOptimizer, TotalVariation
from robustgrad.schedule import Adaptive, Schedule, WarmUp


def losses(step: int, n: int = 96) -> Tensor:
    drawn = torch.randn(n, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return drawn.exp().requires_grad_()


def gradients(reweighter: Reweighter, step: int) -> Tensor:
    leaf = losses(step)
    reweighter(leaf * 1).sum().backward()
    return leaf.grad


SETS = [
    (ChiSquare(0.8), ChiSquare(0.2)),
    (KL(0.4), KL(0.1)),
    (TotalVariation(0.4, cap=3.0), TotalVariation(0.1, cap=3.0)),
    (CVaR(0.2), CVaR(0.5)),
]


@pytest.mark.parametrize(("whole", "quarter"), SETS, ids=repr)
def test_warm_up_grows_to_the_set(whole: AmbiguitySet, quarter: AmbiguitySet) -> None:
    reweighter = Reweighter(WarmUp(whole, steps=4), pool="batch")
    expected = {0: torch.ones(96), 1: quarter.solve(losses(1)).ratio, 4: whole.solve(losses(4)).ratio}
    for step in range(6):
        got = gradients(reweighter, step)
        reweighter.step()
        if step in expected:
            torch.testing.assert_close(got, expected[step].double(), rtol=1e-12, atol=1e-12)
    assert reweighter.ambiguity.current == whole


def test_the_set_stays_within_a_step() -> None:
    reweighter = Reweighter(WarmUp(ChiSquare(1.0), steps=2), pool="batch")
    reweighter.step()  # before any losses: no step of a robust loop
    reweighter.step()
    for _ in range(3):
        reweighter(losses(0, 8) * 1)
    assert reweighter.ambiguity.current == ChiSquare(0.0)
    reweighter.step()
    reweighter.step()  # once more for the same step, as ZeRO does
    assert reweighter.metrics()["value"] == reweighter.metrics()["mean"]  # still about the step that has ended
    reweighter(losses(1, 8) * 1)
    assert reweighter.ambiguity.current == ChiSquare(0.5)


def test_memory_refits_with_the_set_of_the_step() -> None:
    reweighter = Reweighter(WarmUp(ChiSquare(1.0), steps=3))
    for step in range(5):
        got = gradients(reweighter, step)
        reweighter.step()
        assert torch.equal(got, torch.ones(96)) == (step == 0)
    constant = Reweighter(ChiSquare(1.0))
    for step in range(4):
        gradients(constant, step)
        constant.step()
    assert torch.equal(gradients(constant, 4), got)


def test_window_advances_with_each_survey() -> None:
    model = torch.nn.Linear(1, 1)
    reweighter = Reweighter(WarmUp(ChiSquare(1.0), steps=2), pool="window")
    used = []
    for _ in range(4):
        for loss in reweighter.window(
            lambda x: reweighter(model(x).squeeze(-1)).sum(), [torch.randn(6, 1)], model=model
        ):
            loss.backward()
        used.append(reweighter.ambiguity.current)
        reweighter.step()
    assert used == [ChiSquare(0.0), ChiSquare(0.5), ChiSquare(1.0), ChiSquare(1.0)]


def test_adaptive_finds_the_affordable_size() -> None:
    """Validation loss 1 + 0.2 share, tolerance 0.05: a share of 1/4 above the smallest seen is affordable."""
    schedule = Adaptive(TotalVariation(0.4), tolerance=0.05, grow=1.1, shrink=0.8)
    shares = []
    for _ in range(200):
        schedule.observe(1 + 0.2 * schedule.share)
        schedule.advance()
        shares.append(schedule.share)
    affordable = min(shares) + 0.25
    assert min(shares[-50:]) > 0.75 * affordable and max(shares[-50:]) < 1.15 * affordable
    assert schedule.current == TotalVariation(0.4 * schedule.share)


def test_adaptive_uses_all_that_costs_nothing_and_flees_what_costs_much() -> None:
    free, dear = (Adaptive(KL(0.2), tolerance=0.01) for _ in range(2))
    for i in range(30):
        free.observe(0.6)
        dear.observe(0.6 + i)
    free.advance()
    assert free.current == KL(0.2)
    assert dear.share < 1e-6


def test_observed_takes_effect_with_the_next_step() -> None:
    reweighter = Reweighter(Adaptive(ChiSquare(1.0), tolerance=0.1, start=0.5, grow=1.5), pool="batch")
    gradients(reweighter, 0)
    reweighter.ambiguity.observe(1.0)
    gradients_again = gradients(reweighter, 1)  # a batch pool without steps: every call is one
    expected = ChiSquare(0.75).solve(losses(1)).ratio
    torch.testing.assert_close(gradients_again, expected.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", ["memory", "batch"])
@pytest.mark.parametrize("after_step", [True, False])
@pytest.mark.parametrize(
    "schedule",
    [WarmUp(CVaR(0.2), steps=6), Adaptive(ChiSquare(1.0), tolerance=0.1, start=0.3)],
    ids=["warm-up", "adaptive"],
)
def test_resumed_is_uninterrupted(pool: str, after_step: bool, schedule: Schedule) -> None:
    through = Reweighter(schedule, pool=pool)
    for step in range(4):
        gradients(through, step)
        if isinstance(schedule, Adaptive):
            through.ambiguity.observe(1.0 + 0.07 * step)
        if step < 3 or after_step:
            through.step()
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    resumed = Reweighter(schedule, pool=pool)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.metrics()["value"] == through.metrics()["value"]
    for step in range(4, 8):
        assert torch.equal(gradients(resumed, step), gradients(through, step))
        for reweighter in (resumed, through):
            if isinstance(schedule, Adaptive):
                reweighter.ambiguity.observe(1.0)
            reweighter.step()
    assert resumed.ambiguity.current == through.ambiguity.current


def test_one_schedule_serves_many_reweighters() -> None:
    schedule = WarmUp(ChiSquare(1.0), steps=2)
    first, second = Reweighter(schedule, pool="batch"), Reweighter(schedule, pool="batch")
    for step in range(3):
        gradients(first, step)
        first.step()
    assert (first.ambiguity.current, second.ambiguity.current) == (ChiSquare(1.0), ChiSquare(0.0))
    assert copy.deepcopy(first).ambiguity.current == ChiSquare(1.0)


def test_optimizer_takes_a_schedule() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = RobustOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), WarmUp(KL(0.2), steps=5))
    assert "WarmUp(ambiguity=KL(radius=0.2), steps=5)" in repr(optimizer)
    optimizer.reweight(model(torch.randn(4, 2)).square()).mean().backward()
    optimizer.step()


def test_a_state_of_another_schedule_is_refused() -> None:
    state = Reweighter(WarmUp(KL(0.2), steps=5)).state_dict()
    with pytest.raises(ValueError, match=r"state must have ambiguity=WarmUp\(ambiguity=KL\(radius=0.2\), steps=6\)"):
        Reweighter(WarmUp(KL(0.2), steps=6)).load_state_dict(state)


WRONG = [
    (lambda: WarmUp(KL(temperature=1.0), steps=5), r"ambiguity must have a radius \(or alpha\), got KL\(temperature"),
    (lambda: WarmUp(KL(0.1), steps=0), "steps must be an integer of at least 1, got 0. Leave the warm-up out"),
    (lambda: Adaptive(KL(0.1), tolerance=-1.0), r"tolerance must be in \[0, inf\), got -1.0"),
    (lambda: Adaptive(KL(0.1), tolerance=0.1, start=0.0), r"start must be in \(0, 1\], got 0.0"),
    (lambda: Adaptive(KL(0.1), tolerance=0.1, grow=1.0), r"grow must be in \(1, inf\), got 1.0"),
    (lambda: Adaptive(KL(0.1), tolerance=0.1, shrink=1.0), r"shrink must be in \(0, 1\), got 1.0"),
    (lambda: Adaptive(KL(0.1), tolerance=0.1).observe(float("nan")), "loss must be in .* got nan"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_reweighter_names_what_it_takes() -> None:
    with pytest.raises(TypeError, match=r"ambiguity must be an ambiguity set, got 0\.1"):
        Reweighter(0.1)
