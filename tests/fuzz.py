"""Random worst-case problems by the million, each proved feasible and optimal: fuzz.py --problems 1000000 --seed 0.

Problems come in blocks that share a set, a size and a dtype. A certificate over the whole block clears nearly all
of its rows; the rest go to the slow oracle. What fails is printed as a test, ready to be pasted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import certificates
import comparing
import laws
import numpy as np
import oracle
import torch
from inputs import Case
from torch import Tensor

from robustgrad.ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

ENTRIES = 2**16  # of a block
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DECADES = {torch.float64: 30, torch.float32: 30, torch.bfloat16: 30, torch.float16: 2}


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of losses, (rows, n), with the set they are solved under."""

    ambiguity: AmbiguitySet
    losses: Tensor
    base: Tensor | None
    mask: Tensor | None

    def case(self, row: int) -> Case:
        base, mask = (None if x is None else x[row] for x in (self.base, self.mask))
        return Case("found by fuzzing", self.losses[row], base, mask)


def drawn_set(rng: np.random.Generator, unit: float) -> AmbiguitySet:
    """Any set with any parameter; prices in the unit of the losses."""
    share = float(rng.choice([rng.random(), 10 ** rng.uniform(-12, 0)]))
    size, price = float(10 ** rng.uniform(-12, 4)), float(unit * 10 ** rng.uniform(-4, 4))
    kinds = [
        TotalVariation(share),
        TotalVariation(share, cap=1 + float(10 ** rng.uniform(-2, 3))),
        TotalVariation(penalty=price),
        ChiSquare(size),
        ChiSquare(penalty=price),
        KL(size),
        KL(temperature=price),
        CVaR(share),
    ]
    return kinds[rng.integers(len(kinds))]


def drawn_losses(rng: np.random.Generator, rows: int, n: int, unit: float) -> np.ndarray:
    """Normal, heavy-tailed, tied, discrete, or of many magnitudes; some shifted."""
    x = rng.standard_normal((rows, n))
    shapes = [
        x,
        np.tan(1.5 * np.tanh(x)) * 10,
        np.round(x * 2) / 2,
        (x > 1).astype(float),
        np.sign(x) * 10 ** rng.uniform(-6, 0, (rows, n)),
        np.round(x, 1) + 1e-9 * rng.standard_normal((rows, n)).round(),
        -np.log(rng.random((rows, n))),
    ]
    shift = rng.choice([0.0, 0.0, 1.0, -100.0])
    return unit * (shapes[rng.integers(len(shapes))] + shift)


def block(seed: int, number: int) -> Block:
    rng = np.random.default_rng((seed, number))
    n = int(np.floor(2 ** rng.uniform(0, 12.001)))
    rows = max(1, min(256, ENTRIES // n))
    dtype = DTYPES[rng.integers(len(DTYPES))]
    unit = float(10 ** rng.uniform(-1, 1)) * float(rng.choice([1.0, 10 ** rng.uniform(-1, 1) ** 3]))
    unit **= DECADES[dtype] / 2 if rng.random() < 0.5 else 1
    losses = torch.from_numpy(drawn_losses(rng, rows, n, unit)).to(dtype)
    base = torch.from_numpy(10 ** rng.uniform(-rng.integers(1, 9), 0, (rows, n))) if rng.random() < 0.4 else None
    mask = None
    if rng.random() < 0.4:
        mask = torch.from_numpy(rng.random((rows, n)) < rng.random())
        mask[:, rng.integers(n)] = True
        losses = torch.where(mask, losses, torch.tensor(rng.choice([np.nan, np.inf, 7.0]), dtype=dtype))
    return Block(drawn_set(rng, unit), losses, base, mask)


def ratios(given: Block) -> Tensor:
    """Of all rows at once; and of every other one alone, which without base and mask is another way."""
    ratio = given.ambiguity.solve(given.losses, base=given.base, mask=given.mask).ratio.clone()
    if given.base is None and given.mask is None:
        for row in range(1, len(ratio), 2):
            ratio[row] = given.ambiguity.solve(given.losses[row]).ratio
    return ratio


def suspects(given: Block) -> list[int]:
    """Rows that the certificate does not prove feasible and optimal."""
    found = ratios(given)
    p, drop, span = normalised(given)
    ratio, tol = found.double().numpy(), comparing.tolerance(found)
    price = oracle.price_of(given.ambiguity) / span
    integrand = certificates.phi(given.ambiguity, ratio)
    spent = certificates.mean(p, integrand) if not isinstance(given.ambiguity, CVaR) else ratio.max(-1, keepdims=True)
    reached = certificates.mean(p, ratio * drop) - price * certificates.mean(p, integrand)
    with np.errstate(all="ignore"):
        gap = certificates.bound(given.ambiguity, drop, p, ratio, price) - reached
        sound = np.abs(gap) <= tol + tol**2 * price
    sound &= (np.abs(certificates.mean(p, ratio) - 1) <= 2 * tol) & (ratio >= 0).all(-1, keepdims=True)
    sound &= spent <= comparing.most_allowed(given.ambiguity, tol)
    sound &= ratio.max(-1, keepdims=True) <= (getattr(given.ambiguity, "cap", None) or np.inf) * (1 + tol)
    sound &= np.where(p > 0, True, ratio == 0).all(-1, keepdims=True) & monotone(drop, p, found)
    return np.flatnonzero(~sound[:, 0]).tolist()


def normalised(given: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Base that sums to 1, (loss - max) / range with 0 where there is no part, and the range."""
    p = np.ones(given.losses.shape) if given.base is None else given.base.numpy().copy()
    p = p if given.mask is None else np.where(given.mask.numpy(), p, 0.0)
    on, losses = p > 0, given.losses.double().numpy()
    top = np.where(on, losses, -np.inf).max(-1, keepdims=True)
    drop = np.where(on, losses, top) - top
    span = -drop.min(-1, keepdims=True)
    span[span == 0] = 1.0
    return p / p.sum(-1, keepdims=True), drop / span, span


def monotone(drop: np.ndarray, p: np.ndarray, ratio: Tensor) -> np.ndarray:
    """A higher loss has no lower ratio, and equal losses the same one to the bit, (rows, 1)."""
    slack, r = 4 * torch.finfo(ratio.dtype).eps, np.where(p > 0, ratio.double().numpy(), 0.0)
    key = np.where(p > 0, drop, -np.inf)
    order = np.argsort(key, -1, kind="stable")
    key, r = np.take_along_axis(key, order, -1), np.take_along_axis(r, order, -1)
    tie = key[:, 1:] == key[:, :-1]
    step = np.diff(r, axis=-1)
    return np.where(tie, step == 0, step >= -slack * r[:, 1:]).all(-1, keepdims=True)


def violated(ambiguity: AmbiguitySet, case: Case) -> str:
    """What the oracle says is wrong; empty where the certificate was only loose."""
    try:
        for law in (laws.assert_feasible, laws.assert_optimal, laws.assert_monotone_in_loss):
            law(comparing.alone, ambiguity, case)
            law(comparing.in_a_batch, ambiguity, case)
    except AssertionError as error:
        return str(error) or "an assertion without a message"
    return ""


def as_test(ambiguity: AmbiguitySet, case: Case) -> str:
    def tensor(x: Tensor | None) -> str:
        return "None" if x is None else f"torch.tensor({x.tolist()}, dtype={x.dtype})"

    arguments = ", ".join(["'found by fuzzing'", *(tensor(x) for x in (case.losses, case.base, case.mask))])
    return (
        f"def test_found_by_fuzzing() -> None:\n    inf, nan = float('inf'), float('nan')\n"
        f"    ambiguity, case = {ambiguity!r}, Case({arguments})\n"
        "    laws.assert_feasible(comparing.alone, ambiguity, case)\n"
        "    laws.assert_optimal(comparing.alone, ambiguity, case)\n"
        "    laws.assert_monotone_in_loss(comparing.alone, ambiguity, case)\n"
    )


def failures(given: Block, rows: list[int]) -> Iterator[str]:
    for row in rows:
        if message := violated(given.ambiguity, given.case(row)):
            yield f"# row {row}: {message.splitlines()[0]}\n{as_test(given.ambiguity, given.case(row))}"


def main() -> int:
    from rich.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    solved = looked = number = 0
    found: list[str] = []
    with Progress() as progress:
        task = progress.add_task("problems", total=options.problems)
        while solved < options.problems and len(found) < 10:
            given = block(options.seed, number)
            rows = suspects(given)
            looked += len(rows)
            found += [f"# seed {options.seed}, block {number}\n{text}" for text in failures(given, rows[:20])]
            solved, number = solved + len(given.losses), number + 1
            progress.update(task, completed=solved)
    print(*found, sep="\n")
    print(
        f"{solved} problems in {number} blocks, seed {options.seed}: {looked} went to the slow oracle, "
        f"{len(found)} violations."
    )
    return len(found) > 0


if __name__ == "__main__":
    raise SystemExit(main())
