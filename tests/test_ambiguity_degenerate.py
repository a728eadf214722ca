"""What has no ordinary answer, and what must be refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import comparing
import inputs
import laws
import pytest
import torch

from robustgrad import ambiguity as sets
from robustgrad.ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

TYPICAL = [
    TotalVariation(0.1),
    TotalVariation(0.1, cap=2.0),
    TotalVariation(penalty=0.5),
    ChiSquare(0.5),
    ChiSquare(penalty=0.5),
    KL(0.3),
    KL(temperature=0.5),
    CVaR(0.2),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_set = pytest.mark.parametrize("ambiguity", inputs.SETS, ids=str)
each_typical = pytest.mark.parametrize("ambiguity", TYPICAL, ids=str)
each_solve = pytest.mark.parametrize("solve", [comparing.alone, comparing.in_a_batch], ids=["alone", "batch"])


@each_solve
@each_set
def test_finite_losses_decide_over_minus_infinity(ambiguity: AmbiguitySet, solve: comparing.Solve) -> None:
    for case in inputs.MINUS_INF:
        laws.assert_finite_losses_decide(solve, ambiguity, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_solve
@each_set
def test_nan_and_plus_infinity_make_the_row_nan(
    ambiguity: AmbiguitySet, solve: comparing.Solve, dtype: torch.dtype
) -> None:
    for case in inputs.POISONED:
        laws.assert_poisoned(solve, ambiguity, case.to(dtype))


@each_solve
@each_set
def test_a_row_without_valid_entry_is_all_zeros(ambiguity: AmbiguitySet, solve: comparing.Solve) -> None:
    for case in inputs.EMPTY:
        laws.assert_empty(solve, ambiguity, case)


@each_set
def test_poison_under_the_mask_or_without_weight_is_no_poison(ambiguity: AmbiguitySet) -> None:
    losses = torch.tensor([0.1, math.nan, 0.4, math.inf, 0.2], dtype=torch.float64)
    clean = ambiguity.solve(losses[[0, 2, 4]])
    off = torch.tensor([True, False, True, False, True])
    for worst in (ambiguity.solve(losses, mask=off), ambiguity.solve(losses, base=off.double())):
        torch.testing.assert_close(worst.ratio[[0, 2, 4]], clean.ratio, rtol=1e-9, atol=1e-9)
        assert (worst.weights[[1, 3]] == 0).all() and worst.value.isfinite(), (ambiguity, worst.weights)


@each_typical
def test_one_sample_and_equal_losses_keep_ratio_one(ambiguity: AmbiguitySet) -> None:
    for level in (0.0, -7.3, 1e30, 1e-30):
        for n in (1, 2, 5, 64):
            worst = ambiguity.solve(torch.full((n,), level))
            torch.testing.assert_close(worst.ratio, torch.ones(n), rtol=0, atol=2e-7)
            torch.testing.assert_close(worst.value, torch.tensor(level), rtol=1e-6, atol=0)


@each_typical
def test_shared_base_and_mask_are_the_rows_own(ambiguity: AmbiguitySet) -> None:
    losses, base = torch.randn(3, 5), torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0])
    mask = torch.tensor([True, True, False, True, True])
    shared = ambiguity.solve(losses, base=base, mask=mask)
    own = ambiguity.solve(losses, base=base.expand(3, 5), mask=mask.expand(3, 5))
    assert torch.equal(shared.ratio, own.ratio)


@pytest.mark.parametrize("shape", [(1,), (4, 6), (2, 1, 3, 5), (0, 4)])
@each_typical
def test_leading_dimensions(ambiguity: AmbiguitySet, shape: tuple[int, ...]) -> None:
    losses = torch.randn(shape)
    worst = ambiguity.solve(losses.mT.contiguous().mT if losses.dim() > 1 else losses)
    assert worst.weights.shape == worst.ratio.shape == shape
    assert worst.value.shape == worst.threshold.shape == worst.ess.shape == shape[:-1]


INVALID: list[tuple[Callable[[], object], type[Exception], str]] = [
    *(
        (lambda kind=kind, bad=bad: kind(bad), ValueError, rf"radius.*{text}")
        for kind in (TotalVariation, ChiSquare, KL)
        for bad, text in ((-0.1, "-0.1"), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"))
    ),
    (lambda: TotalVariation(1.01), ValueError, r"radius.*1\.01"),
    *(
        (lambda kind=kind, bad=bad: kind(bad), TypeError, rf"(radius|alpha).*{text}")
        for kind in (TotalVariation, ChiSquare, KL, CVaR)
        for bad, text in ((True, "bool True"), ("0.1", "str '0.1'"), (torch.tensor(0.1), "Tensor"))
    ),
    *(
        (lambda bad=bad: CVaR(bad), ValueError, rf"alpha.*{text}")
        for bad, text in ((0, "0"), (-0.2, "-0.2"), (1.5, r"1\.5"), (math.nan, "nan"))
    ),
    *(
        (lambda kind=kind, name=name, bad=bad: kind(**{name: bad}), ValueError, rf"{name}.*{text}")
        for kind, name in ((TotalVariation, "penalty"), (ChiSquare, "penalty"), (KL, "temperature"))
        for bad, text in ((0.0, "0"), (-1.0, "-1"), (math.nan, "nan"), (math.inf, "inf"))
    ),
    *((lambda kind=kind: kind(), ValueError, r"radius.*neither") for kind in (TotalVariation, ChiSquare, KL)),
    (lambda: TotalVariation(0.1, penalty=1.0), ValueError, r"exactly one.*radius and penalty"),
    (lambda: ChiSquare(0.1, penalty=1.0), ValueError, r"exactly one.*radius and penalty"),
    (lambda: KL(0.1, temperature=1.0), ValueError, r"exactly one.*radius and temperature"),
    *(
        (lambda bad=bad: TotalVariation(0.1, cap=bad), ValueError, rf"cap.*{text}")
        for bad, text in ((1.0, "1"), (0.5, r"0\.5"), (math.nan, "nan"))
    ),
    (lambda: TotalVariation(penalty=1.0, cap=2.0), ValueError, r"cap.*2"),
    (lambda: TotalVariation(0.1, cap=True), TypeError, "cap.*bool True"),
]


@pytest.mark.parametrize("number", range(len(INVALID)))
def test_a_set_refuses_its_argument(number: int) -> None:
    make, error, message = INVALID[number]
    with pytest.raises(error, match=message):
        make()


L = torch.tensor([0.1, 0.7, 0.4])
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer losses": ({"losses": torch.tensor([1, 2])}, TypeError, r"losses.*int64"),
    "boolean losses": ({"losses": torch.tensor([True])}, TypeError, r"losses.*bool"),
    "complex losses": ({"losses": torch.zeros(2, dtype=torch.complex64)}, TypeError, r"losses.*complex64"),
    "losses in a list": ({"losses": [0.1, 0.2]}, TypeError, r"losses.*list"),
    "empty losses": ({"losses": torch.zeros(0)}, ValueError, r"losses.*\(0,\)"),
    "rows without entries": ({"losses": torch.zeros(3, 0)}, ValueError, r"losses.*\(3, 0\)"),
    "one number": ({"losses": torch.tensor(0.3)}, ValueError, r"losses.*\(\)"),
    "negative base": ({"base": torch.tensor([1.0, -0.5, 1.0])}, ValueError, r"base.*-0\.5"),
    "NaN in base": ({"base": torch.tensor([1.0, math.nan, 1.0])}, ValueError, r"base.*nan"),
    "infinite base": ({"base": torch.tensor([1.0, math.inf, 1.0])}, ValueError, r"base.*inf"),
    "base of zeros": ({"base": torch.zeros(3)}, ValueError, r"base.*0"),
    "base too short": ({"base": torch.ones(2)}, ValueError, r"base.*\(3,\).*\(2,\)"),
    "base of integers": ({"base": torch.ones(3, dtype=torch.long)}, TypeError, r"base.*int64"),
    "base in a list": ({"base": [1.0, 1.0, 1.0]}, TypeError, r"base.*list"),
    "mask of numbers": ({"mask": torch.ones(3)}, TypeError, r"mask.*float32"),
    "mask too long": ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask.*\(3,\).*\(4,\)"),
    "mask of columns": ({"mask": torch.ones(3, 1, dtype=torch.bool)}, ValueError, r"mask.*\(3, 1\)"),
    "base elsewhere": ({"base": torch.ones(3, device="meta")}, ValueError, r"base.*cpu.*meta"),
}


@pytest.mark.parametrize("name", REFUSED)
@each_typical
def test_solve_refuses(ambiguity: AmbiguitySet, name: str) -> None:
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        ambiguity.solve(**{"losses": L, **arguments})


@each_set
def test_a_set_is_a_value(ambiguity: AmbiguitySet) -> None:
    """Frozen, hashable, picklable, and its repr says how to make it."""
    again = eval(repr(ambiguity), vars(sets))
    copy = pickle.loads(pickle.dumps(ambiguity))
    assert ambiguity == again == copy and hash(ambiguity) == hash(again) == hash(copy)
    assert "None" not in repr(ambiguity)
    for name in ("radius", "alpha", "cap"):
        if hasattr(ambiguity, name):
            with pytest.raises(AttributeError):
                setattr(ambiguity, name, 0.5)


def test_integers_are_numbers() -> None:
    losses = torch.randn(5)
    assert torch.equal(TotalVariation(1).solve(losses).ratio, TotalVariation(1.0).solve(losses).ratio)
    assert torch.equal(ChiSquare(2).solve(losses).ratio, ChiSquare(2.0).solve(losses).ratio)
    assert torch.equal(CVaR(1).solve(losses).ratio, torch.ones(5))


EFFECTS: dict[str, tuple[AmbiguitySet, AmbiguitySet]] = {
    "TotalVariation.radius": (TotalVariation(0.1), TotalVariation(0.2)),
    "TotalVariation.cap": (TotalVariation(0.3), TotalVariation(0.3, cap=1.5)),
    "TotalVariation.cap's value": (TotalVariation(0.3, cap=1.5), TotalVariation(0.3, cap=2.5)),
    "TotalVariation.penalty": (TotalVariation(penalty=0.5), TotalVariation(penalty=4.0)),
    "ChiSquare.radius": (ChiSquare(0.1), ChiSquare(0.2)),
    "ChiSquare.penalty": (ChiSquare(penalty=0.5), ChiSquare(penalty=1.5)),
    "KL.radius": (KL(0.1), KL(0.2)),
    "KL.temperature": (KL(temperature=0.5), KL(temperature=1.5)),
    "CVaR.alpha": (CVaR(0.5), CVaR(0.3)),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_argument_of_a_set_has_an_effect(name: str) -> None:
    losses = torch.linspace(-1, 2, 9).exp()
    one, other = (ambiguity.solve(losses).ratio for ambiguity in EFFECTS[name])
    assert (one - other).abs().max() > 1e-2, name


@each_typical
def test_base_and_mask_have_an_effect(ambiguity: AmbiguitySet) -> None:
    losses, base = torch.linspace(-1, 2, 9), torch.linspace(1, 9, 9)
    plain = ambiguity.solve(losses)
    assert (ambiguity.solve(losses, base=base).weights - plain.weights).abs().max() > 1e-2
    assert (ambiguity.solve(losses, mask=base < 9).weights - plain.weights).abs().max() > 1e-2


def test_cvar_of_a_share_without_digits() -> None:
    """The smallest positive number over 2/3 rounds to itself, and the weights would sum to 4/3."""
    worst = CVaR(5e-324).solve(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
    assert worst.weights.tolist() == [0.0, 0.5, 0.5]


@pytest.mark.parametrize("ambiguity", [ChiSquare(1e308), KL(1e308), KL(temperature=5e-324)], ids=repr)
def test_the_largest_sets_give_the_maximum(ambiguity: AmbiguitySet) -> None:
    assert ambiguity.solve(torch.tensor([0.0, 1.0, 1.0])).weights.tolist() == [0.0, 0.5, 0.5]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_padding_beside_minus_infinity_at_the_exact_radius(dtype: torch.dtype) -> None:
    """Half the mass is finite and the radius just allows it: padding must not stand among the -inf."""
    losses = torch.tensor(
        [[0.1, 0.7, -math.inf, 0.4, 0.2, *[-math.inf] * 3], [1.0, 1.0, *[-math.inf] * 6]], dtype=dtype
    )
    mask = torch.tensor([[True] * 8, [True] * 4 + [False] * 4])
    padded, on = torch.nn.functional.pad(losses, (0, 40)), torch.nn.functional.pad(mask, (0, 40))
    want = [[2.0, 2.0, 0.0, 2.0, 2.0, *[0.0] * 43], [2.0, 2.0, *[0.0] * 46]]
    ratio = ChiSquare(0.5).solve(padded, mask=on).ratio
    torch.testing.assert_close(ratio, torch.tensor(want, dtype=dtype), rtol=0, atol=1e-6)
