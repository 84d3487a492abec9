"""The report: what it says is what the folders hold, a dash where they do not say."""

import base64
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from leanseek.config import BadInput
from leanseek.report import cells, names_of, read, report
from tests.runs import make_run, model_of, tokenizer


def run_at(folder: Path, name: str, violations: tuple[float, ...] = (), results: dict | None = None) -> Path:
    vocabulary = tokenizer()
    (folder / f"of-{name}").mkdir(parents=True)
    run = make_run(folder / f"of-{name}" / name, model_of(vocabulary), vocabulary)
    lines = [
        {"step": i, "tokens": 1000 * i, "loss": 3.0, "mtp_loss": 3.0, "max_violation": violation}
        for i, violation in enumerate(violations)
    ]
    if lines:
        lines.append({"step": 9, "tokens": 9000, "bpb": 1.5})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        bill = {"tokens": 9000, "params_activated": 4193200, "cost_usd": 0.0123, "bpb": 1.5}
        (run / "receipt.json").write_text(json.dumps(bill))
    (run / "eval").mkdir()
    for task, result in (results or {}).items():
        (run / "eval" / f"{task}.json").write_text(json.dumps(result))
    return run


SCORE = {"score": 0.25, "low": 0.125, "high": 0.375, "stderr": 0.06, "n": 48, "too_long": 3, "hung": 1, "chance": 0.25}
BPB = {"bpb": 1.25, "bytes": 10, "tokens": 5, "max_violation": 9.0, "drafts_accepted": 0.846}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    violations = (*[5.0] * 18, 0.5, 1.0)
    a = run_at(tmp_path, "a", violations, {"owls": SCORE | {"drafts_accepted": 0.2}, "bpb": BPB, "bpb-book": BPB})
    return [a, run_at(tmp_path, "b", (2.0,), {"foxes": SCORE | {"too_long": 0, "hung": 0}}), run_at(tmp_path, "c")]


def test_the_table_is_what_the_folders_hold(runs: list[Path]) -> None:
    told = [read(run) for run in runs]
    own = ["run", "tokens", "activated", "cost", "bpb", "MaxVio", "drafts right"]
    assert names_of(told) == [*own, "bpb-book", "foxes", "owls"]
    scored = "25.0% (12.5% to 37.5%, n 48, 4 not answered)"
    bill = ["9,000", "4,193,200", "$0.0123", "1.5000"]
    # MaxVio is the mean of the last tenth of twenty steps; drafts are those on given text, not on the model's own.
    assert cells(told[0], told) == ["a", *bill, "0.75", "84.6%", "1.2500 bpb", "–", scored]
    assert cells(told[1], told) == ["b", *bill, "2.00", "–", "–", "25.0% (12.5% to 37.5%, n 48)", "–"]
    assert cells(told[2], told) == ["c", *["–"] * 9]


def test_page_and_plot(runs: list[Path], tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    page = report(runs, tmp_path / "out", console)
    text = page.read_text()
    assert page == tmp_path / "out" / "report.html"
    assert "25.0% (12.5% to 37.5%, n 48, 4 not answered)" in text
    image = re.search(r"base64,([^\"]+)", text)
    assert image is not None
    picture = base64.b64decode(image[1])
    assert picture == (tmp_path / "out" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "drafts right" in console.export_text()
    assert report(runs[:1], console=console) == runs[0] / "report.html"


def test_a_name_is_text_and_not_markup(tmp_path: Path) -> None:
    run = run_at(tmp_path, "<b>", results={"<i>": SCORE})
    page = report([run], tmp_path / "out", Console(record=True)).read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page


def test_bad_input(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a run"):
        report([tmp_path])
    with pytest.raises(BadInput, match="two runs are named 'a'"):
        report([runs[0], runs[0]])
    (runs[0] / "receipt.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        report(runs)
