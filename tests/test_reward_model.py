"""Reward models: what is learnt of a pair, scores that do not depend on their neighbours, and a judge that fails."""

import json
import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leanseek import checkpoint
from leanseek.cli import main
from leanseek.config import BadInput, Stage, read_recipe
from leanseek.data.pairs import PairLoader, Pairs, open_pairs, read_pairs
from leanseek.hub import export_release
from leanseek.ops.loss import IGNORE
from leanseek.post.judge import Judge, Question
from leanseek.post.reward_model import RewardModel, Scorer, preference_loss, reward, reward_step
from leanseek.report import report
from leanseek.serve.llm import LLM
from leanseek.train.optim import build_optimizers
from leanseek.train.schedule import Knobs
from tests.pool import Pool
from tests.runs import make_run, model_of
from tests.runs import tokenizer as small_tokenizer
from tests.tiny import RECIPE


def pairs_of_sizes(*sizes: tuple[int, int]) -> Pairs:
    dice = np.random.default_rng(2)
    sides = [[dice.integers(3, 320, n) for n in side] for side in zip(*sizes, strict=True)]
    return Pairs(sides[0], sides[1], np.arange(len(sizes), dtype=np.uint64))


def test_the_loss_is_bradley_and_terrys() -> None:
    chosen = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    loss = preference_loss(chosen, rejected)
    by_hand = [math.log(1 + math.exp(-margin)) for margin in (1.5, 0.0, -2.0)]
    assert loss.item() == pytest.approx(sum(by_hand), rel=1e-14)
    loss.backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(margin)) for margin in (1.5, 0.0, -2.0)])


def double(seed: int = 0) -> tuple[RewardModel, Any]:
    config = read_recipe(str(RECIPE), ("train.init_std=0.3", "train.micro_batch=2", "optimizer.name=adamw"))
    model = RewardModel(config.model, torch.float64)
    model.initialise(0.3, torch.Generator().manual_seed(seed))
    return model.double(), config


@pytest.mark.parametrize("blind", [False, True])
def test_packed_pairs_learn_as_if_they_were_alone(blind: bool) -> None:
    model, config = double()
    pairs = pairs_of_sizes((9, 4), (3, 14), (6, 7), (2, 2), (12, 12), (5, 8))
    losses = []
    for a, b in zip(pairs.chosen, pairs.rejected, strict=True):
        scores = [model.scores(torch.from_numpy(x)[None], torch.arange(len(x))[None])[0, -1] for x in (a, b)]
        losses.append(-torch.nn.functional.logsigmoid(scores[0] - scores[1]))
    (sum(losses) / len(losses)).backward()  # type: ignore[union-attr, operator]
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    model.zero_grad(set_to_none=True)

    loader = PairLoader(pairs, (Stage(sequence_length=24),), 2 * 24 * 9, 0, 2)
    batch = loader.batch(0, 0, len(loader.rows(0)))
    assert batch.ids.shape[0] < 2 * len(pairs)
    tensors = [torch.from_numpy(array) for array in (batch.ids, batch.targets, batch.positions, batch.segments)]  # type: ignore[arg-type]
    if blind:
        tensors[3] = torch.ones_like(tensors[3])
    now = Knobs(learning_rate=0.0, batch_tokens=1, bias_speed=0.0, mtp_weight=0.0)
    result = reward_step(
        model, build_optimizers(model, config.optimizer), *tensors[:2], now, config, tensors[2], tensors[3]
    )
    same = result.loss == pytest.approx(sum(losses).item() / len(losses), rel=1e-12)  # type: ignore[union-attr]
    assert same == (not blind)
    assert (result.grad_norm == pytest.approx(norm, rel=1e-10)) == (not blind)


def test_a_row_and_the_one_below_hold_the_two_sides_of_the_same_pairs() -> None:
    pairs = pairs_of_sizes((9, 4), (3, 14), (6, 7), (2, 2), (12, 12), (5, 8))
    loader = PairLoader(pairs, (Stage(sequence_length=24),), 2 * 24 * 9, 0, 2)
    assert loader.samples(0) == 9
    seen = []
    batch = loader.batch(0, 0, len(loader.rows(0)))
    assert batch.segments is not None
    for row in range(0, len(batch.ids), 2):
        for segment in range(1, batch.segments[row].max() + 1):
            sides = [batch.ids[line][batch.segments[line] == segment].tolist() for line in (row, row + 1)]
            ends = [batch.targets[line][batch.segments[line] == segment].tolist() for line in (row, row + 1)]
            assert all(end == [IGNORE] * (len(side) - 1) + [1] for side, end in zip(sides, ends, strict=True))
            seen.append(sides)
    assert sorted(seen) == sorted([a.tolist(), b.tolist()] for a, b in zip(pairs.chosen, pairs.rejected, strict=True))
    parts = [loader.batch(0, 1, 4, rank, 2).ids for rank in range(2)]
    assert np.array_equal(np.concatenate(parts), loader.batch(0, 1, 4).ids)


def test_a_score_depends_on_its_own_chat_alone() -> None:
    vocabulary = small_tokenizer()
    base = model_of(vocabulary)
    model = RewardModel(base.config)
    model.begin_with(base)
    assert not model.score.weight.any()
    torch.nn.init.normal_(model.score.weight)
    scorer = Scorer(model, vocabulary)
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for asked, said in (("Who?", "The fox."), ("A wall", "was old and long and old."), ("fox", ""))
    ]
    together = scorer.score(chats)
    assert together == pytest.approx([scorer.score([chat])[0] for chat in chats], rel=1e-4)  # FP32
    ids = vocabulary.encode_chat(chats[0], add_generation_prompt=False)
    with torch.no_grad():
        hidden = base.eval()(torch.tensor([ids]), torch.arange(len(ids))[None])[0, -1]
        worth = float(hidden @ model.score.weight[0])
    assert together[0] == pytest.approx(worth, rel=1e-4)
    long = [{"role": "user", "content": "fox " * 60}, {"role": "assistant", "content": "The wall"}]
    assert math.isfinite(scorer.score([long])[0])
    with pytest.raises(BadInput, match="no message of the assistant"):
        scorer.score([chats[0][:1]])


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_three_ways_to_write_a_pair_are_one(tmp_path: Path) -> None:
    asked, good, bad = {"role": "user", "content": "Who?"}, "The fox.", "No."
    answers = [{"role": "assistant", "content": text} for text in (good, bad)]
    rows = [
        {"chosen": [asked, answers[0]], "rejected": [asked, answers[1]]},
        {"prompt": "Who?", "chosen": good, "rejected": bad},
        {"prompt": [asked], "chosen": answers[:1], "rejected": answers[1:]},
        {"chosen": f"\n\nHuman: Who?\n\nAssistant: {good}", "rejected": f"\n\nHuman: Who?\n\nAssistant: {bad}"},
        {"prompt": "Who?", "chosen": good, "rejected": good},
    ]
    vocabulary = small_tokenizer()
    pairs, same = read_pairs(write(tmp_path / "p.jsonl", rows), vocabulary)
    assert (len(pairs), same) == (4, 1)
    wanted = vocabulary.encode_chat([asked, answers[0]], add_generation_prompt=False)
    assert [ids.tolist() for ids in pairs.chosen] == [wanted] * 4
    assert len({tuple(ids.tolist()) for ids in pairs.rejected}) == len(set(pairs.keys.tolist())) == 1


BAD = {
    "not JSON": ("{", "not JSON"),
    "one side": ('{"chosen": "a"}', 'with "chosen" and "rejected"'),
    "no question": ('{"chosen": "a", "rejected": "b"}', 'neither messages nor a transcript that begins with "Human:"'),
    "a number": ('{"prompt": "a", "chosen": 1, "rejected": "b"}', '"chosen": must be a string or a list of messages'),
    "no answer": (
        json.dumps({"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}),
        '"chosen": must end with an answer',
    ),
    "ends with a question": (
        json.dumps({"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: b\n\nHuman: c"}),
        '"rejected": must end with an answer',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_told_by_its_line(name: str, tmp_path: Path) -> None:
    row, error = BAD[name]
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n' + row + "\n")
    with pytest.raises(BadInput, match="line 3: ") as told:
        read_pairs(file, small_tokenizer())
    assert error in str(told.value)


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    row = {"prompt": "Who?", "chosen": "The fox.", "rejected": "No."}
    file = write(tmp_path / "p.jsonl", [row, {**row, "chosen": "A fox."}])
    with pytest.raises(BadInput, match="pairs on two different questions, of at most 48 tokens: 2 of 2"):
        open_pairs(file, small_tokenizer(), 48)
    with pytest.raises(BadInput, match="0 of 2 are not longer"):
        open_pairs(file, small_tokenizer(), 3)


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def fox_pairs(count: int) -> list[dict[str, str]]:
    """The better answer is the one that names the fox."""
    dice = random.Random(0)
    words = ["wall", "rain", "was", "old", "long", "the", "and", "over", "nothing"]

    def some() -> list[str]:
        return dice.choices(words, k=dice.randint(1, 5))

    rows = []
    for i in range(count):
        good, bad = some(), some()
        good.insert(dice.randint(0, len(good)), "fox")
        rows.append({"prompt": f"{i} {' '.join(some())}", "chosen": " ".join(good), "rejected": " ".join(bad)})
    return rows


def learns(rank: int, world: int, run: Path, file: Path, out: Path, *overrides: str) -> dict[str, Any]:
    asked = ("train.dtype=fp32", "optimizer.name=adamw", "train.eval_every=1000", "train.tokens=8000")
    asked = (*asked, "schedule.batch_tokens=[{until=1,value=480}]", "schedule.learning_rate=[{until=1,value=3e-3}]")
    return reward(run, file, out, (*asked, "stages.0.sequence_length=48", "train.micro_batch=4", *overrides))


@pytest.mark.parametrize(("world", "mesh"), [(3, ()), (2, ("mesh.ep=2",))], ids=["dp", "ep"])
def test_ranks_learn_the_preference_that_one_process_learns(
    pool: Pool, tmp_path: Path, world: int, mesh: tuple[str, ...]
) -> None:
    model = model_of(small_tokenizer(), num_hidden_layers=2, first_k_dense_replace=1)
    run = make_run(tmp_path / "run", model, small_tokenizer())
    file = write(tmp_path / "pairs.jsonl", fox_pairs(100))
    smooth = "optimizer.eps=1e-3"  # else AdamW makes whole steps of gradients that are nothing but rounding
    one = learns(0, 1, run, file, tmp_path / "one", smooth)
    many = pool.run(world, learns, run, file, tmp_path / "many", smooth, *mesh)
    assert all(each == many[0] for each in many)
    for name in ("accuracy", "accuracy_low", "params_total", "tokens", "pairs"):
        assert many[0][name] == one[name], name
    ours, theirs = (Scorer.load(tmp_path / name).model for name in ("many", "one"))
    assert one["params_total"] == sum(parameter.numel() for parameter in theirs.parameters())
    began = Scorer.load(tmp_path / "one").model
    began.begin_with(model)
    moved = max(
        float((p - q).detach().abs().max()) for p, q in zip(theirs.parameters(), began.parameters(), strict=True)
    )
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-3 * moved, msg=name)


def test_a_preference_is_learnt_and_stopping_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", model_of(small_tokenizer()), small_tokenizer())
    file = write(tmp_path / "pairs.jsonl", fox_pairs(400))
    quick = ("schedule.batch_tokens=[{until=1,value=384}]", "optimizer.name=adamw", "train.eval_every=1000")
    quick = (*quick, "schedule.learning_rate=[{until=1,value=3e-3}]", "stages.0.sequence_length=48")
    quick = (*quick, "train.dtype=fp32")  # what is faster is measured: two runs may find otherwise
    asked = (*quick, "train.tokens=40000")
    receipt = reward(run, file, tmp_path / "out", asked)
    assert receipt["ended"] == "complete"
    assert receipt["accuracy"] > 0.9
    assert receipt["accuracy_low"] <= receipt["accuracy"] <= receipt["accuracy_high"]
    assert receipt["bpb"] is None
    assert (receipt["pairs"], receipt["held_out"]) == (400 - receipt["held_out"], receipt["held_out"])
    for name, limits in {"whole": ("none",), "parts": (3, "none")}.items():
        for limit in limits:
            reward(run, file, tmp_path / name, (*quick, "train.tokens=4000", f"train.max_steps={limit}"))
    ours, theirs = (Scorer.load(tmp_path / name).model.state_dict() for name in ("parts", "whole"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    good, bad = Scorer.load(tmp_path / "out").score(
        [
            [{"role": "user", "content": "1 wall"}, {"role": "assistant", "content": said}]
            for said in ("the fox was old", "the rain was old")
        ]
    )
    assert good > bad
    assert checkpoint.scores(tmp_path / "out")
    with pytest.raises(BadInput, match="is a reward model"):
        LLM.load(tmp_path / "out")
    assert report([tmp_path / "out"]).is_file()
    with pytest.raises(BadInput, match="reward model, which other tools have no place for"):
        export_release(tmp_path / "out", tmp_path / "exported")
    with pytest.raises(BadInput, match="not a reward model"):
        Scorer.load(run)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["reward", str(run), "--data", str(file), "--out", str(run)])
    assert end.value.code == 2
    assert "train onto the run it begins with" in capsys.readouterr().err


# ── a judge ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def endpoint(*replies: tuple[int, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives these replies in turn, the last one ever after; and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, said = replies[min(len(asked), len(replies)) - 1]
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def graded(text: str) -> tuple[int, dict[str, Any]]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def quick_judge(url: str, **changes: Any) -> Judge:
    return Judge(url, "j", **({"wait": 0.01, "attempts": 3, "at_once": 1} | changes))


def test_a_judge_that_is_busy_is_asked_again() -> None:
    told = [(503, b"later"), (429, {"error": "slow down"}), graded("Good.\nGrade: 7"), graded("**Grade:** 10")]
    with endpoint(*told) as (url, asked):
        judge = quick_judge(url, key="secret")
        assert judge([Question("Why?", "So."), Question("Who?", "Ada", "Ada found it")]) == [0.7, 1.0]
        assert (judge.judged, judge.skipped) == (2, 0)
    assert len(asked) == 4
    assert {(one["path"], one["key"], one["temperature"]) for one in asked} == {
        ("/v1/chat/completions", "Bearer secret", 0)
    }
    assert asked[2]["messages"][1]["content"] == "Question:\nWhy?\n\nAnswer:\nSo."
    assert asked[3]["messages"][1]["content"] == "Question:\nWho?\n\nReference:\nAda found it\n\nAnswer:\nAda"
    assert asked[2]["messages"][0] != asked[3]["messages"][0]


def test_what_it_never_judges_is_skipped_and_counted() -> None:
    bad = [graded("I will not say."), graded("Grade: 11"), (200, b"<html>"), (200, {"choices": []}), (500, b"")]
    with endpoint(graded("Grade: 3"), *bad, bad[0], graded("Grade: 4")) as (url, _):
        judge = quick_judge(url)
        assert judge([Question("a", "b")] * 4) == [0.3, None, None, 0.4]
        assert (judge.judged, judge.skipped) == (2, 2)


def test_a_dead_judge_and_a_wrong_address_are_told() -> None:
    with endpoint(graded("Grade: 3")) as (url, _):
        pass
    judge = quick_judge(url, dead_after=3, attempts=2)
    with pytest.raises(BadInput, match=r"gave no grade to any of 3 answers \(URLError.*see whether it is up"):
        judge([Question("a", "b")] * 9)
    with endpoint((404, b"no such model")) as (url, asked), pytest.raises(BadInput, match="HTTP 404 no such model"):
        quick_judge(url)([Question("a", "b")] * 2)
    assert len(asked) < 3
    with pytest.raises(BadInput, match="write its base address"):
        Judge("localhost:8000", "j")
