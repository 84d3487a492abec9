"""The R1 chain: five stages, one receipt, and going on where it was stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leanseek import checkpoint
from leanseek.config import BadInput
from leanseek.eval.ask import Settings
from leanseek.post.chain import STAGES, Chain, r1, table
from leanseek.post.distill import Choice
from tests.runs import make_run, model_of, tokenizer

QUIET = ("train.device=cpu", "train.dtype=fp32", "train.eval_every=1000")
BRIEF = (
    *QUIET, "train.tokens=1600", "schedule.batch_tokens=[{until=1,value=64}]", "optimizer.name=adamw",
    "schedule.learning_rate=[{until=1,value=1e-2}]",
)  # fmt: skip
OF_GRPO = (*QUIET, "grpo.steps=2", "grpo.prompts=2", "grpo.group=2", "grpo.max_tokens=6")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = tokenizer()
    return make_run(tmp_path_factory.mktemp("base") / "run", model_of(vocabulary), vocabulary)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    shown = [{"prompt": f"fox {i}", "response": "wall"} for i in range(6)]
    task = [{"prompt": f"the fox {i}", "verify": "regex", "answer": "(?s).*"} for i in range(4)]
    return Chain(
        write("shown.jsonl", shown),
        write("task.jsonl", task),
        chats=write("others.jsonl", [{"prompt": "rain", "response": "over"}]),
        dev=write("dev.jsonl", task[:2]),
        overrides={"cold": BRIEF, "sft": BRIEF, "reasoning": OF_GRPO, "all-round": OF_GRPO},
        sampled=Settings(samples=4, temperature=1.0, top_p=1.0, max_tokens=6, write=True),
        choice=Choice(one_language=0.0),
    )


def test_five_stages_and_one_receipt_stopped_in_the_middle(base: Path, chain: Chain, tmp_path: Path) -> None:
    out, told = tmp_path / "out", []
    early = replace(chain, overrides={**chain.overrides, "reasoning": (*OF_GRPO, "train.max_steps=1")})
    stopped = r1(base, early, out, told.append)
    assert [stage["stage"] for stage in stopped["stages"]] == ["cold", "reasoning"]
    assert stopped["ended"] == "max_steps"
    receipt = r1(base, chain, out, told.append)
    assert told == [f"── {name} ──" for name in ("cold", "reasoning", *STAGES)]
    assert [stage["stage"] for stage in receipt["stages"]] == list(STAGES)
    assert all(0 <= stage["accuracy"] <= 1 for stage in receipt["stages"] if stage["stage"] != "samples")
    assert receipt["ended"] == "complete"
    assert receipt == json.loads((out / "receipt.json").read_text())
    own = [json.loads((out / f"{name}.json").read_text()) for name in STAGES]
    assert receipt["cpu_seconds"] == pytest.approx(sum(stage["cpu_seconds"] for stage in own))
    assert receipt["flops"] == sum(stage.get("flops", 0) for stage in own)
    # What the base model learns the second time: the samples, and the other chats behind them.
    rows = [json.loads(line) for line in (out / "3-samples.jsonl").read_text().splitlines()]
    assert rows[-1] == {"prompt": "rain", "response": "over"}
    assert len(rows) == own[2]["replies"]["kept"] + 1
    assert "all-round" in table(receipt)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("step-*/state.json")}
    again = r1(base, chain, out, told.append)  # nothing is left to do
    assert again == receipt
    assert {path: path.stat().st_mtime_ns for path in out.rglob("step-*/state.json")} == times
    assert checkpoint.chats(out / "5-all-round")


def test_what_a_chain_cannot_work_with_is_refused(base: Path, chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the chain has no stage 'warm'"):
        replace(chain, overrides={"warm": ()})
    with pytest.raises(BadInput, match=r"nowhere\.jsonl: no such file"):
        r1(base, replace(chain, all_round=tmp_path / "nowhere.jsonl"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
