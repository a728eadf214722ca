"""The command line: numbers in, weights, tables and pages out; what is wrong is said in one line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robustgrad import KL, ChiSquare, CVaR, TotalVariation
from robustgrad.__main__ import main

pytest.importorskip("typer", reason="needs typer")
LOSSES = [0.3, 1.9, 0.4, 2.5, 0.1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `robustgrad ARGUMENTS`: exit status, what it printed, what it complained about."""

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robustgrad", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def write(path: Path, content: object) -> Path:
    """A text as it is, or one JSON object a line."""
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def parsed(out: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(out)))


# --- weights ---

SETS = [
    ((), TotalVariation(0.1)),
    (("--radius", 0.3), TotalVariation(0.3)),
    (("--set", "tv", "--radius", 0.3, "--cap", 2), TotalVariation(0.3, cap=2.0)),
    (("--set", "chi2"), ChiSquare(0.1)),
    (("--set", "kl", "--radius", 0.5), KL(0.5)),
    (("--set", "cvar"), CVaR(0.2)),
]


@pytest.mark.parametrize(("options", "ambiguity"), SETS, ids=str)
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_weights_are_those_of_the_set(command, options, ambiguity, form: str) -> None:
    code, out, err = command("weights", *options, "--format", form, stdin="\n".join(map(str, LOSSES)).encode())
    assert (code, err) == (0, "")
    rows = parsed(out) if form == "csv" else [json.loads(line) for line in out.splitlines()]
    worst = ambiguity.solve(torch.tensor(LOSSES, dtype=torch.float64))
    for name, expected in (("loss", LOSSES), ("weight", worst.weights.tolist()), ("ratio", worst.ratio.tolist())):
        assert [float(row[name]) for row in rows] == pytest.approx(expected, rel=1e-12)
    assert [int(row["index"]) for row in rows] == [0, 1, 2, 3, 4]


FILES = {
    "numbers.txt": "0.5\n\n1.5\r\n  2.5  \n",
    "one.csv": "\ufeffloss\n0.5\n1.5\n\n2.5\n",
    "quoted.csv": 'group,loss,note\n"a,b",0.5,"two\n\nlines"\n"a,b",1.5,x\nc,2.5,y\n',
    "rows.jsonl": [{"loss": 0.5, "domain": "a,b"}, {"loss": 1.5, "domain": "a,b"}, {"domain": "c", "loss": 2.5}],
    "rows.jsonl.gz": [{"loss": x, "prompt": "line\u2028separator"} for x in (0.5, 1.5, 2.5)],
    "raw.jsonl": "".join(f'{{"loss": {x}, "prompt": "line\u2028separator"}}\n' for x in (0.5, 1.5, 2.5)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_is_read(command, name: str, tmp_path: Path) -> None:
    code, out, err = command("weights", write(tmp_path / name, FILES[name]))
    assert (code, err) == (0, "")
    rows = parsed(out)
    assert [float(row["loss"]) for row in rows] == [0.5, 1.5, 2.5]
    if "csv" in name or name == "rows.jsonl":
        assert [row.get("group") for row in rows] == (["a,b", "a,b", "c"] if name != "one.csv" else [None] * 3)


def test_another_column(command) -> None:
    code, out, _ = command("weights", "--column", "nll", stdin=b"loss,nll\n9,0.5\n9,1.5\n")
    assert code == 0 and [float(row["loss"]) for row in parsed(out)] == [0.5, 1.5]


def test_output_goes_in_again(command) -> None:
    _, out, _ = command("weights", stdin=b"1\n2\n3\n")
    assert command("weights", stdin=out.encode()) == (0, out, "")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_nonfinite_losses_are_left_out_only_when_asked(command, form: str) -> None:
    code, out, err = command("weights", stdin=b"1\nnan\n2\n-inf\n")
    assert (code, out) == (2, "")
    assert err == (
        "robustgrad: error: standard input, line 2: the loss must be finite, got nan (and 1 more). Find its cause, or "
        "pass --skip-nonfinite to leave such lines out knowingly.\n"
    )
    code, out, err = command("weights", "--skip-nonfinite", "--format", form, stdin=b"1\nnan\n2\n-inf\n")
    assert code == 0
    assert err == "standard input: left out 2 of 4 losses that are not finite (lines 2, 4)\n"
    rows = parsed(out) if form == "csv" else [json.loads(line) for line in out.splitlines()]
    assert [float(row["weight"]) for row in rows] == pytest.approx([0.4, 0, 0.6, 0])
    assert [row["loss"] in ("", None) for row in rows] == [False, True, False, True]


# --- wrong files ---

BAD = [
    ("", "it holds no losses. Give one loss a line"),
    ("\n \n", "it holds no losses. Give one loss a line"),
    ("loss\n", "it holds no losses. Give one loss a line"),
    ("0.5\nx\n", "line 2: the loss must be a number, got 'x'. Correct the line."),
    ("0.5\n1,5\n", "line 2: the loss must be a number, got '1,5'. Correct the line."),
    ("nll,group\n0.5,a\n", "line 1: column 'loss' is missing. Name one with --column; found: 'nll', 'group'."),
    ("\nloss,group\n0.5,a\n0.5\n", "line 4: must have 2 cells, as the header, got 1. Quote cells that hold commas."),
    ("loss,group\n0.5,a\n,a\n", "line 3: the loss must be a number, got ''. Correct the line."),
    ('loss,group\n0.5,"a\nb"\nx,a\n', "line 4: the loss must be a number, got 'x'."),
    ('{"loss": 1}\n{"loss": 1', "line 2: not JSON (Expecting ',' delimiter, column 11). Write one complete JSON"),
    ("[1, 2]\n", "line 1: must be a JSON object, got list. Write {"),
    ('{"nll": 1}\n', "line 1: field 'loss' is missing. Name one with --column; found: 'nll'."),
    ('{"loss": "1"}\n', "line 1: field 'loss' must be a number, got '1'. Write one loss per sample."),
    ('{"loss": true}\n', "line 1: field 'loss' must be a number, got 'True'."),
    ('{"loss": null}\n', "line 1: field 'loss' must be a number, got 'None'."),
    ('{"loss": 1' + "0" * 400 + "}\n", "line 1: field 'loss' must be a number, got '1000000"),
    ('{"loss": NaN}\n', "line 1: the loss must be finite, got nan. Find its cause"),
    ('{"loss": 1, "group": "a"}\n{"loss": 1}\n', "line 2: field 'group or domain' is missing here and given before."),
    ('{"loss": 1}\n{"loss": 1, "domain": "a"}\n', "line 2: field 'domain' is given here and not before."),
    ('{"loss": 1, "prompt": ["a"]}\n', "line 1: field 'prompt' must be text, got list."),
    ('{"loss": 1, "embedding": [1, null]}\n', "line 1: field 'embedding' must be a list of finite numbers"),
    ('{"loss": 1, "embedding": [1]}\n{"loss": 1, "embedding": [1, 2]}\n', "line 2: field 'embedding' must be a list"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_files(command, content: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad", content)
    code, out, err = command("weights", path)
    place = f"{path}, line" if message.startswith("line") else f"{path}:"
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"robustgrad: error: {place}") and message in err


def test_files_that_cannot_be_read(command, tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("loss,group\n1,déjà\n".encode("latin-1"))
    (tmp_path / "plain.gz").write_bytes(b"1\n2\n")
    for name, message in (
        ("none.csv", 'No such file or directory. Give a file, or "-" for the standard input.'),
        ("latin.csv", "not UTF-8 (invalid continuation byte at byte 14)."),
        ("plain.gz", "not readable as gzip"),
        (".", "Is a directory."),
    ):
        code, _, err = command("weights", tmp_path / name)
        assert code == 2 and err.startswith(f"robustgrad: error: {tmp_path / name}: ") and message in err


def test_wrong_options(command) -> None:
    for options, message in (
        (("--radius", 3), "radius must be in [0, 1], got 3.0. It is the share of mass moved"),
        (("--set", "kl", "--cap", 2), "--cap must come with --set tv, got --set kl. Leave it out."),
        (("--set", "l2"), "'l2' is not one of 'tv', 'chi2', 'kl', 'cvar'"),
    ):
        code, out, err = command("weights", *options, stdin=b"1\n2\n")
        assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_no_finite_loss_at_all(command) -> None:
    for name in ("weights", "check"):
        code, _, err = command(name, "--skip-nonfinite", stdin=b"nan\ninf\n")
        assert code == 2 and "no loss is finite. Find the cause of the NaN losses." in err


# --- check ---


def test_check_shows_each_set(command, tmp_path: Path) -> None:
    losses = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    text = "\n".join(map(str, losses.tolist())).encode()
    code, out, err = command("check", "--plot", tmp_path / "curve.png", stdin=text)
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if "ChiSquare(radius=0.5)" in line)
    worst = ChiSquare(0.5).solve(losses)
    for shown in (f"{worst.value.item():.4g}", f"{worst.ess.item():.0f} (", f"{worst.max_ratio.item():.3g}"):
        assert shown in row
    assert f"{TotalVariation(0.2).solve(losses).value.item():.4g}" in out
    assert (tmp_path / "curve.png").stat().st_size > 5000


def state_of(folder: Path, rows: list[dict[str, object]], step: int | None = None) -> Path:
    folder = folder if step is None else folder / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder / "trainer_state.json", json.dumps({"global_step": step, "log_history": rows}, indent=1))


def logged(step: int, plain: float = 0.0) -> dict[str, object]:
    names = ("value", "mean", "gap", "ess", "max_ratio")
    return {"step": step, "loss": 0.7, "robust/plain": plain} | {f"robust/{name}": step + 0.25 for name in names}


def test_check_of_a_trainer(command, tmp_path: Path) -> None:
    state_of(tmp_path, [logged(1, 1.0)], step=9)
    state_of(tmp_path, [logged(1, 1.0), {"step": 2, "eval_loss": 0.5}, logged(30)], step=30)
    code, out, err = command("check", tmp_path)
    assert (code, err) == (0, "")
    assert "checkpoint-30" in out and "30.25" in out and "1 of 2 logged steps were plain averaging" in out
    alone = command("check", tmp_path / "checkpoint-9" / "trainer_state.json")
    assert alone[0] == 0 and "30.25" not in alone[1]


def test_check_of_a_trainer_without_robust_metrics(command, tmp_path: Path) -> None:
    path = state_of(tmp_path, [{"step": 1, "loss": 0.7}])
    code, out, err = command("check", path)
    assert (code, out) == (2, "") and f"{path}: its log holds the mean loss of each step and nothing robust" in err
    write(path, "{}")
    assert "not the state of a trainer" in command("check", path)[2]
    (tmp_path / "empty").mkdir()
    assert "the folder holds no trainer_state.json" in command("check", tmp_path / "empty")[2]


# --- report ---


def two_models(tmp_path: Path, n: int = 60) -> list[Path]:
    def rows(seed: int) -> list[dict[str, object]]:
        losses = torch.randn(n, generator=torch.Generator().manual_seed(seed)).exp().tolist()
        return [
            {"loss": loss, "domain": "[bold]" if i % 4 else "<code>", "prompt": f"p{i}", "embedding": [1.0, i]}
            for i, loss in enumerate(losses)
        ]

    return [write(tmp_path / f"{name}.jsonl", rows(seed)) for seed, name in enumerate(("before", "after"))]


@pytest.mark.parametrize("count", [1, 2])
def test_report(command, count: int, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = command("report", *two_models(tmp_path)[:count], "--out", page)
    assert (code, err) == (0, "")
    assert f"Saved {page}" in out and ("saved" in out) == (count == 2)
    html = page.read_text()
    assert "before" in html and ("after" in html.split("</h1>")[0]) == (count == 2)
    assert "[bold]" in html and "&lt;code&gt;" in html and "TotalVariation(radius=0.1, cap=5)" in html


def test_report_options_act(command, tmp_path: Path) -> None:
    before, page = two_models(tmp_path)[0], tmp_path / "page.html"
    options = ("--set", "tv", "--radius", 0.2, "--cap", 3, "--by-group")
    assert command("report", before, "--out", page, *options)[0] == 0
    html = page.read_text()
    assert "TotalVariation(radius=0.2, cap=3.0)" in html and "over groups" in html
    assert "none becoming more than 3 times as frequent" in html


def test_report_leaves_out_of_both_what_is_nonfinite_in_one(command, tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "1\nnan\n3\n4\n")
    write(tmp_path / "b.txt", "1\n2\n3\ninf\n")
    paths = (tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "page.html")
    assert command("report", *paths)[0] == 2
    code, _, err = command("report", *paths, "--skip-nonfinite")
    assert code == 0 and err.count("left out 1 of 4") == 2
    assert "<td>2</td>" in (tmp_path / "page.html").read_text()


def test_report_of_other_samples_is_refused(command, tmp_path: Path) -> None:
    before, after = two_models(tmp_path)
    write(after, after.read_text().replace("p7", "q7"))
    code, _, err = command("report", before, after, "--out", tmp_path / "page.html")
    assert code == 2 and "texts of the two models must be the same, got 'p7' and 'q7' at sample 7" in err


# --- the program ---


def test_broken_pipe_leaves_no_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "losses.txt", "".join(f"{i % 97}\n" for i in range(60_000)))
    line = f"cat {path} | {sys.executable} -m robustgrad weights --set tv --radius 0.1 | head -n 2"
    done = subprocess.run(line, shell=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0] == "index,loss,weight,ratio" and len(done.stdout.splitlines()) == 2
    assert done.stderr == ""


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra_is_named(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from robustgrad.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f'robustgrad: error: {missing} is missing. Install it with pip install "robustgrad[cli]".\n'


def test_help_names_the_commands(command) -> None:
    code, out, _ = command("--help")
    assert code == 0 and all(name in out for name in ("weights", "check", "report"))


def test_float_output_is_exact(command) -> None:
    _, out, _ = command("weights", stdin=repr(math.pi).encode())
    assert parsed(out)[0]["loss"] == repr(math.pi)


# --- its page ---

PAGE = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()


def test_commands_of_the_page_run(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1), {})
    lines = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    for line in lines:
        before, _, after = line.rpartition("robustgrad ")
        code, _, err = command(*shlex.split(after.partition("|")[0]), stdin=piped(before))
        assert (code, err) == (0, ""), line
    assert {file.name for file in tmp_path.iterdir()} >= {"curve.png", "before.html", "both.html", "grouped.html"}


def piped(before: str) -> bytes:
    """What comes out of `cat FILE |`."""
    return Path(before.split()[1]).read_bytes() if before else b""


def test_page_names_every_option(command) -> None:
    for name in ("weights", "check", "report"):
        for option in set(re.findall(r"--[\w-]+", command(name, "--help")[1])) - {"--help"}:
            assert option in PAGE, option
