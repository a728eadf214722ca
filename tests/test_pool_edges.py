"""What pools do on their edges: 64 losses, a quarter of an odd memory, nothing but masked samples, large steps."""

from __future__ import annotations

import contextlib

import pytest
import torch

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation
from robustgrad._remembered import Room
from robustgrad.samples import Samples


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


SETS = [TotalVariation(0.2), TotalVariation(penalty=0.5), ChiSquare(0.5), KL(0.3), CVaR(0.3)]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)


def assert_same_run(one: Reweighter, other: Reweighter, calls: list[tuple[dict, dict]]) -> None:
    """Each call of the one beside that of the other; what the second gets is the beginning of what the first gets."""
    one.expects_steps = other.expects_steps = True
    for number, (given, also_given) in enumerate(calls):
        ratio, same = one.ratio(**given), other.ratio(**also_given)
        torch.testing.assert_close(ratio[: len(same)], same, rtol=1e-9, atol=1e-9)
        assert_same_metrics(one, other)
        if number % 2:
            one.step(), other.step()


def assert_same_metrics(one: Reweighter, other: Reweighter) -> None:
    found, want = one.metrics(), other.metrics()
    assert found.keys() == want.keys()
    for name in found:
        torch.testing.assert_close(found[name], want[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("memory", [64, None])
@each_set
def test_what_is_masked_leaves_no_trace(ambiguity: AmbiguitySet, memory: int | None) -> None:
    """Whatever it is, and although the memory is full: neither in a ratio nor in what is measured."""
    calls = []
    for losses in draws(16 * 12).split(12):
        masked = torch.cat((losses, torch.tensor([1e6, -1e6, torch.nan, torch.inf])))
        calls.append(({"scores": masked, "mask": torch.arange(16) < 12}, {"scores": losses}))
    assert_same_run(Reweighter(ambiguity, memory=memory), Reweighter(ambiguity, memory=memory), calls)


@each_set
def test_a_base_is_relative(ambiguity: AmbiguitySet) -> None:
    """A half for each sample says as little as one."""
    calls = [({"scores": x, "base": torch.full((12,), 0.5)}, {"scores": x}) for x in draws(192).split(12)]
    assert_same_run(Reweighter(ambiguity), Reweighter(ambiguity), calls)


@pytest.mark.parametrize("pool", ["memory", "batch"])
def test_masked_samples_alone_have_the_least_ratio(pool: str) -> None:
    reweighter = Reweighter(KL(0.1), pool=pool)
    reweighter.ratio(draws(4), mask=torch.zeros(4, dtype=torch.bool))
    assert reweighter.metrics()["max_ratio"] == 0 and reweighter.metrics()["pool_size"] == 0


@pytest.mark.parametrize(("memory", "most"), [(64, 2**15), (1024, 2**16)])
def test_so_many_losses_wait_for_a_step(memory: int, most: int) -> None:
    """64 times what is remembered, or 2^15; the warning points at the call."""
    reweighter = Reweighter(CVaR(0.5), memory=memory)
    reweighter.expects_steps = True
    for waiting in range(0, most, 2**13):
        assert waiting < most
        reweighter.ratio(draws(2**13))
    with pytest.warns(UserWarning, match=f"{most} losses came without") as said:
        reweighter.ratio(draws(4))
    assert said[0].filename == __file__
    assert reweighter.metrics()["pool_size"] == most or reweighter.metrics()["pool_size"] == memory


def test_equal_losses_are_told_from_those_that_differ_by_more_than_rounding() -> None:
    """Around any level: 64 that differ in the tenth digit carry a rule."""
    for level in (1.0, -1e3, 1e6):
        for difference, plain in ((0.0, True), (1e-10, False)):
            reweighter = Reweighter(CVaR(0.5))
            losses = torch.full((80,), level, dtype=torch.float64)
            losses[:40] += abs(level) * difference
            reweighter.ratio(losses)
            reweighter.step()
            reweighter.ratio(losses[30:50])
            assert bool(reweighter.metrics()["plain"]) is plain, (level, difference)


def test_a_masked_loss_beside_equal_ones_says_nothing() -> None:
    reweighter = Reweighter(CVaR(0.5))
    for _ in range(2):
        reweighter.ratio(torch.tensor([2.0] * 80 + [5.0, torch.nan]), mask=torch.arange(82) < 80)
        reweighter.step()
    reweighter.ratio(draws(8))
    assert reweighter.metrics()["plain"]


def test_a_loss_that_is_not_finite_beside_a_memory_shows_in_no_metric_but_its_own() -> None:
    reweighter, losses = Reweighter(KL(0.1)), draws(70)
    reweighter.ratio(losses)
    reweighter.step()
    reweighter.ratio(torch.cat((losses[:5], torch.tensor([torch.nan]))))
    found = reweighter.metrics()
    assert found.pop("nonfinite") == 1 and all(number.isfinite() for number in found.values())


def test_calls_lie_one_after_the_other_in_a_room() -> None:
    """So that a replayed graph finds them; where the room is too small, the step is joined from its calls."""
    room, cpu, step = Room(), torch.device("cpu"), []
    for n in (300, 0, 212, 1, 900):
        lanes = room.take(n, cpu)
        assert lanes.shape == (3, n)
        lanes.copy_(draws(3 * n).reshape(3, n))
        step.append(Samples(lanes[0], lanes[1], None, lanes[2]))
        want = torch.cat([torch.stack((samples.scores, samples.weights)) for samples in step], 1)
        assert torch.equal(room.seen(step), want)
        if len(step) < 4:  # 512 at first
            assert room.used == want.shape[1] and room.seen(step).data_ptr() == step[0].scores.data_ptr()


def test_a_batch_of_one_is_plain_and_of_two_is_not() -> None:
    for n in (1, 2):
        reweighter = Reweighter(TotalVariation(0.1), pool="batch")
        with pytest.warns(UserWarning, match="batch pool") if n == 1 else contextlib.nullcontext():
            reweighter.ratio(draws(n))
        assert bool(reweighter.metrics()["plain"]) is (n == 1)


def test_what_waits_and_what_is_remembered_follow_the_model() -> None:
    """To the same device here, by copies; before there is a memory too."""
    reweighter, cpu = Reweighter(CVaR(0.5)), torch.device("cpu")
    reweighter.ratio(draws(70))
    reweighter._pool._move(cpu)
    reweighter.step()
    reweighter.ratio(draws(8))
    before = reweighter._pool._memory
    reweighter._pool._move(cpu)
    after = reweighter._pool._memory
    assert after is not before and torch.equal(after.samples.scores, before.samples.scores)
    assert reweighter.metrics()["pool_size"] == 70
