"""`leanseek grpo`: runs that go on where they were stopped, what they tell, and what they refuse."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from leanseek import checkpoint
from leanseek.cli import main
from leanseek.config import BadInput, GRPOConfig, read_recipe
from leanseek.eval.verify import Verifier
from leanseek.post import judge, sft
from leanseek.post.grpo import Explorer, grpo, tuned
from leanseek.post.reward_model import RewardModel, Scorer
from leanseek.post.rewards import Correct, Format, Graded, Language, Preferred, asked_for, earned
from leanseek.post.rollout import Answer, Question
from leanseek.serve.engine import Engine
from leanseek.train.schedule import knobs
from tests.runs import CONTEXT, make_run, model_of, tokenizer
from tests.test_pretrain import tensors_of

QUIET = (
    "train.device=cpu", "train.dtype=fp32", "grpo.steps=4", "grpo.prompts=3", "grpo.group=4", "grpo.max_tokens=6",
    "schedule.learning_rate=[{until=1,value=1e-3}]",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = tokenizer()
    folder = tmp_path_factory.mktemp("begun")
    return make_run(folder / "run", model_of(vocabulary, num_nextn_predict_layers=1), vocabulary)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": f"A fox {word}", "verify": "exact", "answer": "the wall", "source": source}
        for word in ("walked", "saw", "slept", "came")
        for source in ("field", "wood")
    ]
    return write(tmp_path_factory.mktemp("task") / "task.jsonl", rows)


def write(file: Path, rows: Sequence[object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Letters:
    """A reward that teaches something from the first step on: the share of an answer's letters that are an e."""

    name, weight = "letters", 1.0

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        return [answer.text.count("e") / (1 + len(answer.text)) for answer in answers]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


TIMES = ("seconds", "cpu_seconds", "rollout_seconds", "learning_seconds")


def untimed(out: Path, billed: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in (*TIMES, *billed)} for row in rows_of(out)]


def same(out: Path, whole: Path, billed: tuple[str, ...] = ()) -> bool:
    """Whether two runs are alike to the last bit: weights, optimizer, what was logged, what was answered.

    `billed` is what work that a kill undid adds to.
    """
    ours, theirs = tensors_of(out), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    told = all((out / name).read_text() == (whole / name).read_text() for name in ("samples.jsonl",))
    logged = untimed(out, billed) == untimed(whole, billed)
    return told and logged and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture(scope="module")
def whole(run: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, whose reference is renewed on the way."""
    out = tmp_path_factory.mktemp("whole") / "out"
    grpo(run, task, out, (*QUIET, "grpo.reference_every=2", "grpo.updates=2"), task, (Letters(),))
    return out


# ── going on ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stopping_at_a_step_limit_and_going_on_is_bit_identical(
    run: Path, task: Path, whole: Path, tmp_path: Path
) -> None:
    asked = (*QUIET, "grpo.reference_every=2", "grpo.updates=2")
    for limit in (1, 3, 100):
        ended = grpo(run, task, tmp_path / "parts", (*asked, f"train.max_steps={limit}"), task, (Letters(),))["ended"]
    assert ended == "complete"
    # Where it stopped it looked at the held-out questions once more, which the other did at the end alone.
    extra = [row for row in untimed(tmp_path / "parts") if "dev" in row and row["step"] in (1, 3)]
    assert len(extra) == 2
    kept = [row for row in rows_of(tmp_path / "parts") if "dev" not in row or row["step"] in (0, 4)]
    write(tmp_path / "parts" / "metrics.jsonl", kept)
    assert same(tmp_path / "parts", whole)
    before = tensors_of(run)
    moved = {key for key in before if not torch.equal(before[key], tensors_of(whole)[key])}
    still = {key for key in before if key not in moved}
    assert {key for key in still if ".mtp." not in key and "/mtp." not in key} == {
        key for key in before if key.endswith("e_score_correction_bias") and "mtp." not in key
    }


@pytest.mark.parametrize("how", ["a kill", "a signal"])
def test_a_run_stopped_while_it_draws_goes_on_bit_identical(
    how: str, run: Path, task: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, real = 0, Engine.step

    def step(engine: Engine) -> Any:
        nonlocal steps
        steps += 1
        if steps == 21:  # six tokens a step and as many for the held-out questions: in the third step
            if how == "a kill":
                raise SystemExit(9)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(engine)

    asked, out = (*QUIET, "grpo.reference_every=2", "grpo.updates=2"), tmp_path / "out"
    monkeypatch.setattr(Engine, "step", step)
    if how == "a kill":
        with pytest.raises(SystemExit):
            grpo(run, task, out, asked, task, (Letters(),))
    else:
        assert grpo(run, task, out, asked, task, (Letters(),))["ended"] == "interrupted"
    newest = checkpoint.newest(out, pytest.fail)
    assert newest is not None
    assert newest.step == 2  # it lost the step at hand and no more
    grpo(run, task, out, asked, task, (Letters(),))
    assert same(out, whole)


def test_the_first_update_is_at_the_reference(run: Path, task: Path, tmp_path: Path) -> None:
    """Later ones of a step are not: they are of a model that has moved."""
    out = tmp_path / "out"
    grpo(run, task, out, (*QUIET, "grpo.updates=1"), task, (Letters(),))
    first, *others = [row["kl"] for row in rows_of(out) if "reward" in row]
    assert first == pytest.approx(0, abs=1e-6)
    assert min(others) > 1e-3


def test_what_a_step_tells(run: Path, task: Path, whole: Path) -> None:
    steps = [row for row in rows_of(whole) if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        parts = row["reward_correct"] + row["reward_letters"]
        assert row["reward"] == pytest.approx(parts)
        assert row["reward"] == pytest.approx((row["reward_of_field"] + row["reward_of_wood"]) / 2, abs=0.2)
        assert 0 < row["length"] <= 6
        assert row["entropy"] > 0
        assert row["kl"] >= 0
        assert 0 <= row["clip_share"] <= 1
        assert row["grad_norm"] > 0
        assert row["max_violation"] >= 0
        assert 0 <= row["experts_differ"] < 0.5  # a second update begins with another model than drew the answers
        assert row["logprob_gap"] < 1e-4
        assert row["loss"] == row["loss"]
    assert steps[0]["kl"] < 0.1 * steps[-1]["kl"]
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert all(isinstance(row["answer"], str) and row["prompt"].startswith("A fox") for row in samples)
    receipt = json.loads((whole / "receipt.json").read_text())
    assert receipt["answers"] == 4 * 3 * 4
    assert receipt["tokens"] == steps[-1]["tokens"]
    assert receipt["flops"] > 0
    assert 0 <= receipt["dev"] <= 1
    assert receipt["ended"] == "complete"
    assert (whole / "grpo.png").stat().st_size > 10_000


# ── rewards ───────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(text: str, row: dict[str, Any] | None = None, cut: bool = False) -> Answer:
    return Answer(Question([1], row or {"prompt": "?"}, ""), text, [2], [-1.0], None, cut)


def test_what_is_behind_the_thoughts_is_what_is_verified() -> None:
    row = {"prompt": "7+5", "verify": "exact", "answer": "12"}
    with Verifier() as verifier:
        correct = Correct(verifier)
        for text, right in (
            ("12", True),
            ("<think>2 1</think>12", True),
            ("<think>12</think>13", False),
            ("<think>the answer is 12", False),  # never said so
            ("\n<think>13</think>\n12", True),
        ):
            assert correct([answer(text, row)]) == [float(right)], text


def test_the_format_by_hand() -> None:
    for text, kept in (
        ("<think>a</think>b", True),
        ("\n<think>a\nb</think>\n\nc", True),
        ("<think></think>b", False),
        ("<think>a</think>", False),
        ("<think>a", False),
        ("a", False),
        ("a<think>b</think>c", False),
        ("<think>a</think>b<think>c</think>d", False),
    ):
        assert Format()([answer(text)]) == [float(kept)], text
    assert Format()([answer("<think>a</think>b", cut=True)]) == [0.0]


class Fixed:
    name, weight = "fixed", 0.5

    def __init__(self, values: Sequence[float | None]) -> None:
        self.values = values

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float | None]:
        return self.values


def test_rewards_are_weighed_and_added() -> None:
    some = [answer("<think>a</think>b"), answer("b")]
    found = earned([Format(2.0), Fixed([3.0, None])], some)
    assert found.total == [2 + 1.5, None]
    assert found.parts == {"format": [1.0, 0.0], "fixed": [3.0, None]}


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([1.0, float("nan")], "reward 'fixed' gave nan for an answer to '\\?'"),
        ([float("inf"), 1.0], "reward 'fixed' gave inf"),
        ([1.0], "gave 1 numbers for 2 answers"),
    ],
)
def test_rewards_that_are_no_numbers_are_refused(values: list[float | None], error: str) -> None:
    with pytest.raises(BadInput, match=error):
        earned([Fixed(values)], [answer("a"), answer("b")])


def test_a_reward_that_fails_loses_nothing(run: Path, task: Path, tmp_path: Path) -> None:
    class Falling(Letters):
        calls = 0

        def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
            self.calls += 1
            return [1 / (3 - self.calls)] * 12 if self.calls == 3 else super().__call__(answers)

    out, asked = tmp_path / "out", (*QUIET, "train.checkpoint_every=100")
    with pytest.raises(BadInput, match="reward 'letters' failed with ZeroDivisionError"):
        grpo(run, task, out, asked, None, (Falling(),))
    newest = checkpoint.newest(out, pytest.fail)
    assert newest is not None
    assert newest.step == 2
    assert grpo(run, task, out, asked, None, (Letters(),))["steps"] == 4


def test_groups_that_all_earn_the_same_change_nothing_and_are_told(
    run: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    grpo(run, task, out, (*QUIET, "grpo.kl_weight=0", "grpo.steps=1"), None, (Fixed([1.0] * 12),))
    assert "step 1: all answers to a question earned the same" in capsys.readouterr().err
    before, after = tensors_of(run), tensors_of(out)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [row["equal_groups"] for row in rows_of(out)] == [1.0]


def test_answers_that_nobody_could_judge_leave_with_their_group(run: Path, task: Path, tmp_path: Path) -> None:
    values = [None, *map(float, range(11))]
    grpo(run, task, tmp_path / "out", (*QUIET, "grpo.steps=1"), None, (Fixed(values),))
    (row,) = rows_of(tmp_path / "out")
    assert row["unjudged"] == 1
    assert row["answers"] == 12
    assert row["learnt_tokens"] <= 8 * 6


# ── which questions ───────────────────────────────────────────────────────────────────────────────────────────────


class Parrot:
    """Answers at once: the text is the question's number."""

    closed = torch.empty(0, dtype=torch.int64)

    def refresh(self) -> None: ...

    def draw(
        self, questions: Sequence[Question], seeds: Sequence[int], temperature: float, stop: Callable[[], bool]
    ) -> list[Answer]:
        return [
            Answer(question, str(seed), [1], [-1.0], None, False)
            for question, seed in zip(questions, seeds, strict=True)
        ]


class Counting:
    """Questions 0, 1, 2, … whose seeds say which they are."""

    def at(self, place: int) -> Question:
        return Question([1], {"prompt": str(place), "verify": "exact", "answer": "a"}, "exact")

    def seeds(self, place: int, count: int) -> list[int]:
        return [100 * place + number for number in range(count)]


class SomeEqual:
    """In every third group alone do answers differ."""

    name, weight = "some", 1.0

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        return [float(int(a.text) // 100 % 3 == 2 and int(a.text) % 2) for a in answers]


@pytest.mark.parametrize(("rounds", "kept", "asked"), [(2, [2], 5), (5, [2, 5, 8], 9)])
def test_dynamic_sampling_asks_on_until_enough_groups_differ(rounds: int, kept: list[int], asked: int) -> None:
    settings = GRPOConfig(prompts=3, group=2, dynamic_sampling=True, most_rounds=rounds)
    explorer = Explorer(Counting(), Parrot(), [SomeEqual()], settings)  # type: ignore[arg-type]
    seen = explorer.explore(0, lambda: False)
    # Three are asked, one of which differs; then two, and neither does; then two, one of them; one; and one.
    assert [int(each.text) // 100 for each in seen.answers[::2]] == kept
    assert seen.place == asked
    assert len(seen.every) == 2 * asked
    assert seen.equal_groups == asked - len(kept)


def test_a_question_and_its_answers_are_functions_of_seed_and_place(run: Path, task: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for out, seed in ((first, 0), (second, 1)):
        grpo(
            run, task, out, (*QUIET, "grpo.steps=1", f"train.seed={seed}", "grpo.samples_shown=12"), None, (Letters(),)
        )
    ours, theirs = ((out / "samples.jsonl").read_text().splitlines() for out in (first, second))
    assert len({json.loads(line)["prompt"] for line in ours}) <= 3
    assert len(set(ours)) > 6  # a group's answers differ
    assert ours != theirs


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["grpo", *map(str, arguments)])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"prompt": "a", "verify": "exact"}], "line 1: has no text 'answer'"),
        ([{"prompt": "a", "verify": "exakt", "answer": "b"}], "did you mean 'exact'"),
        ([{"prompt": "word " * 99, "verify": "exact", "answer": "b"}], "the shortest prompt has"),
        ([], "empty"),
    ],
)
def test_tasks_that_cannot_be_asked_are_refused(
    rows: list[object], error: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "task.jsonl", rows)
    assert error in refused(capsys, run, "--task", file, "--out", tmp_path / "out", *QUIET)
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_asked_are_counted(
    run: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "word " * 99, "verify": "exact", "answer": "b"}
    file = tmp_path / "more.jsonl"
    file.write_text(task.read_text() + json.dumps(long) + "\n{}\n")
    grpo(run, file, tmp_path / "out", (*QUIET, "grpo.steps=1"))
    told = capsys.readouterr().err
    assert f"left out 1 questions that leave no room for 6 tokens of answer in the context of {CONTEXT}" in told
    assert "left out 1 rows; the first, line 10" in told


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("grpo.grop=5", "unknown key 'grpo.grop' (did you mean 'group'?)"),
        ("grpo.group=1", "grpo.group"),
        ("grpo.correct=0", "nothing would earn anything"),
        ("model.hidden_size=64", "leave model.* out"),
        ("data.fim_rate=0.5", "leave data.* and mixtures out"),
        ("schedule.bias_speed=[{until=1,value=0.1}]", "experts are not balanced here"),
        ("train.compile=true", "train.compile does not go"),
        ("grpo=null", "[grpo] and [rollout] cannot be left out"),
    ],
)
def test_overrides_that_make_no_sense_here_are_refused(
    override: str, error: str, run: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, run, "--task", task, "--out", tmp_path / "out", *QUIET, override)
    assert error in line
    assert f"grpo of {run}" in line or "earn anything" in line
    assert not (tmp_path / "out").exists()


def test_code_is_not_asked_for_where_nothing_isolates(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> None:
        raise BadInput("nothing here isolates code")

    monkeypatch.setattr("leanseek.eval.verify.Sandbox.find", nowhere)
    file = write(tmp_path / "task.jsonl", [{"prompt": "a", "verify": "code", "tests": ["assert f()"]}])
    assert "nothing here isolates code" in refused(capsys, run, "--task", file, "--out", tmp_path / "out", *QUIET)
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_begun_with_are_refused(
    run: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "train onto the run it begins with" in refused(capsys, run, "--task", task, "--out", run)
    assert "not a run" in refused(capsys, tmp_path / "nowhere", "--task", task, "--out", tmp_path / "out")
    grpo(run, task, tmp_path / "out", (*QUIET, "grpo.steps=1"))
    line = refused(capsys, run, "--task", task, "--out", tmp_path / "out", *QUIET, "grpo.group=5")
    assert "holds another config" in line
    assert "grpo.group" in line


# ── rewards that are other models ─────────────────────────────────────────────────────────────────────────────────


def test_a_reward_model_scores_what_was_drawn() -> None:
    vocabulary = tokenizer()
    base = model_of(vocabulary)
    model = RewardModel(base.config)
    model.begin_with(base)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    scorer = Scorer(model, vocabulary)
    asked = [{"role": "user", "content": "Who saw the fox?"}]
    said = [[*asked, {"role": "assistant", "content": content}] for content in ("Nobody.", "The old wall did.")]
    prompt = vocabulary.encode_chat(asked)
    drawn = [vocabulary.encode_chat(chat, add_generation_prompt=False)[len(prompt) :] for chat in said]
    answers = [Answer(Question(prompt, {}, ""), "", tokens, [], None, False) for tokens in drawn]
    assert Preferred(scorer)(answers) == pytest.approx(scorer.score(said))
    assert len(set(Preferred(scorer)(answers))) == 2


def test_a_judge_sees_the_answer_behind_the_thoughts_and_the_reference() -> None:
    seen: list[judge.Question] = []

    def grade(questions: Sequence[judge.Question]) -> list[float | None]:
        seen.extend(questions)
        return [0.5, None]

    some = [
        answer("<think>a</think>b", {"prompt": "p", "answer": "c"}),
        answer("<think>a", {"prompt": "q", "verify": "code"}),
    ]
    assert Graded(grade)(some) == [0.5, None]  # type: ignore[arg-type]
    assert seen == [judge.Question("p", "b", "c"), judge.Question("q", "<think>a", None)]


def test_the_language_of_thoughts_by_hand() -> None:
    row = {"prompt": "What is it?"}
    for text, share in (
        ("<think>one two</think>three", 1.0),
        ("<think>one две</think>три", 0.5),
        ("<think>7 + 5</think>12", 1.0),  # no words at all
        ("<think>one", 0.0),
    ):
        assert Language()([answer(text, row)]) == [share], text


def test_the_configuration_says_which_rewards_there_are(run: Path, tmp_path: Path) -> None:
    with Verifier() as verifier:
        names = [
            [reward.name for reward in asked_for(settings, verifier, tokenizer(), "cpu")]
            for settings in (
                GRPOConfig(),
                GRPOConfig(format=0.2, language=0.1),
                GRPOConfig(correct=0.0, judge_url="http://127.0.0.1:1/v1", judge_model="m"),
            )
        ]
        assert names == [["correct"], ["correct", "format", "language"], ["graded"]]
        with pytest.raises(BadInput, match="not a reward model"):
            asked_for(GRPOConfig(reward_model=str(run)), verifier, tokenizer(), "cpu")


# ── it learns ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Even:
    """The share of an answer's tokens with an even id: a half, for a model that knows nothing of it."""

    name, weight = "even", 1.0

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        return [sum(token % 2 == 0 for token in answer.tokens) / len(answer.tokens) for answer in answers]


@pytest.mark.slow
def test_twenty_steps_raise_what_answers_earn(run: Path, task: Path, tmp_path: Path) -> None:
    asked = (*QUIET, "grpo.steps=20", "grpo.prompts=8", "grpo.group=8", "grpo.max_tokens=8", "grpo.kl_weight=0.001")
    earned_by = {}
    for name, rate in (("learning", 1e-2), ("still", 0.0)):
        out = tmp_path / name
        grpo(run, task, out, (*asked, f"schedule.learning_rate=[{{until=1,value={rate}}}]"), None, (Even(),))
        earned_by[name] = [row["reward"] for row in rows_of(out)]
        assert max(row["logprob_gap"] for row in rows_of(out)) < 1e-4
    assert sum(earned_by["learning"][-4:]) / 4 > 0.75
    assert max(earned_by["still"]) < 0.6  # without learning there is nothing to see


def test_the_configuration_is_the_runs_tuned_down() -> None:
    before = read_recipe("nano", ("train.max_steps=5", 'stages.0.mixture={"code" = 1.0}', "data.fim_rate=0.1"))
    config = tuned(before)
    assert config.model == before.model
    assert config.grpo == GRPOConfig()
    assert config.counts is None
    assert config.train.mtp_length is None
    assert config.optimizer.embedding_rate == 1
    at = {share: knobs(config.schedule, share * 200, 200) for share in (0.0, 0.025, 0.05, 1.0)}
    rates = [now.learning_rate / 6e-3 for now in at.values()]
    assert rates == pytest.approx([0.0, 0.015, 0.03, 0.03])
    assert all(now.bias_speed == now.mtp_weight == 0 for now in at.values())
    assert config.train.balance_loss_alpha == 0
    assert config.train.checkpoint_every == 1  # a kill costs the step at hand and no more
    again = tuned(config)  # from a run that was rewarded already: as before
    assert again.schedule == config.schedule
    assert sft.tuned(config).grpo is None
    v3 = tuned(read_recipe("v3"))
    assert knobs(v3.schedule, 100, 200).learning_rate == pytest.approx(1e-6)


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_bit_identical(run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"A fox {i}", "verify": "regex", "answer": "[aeiou]"} for i in range(6)]
    task = write(tmp_path / "task.jsonl", rows)

    def command(out: Path) -> list[str]:
        asked = ["grpo", str(run), "--task", str(task), "--out", str(out), *QUIET, "grpo.steps=6"]
        return [sys.executable, "-m", "leanseek", *asked]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, timeout=600)
    out = tmp_path / "out"
    for wanted in (2, 4):
        with subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            metrics = out / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and f'"step": {wanted},' in metrics.read_text()):
                time.sleep(0.01)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command(out), check=True, capture_output=True, timeout=600)
    assert same(out, tmp_path / "whole", billed=("flops",))
