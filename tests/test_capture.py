"""Capture: whatever closed loop made the scalar, the gradient is that of the per-sample losses behind it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import robustgrad
from robustgrad import ChiSquare, CVaR, Reweighter, RobustOptimizer, TotalVariation

SET = ChiSquare(0.5)
N, CLASSES = 12, 4


class Task:
    """A small model, a batch, and its per-sample losses written out by hand."""

    def __init__(self, n: int = N, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.head, self.classifier = nn.Linear(8, 1), nn.Linear(8, CLASSES)
        self.x, self.y = torch.randn(n, 5), torch.randn(n)
        self.labels = torch.arange(n) % CLASSES
        self.parameters = [*self.body.parameters(), *self.head.parameters(), *self.classifier.parameters()]

    def out(self) -> Tensor:
        return self.head(self.body(self.x)).squeeze(-1)

    def logits(self) -> Tensor:
        return self.classifier(self.body(self.x))

    def squares(self) -> Tensor:
        return (self.out() - self.y).square()

    def gradient(self, loss: Tensor) -> Tensor:
        """Of all parameters, flat."""
        grads = torch.autograd.grad(loss, self.parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])

    def captured(self, loss_fn: Callable[[Task], Tensor], **options: object) -> tuple[Tensor, Tensor]:
        """Gradient under capture, and the loss."""
        with Reweighter(SET, pool="batch").capture(**options):
            loss = loss_fn(self)
        return self.gradient(loss), loss.detach()

    def expected(self, losses: Tensor, base: Tensor | None = None) -> Tensor:
        """sum_i q_i grad loss_i, one sample at a time."""
        weights = SET.solve(losses, base=base).weights
        return torch.stack([w * self.gradient(losses[i]) for i, w in enumerate(weights)]).sum(0)


def close(got: Tensor, want: Tensor, tol: float = 1e-5) -> None:
    assert (got - want).norm() <= tol * want.norm(), ((got - want).norm() / want.norm()).item()


def in_place(task: Task) -> Tensor:
    losses = task.squares()
    loss = losses.mean()
    loss *= 0.5
    loss += 0.5 * losses.mean()
    return loss


def negated_afterwards(task: Task) -> Tensor:
    return -(-task.squares()).mean()


def changed_after_reduction(task: Task) -> Tensor:
    losses = task.squares() * 1
    loss = losses.mean()
    losses += 100
    return loss


def with_metrics(task: Task) -> Tensor:
    losses = task.squares()
    (losses.detach() > 1).float().mean()
    losses.max() - losses.sum()  # a metric that has a gradient
    losses[:0].nansum()  # of a part of the batch that happens to be empty
    return losses.mean()


def centred(task: Task) -> Tensor:
    loss = task.squares().mean()
    loss += 0.1 * torch.mean(task.out() ** 2)
    return loss


SAME = {
    "mean": lambda t: t.squares().mean(),
    "torch.mean": lambda t: torch.mean(t.squares()),
    "mean over dim 0": lambda t: t.squares().mean(0),
    "sum": lambda t: t.squares().sum() / N,
    "nanmean": lambda t: t.squares().nanmean(),
    "mse_loss": lambda t: F.mse_loss(t.out(), t.y),
    "MSELoss": lambda t: nn.MSELoss(reduction="sum")(t.out(), t.y) / N,
    "two columns": lambda t: torch.stack((t.squares(), t.squares()), -1).mean(),
    "stacked scalars": lambda t: torch.stack(list(t.squares())).mean(),
    "negated": negated_afterwards,
    "in place": in_place,
    "changed afterwards": changed_after_reduction,
    "with metrics": with_metrics,
    "constant added": lambda t: t.squares().mean() * 2 / 2 + 0.0,
}


@pytest.mark.parametrize("name", SAME)
def test_gradient_is_the_weighted_sum(name: str) -> None:
    task = Task()
    got, loss = task.captured(SAME[name])
    close(got, task.expected(task.squares()))
    assert loss == SAME[name](task).detach()


CROSS_ENTROPY = {
    "plain": {},
    "class weights": {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0])},
    "label smoothing": {"label_smoothing": 0.1},
    "sum": {"reduction": "sum"},
    "ignored": {"ignore_index": 2},
    "weights and smoothing": {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0]), "label_smoothing": 0.1, "ignore_index": 1},
}


@pytest.mark.parametrize("name", CROSS_ENTROPY)
def test_cross_entropy_that_reduces_inside(name: str) -> None:
    options = CROSS_ENTROPY[name]
    task = Task()
    got, loss = task.captured(lambda t: F.cross_entropy(t.logits(), t.labels, **options))
    want = F.cross_entropy(task.logits(), task.labels, **options)
    torch.testing.assert_close(loss, want)
    entries = F.cross_entropy(task.logits(), task.labels, **options | {"reduction": "none"})
    close(got, task.expected(entries * (want / entries.sum()).detach() * N))


def test_loss_functions_keep_their_value() -> None:
    task = Task()
    pairs = [
        (F.binary_cross_entropy_with_logits, (task.out(), (task.y > 0).float())),
        (F.smooth_l1_loss, (task.out(), task.y)),
        (F.huber_loss, (task.out(), task.y)),
        (F.kl_div, (F.log_softmax(task.logits(), -1), task.logits().softmax(-1).detach())),
        (F.nll_loss, (F.log_softmax(task.logits(), -1), task.labels)),
        (F.cross_entropy, (task.logits(), task.logits().softmax(-1).detach())),
        (F.soft_margin_loss, (task.out(), task.y.sign())),
    ]
    for func, args in pairs:
        for how in ("sum", "batchmean" if func is F.kl_div else "mean"):
            want = func(*args, reduction=how)
            with Reweighter(SET, pool="batch").capture():
                got = func(*args, reduction=how)
            torch.testing.assert_close(got, want, msg=lambda m, f=func: f"{f.__name__}: {m}")


def test_two_reductions_are_one_loss() -> None:
    task = Task()
    close(task.captured(centred)[0], task.expected(task.squares() + 0.1 * task.out() ** 2))


def test_causal_tokens_are_not_samples() -> None:
    """The flattened (b * t) losses of a language model belong to b samples."""
    task = Task()
    labels = torch.arange(N).reshape(3, 4) % CLASSES

    def loss_fn(task: Task) -> Tensor:
        logits = task.logits().reshape(3, 4, CLASSES)
        return F.cross_entropy(logits.view(-1, CLASSES).float(), labels.view(-1))

    entries = F.cross_entropy(task.logits(), labels.view(-1), reduction="none").reshape(3, 4)
    close(task.captured(loss_fn)[0], task.expected(entries.mean(-1)))


def test_other_uses_of_a_tensor_are_not_scaled() -> None:
    task = Task()
    losses = task.squares()
    with Reweighter(SET, pool="batch").capture(auxiliary="keep") as capture:
        loss = capture(losses.mean())
    other = losses.square().mean()  # outside
    close(task.gradient(loss + other), task.expected(task.squares()) + task.gradient(task.squares().square().mean()))


def test_kept_terms_keep_their_gradient() -> None:
    task = Task()

    def penalised(capture: robustgrad.capture.Capture | None) -> Tensor:
        penalty = sum(p.square().sum() for p in task.parameters)
        penalty = penalty if capture is None else capture.keep(penalty)
        penalty *= 0.5
        return task.squares().mean() + penalty

    with Reweighter(SET, pool="batch").capture() as capture:
        loss = penalised(capture)
    want = task.expected(task.squares()) + torch.cat([p.detach().flatten() for p in task.parameters])
    close(task.gradient(loss), want)
    with Reweighter(SET, pool="batch").capture(auxiliary="keep"):
        loss = penalised(None)
    close(task.gradient(loss), want)


@pytest.mark.parametrize("coefficient", [0.005, 0.1, 1.0])
def test_an_unattributed_part_raises_with_its_share(coefficient: float) -> None:
    task = Task()
    aux = coefficient * task.squares().mean().detach()
    with pytest.raises(RuntimeError, match=rf"{coefficient * 100 / 1:.2f}% of the mean.*auxiliary=.keep"):
        task.captured(lambda t: t.squares().mean() + aux * t.logits().norm() / t.logits().norm().detach())


def test_a_penalty_with_as_many_rows_as_the_batch_is_no_sample() -> None:
    task = Task(n=8)  # the first layer has 8 rows, too
    with pytest.raises(RuntimeError, match="from elsewhere"):
        task.captured(lambda t: t.squares().mean() + t.body[0].weight.square().sum())


def test_a_router_loss_is_no_sample() -> None:
    """At micro-batch 1 a full sum over (1, experts) looks like one sample; rows= and keep() say otherwise."""
    task = Task(n=1)

    def loss_fn(capture: robustgrad.capture.Capture) -> Tensor:
        router = task.logits().softmax(-1)
        aux = capture.keep((router * router.mean(0, keepdim=True)).sum())
        return task.squares().mean() + 0.1 * aux

    seen: list[Tensor] = []
    with robustgrad.capture.Capture(lambda x, **_: seen.append(x) or torch.ones_like(x), rows=1) as capture:
        loss = loss_fn(capture)
    assert loss.requires_grad
    torch.testing.assert_close(seen[0], task.squares().double().detach(), rtol=2e-6, atol=0)


def test_rows_that_are_no_samples() -> None:
    task = Task()
    cases = [
        (lambda t: t.squares().mean().expand(N).mean(), "one number expanded"),
        (lambda t: t.squares().sort().values.mean(), "sorted"),
        (lambda t: t.logits()[torch.eye(N, CLASSES, dtype=torch.bool)].mean(), r"picked out of \(12, 4\) by a mask"),
        (lambda t: t.squares().mean() + t.logits()[:5].square().mean(), "rows=n"),
        (lambda t: t.squares().norm(), "reduces inside"),
        (lambda t: t.body[0].weight.square().sum(), "a parameter itself"),
    ]
    for loss_fn, found in cases:
        with pytest.raises(RuntimeError, match=found) as error:
            task.captured(loss_fn)
        assert "reweight(losses)" in str(error.value)
    with pytest.raises(RuntimeError, match="over the 6 samples"):
        task.captured(SAME["mean"], rows=6)


def test_scores_groups_and_mask_reach_the_reweighter() -> None:
    task = Task()
    scores, mask, groups = torch.linspace(0, 1, N), torch.arange(N) < 9, torch.arange(N) % 3
    losses = task.squares()
    reference = Reweighter(SET, pool="batch")
    reference(losses, scores=scores, mask=mask, groups=groups)
    got, _ = task.captured(SAME["mean"], scores=scores, mask=mask, groups=groups)
    close(got, task.gradient(losses.mean()))
    assert (task.gradient(task.squares().mean()) - got).norm() > 0.1 * got.norm()


@pytest.mark.parametrize("cut", [(4, 2), (1, 1, 4), (6,)])
def test_unequal_micro_batches_follow_the_loops_own_weights(cut: tuple[int, ...]) -> None:
    """A loop that averages micro-batches of unequal size gives each sample 1 / n_k; the window solves with that."""
    task = Task(n=6)
    parts = torch.arange(6).split(list(cut))
    base = torch.cat([torch.full((len(part),), 1 / len(part)) for part in parts])
    optimizer = RobustOptimizer(torch.optim.SGD(task.parameters, lr=0.1), SET, pool="window")

    def loss_fn(part: Tensor) -> Tensor:
        with optimizer.capture():
            loss = task.squares()[part].mean()
        return loss / len(parts)

    model = nn.ModuleList([task.body, task.head, task.classifier])
    got = sum(task.gradient(loss) for loss in optimizer.window(loss_fn, parts, model=model))
    close(got, task.expected(task.squares(), base=base))


def test_window_of_a_count_of_the_whole_step() -> None:
    """A loop that divides by the count of the whole step gives all samples the same weight."""
    task = Task(n=6)
    parts = torch.arange(6).split([4, 2])
    reweighter = Reweighter(SET, pool="window")

    def loss_fn(part: Tensor) -> Tensor:
        with reweighter.capture(samples=6):
            loss = task.squares()[part].sum() / 6
        return loss

    model = nn.ModuleList([task.body, task.head, task.classifier])
    got = sum(task.gradient(loss) for loss in reweighter.window(loss_fn, parts, model=model))
    close(got, task.expected(task.squares()))


def test_a_survey_keeps_no_activations() -> None:
    task = Task()
    reweighter = Reweighter(SET, pool="window")
    with reweighter.survey(nn.ModuleList([task.body, task.head])), reweighter.capture():
        loss = task.squares().mean()
    with pytest.raises(RuntimeError, match="a survey has no backward pass"):
        loss.backward()


def test_backward_inside_the_context() -> None:
    task = Task()
    want = task.expected(task.squares())
    with Reweighter(SET, pool="batch").capture():
        for _ in range(2):
            task.squares().mean().backward()
    got = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in task.parameters])
    close(got, 2 * want)


def test_which_scalar() -> None:
    task = Task()
    kept = []

    def loss_fn(task: Task) -> Tensor:
        kept.append(task.logits().norm())
        return task.squares().mean()

    with pytest.raises(RuntimeError, match=r"found 2 .*as capture: loss = capture"):
        task.captured(loss_fn)
    with Reweighter(SET, pool="batch").capture() as capture:
        loss = capture(loss_fn(task))
    close(task.gradient(loss), task.expected(task.squares()))
    with pytest.raises(RuntimeError, match="found 0"), Reweighter(SET).capture():
        pass
    with pytest.raises(ValueError, match="must be a scalar"), Reweighter(SET).capture() as capture:
        capture(task.squares())
    with pytest.raises(ValueError, match="must have a gradient"), Reweighter(SET).capture() as capture:
        capture(task.squares().mean().detach())


def test_evaluation_and_errors_inside_pass_through() -> None:
    task = Task()
    reweighter = Reweighter(SET)
    with torch.no_grad(), reweighter.capture() as capture:
        capture(F.cross_entropy(task.logits(), task.labels))
    assert reweighter.metrics() == {}
    with pytest.raises(KeyError, match="mine"), reweighter.capture():
        raise KeyError("mine")


def test_autocast_and_checkpointing() -> None:
    task = Task()

    def loss_fn(task: Task) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = checkpoint(task.body, task.x, use_reentrant=False)
            return F.mse_loss(task.head(hidden).squeeze(-1).float(), task.y)

    got, _ = task.captured(loss_fn)
    with torch.autocast("cpu", torch.bfloat16):
        losses = (task.out().float() - task.y).square()
    weights = SET.solve(losses).weights
    close(got, task.gradient((weights * losses).sum()), 1e-2)


def test_pure_bfloat16_is_no_false_alarm() -> None:
    task = Task(n=64)
    for part in (task.body, task.head):
        part.bfloat16()
    task.x, task.y = task.x.bfloat16(), task.y.bfloat16()
    reweighter = Reweighter(SET, pool="batch")
    for scale in torch.linspace(0.1, 3, 20).tolist():
        with reweighter.capture():
            loss = (task.squares() * scale).mean()
        assert loss.dtype == torch.bfloat16


def test_compiled_model() -> None:
    """No graph break, and nothing of the first call is baked in."""
    task, graphs = Task(), []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(nn.Sequential(task.body, task.head), backend=backend, fullgraph=True)
    for seed in (0, 1, 2):
        task.x, task.y = torch.randn(N, 5, generator=torch.manual_seed(seed)), torch.randn(N)
        got, _ = task.captured(lambda t: F.mse_loss(compiled(t.x).squeeze(-1), t.y))
        close(got, task.expected(task.squares()))
    assert len(graphs) == 1


def test_a_compiled_loss_is_an_error() -> None:
    task = Task()
    compiled = torch.compile(lambda x, y: F.mse_loss(task.head(task.body(x)).squeeze(-1), y), backend="aot_eager")
    with pytest.raises(RuntimeError, match="made inside a compiled function"), Reweighter(SET).capture() as capture:
        capture(compiled(task.x, task.y))


def test_near_ties_are_ties() -> None:
    """The first step of preference optimisation: log 2 everywhere, but for rounding."""
    weight = torch.ones(8, requires_grad=True)
    jitter = 1 + torch.tensor([0, 1, -1, 3, -2, 2, 0, 1]) * 2.0**-23
    values = torch.log(torch.tensor(2.0)) * jitter
    assert len(values.unique()) > 3
    with Reweighter(TotalVariation(0.3), pool="batch").capture():
        loss = ((torch.eye(8) @ weight) * values).mean()
    loss.backward()
    torch.testing.assert_close(weight.grad, values / 8)


def test_ties_keep_losses_of_all_sizes() -> None:
    from robustgrad._attribution import tied

    losses = torch.tensor([0.0, 1e-30, -3.25, 7e30, torch.inf, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(tied(losses, torch.float32), losses, rtol=2e-6, atol=0, equal_nan=True)


def test_nan_is_the_reweighters_to_handle() -> None:
    task = Task()
    task.y[3] = torch.nan
    with pytest.raises(FloatingPointError), Reweighter(SET, on_nonfinite="raise").capture():
        loss = task.squares().mean()
    task.y[3] = 0.0
    missing = torch.where(torch.arange(N) == 3, torch.nan, 0.0)
    got, loss = task.captured(lambda t: torch.where(missing.isnan(), missing, t.squares()).nanmean())
    assert got.isfinite().all() and loss.isfinite()


def test_micro_batch_one_under_memory() -> None:
    """Captured one at a time, the ratios are those of explicit losses."""
    grads = []
    for captured in (True, False):
        task = Task(n=96)
        optimizer = RobustOptimizer(torch.optim.SGD(task.parameters, lr=0.05), CVaR(0.5))
        for start in range(0, 96, 8):
            for i in range(start, start + 8):
                if captured:
                    with optimizer.capture():
                        loss = F.mse_loss(task.out()[i], task.y[i])
                else:
                    loss = optimizer.reweight(task.squares()[i : i + 1]).mean()
                (loss / 8).backward()
            optimizer.step()
            optimizer.zero_grad()
        grads.append(torch.cat([p.detach().flatten() for p in task.parameters]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_nothing_is_kept_alive() -> None:
    gc.disable()
    try:
        task = Task()
        losses = task.squares()
        gone = weakref.ref(losses)
        with Reweighter(SET).capture() as capture:
            loss = capture(losses.mean())
        loss.backward()
        del loss, losses, capture
        assert gone() is None
    finally:
        gc.enable()
