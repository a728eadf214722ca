"""What pools do on their edges: 64 losses, a quarter of an odd memory, nothing but masked samples, large steps."""

from __future__ import annotations

import pytest
import torch

from robustgrad import KL, CVaR, Reweighter, TotalVariation


def draws(n: int) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_64_losses_are_solved_on_themselves_and_63_are_plain() -> None:
    assert Reweighter(CVaR(0.5)).ratio(draws(64)).unique().tolist() == [0.0, 2.0]
    assert Reweighter(CVaR(0.5)).ratio(draws(63)).unique().tolist() == [1.0]


def test_a_quarter_of_an_odd_memory_is_rounded_down() -> None:
    reweighter = Reweighter(KL(0.1), memory=66)
    for loss in draws(17).split(1):
        reweighter.ratio(loss)
    assert reweighter.metrics()["pool_size"] == 16


@pytest.mark.parametrize("pool", ["memory", "batch"])
def test_a_call_of_masked_samples_alone_has_no_effective_sample(pool: str) -> None:
    reweighter = Reweighter(KL(0.1), pool=pool)
    reweighter.ratio(draws(4), mask=torch.zeros(4, dtype=torch.bool))
    assert reweighter.metrics()["ess"] == 0


def test_the_gap_of_a_memory_sees_no_level() -> None:
    """What the rule makes of the remembered losses is a distribution: its weights sum to one."""
    gaps = []
    for level in (0.0, 1e4):
        reweighter = Reweighter(CVaR(0.3))
        for losses in draws(600).split(100):
            reweighter.ratio(losses + level)
            reweighter.step()
        reweighter.ratio(draws(8) + level)
        gaps.append(reweighter.metrics()["gap"].item())
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-6)


def test_beyond_64_samples_a_step_moves_the_mass_to_one_in_64() -> None:
    one, losses = torch.ones((), dtype=torch.float64), draws(500)
    large, capped = (
        ambiguity.fit(losses, torch.ones_like(losses), unit=one, step_size=500 * one)
        for ambiguity in (TotalVariation(0.2), TotalVariation(0.2, cap=1 + 0.2 * 64))
    )
    torch.testing.assert_close(large.ratio(draws(50)), capped.ratio(draws(50)))


def test_options_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        Reweighter(KL(0.1), "batch")  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Reweighter(KL(0.1)).ratio(draws(4), None)  # type: ignore[misc]


def test_a_step_that_was_said_once_is_waited_for() -> None:
    reweighter = Reweighter(KL(0.1))
    reweighter.ratio(draws(4))
    reweighter.step()
    for _ in range(3):
        reweighter.ratio(draws(200))
    assert reweighter.expects_steps and reweighter.metrics()["pool_size"] == 4
