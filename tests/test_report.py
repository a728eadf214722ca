"""The report on trained models: each number by hand or by another method, the pictures, and the page."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import oracle
import pytest
import torch
from torch import Tensor

from robustgrad import CVaR, TotalVariation
from robustgrad.report import (
    Evaluation,
    Report,
    gain_picture,
    group_picture,
    loss_picture,
    report,
    save_page,
    shift_curve,
    shift_picture,
)
from robustgrad.report.cautions import neighbour_losses, smooth_share

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")
pytest.importorskip("jinja2", reason="needs jinja2")
BROWSERS = ("chromium", "chromium-browser", "chrome-headless-shell", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def drawn(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the shift curve ---


@pytest.mark.parametrize("cap", [None, 3.0])
def test_curve_against_the_oracle(cap: float | None) -> None:
    losses, base = drawn(40).exp(), drawn(40, 1).exp()
    curve = shift_curve(losses, base=base, cap=cap)
    for share, value in zip(curve.shares, curve.values, strict=True):
        expected = oracle.solve(TotalVariation(share, cap=cap), losses.numpy(), base.numpy())[1]
        assert value == pytest.approx(expected, rel=1e-9)


def test_curve_begins_at_the_mean_and_never_falls() -> None:
    losses = drawn(100)
    curve = shift_curve(losses)
    assert curve.shares[0] == 0.0 and curve.shares[-1] == 0.5 and len(curve.shares) == 11
    assert curve.values[0] == pytest.approx(losses.mean().item())
    assert list(curve.values) == sorted(curve.values)


def width(curve) -> float:
    return curve.high[0] - curve.low[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_band_of_the_mean_is_that_of_the_central_limit_theorem(weighted: bool) -> None:
    losses, base = drawn(400), drawn(400, 1).exp() if weighted else torch.ones(400)
    share = base / base.sum()
    error = (share * (losses - (share * losses).sum())).square().sum().sqrt().item()
    for level in (0.5, 0.9):
        curve = shift_curve(losses, base=base, shares=[0.0], level=level, resamples=2000)
        assert width(curve) == pytest.approx(2 * NormalDist().inv_cdf((1 + level) / 2) * error, rel=0.12)


def test_groups_are_resampled_as_wholes() -> None:
    """Each of 50 samples nine times: as groups they carry the noise of 50, not that of 450."""
    losses, slots = drawn(50).repeat_interleave(9), [i // 9 for i in range(450)]
    options = {"shares": [0.0], "resamples": 2000}
    together, apart = shift_curve(losses, slots=slots, **options), shift_curve(losses, **options)
    assert width(together) / width(apart) == pytest.approx(3, rel=0.15)
    assert (together.unit, apart.unit) == ("groups", "samples")


def test_resamples_of_many_samples_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, once = drawn(30), shift_curve(drawn(30))
    monkeypatch.setattr(sys.modules["robustgrad.report.curve"], "_AT_ONCE", 100)
    assert shift_curve(losses) == once


def test_difference_of_two_models_is_paired() -> None:
    losses = drawn(80)
    same = shift_curve(losses, losses)
    assert set(same.values) == set(same.low) == set(same.high) == {0.0}
    shifted = shift_curve(losses, losses - 0.25)
    assert [*shifted.values, *shifted.low, *shifted.high] == pytest.approx([0.25] * 33)


def test_every_argument_of_the_curve_acts() -> None:
    losses = drawn(40).exp()
    first = shift_curve(losses)
    assert shift_curve(losses) == first
    for change in ({"seed": 1}, {"cap": 2.0}, {"level": 0.5}, {"resamples": 50}, {"base": losses}, {"shares": [0.1]}):
        assert shift_curve(losses, **change) != first, change


# --- who carries the worst case ---


def test_worst_samples_and_groups_by_hand() -> None:
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    groups, texts = ["a", "a", "b", "b", "c"], [f"prompt {i}" for i in range(5)]
    found = report(Evaluation(losses, groups=groups, texts=texts), ambiguity=CVaR(0.4), top=3).models[0]
    assert (found.mean, found.value, found.ess, found.max_ratio) == pytest.approx((2.0, 3.5, 2.0, 2.5))
    assert [(s.index, s.text, s.group) for s in found.samples] == [
        (4, "prompt 4", "c"),
        (3, "prompt 3", "b"),
        (2, "prompt 2", "b"),
    ]
    assert [s.weight for s in found.samples] == pytest.approx([0.5, 0.5, 0.0])
    assert [s.ratio for s in found.samples] == pytest.approx([2.5, 2.5, 0.0])
    rows = {row.group: (row.samples, row.share, row.mean_loss, row.worst_share) for row in found.groups}
    assert list(rows) == ["c", "b", "a"]
    assert rows["b"] == pytest.approx((2, 0.4, 2.5, 0.5))
    assert rows["a"] == pytest.approx((2, 0.4, 0.5, 0.0))


def test_base_weights_count() -> None:
    losses, base = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 0.0])
    found = report(Evaluation(losses, groups=["a", "b", "b"], base=base), ambiguity=TotalVariation(0.0)).models[0]
    assert found.mean == found.value == pytest.approx(4 / 3)
    assert {row.group: row.share for row in found.groups} == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert next(s for s in found.samples if s.index == 2).ratio == 0.0


# --- reasons to doubt ---


def mislabeled(n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of two models whose ten largest, of the same samples, are noise; and which those are."""
    noisy = torch.arange(n) % (n // 10) == 0
    return *(torch.where(noisy, 5.0 + drawn(n, s).abs(), drawn(n, s).sigmoid()) for s in (1, 2)), noisy


def test_weight_on_what_both_get_wrong_is_said() -> None:
    before, after, noisy = mislabeled()
    found = report(Evaluation(before, "plain"), Evaluation(after, "robust"), ambiguity=CVaR(0.05))
    assert found.noise is not None and found.noise.samples == int(noisy.sum())
    assert (found.noise.share, found.noise.worst_share) == pytest.approx((10 / 400, 0.5))
    assert any(
        text.startswith("50% of the worst-case weight lies on the 2.5% of the samples (10)") for text in found.cautions
    )


def test_weight_on_what_only_one_gets_wrong_is_not() -> None:
    before, after, noisy = mislabeled()
    learned = torch.where(noisy, 0.1, before)
    found = report(Evaluation(learned), Evaluation(after), ambiguity=CVaR(0.05))
    assert found.noise is not None and found.noise.samples == 0 and not found.noise.overweighted
    high = report(Evaluation(before), Evaluation(after), ambiguity=CVaR(0.05), wrong=50.0)
    assert high.noise is not None and high.noise.samples == 0


def test_regions_and_lone_samples_are_told_apart() -> None:
    hard = torch.arange(200) < 40
    embeddings = torch.nn.functional.one_hot(hard.long()) + 0.01 * drawn(400).reshape(200, 2)
    for losses, expected in (
        (hard.double(), 1.0),
        (hard[torch.randperm(200, generator=torch.Generator().manual_seed(0))].double(), 0.0),
    ):
        worst = CVaR(0.2).solve(losses).weights
        near = neighbour_losses(losses, embeddings)
        assert smooth_share(losses, near, worst, torch.full((200,), 1 / 200)) == pytest.approx(expected, abs=0.15)
        said = report(Evaluation(losses, embeddings=embeddings), ambiguity=CVaR(0.2)).cautions
        assert any("lone samples" in text for text in said) == (expected == 0.0)


def test_neighbours_by_hand() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [5.0, 0.1], [0.0, 1.0], [0.1, 2.0]])
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    monkey = neighbour_losses(losses, embeddings)  # fewer than ten others: all of them
    assert monkey.tolist() == pytest.approx([3.0, 8 / 3, 7 / 3, 2.0])


def test_neighbours_of_many_are_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, embeddings = drawn(50), drawn(200).reshape(50, 4)
    once = neighbour_losses(losses, embeddings)
    monkeypatch.setattr(sys.modules["robustgrad.report.cautions"], "_ROWS", 7)
    torch.testing.assert_close(neighbour_losses(losses, embeddings), once)


def test_one_sample_and_few_samples_are_said() -> None:
    said = report(Evaluation(drawn(200), "mine"), ambiguity=TotalVariation(0.5)).cautions
    assert said[0].startswith("mine: one sample has 5") and "use a cap" in said[0]
    assert said[1].startswith("mine: the worst case rests on 4 of 200 samples")


def test_suggestions_have_the_reach_and_size_they_claim() -> None:
    losses = drawn(300).exp()
    found = report(Evaluation(losses, groups=["a"] * 240 + ["b"] * 60), ambiguity=CVaR(0.5))
    tv, _, same, half, sampling = (one.ambiguity for one in found.suggestions)
    assert tv == TotalVariation(0.1)
    assert same.solve(losses).value.item() == pytest.approx(found.models[0].value, rel=1e-6)
    assert half.solve(losses).ess.item() == pytest.approx(150, rel=1e-3)
    assert sampling.radius == pytest.approx(NormalDist().inv_cdf(0.95) ** 2 / 600)
    assert found.suggestions[2].code == f"ChiSquare({same.radius:.4g})"


# --- wrong use ---

ONES = torch.ones(3)
WRONG = [
    (lambda: Evaluation(torch.tensor([1.0, math.nan])), ValueError, r"losses must be finite, got NaN .* at \[1\] of 2"),
    (lambda: Evaluation(ONES, groups=["a"]), ValueError, "groups must have 3 entries, as losses, got 1"),
    (lambda: Evaluation(ONES, texts=["a"] * 4), ValueError, "texts must have 3 entries, as losses, got 4"),
    (lambda: Evaluation(ONES, embeddings=torch.ones(3)), ValueError, r"embeddings must be finite .* got \(3,\)"),
    (lambda: Evaluation(ONES, base=-ONES), ValueError, "base must be finite and not negative"),
    (lambda: report(Evaluation(ONES), Evaluation(torch.ones(4))), ValueError, "losses of after must have the shape of"),
    (lambda: report(Evaluation(ONES, texts="abc"), Evaluation(ONES, texts="axc")), ValueError, "got 'b' and 'x' at"),
    (lambda: report(Evaluation(ONES), unit="groups"), ValueError, 'groups must be given with unit="groups"'),
    (lambda: report(Evaluation(ONES), unit="group"), ValueError, "unit must be 'samples' or 'groups', got 'group'"),
    (lambda: report(Evaluation(ONES), ambiguity=0.1), TypeError, "ambiguity must be an ambiguity set, got 0.1"),
    (lambda: shift_curve(ONES, resamples=1), ValueError, "resamples must be an integer of at least 20, got 1"),
    (lambda: shift_curve(ONES, torch.ones(2)), ValueError, "minus must have the shape of losses"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_errors(call, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


# --- pictures and page ---

HOSTILE = '<script>alert(1)</script> & "quotes" $\\frac{1}{0}$ \ud83d \x00 __'


def of_two(text: str = "a prompt", n: int = 60) -> Report:
    groups = [text if i % 5 == 0 else "the others" for i in range(n)]
    losses = [torch.nn.functional.softplus(drawn(n, s) + 2 * (torch.arange(n) % 5 == 0)) for s in (1, 2)]
    texts = [f"{text} {i}" for i in range(n)]
    embeddings = drawn(3 * n).reshape(n, 3)
    before, after = (
        Evaluation(one, name, groups=groups, texts=texts, embeddings=embeddings)
        for one, name in zip(losses, (f"_{text}", "robust"), strict=True)
    )
    return report(before, after)


def test_pictures_show_the_numbers() -> None:
    found = of_two()
    lines = shift_picture(found).axes[0].get_lines()
    assert [tuple(line.get_ydata()) for line in lines] == [model.curve.values for model in found.models]
    assert tuple(gain_picture(found).axes[0].get_lines()[0].get_ydata()) == found.gain.values
    bars = [bar.get_width() for bar in group_picture(found.models[0]).axes[0].patches]
    assert bars == [row.share for row in found.models[0].groups] + [row.worst_share for row in found.models[0].groups]
    assert sum(bar.get_height() for bar in loss_picture(found.models[0]).axes[0].patches[:40]) == pytest.approx(1)


def test_one_model_without_groups_has_fewer_pictures() -> None:
    found = report(Evaluation(torch.full((3,), 2.0)))
    assert gain_picture(found) is None and group_picture(found.models[0]) is None
    assert shift_picture(found).axes and loss_picture(found.models[0]).axes


def test_names_are_no_formulas() -> None:
    found = of_two("$\\frac$")  # an error where matplotlib takes it for one
    for figure in (shift_picture(found), gain_picture(found), group_picture(found.models[0])):
        figure.savefig(io.BytesIO())


def test_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    page = save_page(of_two(HOSTILE), tmp_path / "r.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quotes&#34;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:image/png;base64,)", page)
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in page


def test_page_holds_the_numbers(tmp_path: Path) -> None:
    found = of_two()
    page = save_page(found, tmp_path / "r.html").read_text()
    for model in found.models:
        assert f"{model.value:.4g}" in page and f"{model.curve.values[4]:.4g}" in page
        assert all(f"<td>{sample.index}</td>" in page and f"{sample.text}" in page for sample in model.samples)
    assert all(one.code in page for one in found.suggestions)
    assert f"{found.gain.values[4]:+.3g}" in page
    assert page.count("data:image/png;base64,") == 6


@pytest.mark.parametrize("missing", ["matplotlib.figure", "jinja2"])
def test_missing_package_names_the_extra(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "robustgrad\[plot\]"'):
        save_page(of_two(), tmp_path / "r.html")


@pytest.mark.skipif(BROWSER is None, reason=f"needs one of {', '.join(BROWSERS)}")
@pytest.mark.parametrize("size", ["1200,2000", "500,2000"])
def test_page_in_a_browser(size: str, tmp_path: Path) -> None:
    from PIL import Image

    page, shot = save_page(of_two(HOSTILE), tmp_path / "r.html"), tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/home"]
    command = [BROWSER, *options, f"--window-size={size}", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with Image.open(shot) as picture:
        colors = {color: count for count, color in picture.convert("RGB").getcolors(2**24)}
        assert f"{picture.width},{picture.height}" == size
    for color in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):  # the curves of both models, the gain
        assert colors.get(color, 0) > 50
