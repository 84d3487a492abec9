"""Task files asked of a run: what is read, how it is asked, scored and kept. All questions are made for these tests."""

import json
import math
import os
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leanseek.config import BadInput
from leanseek.data.puzzles import countdown
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval import ask as ask_module
from leanseek.eval import verify
from leanseek.eval.ask import Settings, ask, spans
from leanseek.eval.harness import evaluate, results_of
from leanseek.eval.likelihood import Asked
from leanseek.eval.records import Records
from leanseek.eval.sandbox import Sandbox
from leanseek.eval.standing import standing
from leanseek.eval.statistics import interval, majority, pass_at_k
from leanseek.eval.tasks import as_chat, as_text, chosen, examples_for, read_task
from leanseek.model.moe import max_violation
from leanseek.serve.llm import LLM
from tests.oracle import ours, tiny
from tests.runs import make_run, model_of, tokenizer

Row = dict[str, Any]


def write(file: Path, rows: Sequence[Row | str]) -> Path:
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return file


# ── formats ───────────────────────────────────────────────────────────────────────────────────────────────────────

# A row in each published shape: what is asked, how it is solved, the key.
MADE: dict[str, tuple[Row, str, str, Any]] = {
    "gsm8k": (
        {"question": "Ida has 2 nuts and finds 3. How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5", "final": "5"},
        "Question: Ida has 2 nuts and finds 3. How many?\nAnswer:", " 2 + 3 = 5\n#### 5", "5",
    ),
    "math": (
        {"problem": "What is $1+1$?", "answer": "2", "level": "Level 1", "subject": "Algebra"},
        "Problem: What is $1+1$?\nAnswer:", " The answer is $\\boxed{2}$.", "2",
    ),
    "svamp": (
        {"ID": "x", "Body": "A fox had 4 eggs.", "Question": "It ate 1. How many are left?", "Answer": 3.0},
        "Question: A fox had 4 eggs. It ate 1. How many are left?\nAnswer:", " The answer is 3.", "3",
    ),
    "aqua": (
        {"question": "2+2?", "options": ["A)3", "B)4", "C)5"], "rationale": "Two and two make four.", "correct": "B"},
        "Question: 2+2?\nA. 3\nB. 4\nC. 5\nAnswer:", " Two and two make four.\nThe answer is (B).", "B",
    ),
    "mmlu": (
        {"subject": "forest_law", "question": "Who rules?", "choices": ["fox", "owl"], "answer": "B"},
        "These are multiple choice questions about forest law, each with its answer.\n\n"
        "Who rules?\nA. fox\nB. owl\nAnswer:", " B", "B",
    ),
    "openbookqa": (
        {"ID": "1", "Question Stem": "A fox is", "Choices": "(A) a stone (B) an animal", "Answer Key": "B"},
        "A fox is", " an animal", "B",
    ),
    "agieval": (
        {"task": "t", "passage": "P.", "question": "Which?", "options": ["(A)one", "(B)two"], "label": "A"},
        "P.\nWhich?\nA. one\nB. two\nAnswer:", " A", "A",
    ),
    "bbh": ({"task": "t", "input": "not True is", "target": "False"}, "Q: not True is\nA:", " False", "False"),
    "cluewsc": (
        {"text": "狐看见狼，它跑了。", "label": "true",
         "target": {"span1_text": "狐", "span2_text": "它", "span1_index": 0, "span2_index": 5}},
        "狐看见狼，它跑了。\n问题：这里的“它”指的是“狐”吗？\n回答（是或否）：", "是", "是",
    ),
    "lambada": ({"text": "the fox sat on the wall"}, "the fox sat on the", " wall", "wall"),
    "mbpp": (
        {"text": "Double it.", "code": "def d(x):\r\n    return 2 * x", "test_list": ["assert d(1) == 2"]},
        "Double it. It must pass these tests:\nassert d(1) == 2\n```python\n", "def d(x):\n    return 2 * x\n```", "",
    ),
    "humaneval": (
        {"prompt": "def d(x):\n", "test": "def check(f):\n    assert f(1) == 2", "entry_point": "d"},
        "def d(x):\n", "", "",
    ),
    "countdown": (
        {"numbers": [2, 3], "target": 6, "example_solution": "2 * 3", "prompt": "Make 6 of 2, 3."},
        "Make 6 of 2, 3.\nAnswer:", " 2 * 3", "6",
    ),
    "sums": ({"prompt": "1 + 1 =", "answer": "2"}, "1 + 1 =", " 2", "2"),
    "task": ({"prompt": "1 + 1 =", "verify": "math", "answer": "2"}, "1 + 1 =", " 2", "2"),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_published_rows_are_read(name: str, tmp_path: Path) -> None:
    row, asked, solved, key = MADE[name]
    task = read_task(write(tmp_path / "t.jsonl", [row, row]))
    assert task.format.name == name
    assert not task.left_out
    item = task.items[0]
    assert (as_text(item, []), item.solution, item.row["answer"]) == (asked, solved, key)
    shown = as_text(item, [item])
    assert shown == item.header + asked.removeprefix(item.header) + solved + "\n\n" + asked.removeprefix(item.header)
    assert as_chat(item, [item])[-1] == {"role": "user", "content": item.question}


def test_settings_are_the_reports(tmp_path: Path) -> None:
    shots = {name: read_task(write(tmp_path / "t.jsonl", [MADE[name][0]])).format.shots for name in MADE}
    published = {"mmlu": 5, "bbh": 3, "agieval": 0, "humaneval": 0, "mbpp": 3, "gsm8k": 8, "math": 4, "cluewsc": 5}
    assert {name: shots[name] for name in published} == published
    compared = [name for name in MADE if read_task(write(tmp_path / "t.jsonl", [MADE[name][0]])).items[0].continuations]
    assert compared == ["mmlu", "openbookqa", "lambada"]


def test_chinese_has_no_space_before_a_choice(tmp_path: Path) -> None:
    row = {"subject": "law", "question": "狐在哪里", "choices": ["墙下", "树上"], "answer": "A"}
    item = read_task(write(tmp_path / "t.jsonl", [row])).items[0]
    assert item.continuations == ("A", "B")
    assert as_text(item, [item]).startswith(
        "以下是关于law的单项选择题，请选出正确答案。\n\n狐在哪里\nA. 墙下\nB. 树上\n答案：A\n\n狐"
    )


def test_examples_come_from_the_group_and_never_give_the_answer_away(tmp_path: Path) -> None:
    rows = [{"task": f"t{i % 2}", "input": str(i), "target": str(i)} for i in range(8)]
    items = read_task(write(tmp_path / "t.jsonl", rows)).items
    for number, item in enumerate(items):
        shown = examples_for(number, items, None, 2)
        assert item not in shown
        assert [one.group for one in shown] == [item.group] * 2
    assert [one.row["answer"] for one in examples_for(6, items, None, 2)] == ["0", "2"]
    assert len(examples_for(0, items, None, 5)) == 5  # the group has three others: then of all
    assert examples_for(0, items, items[1:3], 1) == [items[2]]


def test_some_of_the_questions() -> None:
    assert chosen(10, None, 0) == list(range(10)) == chosen(10, 12, 0)
    assert chosen(1000, 50, 0) == sorted(set(chosen(1000, 50, 0))) != chosen(1000, 50, 1)
    assert len(chosen(1000, 50, 0)) == 50


# ── statistics ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pass_at_k_counts_the_draws() -> None:
    for samples, right in ((5, 0), (5, 1), (6, 3), (4, 4)):
        marks = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            draws = list(combinations(marks, k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), rel=1e-12)
    with pytest.raises(ValueError, match="needs at least 5 samples"):
        pass_at_k(4, 1, 5)


def test_the_biased_estimate_is_another() -> None:
    assert abs(pass_at_k(8, 2, 4) - (1 - (1 - 2 / 8) ** 4)) > 0.05


def test_majority() -> None:
    assert majority(["4", "5", None, "5"]) == 1
    assert majority(["4", "5", "5", "4"]) == 0
    assert majority([None, None]) is None
    assert majority([]) is None


def test_the_interval_is_that_of_a_mean() -> None:
    """The normal interval: 2,000 resamples give its width to 3%, three times that is allowed."""
    scores = [1.0] * 120 + [0.0] * 280
    error, low, high = interval(scores)
    exact = math.sqrt(0.3 * 0.7 / 400)
    assert error == pytest.approx(exact, rel=0.1)
    assert high - low == pytest.approx(2 * 1.96 * exact, rel=0.1)
    assert low < 0.3 < high
    assert interval(scores) == interval(scores)


def test_the_interval_covers_what_it_says() -> None:
    """Of 400 intervals of 95% about 380 hold the truth; a binomial's standard deviation is 4.4, and small samples make
    percentiles a little narrow."""
    dice = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        _, low, high = interval((dice.random(80) < 0.4).astype(float).tolist())
        inside += low <= 0.4 <= high
    assert 360 <= inside <= 395


def test_all_wrong_is_no_proof_of_zero() -> None:
    assert interval([0.0] * 100) == (0.0, 0.0, pytest.approx(1 - 0.025**0.01, rel=1e-12))
    assert interval([1.0] * 100) == (0.0, pytest.approx(0.025**0.01, rel=1e-12), 1.0)


# ── asking ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module")
def llm(vocabulary: Tokenizer) -> LLM:
    return LLM(model_of(vocabulary, max_position_embeddings=160), vocabulary, max_running=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vocabulary: Tokenizer) -> Path:
    return make_run(tmp_path_factory.mktemp("tasks") / "run", model_of(vocabulary), vocabulary)


WORDS = ("fox", "wall", "rain", "over", "under", "old", "long", "small", "nothing", "slept")


def choices(count: int, length: int = 1, seed: int = 0) -> list[Row]:
    """Questions whose answers nobody can know, all choices of one length."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        four: set[str] = set()
        while len(four) < 4:
            four.add(" ".join(dice.choices(WORDS, k=length)))
        answer = dice.choice("ABCD")
        prompt = "The " + " ".join(dice.choices(WORDS, k=6)) + " and the"
        rows.append({"prompt": prompt, "verify": "choice", "choices": sorted(four), "answer": answer})
    return rows


def directly(llm: LLM, prompt: str, continuation: str) -> float:
    """ln p of a continuation, from one pass over all of the text without a cache."""
    bos = llm.tokenizer.bos_id
    before, ids = llm.tokenizer.encode(prompt), [bos, *llm.tokenizer.encode(prompt + continuation)]
    assert ids[1 : 1 + len(before)] == before
    with torch.no_grad():
        hidden = llm.model(torch.tensor([ids]), torch.arange(len(ids))[None])
        logprobs = llm.model.lm_head(hidden)[0].log_softmax(-1)
    return sum(logprobs[i, ids[i + 1]].item() for i in range(len(before), len(ids) - 1))


def lines(result: Row) -> list[Row]:
    return [json.loads(line) for line in Path(result["records"]).read_text().splitlines()]


def test_choices_are_compared_by_their_likelihood(llm: LLM, tmp_path: Path) -> None:
    rows = choices(40, length=2)
    result = ask(llm, read_task(write(tmp_path / "t.jsonl", rows)), Settings(), tmp_path, "w")
    right = dict.fromkeys(("score", "score_per_byte", "score_summed"), 0)
    for row, line in zip(rows, lines(result), strict=True):
        expected = [directly(llm, row["prompt"], f" {choice}") for choice in row["choices"]]
        # FP32 over a cache and without one; a span that is one token off differs by whole nats.
        assert line["logprobs"] == pytest.approx(expected, abs=2e-3)
        sizes = {
            "score": [len(llm.tokenizer.encode(f" {choice}")) for choice in row["choices"]],
            "score_per_byte": [len(choice) for choice in row["choices"]],
            "score_summed": [1] * 4,
        }
        for how, over in sizes.items():
            found = [logprob / size for logprob, size in zip(expected, over, strict=True)]
            right[how] += found.index(max(found)) == "ABCD".index(row["answer"])
    assert {how: result[how] for how in right} == pytest.approx({how: count / 40 for how, count in right.items()})
    assert len(set(right.values())) > 1  # the three can differ
    assert result["chance"] == 0.25


def test_a_span_that_is_one_off_is_seen(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(prompt: list[int], wholes: Sequence[list[int]]) -> list[Asked]:
        moved = []
        for one in spans(prompt, wholes):
            text = (*one.prompt, *one.continuation)
            moved.append(Asked(text[: len(one.prompt) - 1], text[len(one.prompt) - 1 : -1]))
        return moved

    monkeypatch.setattr(ask_module, "spans", off)
    with pytest.raises(AssertionError):
        test_choices_are_compared_by_their_likelihood(llm, tmp_path)


def test_a_token_over_the_border_is_scored_with_all_choices() -> None:
    assert spans([2, 5, 6], [[2, 5, 6, 7], [2, 5, 6, 8, 9]]) == [Asked((2, 5, 6), (7,)), Asked((2, 5, 6), (8, 9))]
    assert spans([2, 5, 6], [[2, 5, 67], [2, 5, 6, 8]]) == [Asked((2, 5), (67,)), Asked((2, 5), (6, 8))]


def test_the_last_word_is_right_when_the_model_would_write_it(llm: LLM, tmp_path: Path) -> None:
    with torch.no_grad():
        ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("The old fox saw the")]
        logits = llm.model.lm_head(llm.model(torch.tensor([ids]), torch.arange(len(ids))[None]))[0, -1]
    words = [word for word in WORDS if len(llm.tokenizer.encode(f" {word}")) == 1]
    rows = [{"text": f"The old fox saw the {word}"} for word in words]
    result = ask(llm, read_task(write(tmp_path / "t.jsonl", rows)), Settings(), tmp_path, "w")
    likeliest = int(logits.argmax())
    assert [line["right"] for line in lines(result)] == [
        [int(llm.tokenizer.encode(f" {word}") == [likeliest])] for word in words
    ]


def test_an_untrained_model_scores_chance(vocabulary: Tokenizer, tmp_path: Path) -> None:
    model = model_of(vocabulary, max_position_embeddings=160)
    model.initialise(0.02, torch.Generator().manual_seed(0))
    untrained = LLM(model, vocabulary)
    mmlu = [
        {"subject": "s", "question": row["prompt"], "choices": row["choices"], "answer": row["answer"]}
        for row in choices(300, seed=1)
    ]
    for name, rows in (("own", choices(300)), ("mmlu", mmlu)):
        task = read_task(write(tmp_path / f"{name}.jsonl", rows))
        result = ask(untrained, task, Settings(shots=0), tmp_path, "w")
        assert result["low"] <= result["chance"] == 0.25 <= result["high"]
        assert result["high"] - result["low"] < 0.12
    uneven = choices(100)
    for row in uneven:  # summed up, the shortest choice wins whatever it says; the right one is the longest here
        row["choices"]["ABCD".index(row["answer"])] += " and the old fox"
    result = ask(untrained, read_task(write(tmp_path / "uneven.jsonl", uneven)), Settings(), tmp_path, "w")
    assert result["score_summed"] == 0 < result["score"]


def test_a_model_that_knows_scores_above_chance(llm: LLM, tmp_path: Path) -> None:
    """The interval can leave chance behind: questions whose key is what the model finds likeliest."""
    rows = choices(60)
    for row in rows:
        sizes = [len(llm.tokenizer.encode(f" {choice}")) for choice in row["choices"]]
        found = [
            directly(llm, row["prompt"], f" {choice}") / size
            for choice, size in zip(row["choices"], sizes, strict=True)
        ]
        row["answer"] = "ABCD"[found.index(max(found))]
    result = ask(llm, read_task(write(tmp_path / "t.jsonl", rows)), Settings(), tmp_path, "w")
    assert result["score"] == 1.0
    assert result["low"] > 0.9 > result["chance"]


def sums(count: int) -> list[Row]:
    return [{"prompt": f"The old fox {i}", "verify": "regex", "answer": "[ae]"} for i in range(count)]


def without_time(result: Row) -> Row:
    return {
        key: value for key, value in result.items() if key not in ("seconds", "records", "drafts_accepted", "asked")
    }


@pytest.mark.parametrize("make", [lambda: choices(20), lambda: sums(20)], ids=["compared", "written"])
def test_neither_batch_nor_order_changes_a_result(
    make: Any, llm: LLM, vocabulary: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, settings = make(), Settings(max_tokens=6, temperature=0.8)
    task = read_task(write(tmp_path / "t.jsonl", rows))
    first = ask(llm, task, settings, tmp_path / "1", "w")
    monkeypatch.setattr(ask_module, "AT_ONCE", 3)
    alone = LLM(llm.model, vocabulary, max_running=1, speculate=False)
    second = ask(alone, task, settings, tmp_path / "2", "w")
    assert without_time(first) == without_time(second)
    by_number = [sorted(lines(result), key=lambda line: line["question"]) for result in (first, second)]
    for a, b in zip(*by_number, strict=True):
        assert a["right"] == b["right"]
        assert a.get("replies") == b.get("replies")
        assert a.get("logprobs", []) == pytest.approx(b.get("logprobs", []), abs=1e-4)  # FP32 in another order
    some = ask(llm, task, Settings(max_tokens=6, temperature=0.8, limit=7), tmp_path / "3", "w")
    assert {line["question"]: line["right"] for line in lines(some)}.items() <= {
        line["question"]: line["right"] for line in by_number[0]
    }.items()


def test_several_samples(llm: LLM, tmp_path: Path) -> None:
    rows = [countdown(0, 0), countdown(0, 1), {"prompt": "The fox", "verify": "exact", "answer": "x"}, *sums(3)]
    task = read_task(write(tmp_path / "t.jsonl", rows))
    result = ask(llm, task, Settings(samples=4, max_tokens=5), tmp_path, "w")
    counts = [sum(line["right"]) for line in sorted(lines(result), key=lambda line: line["question"])]
    assert all(len(line["replies"]) == 4 for line in lines(result))
    assert any(len(set(line["replies"])) > 1 for line in lines(result))
    assert result["score"] == result["pass@1"] == pytest.approx(sum(counts) / 4 / len(rows))
    assert result["pass@4"] == pytest.approx(sum(count > 0 for count in counts) / len(rows))
    assert result["pass@1"] <= result["pass@2"] <= result["pass@4"]
    assert 0 <= result["majority@4"] <= result["pass@4"]
    again = ask(llm, task, Settings(samples=4, max_tokens=5), tmp_path / "again", "w")
    assert without_time(again) == without_time(result)
    other = ask(llm, task, Settings(samples=4, max_tokens=5, seed=1), tmp_path, "w")
    assert lines(other) != lines(result)


def test_code_is_run_behind_walls_or_not_asked_for(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = read_task(write(tmp_path / "t.jsonl", [MADE["mbpp"][0]]))
    monkeypatch.setattr(verify.Sandbox, "find", classmethod(lambda cls: (_ for _ in ()).throw(BadInput("no walls"))))
    with pytest.raises(BadInput, match="no walls"):
        ask(llm, task, Settings(shots=0, max_tokens=2), tmp_path, "w")
    assert not llm.engine.metrics.submitted - llm.engine.metrics.finished - llm.engine.metrics.cancelled
    monkeypatch.undo()
    try:
        walls = Sandbox.find().isolation
    except BadInput as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    result = ask(llm, task, Settings(shots=0, max_tokens=2), tmp_path, "w")
    assert (result["isolation"], result["score"], result["cut"]) == (walls, 0.0, 1)


def test_a_chatting_model_is_asked_in_turns(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = Tokenizer.encode_chat
    monkeypatch.setattr(Tokenizer, "encode_chat", lambda self, chat: seen.append(chat) or plain(self, chat))
    task = read_task(write(tmp_path / "t.jsonl", [*sums(2), *choices(1)]))
    ask(llm, task, Settings(max_tokens=2, shots=1), tmp_path, "w", chat=True)
    assert [len(chat) for chat in seen] == [3, 3, 3]
    seen.clear()
    ask(llm, task, Settings(max_tokens=2, raw=True), tmp_path, "w", chat=True)
    assert not seen


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_question_longer_than_the_context_is_counted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "The fox " * 60
    rows = [*choices(3), choices(1)[0] | {"prompt": long}, *sums(2), sums(1)[0] | {"prompt": long}]
    result = evaluate(run, [], files=[write(tmp_path / "t.jsonl", rows)], out=tmp_path)["t"]
    assert (result["n"], result["too_long"]) == (7, 2)
    said = capsys.readouterr().err
    assert "warning: t: 2 of 7 questions are longer than the context of 48 tokens and count as not answered" in said
    assert [line["right"] for line in lines(result) if line.get("too_long")] == [[0], [0]]


def test_bad_rows_are_named_and_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad: list[Row | str] = [
        {"prompt": "?", "verify": "choice", "choices": ["a", "b"], "answer": "E"},
        {"verify": "math", "answer": "1"},
        "{broken",
        "[1]",
    ]
    task = read_task(write(tmp_path / "t.jsonl", [*choices(2), *bad]))
    assert [line.partition(":")[0] for line in task.left_out] == ["line 3", "line 4", "line 5", "line 6"]
    assert "answer names no choice: 'E' of 2" in task.left_out[0]
    assert "has no 'prompt'" in task.left_out[1]
    result = evaluate(run, [], files=[tmp_path / "t.jsonl"], out=tmp_path)["t"]
    assert (result["n"], result["left_out"]) == (2, 4)
    assert "warning: t: left out 4 rows; the first, line 3: answer names no choice" in capsys.readouterr().err


def test_a_verifier_that_hangs_is_counted(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    plain = ask_module.Verifier
    monkeypatch.setattr(ask_module, "Verifier", lambda: plain(seconds=1))
    rows = [sums(1)[0], sums(1)[0] | {"answer": r"^(([a-zA-Z\s\S])+)+$(?<=\bnever)"}]
    result = evaluate(run, [], files=[write(tmp_path / "t.jsonl", rows)], out=tmp_path)["t"]
    assert (result["n"], result["hung"]) == (2, 1)
    assert "warning: t: 1 replies could not be verified in time and count as wrong" in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda: choices(8), lambda: sums(8)], ids=["compared", "written"])
def test_ctrl_c_loses_nothing_that_was_known(
    make: Any, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, settings = read_task(write(tmp_path / "t.jsonl", make())), Settings(max_tokens=4)
    undisturbed = ask(llm, task, settings, tmp_path / "whole", "w")
    plain = Records.add

    def interrupted(self: Records, question: int, row: Row) -> None:
        if len(self.known) == 5:
            raise KeyboardInterrupt
        plain(self, question, row)

    monkeypatch.setattr(Records, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(llm, task, settings, tmp_path, "w")
    assert not llm.engine.busy
    monkeypatch.setattr(Records, "add", plain)
    resumed = ask(llm, task, settings, tmp_path, "w")
    assert resumed["asked"] == 3
    assert without_time(resumed) == without_time(undisturbed)
    assert ask(llm, task, settings, tmp_path, "w")["asked"] == 0
    assert ask(llm, task, settings, tmp_path, "others")["asked"] == 8
    assert ask(llm, task, Settings(max_tokens=3), tmp_path, "w")["asked"] == 8


def test_half_a_line_is_forgotten_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    records = Records(tmp_path, "t", {})
    for number in range(3):
        records.add(number, {"right": [1]})
    whole = records.path.read_bytes()
    records.path.write_bytes(whole[:-4])
    again = Records(tmp_path, "t", {})
    assert list(again.known) == [0, 1]
    again.add(2, {"right": [1]})
    assert records.path.read_bytes() == whole
    records.path.write_bytes(b"{no}\n" + whole)
    with pytest.raises(BadInput, match="line 1 is damaged: remove the file"):
        Records(tmp_path, "t", {})


def test_bad_input(run: Path, tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", choices(2))
    other = write(tmp_path / "other.jsonl", [MADE["gsm8k"][0]])
    for says, arguments in {
        "no such file": {"files": [tmp_path / "gone.jsonl"]},
        "no row of it can be asked; the first: line 1: of no format that is known, it has 'x'": {
            "files": [write(tmp_path / "x.jsonl", [{"x": 1}])]
        },
        "no row of it can be asked; the first: line 1: has no text 'answer'": {
            "files": [write(tmp_path / "y.jsonl", [{"prompt": "?", "verify": "math"}])]
        },
        "a task is a .jsonl file": {"files": [write(tmp_path / "t.txt", ["x"])]},
        "two tasks are named 'good'": {"files": [good, good]},
        "two tasks are named 'bpb'": {"files": [write(tmp_path / "bpb.jsonl", choices(1))]},
        "of the format gsm8k, good of task": {"files": [good], "examples": other},
    }.items():
        with pytest.raises(BadInput, match=says.replace("(", r"\(")):
            evaluate(run, [], **arguments)
    for says, changes in {
        "samples must be at least 1": {"samples": 0},
        "shots must be at least 0": {"shots": -1},
        "max-tokens must be at least 1": {"max_tokens": 0},
        "at temperature 0 all 4 would be the same": {"samples": 4, "temperature": 0.0},
        "seed must be between": {"seed": -1},
    }.items():
        with pytest.raises(BadInput, match=says):
            Settings(**changes)


# ── with the run ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_results_are_kept_with_the_run(vocabulary: Tokenizer, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model_of(vocabulary), vocabulary)
    (tmp_path / "t.txt").write_text("The fox slept under the wall.")
    found = evaluate(run, ["bpb"], tmp_path / "t.txt", [write(tmp_path / "q.jsonl", choices(3))])
    kept = results_of(run)
    assert kept.keys() == {"bpb-t", "q"}
    assert kept["q"] == found["q"]
    assert kept["bpb-t"].items() >= found["bpb"].items()
    assert kept["bpb-t"]["max_violation"] > 0
    (run / "eval" / "q.json").write_text("{")
    with pytest.raises(BadInput, match="is damaged: remove it"):
        results_of(run)


def test_standing_columns_are_the_direct_count() -> None:
    model = ours(tiny(num_nextn_predict_layers=1), dtype=torch.float64)
    dice = np.random.default_rng(0)
    windows = [(ids := dice.integers(3, 64, length), np.roll(ids, -1)) for length in (9, 5, 9, 1)]
    found = standing(model, windows)
    model.train()
    for router in model.routers().values():
        router.load.zero_()
    agreed = drafted = 0
    for ids, _ in windows:  # each alone, in training mode, where the routers count themselves
        row, positions = torch.tensor(ids)[None], torch.arange(len(ids))[None]
        with torch.no_grad():
            hidden = model(row, positions)
            further = model.predict_further(hidden, row, positions)[0] if len(ids) > 1 else hidden[:, 1:]
            agreed += int((model.lm_head(further).argmax(-1) == model.lm_head(hidden[:, 1:]).argmax(-1)).sum())
            drafted += len(ids) - 1
    loads = [router.load for name, router in model.routers().items() if name.startswith("layers.")]
    assert found.max_violation == pytest.approx(max(map(max_violation, loads)), rel=1e-12)
    assert found.drafts_accepted == pytest.approx(agreed / drafted)
    assert model.training


def test_a_model_without_mtp_has_no_drafts() -> None:
    windows = [(np.array([3, 4, 5]), np.array([4, 5, 6]))]
    assert standing(ours(tiny(num_nextn_predict_layers=0)), windows).drafts_accepted is None
