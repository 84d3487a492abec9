"""Post-training: what is learnt of a chat, samples that do not see each other, and a run that answers."""

import gzip
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zstandard
from safetensors.torch import load_file
from torch import Tensor

import leanseek
import leanseek.train.step as step
from leanseek import checkpoint
from leanseek.cli import main
from leanseek.config import BadInput, Config, Stage, read_config, read_recipe
from leanseek.data.chats import HELD_OUT, MOST_HELD_OUT, ChatLoader, Chats, held_out, open_chats, read_chats
from leanseek.data.tokenizer import BOS, EOS, Tokenizer
from leanseek.eval.harness import evaluate
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE
from leanseek.plan.count import flops_per_token
from leanseek.post.sft import sft, tuned
from leanseek.serve.sampling import Sampling
from leanseek.train.optim import build_optimizers
from leanseek.train.pretrain import pretrain
from leanseek.train.schedule import Knobs, knobs
from leanseek.train.step import loss_sums, targets_of_depth, train_step
from tests.tiny import RECIPE, make_data, story

U, A = "<｜User｜>", "<｜Assistant｜>"
LENGTH = 64
QUIET = ("train.dtype=fp32", "train.eval_every=1000", "train.checkpoint_every=1000")


def said(*turns: str) -> list[dict[str, Any]]:
    """A chat of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def some_chats(count: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Different chats of one to three questions and answers, some with a system message."""
    dice = random.Random(seed)
    chats = []
    for i in range(count):
        turns = [story(dice).split(".")[0][: dice.randint(2, 30)] for _ in range(2 * dice.randint(1, 3))]
        system = [{"role": "system", "content": "Be brief."}] if dice.random() < 0.3 else []
        chats.append([*system, *said(f"{i}", *turns[1:])])
    return chats


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was pre-trained for a few steps: with moments, a routing bias and MTP."""
    folder = tmp_path_factory.mktemp("pretrained")
    asked = (f"stages.0.sequence_length={LENGTH}", "train.max_steps=4", *QUIET)
    pretrain(read_recipe(str(RECIPE), asked), make_data(folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def tokenizer(run: Path) -> Tokenizer:
    return Tokenizer.load(run / "tokenizer")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("chats") / "chats.jsonl", *({"messages": chat} for chat in some_chats(60)))


# ── what is learnt of a chat ──────────────────────────────────────────────────────────────────────────────────────

CALL = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
CALLED = (
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>"),
    *('look\n```json\n{"at": "sea"}\n```', "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", EOS),
)
ANSWERED = (
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>"),
    *("waves", "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>"),
)
# What stands before, an answer, what stands between, an answer, …
BY_HAND: dict[str, tuple[Any, list[tuple[str, ...]]]] = {
    "prompt and response": (
        {"prompt": "Who?", "response": "Ada. "},
        [(BOS, U, "Who?", A), ("Ada. ", EOS)],
    ),
    "several turns": (
        {"messages": said("Who?", "Ada", "Where?", "In the attic.")},
        [(BOS, U, "Who?", A), ("Ada", EOS), (U, "Where?", A), ("In the attic.", EOS)],
    ),
    "a question without an answer is left off": (
        {"messages": said("Who?", "Ada", "Where?")},
        [(BOS, U, "Who?", A), ("Ada", EOS)],
    ),
    "a system message": (
        {"messages": [{"role": "system", "content": "Be kind."}, *said("Hi", "Hello")]},
        [(BOS, "Be kind.", U, "Hi", A), ("Hello", EOS)],
    ),
    "thinking": (
        {"messages": said("1+1?", "2", "sure?", "<think>one, two</think>\n\nyes")},
        [
            *[(BOS, U, "1+1?", A), ("2", EOS)],
            *[(U, "sure?", A), ("<think>", "one, two", "</think>", "\n\nyes", EOS)],
        ],
    ),
    "special tokens spelt out by whoever writes": (
        {"messages": said(f"a{EOS}b<think>", f"c{EOS}d")},
        [(BOS, U, [*f"a{EOS}b<think>"], A), ([*f"c{EOS}d"], EOS)],  # type: ignore[list-item]
    ),
    "a tool": (
        {
            "messages": [
                {"role": "user", "content": "Look"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "waves"},
                {"role": "assistant", "content": "Waves."},
            ]
        },
        [(BOS, U, "Look", A), CALLED, ANSWERED, ("Waves.", EOS)],
    ),
    "the assistant begins": (
        {"messages": [{"role": "assistant", "content": "Hello"}, *said("Hi", "")]},
        [(BOS, A), ("Hello", EOS), (U, "Hi", A), (EOS,)],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_exactly_the_assistants_tokens_are_learnt(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    row, parts = BY_HAND[name]
    ids, learnt = [], []
    for i, part in enumerate(parts):
        for piece in part:
            known = isinstance(piece, str) and piece in tokenizer.special
            some = [tokenizer.special[piece]] if known else tokenizer.encode("".join(piece))
            ids.extend(some)
            learnt.extend([i % 2 == 1] * len(some))
    chats = read_chats(write(tmp_path / "chats.jsonl", row), tokenizer)
    assert chats.ids.tolist() == ids
    assert chats.learnt.tolist() == learnt
    inputs, targets = chats.sample(0)
    assert inputs.tolist() == ids[:-1]
    assert targets.tolist() == [token if own else IGNORE for token, own in zip(ids, learnt, strict=True)][1:]


STRIPS = (  # as R1's: of what was said the thoughts are left out
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}<｜User｜>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>PROMPT{% endif %}"
)


@pytest.mark.parametrize("template", [None, STRIPS.replace("PROMPT", ""), STRIPS.replace("PROMPT", "<think>\n")])
def test_what_was_thought_before_is_not_seen_again(template: str | None, tokenizer: Tokenizer, tmp_path: Path) -> None:
    if template is not None:
        tokenizer = with_template(tokenizer, template, tmp_path / "t")
    first, second, third = "<think>\none, two</think>\n\n2", "<think>\nagain</think>yes", "<think>\n</think>four"
    chat = said("1+1?", first, "sure?", second, "and 2+2?", third, "thanks")
    chats = read_chats(write(tmp_path / "chats.jsonl", {"messages": chat}), tokenizer)
    assert len(set(chats.keys.tolist())) == 1
    wanted = [
        (f"{BOS}{U}1+1?{A}", f"{first}{EOS}"),
        (f"{BOS}{U}1+1?{A}2{EOS}{U}sure?{A}", f"{second}{EOS}"),
        (f"{BOS}{U}1+1?{A}2{EOS}{U}sure?{A}yes{EOS}{U}and 2+2?{A}", f"{third}{EOS}"),
    ]
    thinks = template is not None and "<think>" in template
    for i, (before, answer) in enumerate(wanted):
        own = slice(chats.starts[i], chats.starts[i + 1])
        ids, learnt = chats.ids[own], chats.learnt[own]
        if thinks:  # the prompt has begun the answer
            before, answer = before + "<think>\n", answer.removeprefix("<think>\n")
        assert tokenizer.decode(ids[~learnt].tolist()) == before
        assert tokenizer.decode(ids[learnt].tolist()) == answer
        assert learnt.tolist() == sorted(learnt.tolist())
        assert tokenizer.special["</think>"] in ids[learnt].tolist()
        asked = [m | {"content": m["content"].split("</think>")[-1].lstrip()} for m in chat[: 2 * i + 1]]
        assert tokenizer.encode_chat(asked) == ids[~learnt].tolist()
    assert len(chats) == 3


def with_template(tokenizer: Tokenizer, template: str, folder: Path) -> Tokenizer:
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]"
TEMPLATES = {
    "ours": None,
    "no special tokens": PLAIN + "{% endif %}",
    "words between": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}Answer:\n{{ m.content }}\n"
    "{% else %}Question: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_what_follows_its_prompt(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """By the definition, turn by turn: what a model is given when it is asked is what stands before the answer."""
    if (template := TEMPLATES[name]) is not None:
        tokenizer = with_template(tokenizer, template, tmp_path / "t")
    chats = some_chats(40)
    for messages, (ids, answers) in zip(chats, tokenizer.encode_chat_turns(chats), strict=True):
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        last = turns[-1]
        assert ids == tokenizer.encode_chat(messages[: last + 1], add_generation_prompt=False)
        assert len(answers) == len(turns)
        for i, (first, after) in zip(turns, answers, strict=True):
            assert tokenizer.encode_chat(messages[:i]) == ids[:first]
            assert tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False) == ids[:after]


def test_templates_that_do_more_than_append_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = said("Who?", "<think>hm</think>Ada", "Where?", "Here")
    each, prompt = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}"
    forgets = each + "{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    drops = each + "{{ m.content }}" + prompt + "A{% endif %}"
    assert len(tokenizer.encode("the")) == 1  # which a template cuts in two
    joins = each + "{{ 'the' if m.role == 'assistant' }}" + prompt + "t{% endif %}"
    tears = each + "{{ '<｜User｜>' if m.role == 'assistant' }}" + prompt + "<｜U{% endif %}"
    for i, (template, error) in enumerate(
        [
            (forgets, "rewrites what stands before message 4"),
            (drops, "rewrites what stands before message 2"),
            (joins, "where tokens join"),
            (tears, "inside a special token"),
            ("{{ raise_exception('no') }}", "the template refuses these messages: no"),
        ]
    ):
        with pytest.raises(BadInput, match=error):
            with_template(tokenizer, template, tmp_path / str(i)).encode_chat_turns([said("Who?", "x"), chat])


# ── files, the split ──────────────────────────────────────────────────────────────────────────────────────────────


def test_packed_files_read_alike(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = data.read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(text))
    (tmp_path / "d.jsonl").write_bytes(text.replace(b"\n", b"\r\n\n"))
    plain = read_chats(data, tokenizer)
    assert len(plain) == 60
    for name in ("c.jsonl.gz", "c.jsonl.zst", "d.jsonl"):
        other = read_chats(tmp_path / name, tokenizer)
        for field in ("ids", "learnt", "starts", "keys"):
            assert np.array_equal(getattr(other, field), getattr(plain, field)), (name, field)


def test_what_is_held_out_follows_content_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats = some_chats(300, seed=3)
    rows = [{"messages": chat} for chat in chats]
    first = read_chats(write(tmp_path / "a.jsonl", *rows), tokenizer)
    turned = read_chats(write(tmp_path / "b.jsonl", *reversed(rows)), tokenizer)
    assert held_out(first.keys).tolist() == held_out(turned.keys).tolist()[::-1]
    assert 0 < held_out(first.keys).sum() < 20
    two_forms = ({"prompt": "a", "response": "b"}, {"messages": said("a", "b")})
    keys = read_chats(write(tmp_path / "c.jsonl", *two_forms), tokenizer).keys
    assert keys[0] == keys[1]


def test_how_many_are_held_out() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    assert held_out(keys[:2]).sum() == held_out(keys[:3]).sum() == 1
    assert 0.8 < held_out(keys[:10_000]).sum() / (HELD_OUT * 10_000) < 1.2
    assert held_out(keys).sum() == MOST_HELD_OUT
    twice = np.concatenate([keys[:500], keys[:500]])
    assert held_out(twice).tolist() == 2 * held_out(keys[:500]).tolist()


def test_no_chat_is_on_both_sides_and_long_ones_on_neither(tokenizer: Tokenizer, tmp_path: Path) -> None:
    short = some_chats(200)
    rows = [{"messages": chat} for chat in [*short, *short]] + [{"prompt": "long", "response": "word " * LENGTH}]
    file = write(tmp_path / "c.jsonl", *rows)
    every, longest = read_chats(file, tokenizer), 48
    training, validation, too_long = open_chats(file, tokenizer, longest)
    assert too_long == (every.lengths > longest).sum() > 1
    assert len(training) + len(validation) + too_long == len(every)
    assert not set(training.keys) & set(validation.keys)
    assert set(training.keys) | set(validation.keys) == set(every.keys[every.lengths <= longest])
    whole = {key: every.sample(i) for i, key in enumerate(every.keys.tolist())}
    for chats in (training, validation):
        for i, key in enumerate(chats.keys.tolist()):
            assert [part.tolist() for part in chats.sample(i)] == [part.tolist() for part in whole[key]]


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def loader_of(chats: Chats, width: int = LENGTH, epochs: int = 3, seed: int = 0) -> ChatLoader:
    stages = (Stage(sequence_length=width),)
    rows = len(ChatLoader(chats, stages, width, seed, 2).rows(0))
    return ChatLoader(chats, stages, epochs * rows * width, seed, 2)


def pieces_of(loader: ChatLoader, first: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every segment of some rows, with the rules of a row checked."""
    batch, found = loader.batch(0, first, count), []
    assert batch.segments is not None
    assert batch.positions is not None
    for ids, targets, segments, positions in zip(
        batch.ids, batch.targets, batch.segments, batch.positions, strict=True
    ):
        last = int(segments.max())
        assert segments.tolist() == sorted(segments[segments > 0].tolist()) + [0] * int((segments == 0).sum())
        for segment in range(1, last + 1):
            own = segments == segment
            assert positions[own].tolist() == list(range(own.sum()))
            found.append((ids[own].tolist(), targets[own].tolist()))
        assert (targets[segments == 0] == IGNORE).all()
        assert (ids[segments == 0] == 2).all()
    return found


def test_an_epoch_has_every_chat_whole_and_once(data: Path, tokenizer: Tokenizer) -> None:
    chats = open_chats(data, tokenizer, LENGTH)[0]
    loader = loader_of(chats)
    rows = len(loader.rows(0))
    wanted = sorted(tuple(map(np.ndarray.tolist, chats.sample(i))) for i in range(len(chats)))
    epochs = [pieces_of(loader, epoch * rows, rows) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [wanted] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows < 1.2 * chats.lengths.sum() / LENGTH  # well filled
    assert loader.samples(0) == 3 * rows


def test_a_batch_is_a_pure_function_that_the_ranks_share(data: Path, tokenizer: Tokenizer) -> None:
    chats = open_chats(data, tokenizer, LENGTH)[0]

    def arrays(loader: ChatLoader, *place: int) -> list[np.ndarray]:
        batch = loader.batch(0, *place)
        return [batch.ids, batch.targets, batch.positions, batch.segments]  # type: ignore[list-item]

    whole = arrays(loader_of(chats), 5, 13)
    late = loader_of(chats)
    late.batch(0, 40, 2)
    for ours, theirs in zip(arrays(late, 5, 13), whole, strict=True):
        assert np.array_equal(ours, theirs)
    parts = [arrays(loader_of(chats), 5, 13, rank, 4) for rank in range(4)]
    for ours, theirs in zip(map(np.concatenate, zip(*parts, strict=True)), whole, strict=True):
        assert np.array_equal(ours, theirs)
    other = arrays(loader_of(chats, seed=1), 5, 13)
    assert not np.array_equal(other[0], whole[0])


# ── isolation ─────────────────────────────────────────────────────────────────────────────────────────────────────

WEIGHT = 0.3


def double_model(*overrides: str) -> tuple[Transformer, Config]:
    config = read_recipe(str(RECIPE), ("train.init_std=0.3", "train.balance_loss_alpha=0", *overrides))
    model = Transformer(config.model, torch.float64)
    model.initialise(config.train.init_std, torch.Generator().manual_seed(0))
    return model.double().train(), config


def chats_of_sizes(*sizes: int) -> Chats:
    """Random tokens, about half of them learnt, the last one always."""
    dice = np.random.default_rng(1)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    learnt = dice.random(starts[-1]) < 0.5
    learnt[starts[1:] - 1] = True
    return Chats(dice.integers(3, 320, starts[-1]), learnt, starts, np.arange(len(sizes), dtype=np.uint64))


def gradients(model: Transformer, sums: list[list[Tensor]], counts: list[int]) -> tuple[list[float], dict[str, Tensor]]:
    """Mean losses, and gradients of the objective, from the sums of several passes."""
    means = [sum(depth) / count for depth, count in zip(zip(*sums, strict=True), counts, strict=True)]
    model.zero_grad()
    (means[0] + WEIGHT / len(model.mtp) * sum(means[1:])).backward()  # type: ignore[operator]
    return [mean.item() for mean in means], {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def alone(model: Transformer, chats: Chats) -> tuple[list[float], dict[str, Tensor]]:
    """Every sample by itself in a row of its own length: no padding, no segments."""
    depths = len(model.mtp)
    sums, counts = [], [0] * (depths + 1)
    for i in range(len(chats)):
        ids, targets = (torch.from_numpy(array)[None] for array in chats.sample(i))
        sums.append(loss_sums(model, ids, targets))
        for k in range(depths + 1):
            counts[k] += int((targets[:, k:] != IGNORE).sum())
    return gradients(model, sums, counts)


def packed(model: Transformer, chats: Chats) -> tuple[list[float], dict[str, Tensor]]:
    loader = loader_of(chats, width=24)
    rows = len(loader.rows(0))
    assert rows < len(chats)
    batch = loader.batch(0, 0, rows)
    ids, targets, positions, segments = (
        torch.from_numpy(array) for array in (batch.ids, batch.targets, batch.positions, batch.segments)
    )
    depths = range(len(model.mtp) + 1)
    counts = [int((step.targets_of_depth(targets, segments, k) != IGNORE).sum()) for k in depths]
    return gradients(model, [step.loss_sums(model, ids, targets, positions, segments)], counts)


def blind(model: Transformer, ids: Tensor, targets: Tensor, positions: Tensor, segments: Tensor) -> list[Tensor]:
    """Counts targets as it should, but its attention ignores the segments."""
    forward, further = model.forward, model.predict_further
    model.forward = lambda ids, positions, segments: forward(ids, positions)  # type: ignore[method-assign]
    model.predict_further = lambda h, ids, positions, segments: further(h, ids, positions)  # type: ignore[method-assign]
    try:
        return loss_sums(model, ids, targets, positions, segments)
    finally:
        del model.forward, model.predict_further


def over_borders(targets: Tensor, segments: Tensor | None, depth: int) -> Tensor:
    return targets[:, depth:]


FAULTS = [None, ("loss_sums", blind), ("targets_of_depth", over_borders)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault and fault[1].__name__)
def test_packed_samples_learn_as_if_they_were_alone(
    fault: tuple[str, Callable[..., Any]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = double_model("model.num_nextn_predict_layers=2")
    chats = chats_of_sizes(9, 4, 14, 6, 7, 25, 5)
    losses, wanted = alone(model, chats)
    if fault is not None:
        monkeypatch.setattr(step, *fault)
    ours, found = packed(model, chats)
    assert found.keys() == wanted.keys()
    apart = max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)
    same = apart < 1e-10 and ours == pytest.approx(losses, rel=1e-12)  # FP64: sums in another order, nothing else
    assert same == (fault is None)
    if fault is not None:
        assert apart > 1e-3


def test_a_step_on_packed_rows_is_a_step_on_the_samples() -> None:
    model, config = double_model("optimizer.name=adamw", "train.micro_batch=2")
    chats = chats_of_sizes(9, 4, 14, 6, 7, 25, 5)
    (loss, mtp_loss), wanted = alone(model, chats)
    loader = loader_of(chats, width=24)
    batch = loader.batch(0, 0, len(loader.rows(0)))
    model.zero_grad(set_to_none=True)
    for router in model.routers().values():
        router.load.zero_()
    ids, targets, positions, segments = (
        torch.from_numpy(array) for array in (batch.ids, batch.targets, batch.positions, batch.segments)
    )
    now = Knobs(learning_rate=0.0, batch_tokens=1, bias_speed=0.0, mtp_weight=WEIGHT)
    result = train_step(
        model, build_optimizers(model, config.optimizer), ids, targets, now, config, positions, segments
    )
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in wanted.values()))
    assert (result.loss, result.mtp_loss) == pytest.approx((loss, mtp_loss), rel=1e-12)
    assert result.grad_norm == pytest.approx(norm, rel=1e-10)


def test_mtp_ends_where_its_sample_ends() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0]])
    targets = torch.tensor([[11, IGNORE, 13, 21, 22, 31, IGNORE, IGNORE]])
    x = IGNORE
    assert targets_of_depth(targets, segments, 0).tolist() == targets.tolist()
    assert targets_of_depth(targets, segments, 1).tolist() == [[x, 13, x, 22, x, x, x]]
    assert targets_of_depth(targets, segments, 2).tolist() == [[13, x, x, x, x, x]]
    assert targets_of_depth(targets, None, 2).tolist() == targets[:, 2:].tolist()


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tensors_of(run: Path) -> dict[str, Tensor]:
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    files = sorted(newest.path.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def test_the_configuration_is_pretrainings_tuned_down() -> None:
    before = read_recipe("nano", ("train.max_steps=5", 'stages.0.mixture={"code" = 1.0}', "data.fim_rate=0.1"))
    config = tuned(before)
    assert config.model == before.model
    assert config.optimizer == before.optimizer.model_copy(update={"embedding_rate": 1.0})
    at = {share: knobs(config.schedule, share * 1e6, 10**6) for share in (0.0, 0.015, 0.03, 0.515, 1.0)}
    rates = [now.learning_rate for now in at.values()]
    peak = 0.3 * 6e-3  # of 1.6e-2 no more
    assert rates == pytest.approx([0, peak / 2, peak, 0.55 * peak, 0.1 * peak])  # half way down the cosine: 0.55
    assert {(now.bias_speed, now.mtp_weight, now.batch_tokens) for now in at.values()} == {(0.0, 0.1, 4096)}
    assert (config.train.max_steps, config.train.balance_loss_alpha, config.data.fim_rate) == (None, 0.0, 0.0)
    assert config.stages == (Stage(sequence_length=256),)
    assert before.counts is not None
    assert config.counts is None
    assert config.train.mtp_length is None
    for large in ("v2-lite", "v3"):  # at that size V3's own (report §5.1)
        schedule = tuned(read_recipe(large)).schedule
        rates = [knobs(schedule, share * 1e6, 10**6).learning_rate for share in (0.03, 0.515, 1.0)]
        assert rates == pytest.approx([5e-6, 3e-6, 1e-6])


def test_it_begins_with_the_weights_alone_and_keeps_the_bias(run: Path, data: Path, tmp_path: Path) -> None:
    sft(run, data, tmp_path / "out", (*QUIET, "train.max_steps=1", "schedule.learning_rate=[{until=1,value=0}]"))
    before, after = tensors_of(run), tensors_of(tmp_path / "out")
    model = [name for name in before if name.startswith("model/")]
    assert [name for name in model if not torch.equal(before[name], after[name])] == []
    assert any(t.abs().sum() > 0 for name, t in before.items() if name.endswith("e_score_correction_bias"))
    moments = [name for name in before if not name.startswith("model/")]
    assert any(not torch.equal(before[name], after[name]) for name in moments)  # of one step, not of five


def test_a_finished_run_says_so(run: Path, data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    receipt = sft(run, data, out, ("train.eval_every=8", "train.dtype=fp32"))
    training, validation, _ = open_chats(data, tokenizer, LENGTH)
    rows, model = len(loader_of(training).rows(0)), read_config(out / "config.toml").model
    assert receipt["ended"] == "complete"
    assert receipt["tokens"] == 2 * rows * LENGTH
    keys = np.concatenate([np.arange(1, length + 1) for length in training.lengths])  # that each token sees
    flops = receipt["tokens"] * flops_per_token(model, 2 * keys.mean() - 1)
    assert receipt["flops"] == pytest.approx(flops, rel=0.01)  # of a length rounded to whole tokens
    assert checkpoint.chats(out)
    assert not checkpoint.chats(run)
    assert checkpoint.data_of(out) == data
    assert (out / "loss.png").exists()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validations = [row["bpb"] for row in metrics if "bpb" in row]
    assert validations[-1] == receipt["bpb"] < validations[0]
    assert receipt["bpb"] == pytest.approx(slow_bpb(out, validation, tokenizer), rel=1e-5)  # FP32, other sums
    scored = evaluate(out, ["bpb"])["bpb"]
    assert scored["bpb"] == pytest.approx(receipt["bpb"], rel=1e-6)
    assert scored["bytes"] == answered_bytes(data, validation, tokenizer)
    (tmp_path / "gone.jsonl").write_text("")
    checkpoint.remember_data(out, tmp_path / "gone.jsonl")
    with pytest.raises(BadInput, match="other data"):
        evaluate(out, ["bpb"])
    checkpoint.remember_data(out, tmp_path / "nowhere.jsonl")
    with pytest.raises(BadInput, match=r"no longer at .*nowhere\.jsonl"):
        evaluate(out, ["bpb"])


def slow_bpb(out: Path, chats: Chats, tokenizer: Tokenizer) -> float:
    """By the definition: one chat at a time, full logits, the end of an answer not counted."""
    model, nats, size = leanseek.load_model(out), 0.0, 0
    for i in range(len(chats)):
        ids, targets = (torch.from_numpy(array) for array in chats.sample(i))
        with torch.no_grad():
            logits = model.eval().lm_head(model(ids[None], torch.arange(len(ids))[None]))[0]
        for place, target in enumerate(targets.tolist()):
            if target not in (IGNORE, tokenizer.eos_id):
                nats += float(F.cross_entropy(logits[place], targets[place]))
                size += len(tokenizer.token_bytes(target))
    return nats / math.log(2) / size


def answered_bytes(data: Path, chats: Chats, tokenizer: Tokenizer) -> int:
    """The bytes of the held-out answers as they stand in the file."""
    every = read_chats(data, tokenizer).keys
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    kept = [messages for messages, key in zip(rows, every, strict=True) if key in chats.keys]
    return sum(len(m["content"].encode()) for messages in kept for m in messages if m["role"] == "assistant")


def test_stopping_at_a_step_limit_and_going_on_is_bit_identical(run: Path, data: Path, tmp_path: Path) -> None:
    asked = (*QUIET, "train.tokens=2560")
    sft(run, data, tmp_path / "whole", asked)
    for limit in (4, 5, 100):
        ended = sft(run, data, tmp_path / "parts", (*asked, f"train.max_steps={limit}"))["ended"]
    assert ended == "complete"
    ours, theirs = tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert read_config(tmp_path / "whole" / "config.toml").train.tokens == 2560
    before = tensors_of(run)
    assert any(not torch.equal(before[key], ours[key]) for key in before if key.startswith("model/"))


def test_three_answers_can_be_learnt_by_heart(
    run: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"Who found the map?": "Ada found it.", "Where is Ben?": "On the hill.", "And Cleo?": "By the sea, asleep."}
    rows = [{"prompt": question, "response": answer} for question, answer in known.items()]
    for spare in range(100):  # one chat is held out: a fourth one shall be that
        file = write(tmp_path / "chats.jsonl", *rows, {"prompt": f"{spare}?", "response": "No."})
        if held_out(read_chats(file, tokenizer).keys).tolist() == [False, False, False, True]:
            break
    asked = (
        "train.tokens=12800",
        "schedule.batch_tokens=[{until=1,value=64}]",
        "schedule.mtp_weight=[{until=1,value=0}]",
    )
    out = tmp_path / "out"
    arguments = ["sft", str(run), "--data", str(file), "--out", str(out), *QUIET, *asked, "optimizer.name=adamw"]
    with pytest.raises(SystemExit) as end:
        main(
            [
                *arguments,
                "schedule.learning_rate=[{until=0.1,value=1e-2,shape='linear'},{until=1,value=1e-3,shape='cosine'}]",
            ]
        )
    assert end.value.code == 0
    assert "bits per byte" in capsys.readouterr().out
    llm, before = leanseek.load(out), leanseek.load(run)
    greedy = Sampling(temperature=0, max_tokens=40)
    for question, answer in known.items():
        asked_of = [{"role": "user", "content": question}]
        completion = llm.chat(asked_of, greedy)
        assert (completion.text, completion.finish_reason) == (answer, "stop")
        assert before.chat(asked_of, greedy).text != answer
    with pytest.raises(SystemExit):
        main(["generate", str(out), "--prompt", "Where is Ben?", "--temperature", "0"])
    assert capsys.readouterr().out.strip() == "On the hill."


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["sft", *map(str, arguments)])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    return lines[0]


GOOD = json.dumps({"prompt": "a", "response": "b"}).encode()
BAD_ROWS = {
    "not JSON": (b'{"prompt": "a"', "not JSON"),
    "not UTF-8": (b'{"prompt": "a\xff", "response": "b"}', "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "a list": (b"[]", "not an object"),
    "no messages": (b'{"text": "a"}', 'needs "messages", or "prompt" and "response"'),
    "no response": (b'{"prompt": "a"}', 'needs "messages", or "prompt" and "response"'),
    "response of a wrong type": (b'{"prompt": "a", "response": 3}', '"prompt" and "response" must be strings'),
    "messages of a wrong type": (b'{"messages": "a"}', "messages must be a list with at least one message"),
    "messages empty": (b'{"messages": []}', "messages must be a list with at least one message"),
    "unknown role": (b'{"messages": [{"role": "robot", "content": "a"}]}', "message 1: needs a role"),
    "role of a wrong type": (b'{"messages": [{"role": ["user"], "content": "a"}]}', "message 1: needs a role"),
    "content of a wrong type": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 1}]}',
        "message 2: content must be a string",
    ),
    "nobody answers": (b'{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
    "half a character": (b'{"prompt": "\\ud800", "response": "b"}', "half of a surrogate pair"),
    "a system message late": (
        json.dumps({"messages": [*said("a", "b"), {"role": "system", "content": "c"}, *said("d", "e")]}).encode(),
        "rewrites what stands before message 5",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_told_by_file_and_line(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, error = BAD_ROWS[name]
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b"\n".join([GOOD, b"", row, GOOD]))
    line = refused(capsys, run, "--data", file, "--out", tmp_path / "out")
    assert f"{file} line 3: " in line
    assert error in line
    assert not (tmp_path / "out").exists()


def test_files_that_hold_no_chats_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.jsonl" / "a.jsonl").write_bytes(GOOD)
    long = {"prompt": "word " * 40, "response": "word " * 40}
    for file, error in (
        (tmp_path / "missing.jsonl", "no such file"),
        (tmp_path / "folder.jsonl", "not a file of chats"),
        (write(tmp_path / "chats.txt", {}), "chats are read from .jsonl files"),
        (write(tmp_path / "empty.jsonl"), "the file is empty"),
        (write(tmp_path / "a.jsonl").parent / "blank.jsonl", "there is no chat in it"),
        (
            write(tmp_path / "long.jsonl", long, {**long, "response": "words " * 40}),
            "all 2 chats are longer than the 64",
        ),
        (write(tmp_path / "one.jsonl", json.loads(GOOD), json.loads(GOOD)), "two different chats"),
        (tmp_path / "torn.jsonl.gz", "damaged or truncated archive"),
    ):
        (tmp_path / "blank.jsonl").write_text("\n\n")
        (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(GOOD)[:-4])
        line = refused(capsys, run, "--data", file, "--out", tmp_path / "out")
        assert error in line, line
        assert file.name in line


def test_answers_that_say_nothing_cannot_be_scored(run: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", *({"prompt": str(i), "response": ""} for i in range(4)))
    with pytest.raises(BadInput, match="no answer with words in it"):
        sft(run, file, tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_begun_with_are_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    line = refused(capsys, copy, "--data", data, "--out", copy / "checkpoints" / "..")
    assert "train onto the run it begins with" in line
    assert "not a run" in refused(capsys, tmp_path / "nowhere", "--data", data, "--out", out)
    out.mkdir()
    (out / "thesis.txt").touch()
    assert "a folder with other things in it" in refused(capsys, run, "--data", data, "--out", out)
    assert "holds another config" in refused(capsys, run, "--data", data, "--out", copy)
    larger = Tokenizer.train([f"{i} new words " * 3 for i in range(999)], 400)
    larger.save(copy / "tokenizer")
    assert "they do not belong together" in refused(capsys, copy, "--data", data, "--out", tmp_path / "out2")
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(run / "tokenizer", copy / "tokenizer")
    shutil.rmtree(copy / "checkpoints")
    assert "has no checkpoint yet" in refused(capsys, copy, "--data", data, "--out", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("train.tokns=5", "unknown key 'train.tokns' (did you mean 'tokens'?)"),
        ("model.hidden_size=64", "leave model.* out"),
        ("data.fim_rate=0.5", "leave data.* and mixtures out"),
        ("stages.0.mixture={a=1}", "leave data.* and mixtures out"),
        ("stages.0.sequence_length=65", "above model.max_position_embeddings"),
    ],
)
def test_overrides_that_make_no_sense_here_are_refused(
    override: str, error: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, run, "--data", data, "--out", tmp_path / "out", override)
    assert error in line
    assert f"sft of {run}" in line


def test_long_chats_are_counted(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.jsonl"
    long = json.dumps({"prompt": "long", "response": "word " * 99})
    file.write_text(data.read_text() + f"{long}\n{long}\n")
    short = (read_chats(data, Tokenizer.load(run / "tokenizer")).lengths > LENGTH).sum()
    sft(run, file, tmp_path / "out", (*QUIET, "train.max_steps=1"))
    assert f"warning: left out {short + 2} chats longer than the 64 tokens of a row" in capsys.readouterr().err


def test_another_file_for_the_same_run_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    asked = (*QUIET, "train.tokens=2560", "train.max_steps=1")
    sft(run, data, out, asked)
    other.write_text(data.read_text().replace("Be brief.", "Be polite"))
    with pytest.raises(BadInput, match="other data"):
        sft(run, other, out, asked)
    shutil.copy(data, other)
    sft(run, other, out, asked)  # the same chats elsewhere are the same chats
    assert checkpoint.data_of(out) == other
