"""Distillation: which replies are fit to learn from, files that are whole, and a teacher's likeliest tokens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import leanseek.post.distill as distill_module
from leanseek import checkpoint
from leanseek.cli import main
from leanseek.config import BadInput, TeacherConfig, read_recipe
from leanseek.data.chats import read_chats
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.ask import Settings
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE, likeliest, linear_cross_entropy, linear_divergence
from leanseek.post.distill import REFLECT, Choice, distill
from leanseek.post.replies import Parts, language_share, longest_paragraph, parts_of
from leanseek.serve.engine import Engine
from leanseek.train.optim import build_optimizers
from leanseek.train.pretrain import pretrain
from leanseek.train.schedule import Knobs
from leanseek.train.step import train_step
from leanseek.train.teacher import Teacher
from tests.runs import make_run, model_of
from tests.runs import tokenizer as small_tokenizer
from tests.tiny import RECIPE, make_data

# ── replies ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        ("42", Parts(None, "42")),
        (" <think>\n6 · 7 </think>\n\n42 ", Parts("6 · 7", "42")),
        ("<think></think>42", Parts("", "42")),
        ("<think>6 · 7", None),
        ("<think>6 · 7</think>", None),
        ("<think>a</think>b</think>c", None),
        ("<think>a<think>b</think>c", None),
        ("so <think>a</think> 42", None),
        ("42<｜User｜>and", None),
        ("<think><｜tool▁calls▁begin｜></think>42", None),
        ("4\ufffd", None),
        ("", None),
    ],
)
def test_thoughts_and_answer(reply: str, parts: Parts | None) -> None:
    assert parts_of(reply) == parts


def test_languages_are_told_by_their_scripts() -> None:
    assert language_share("the sum of 2 and 3, so: 5", "How much is 2 + 3?") == 1
    assert language_share("so we have 答案 here", "How much?") == pytest.approx(4 / 6)
    assert language_share("答案是 five", "多少？") == pytest.approx(3 / 4)
    assert language_share("また明日", "漢字かな") == 1
    assert language_share("да, yes", "Почему?") == 1 / 2
    assert language_share("5", "2 + 3 =") == language_share("five", "2 + 3 =") == 1
    assert longest_paragraph("ab\n\nabc\nde\n \nf") == 6


# ── rejection sampling ────────────────────────────────────────────────────────────────────────────────────────────

ANSWERS = {
    "one": [("1", True), ("  1", True), ("It is 1", True), ("2", True), ("1 1 1 1 1 1 1 1 1 1", True)],
    "two": [("2", False), ("答案 is 2", True), ("<think>so 2", True), ("2\n```", True), ("The result is 2", True)],
    "three": [("4", True)] * 5,
}


def task_of(folder: Path, **more: Any) -> Path:
    rows = [{"prompt": name, "verify": "exact", "answer": str(i), **more} for i, name in enumerate(ANSWERS, start=1)]
    file = folder / "task.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "run", model_of(small_tokenizer(), max_position_embeddings=256), small_tokenizer())
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"chats": True}))
    return run


class Scripted:
    """Stands for the engine's draws: the model's answers are those above, whatever its weights would say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        monkeypatch.setattr(distill_module, "ask", self.ask)

    def ask(self, llm: Any, task: Any, settings: Settings, folder: Path, weights: str, chat: bool) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        with (folder / "records").open("w") as file:
            for number, item in enumerate(task.items):
                self.asked.append(item.question)
                replies = ANSWERS[item.question]
                right = [int(item.row["answer"] in reply) for reply, _ in replies]
                row = {"question": number, "right": right, "replies": [r for r, _ in replies]}
                file.write(json.dumps(row | {"ended": [int(e) for _, e in replies]}) + "\n")
        return {"records": str(folder / "records"), "too_long": 0, "hung": 0, "n": 3}


def test_what_is_kept_and_why_the_rest_is_not(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch)
    out = tmp_path / "chats.jsonl"
    settings = Settings(samples=5, temperature=1.0, system="Reflect.")
    counts = distill(run, task_of(tmp_path), out, settings, Choice(keep=1, longest=17))
    assert counts == {
        "kept": 2,
        "more than are kept": 2,
        "wrong": 6,
        "cut off": 1,
        "the same again": 1,
        "too long": 1,
        "languages mixed": 1,
        "ill formed": 1,
    }
    rows = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    system = {"role": "system", "content": "Reflect."}
    assert rows == [
        [system, {"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}],
        [system, {"role": "user", "content": "two"}, {"role": "assistant", "content": "2\n```"}],
    ]
    read_chats(out, small_tokenizer())  # what sft reads


def test_v3s_two_kinds_of_sample(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch)
    task = task_of(tmp_path, solution="Count, and see.")
    out = tmp_path / "chats.jsonl"
    distill(run, task, out, Settings(samples=5, temperature=1.0, system=REFLECT), Choice(keep=2))
    rows = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    of_one = [row for row in rows if any(m["content"] == "one" for m in row)]
    assert [[m["role"] for m in row] for row in of_one] == [["user", "assistant"]] + [
        ["system", "user", "assistant"]
    ] * 2
    assert of_one[0][1]["content"] == "Count, and see."
    assert {row[0]["content"] for row in of_one[1:]} == {REFLECT}
    assert not any(m["content"] == "three" for row in rows for m in row)  # never answered rightly
    distill(run, task, out, Settings(samples=5, temperature=1.0), Choice(keep=2))  # without a system prompt
    rows = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert {tuple(m["role"] for m in row) for row in rows} == {("user", "assistant")}
    assert not any(m["content"] == "Count, and see." for row in rows for m in row)


def test_nothing_fit_writes_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch)
    monkeypatch.setitem(ANSWERS, "one", [("0", True)] * 5)
    monkeypatch.setitem(ANSWERS, "two", [("0", True)] * 5)
    out = tmp_path / "chats.jsonl"
    with pytest.raises(BadInput, match=r"no reply of .* is fit to learn from \(15 wrong\): nothing is written"):
        distill(run, task_of(tmp_path), out)
    assert not out.exists()
    assert not (tmp_path / ".writing-chats.jsonl").exists()


def test_it_asks_with_the_system_prompt_and_goes_on_where_it_was_stopped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine itself, on weights that know nothing: any answer that is not empty counts as right."""
    rows = [{"prompt": word, "verify": "regex", "answer": r"(?s).+"} for word in ("fox", "wall", "rain")]
    task, out = tmp_path / "task.jsonl", tmp_path / "chats.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(samples=2, temperature=1.0, max_tokens=5, system="The fox.")
    prompts: list[str] = []
    submit = Engine.submit

    def watched(self: Engine, prompt: list[int], *rest: Any) -> Any:
        prompts.append(self.tokenizer.decode(prompt))
        if len(prompts) == 5:
            raise KeyboardInterrupt
        return submit(self, prompt, *rest)

    monkeypatch.setattr(Engine, "submit", watched)
    monkeypatch.setattr("leanseek.eval.ask.AT_ONCE", 2)
    loose = Choice(one_language=0.0)
    monkeypatch.setattr(distill_module, "fit", lambda item, row, *_: row["replies"])
    with pytest.raises(KeyboardInterrupt):
        distill(run, task, out, settings, loose)
    assert not out.exists()
    assert "The fox.<｜User｜>fox<｜Assistant｜>" in prompts[0]
    distill(run, task, out, settings, loose)
    assert len(prompts) == 7  # the third question's two, again
    written = out.read_text()
    distill(run, task, tmp_path / "at-once.jsonl", settings, loose)
    assert (tmp_path / "at-once.jsonl").read_text() == written


def test_distill_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = task_of(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "verify": "exact"}\n')
    for arguments, error in (
        (["--task", task, "--out", tmp_path / "chats.txt"], "chats are written to a .jsonl file"),
        (["--task", task, "--out", tmp_path / "folder.jsonl"], "there is a folder of that name"),
        (["--task", tmp_path / "bad.jsonl", "--out", tmp_path / "c.jsonl"], "line 1: has no text 'answer'"),
        (["--task", task, "--out", tmp_path / "c.jsonl", "--keep", 0], "keep must be at least 1"),
        (["--task", task, "--out", tmp_path / "c.jsonl", "--one-language", 2], "one_language is a share"),
        (["--task", task, "--out", tmp_path / "c.jsonl", "--temperature", 0], "would be the same"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["distill", str(run), *map(str, arguments)])
        assert end.value.code == 2
        assert error in capsys.readouterr().err
        assert not (tmp_path / "c.jsonl").exists()


# ── a teacher ─────────────────────────────────────────────────────────────────────────────────────────────────────


def divergence_by_hand(hidden: Tensor, weight: Tensor, p: Tensor, k: int) -> Tensor:
    """KL over the k likeliest tokens of p [N, V] and the rest as one, from full distributions."""
    q, best = (hidden @ weight.T).softmax(-1), p.topk(k).indices
    some_p, some_q = p.gather(1, best), q.gather(1, best)
    rest_p, rest_q = 1 - some_p.sum(1), 1 - some_q.sum(1)
    rest = torch.where(rest_p > 1e-15, rest_p * (rest_p / rest_q).log(), 0.0) if k < p.shape[1] else torch.zeros(())
    return ((some_p * (some_p / some_q).log()).sum(1) + rest).sum()


@pytest.mark.parametrize("k", [1, 3, 10, 11])
def test_the_divergence_and_its_gradient_are_the_closed_form(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanseek.ops.loss._LOGITS_IN_CACHE", 22)  # two rows at a time
    torch.manual_seed(k)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    p = (2 * torch.randn(5, 11, dtype=torch.float64)).softmax(-1)
    best = p.topk(k)
    found, wanted = [], []
    for results, loss in (
        (found, lambda h, w: linear_divergence(h, w, best.indices, best.values.log())),
        (wanted, lambda h, w: divergence_by_hand(h, w, p, k)),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total = loss(h, w)
        (0.7 * total).backward()
        results += [total.detach(), h.grad, w.grad]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    if k == 11:  # every token known: the divergence itself
        whole = F.kl_div((hidden @ weight.T).log_softmax(-1), p, reduction="sum")
        torch.testing.assert_close(found[0], whole, rtol=1e-12, atol=0)


def test_a_student_that_agrees_has_nothing_to_learn() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    hidden.requires_grad_()
    ids, logprobs = likeliest(hidden, weight, 4)
    assert torch.equal(ids, (hidden @ weight.T).topk(4).indices)
    loss = linear_divergence(hidden, weight, ids, logprobs)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-12
    assert likeliest(hidden[:0], weight, 4)[0].shape == (0, 4)


def test_a_step_mixes_the_text_and_the_teacher() -> None:
    config = read_recipe(str(RECIPE), ("train.init_std=0.3", "train.balance_loss_alpha=0", "optimizer.name=adamw"))
    students, weight = [], 0.3
    for seed in (0, 0, 1):
        model = Transformer(config.model, torch.float64)
        model.initialise(0.3, torch.Generator().manual_seed(seed))
        students.append(model.double())
    student, twin, teaching = students
    teacher = Teacher(teaching.eval(), 300, TeacherConfig(run="", top_k=5, weight=weight))
    ids = torch.randint(3, 300, (7, 12), generator=torch.Generator().manual_seed(3))
    targets = torch.where(torch.rand(7, 12, generator=torch.Generator().manual_seed(4)) < 0.5, ids.roll(-1, 1), IGNORE)
    now = Knobs(learning_rate=0.0, batch_tokens=1, bias_speed=0.0, mtp_weight=0.0)
    result = train_step(
        student, build_optimizers(student, config.optimizer), ids, targets, now, config, teacher=teacher
    )

    places, asked = torch.arange(12).expand_as(ids), targets != IGNORE
    assert twin.lm_head is not None
    assert teaching.lm_head is not None
    hidden = twin(ids, places)[asked]
    text = linear_cross_entropy(hidden, twin.lm_head.weight, targets[asked]) / asked.sum()
    with torch.no_grad():
        p = (teaching(ids, places)[asked] @ teaching.lm_head.weight[:300].T).softmax(-1)
    p = F.pad(p, (0, twin.lm_head.weight.shape[0] - 300))
    told = divergence_by_hand(hidden, twin.lm_head.weight, p, 5) / asked.sum()
    ((1 - weight) * text + weight * told).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None))
    assert (result.loss, result.divergence) == pytest.approx((text.item(), told.item()), rel=1e-10)
    assert result.grad_norm == pytest.approx(norm, rel=1e-8)


def test_a_teacher_helps_a_run_and_is_billed(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    asked = ("train.dtype=fp32", "train.eval_every=1000", "train.checkpoint_every=1000", "train.tokens=2048")
    pretrain(read_recipe(str(RECIPE), asked), data, tmp_path / "teacher")
    alone = pretrain(read_recipe(str(RECIPE), asked), data, tmp_path / "alone")
    taught = read_recipe(str(RECIPE), (*asked, f"teacher.run={tmp_path / 'teacher'}", "teacher.top_k=8"))
    receipt = pretrain(taught, data, tmp_path / "taught")
    assert receipt["flops"] > 1.2 * alone["flops"]
    rows = [json.loads(line) for line in (tmp_path / "taught" / "metrics.jsonl").read_text().splitlines()]
    told = [row["divergence"] for row in rows if "loss" in row]
    assert len(told) == receipt["steps"]
    assert told[-1] < told[0]
    assert checkpoint.read_run(tmp_path / "taught").teacher == taught.teacher


def test_a_teacher_that_cannot_teach_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    other = make_run(tmp_path / "other", model_of(small_tokenizer()), small_tokenizer())
    with pytest.raises(BadInput, match="has another tokenizer"):
        pretrain(read_recipe(str(RECIPE), (f"teacher.run={other}",)), data, tmp_path / "run")
    with pytest.raises(BadInput, match="not a run"):
        pretrain(read_recipe(str(RECIPE), (f"teacher.run={tmp_path / 'nowhere'}",)), data, tmp_path / "run")
    Tokenizer.load(data / "tokenizer").save(other / "tokenizer")
    asked = (f"teacher.run={other}", "stages.0.sequence_length=64")
    with pytest.raises(BadInput, match="reads 48 tokens, a row here has 64"):
        pretrain(read_recipe(str(RECIPE), asked), data, tmp_path / "run")
    with pytest.raises(BadInput, match="top_k"):
        read_recipe(str(RECIPE), (f"teacher.run={other}", "teacher.top_k=0"))
    assert not (tmp_path / "run").exists()
