"""The window pool: exact over all micro-batches of a step, however it is cut, and strict about the two passes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, RobustOptimizer, TotalVariation
from robustgrad.ambiguity import group_means
from robustgrad.samples import Samples
from robustgrad.window import _comes_later

SETS = [TotalVariation(0.2), TotalVariation(0.3, cap=2.0), ChiSquare(0.5), KL(0.3), CVaR(0.3), KL(temperature=0.5)]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)
CUTS = [[32], [8] * 4, [1] * 32, [5] * 6 + [2], [31, 1], [1, 30, 1]]
each_cut = pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "+".join(map(str, cut[:4])))


def linear() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(6, 1), torch.randn(32, 6)


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.softplus(model(x).squeeze(-1) + x[:, 0] * x[:, 1])


def gradient(model: nn.Linear) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weighted(model: nn.Linear, x: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the weighted sum, in one pass over all samples."""
    model = copy.deepcopy(model)
    (losses_of(model, x) * weights).sum().backward()
    return gradient(model)


def run(
    reweighter: Reweighter, model: nn.Module, parts: tuple[Tensor, ...], loss_fn: Callable[[Tensor], Tensor]
) -> None:
    model.zero_grad()
    for loss in reweighter.window(loss_fn, parts, model=model):
        loss.backward()
    reweighter.step()


@each_set
@each_cut
def test_every_cut_gives_the_gradient_of_one_pass(ambiguity: AmbiguitySet, cut: list[int]) -> None:
    (model, x), reweighter = linear(), Reweighter(ambiguity, pool="window")
    weights = ambiguity.solve(losses_of(model, x).detach()).weights
    run(reweighter, model, x.split(cut), lambda part: reweighter(losses_of(model, part)).sum() / 32)
    torch.testing.assert_close(gradient(model), weighted(model, x, weights), rtol=1e-6, atol=1e-6 * weights.max())


@each_set
@each_cut
def test_a_loop_that_averages_micro_batches(ambiguity: AmbiguitySet, cut: list[int]) -> None:
    """Samples of a small micro-batch weigh more in such a loop: that is its base."""
    (model, x), reweighter = linear(), Reweighter(ambiguity, pool="window")
    base = torch.cat([torch.full((n,), 1 / n) for n in cut])
    weights = ambiguity.solve(losses_of(model, x).detach(), base=base).weights

    def loss_fn(part: Tensor) -> Tensor:
        n = len(part)
        return reweighter(losses_of(model, part), base=torch.full((n,), 1 / n)).mean() / len(cut)

    run(reweighter, model, x.split(cut), loss_fn)
    torch.testing.assert_close(gradient(model), weighted(model, x, weights), rtol=1e-6, atol=1e-6 * weights.max())


@each_set
def test_padding_and_groups(ambiguity: AmbiguitySet) -> None:
    (model, x), reweighter = linear(), Reweighter(ambiguity, pool="window")
    mask, groups = torch.arange(32) % 5 != 0, torch.arange(32) % 3
    means = group_means(losses_of(model, x).detach().double(), groups, mask.double())
    weights = ambiguity.solve(means, mask=mask).weights

    def loss_fn(part: list[Tensor]) -> Tensor:
        return reweighter(losses_of(model, part[0]), mask=part[1], groups=part[2]).sum() / mask.sum()

    parts = list(zip(x.split(5), mask.split(5), groups.split(5), strict=True))
    run(reweighter, model, parts, loss_fn)
    torch.testing.assert_close(gradient(model), weighted(model, x, weights.float()), rtol=1e-5, atol=1e-6)


def test_the_optimizer_offers_it() -> None:
    model, x = linear()
    optimizer = RobustOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ChiSquare(0.5), pool="window")
    for _ in range(3):
        expected = weighted(model, x, ChiSquare(0.5).solve(losses_of(model, x).detach()).weights)
        for loss in optimizer.window(
            lambda p: optimizer.reweight(losses_of(model, p)).sum() / 32, x.split(4), model=model
        ):
            loss.backward()
        torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()


# --- the mode of the survey ---


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(x)))


def both_passes(survey: str) -> tuple[Noisy, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    model, reweighter, seen = Noisy(), Reweighter(KL(0.3), pool="window", survey=survey), []
    model.norm.eval()  # a part that is frozen stays so
    model.norm.train(survey == "train")

    def loss_fn(part: Tensor) -> Tensor:
        losses = losses_of(model, part)
        seen.append(losses.detach())
        return reweighter(losses).sum()

    for loss in reweighter.window(loss_fn, torch.randn(32, 6).split(8), model=model):
        loss.backward()
    return model, seen[:4], seen[4:]


def test_survey_in_eval_mode_sees_no_masks() -> None:
    model, surveyed, trained = both_passes("eval")
    torch.manual_seed(0)
    untouched = Noisy().eval()
    expected = [losses_of(untouched, part).detach() for part in torch.randn(32, 6).split(8)]
    torch.testing.assert_close(surveyed, expected, rtol=0, atol=0)
    assert not torch.equal(torch.cat(surveyed), torch.cat(trained))
    assert model.training and model.dropout.training and not model.norm.training


def test_survey_in_train_mode_replays_masks_and_statistics() -> None:
    model, surveyed, trained = both_passes("train")
    torch.testing.assert_close(surveyed, trained, rtol=0, atol=0)
    assert model.norm.num_batches_tracked == 4


def test_survey_in_train_mode_leaves_the_random_stream_of_the_plain_loop() -> None:
    both_passes("train")
    after = torch.rand(1)
    torch.manual_seed(0)
    model = Noisy()
    for part in torch.randn(32, 6).split(8):
        model(part)
    assert torch.rand(1) == after


# --- wrong use ---


def surveyed(*sizes: int, pool: str = "window") -> tuple[Reweighter, list[Tensor]]:
    reweighter = Reweighter(ChiSquare(0.5), pool=pool)
    parts = [
        p.requires_grad_() for p in torch.rand(sum(sizes), generator=torch.Generator().manual_seed(1)).split(sizes)
    ]
    with reweighter.survey(nn.Identity()):
        for part in parts:
            assert reweighter(part) is part
    return reweighter, parts


def test_call_without_a_survey() -> None:
    with pytest.raises(RuntimeError, match=r"got 3 losses that were not.*optimizer\.window"):
        Reweighter(ChiSquare(0.5), pool="window")(torch.rand(3, requires_grad=True))


def test_more_calls_than_surveyed() -> None:
    reweighter, parts = surveyed(3)
    reweighter(parts[0])
    with pytest.raises(RuntimeError, match="must have been surveyed"):
        reweighter(torch.rand(3, requires_grad=True))


def test_other_order_of_sizes() -> None:
    reweighter, parts = surveyed(3, 4)
    with pytest.raises(RuntimeError, match="order of the survey, got 4 losses where 3 are due"):
        reweighter(parts[1])
    reweighter(parts[0])  # nothing is lost by the error


def test_other_order_of_equal_sizes() -> None:
    reweighter, parts = surveyed(3, 3)
    with pytest.raises(RuntimeError, match="due later"):
        reweighter(parts[1])


def test_equal_losses_in_any_order() -> None:
    reweighter = Reweighter(ChiSquare(0.5), pool="window")
    parts = [torch.full((3,), 0.5, requires_grad=True) for _ in range(2)]
    with reweighter.survey(nn.Identity()):
        for part in parts:
            reweighter(part)
    for part in reversed(parts):
        reweighter(part)


def test_fewer_calls_than_surveyed() -> None:
    reweighter, parts = surveyed(3, 4)
    reweighter(parts[0])
    with pytest.raises(RuntimeError, match="got 1 that did not"), reweighter.survey(nn.Identity()):
        pass


def test_survey_without_a_call() -> None:
    reweighter = Reweighter(ChiSquare(0.5), pool="window")
    with pytest.raises(RuntimeError, match="got no call"), reweighter.survey(nn.Identity()):
        pass


def test_survey_inside_a_survey() -> None:
    reweighter = Reweighter(ChiSquare(0.5), pool="window")
    with (
        pytest.raises(RuntimeError, match="one inside another"),
        reweighter.survey(nn.Identity()),
        reweighter.survey(nn.Identity()),
    ):
        pass


@pytest.mark.parametrize("pool", ["memory", "batch"])
def test_survey_of_another_pool(pool: str) -> None:
    with pytest.raises(ValueError, match=f'pool must be "window".*{pool}'):
        surveyed(3, pool=pool)


def test_a_survey_that_fails_can_be_repeated() -> None:
    reweighter, model = Reweighter(ChiSquare(0.5), pool="window"), nn.Dropout()
    with pytest.raises(ZeroDivisionError), reweighter.survey(model):
        reweighter(torch.rand(3))
        raise ZeroDivisionError
    assert model.training
    with reweighter.survey(model):
        reweighter(torch.rand(4))
    reweighter(torch.rand(4, requires_grad=True))


# --- losses that are not finite ---


def test_nan_in_the_survey_is_nan_everywhere() -> None:
    reweighter = Reweighter(ChiSquare(0.5), pool="window")
    parts = [torch.tensor(part, requires_grad=True) for part in ([1.0, 2.0], [torch.nan, 3.0])]
    with reweighter.survey(nn.Identity()):
        for part in parts:
            reweighter(part)
    for part in parts:
        reweighter(part).sum().backward()
        assert part.grad.isnan().all()


def test_nan_in_the_second_pass_is_nan_there() -> None:
    reweighter = Reweighter(ChiSquare(0.5), pool="window")
    with reweighter.survey(nn.Identity()):
        reweighter(torch.tensor([1.0, 2.0, 3.0]))
    losses = torch.tensor([1.0, torch.inf, 3.0], requires_grad=True)
    reweighter(losses).sum().backward()
    assert losses.grad.isnan().tolist() == [False, True, False]
    assert reweighter.metrics()["nonfinite"] == 1


def test_metrics_are_about_the_window() -> None:
    reweighter, parts = surveyed(3, 5)
    for part in parts:
        reweighter(part)
    metrics, worst = reweighter.metrics(), ChiSquare(0.5).solve(torch.cat(parts).detach().double())
    assert metrics["pool_size"] == 8 and not metrics["plain"]
    for name in ("value", "mean", "ess", "max_ratio", "divergence"):
        torch.testing.assert_close(metrics[name], getattr(worst, name), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scores", "surveyed", "later"),
    [
        ([1.0, 2.0], [[1.0, 2.0], [3.0, 4.0]], False),
        ([3.0, 4.0], [[1.0, 2.0], [3.0, 4.0]], True),
        ([3.0, 4.0], [[1.0, 2.0], [9.0, 9.0, 9.0], [8.0, 8.0], [3.0, 4.0]], True),
        ([3.0, 4.0], [[1.0, 2.0], [3.1, 4.0]], False),  # neither of the two: something else has changed
        ([4.0, 4.0], [[4.0, 4.0 + 3e-3], [4.0, 4.0]], False),  # less than a thousandth of the largest
        ([4.0, 4.0], [[4.0, 4.0 + 5e-3], [4.0, 4.0]], True),
        ([4.0, 4.0], [[1.0, 2.0], [4.0, 4.0 + 3e-6]], True),  # less than a millionth
        ([4.0, 4.0], [[1.0, 2.0], [4.0, 4.0 + 5e-6]], False),
        ([0.1, 0.1], [[0.1, 0.1 + 5e-4], [0.1, 0.1]], False),  # of one, where all are smaller
        ([0.1, 0.1], [[0.1, 0.1 + 15e-4], [0.1, 0.1]], True),
        ([], [[], [1.0], []], False),
    ],
    ids=str,
)
def test_losses_that_are_due_later(scores: list[float], surveyed: list[list[float]], later: bool) -> None:
    calls = [Samples(torch.tensor(call, dtype=torch.float64)) for call in (scores, *surveyed)]
    assert _comes_later(calls[0], calls[1:]) is later
