"""The command line: each verb end to end on a tiny run, and one clear line with exit code 2 for what is wrong."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from leanseek.cli import main
from leanseek.config import Config, parse, read_recipe, recipe_names
from tests.tiny import RECIPE, make_data, story

FEW = "train.max_steps=6"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as end:
        main(["pretrain", str(RECIPE), "--data", str(data), "--out", str(folder), FEW])
    assert end.value.code == 0
    return folder


@pytest.fixture
def leanseek(capsys: pytest.CaptureFixture[str]):
    """Runs a command: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def refusal(leanseek):
    """Runs a command that must be refused; returns its one line."""

    def call(*arguments: object) -> str:
        code, _, err = leanseek(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("leanseek: ")]
        assert code == 2, err
        assert len(lines) == 1, err
        assert err.splitlines()[-1] == lines[0]
        return lines[0]

    return call


# ── the verbs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_names_every_verb(leanseek) -> None:
    code, out, _ = leanseek()
    assert code == 0
    assert all(verb in out for verb in ("demo", "recipes", "prepare", "pretrain", "eval", "generate", "chat"))


def test_recipes(leanseek) -> None:
    _, listed, _ = leanseek("recipes")
    assert (
        [line.split()[0] for line in listed.splitlines()]
        == recipe_names()
        == ["nano", "demo", "mix", "bench-20m", "small", "v2-lite", "v2", "v3"]
    )
    for name in recipe_names():
        _, printed, _ = leanseek("recipes", name)
        parse(printed, name)


def test_prepare_reports_what_it_did(leanseek, tmp_path: Path) -> None:
    import random

    dice = random.Random(1)
    rows = [json.dumps({"text": story(dice)}) for _ in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join([*rows, rows[0], "not json"]))
    code, out, _ = leanseek("prepare", tmp_path / "t.jsonl", "--out", tmp_path / "D", "--vocab-size", 300)
    assert code == 0
    assert "1 exact" in out
    assert "not JSON" in out
    assert "t.jsonl line 42" in out
    assert (tmp_path / "D" / "manifest.json").exists()


def test_pretrain_says_how_to_go_on_and_prints_the_bill(leanseek, data: Path, tmp_path: Path) -> None:
    code, out, err = leanseek("pretrain", RECIPE, "--data", data, "--out", tmp_path / "run", "train.max_steps=2")
    assert code == 0
    assert "a larger train.max_steps goes on" in err
    assert all(word in out for word in ("tokens", "FLOPs", "CPU-minutes", "$", "H800", "bits per byte"))


def test_eval_of_task_files_and_the_report(leanseek, refusal, run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1 + 1 =", "verify": "exact", "answer": "2"}, {"prompt": "2 + 1 ="}]
    choice = {"prompt": "The fox is", "verify": "choice", "choices": ["red", "old"], "answer": "A"}
    for name, of in (("sums", rows), ("foxes", [choice] * 5)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    asked = ("--task", tmp_path / "sums.jsonl", "--task", tmp_path / "foxes.jsonl", "--max-tokens", 2)
    code, out, err = leanseek("eval", run, *asked, "--json")
    assert code == 0
    assert "warning: sums: left out 1 rows; the first, line 2: has no 'verify'" in err
    found = json.loads(out)
    assert list(found) == ["sums", "foxes"]
    assert all({"score", "stderr", "n", "low", "high"} <= result.keys() for result in found.values())
    assert (found["sums"]["n"], found["sums"]["left_out"], found["foxes"]["chance"]) == (1, 1, 0.5)
    _, out, _ = leanseek("eval", run, *asked, "--tasks", "bpb")
    assert [line.split()[0] for line in out.splitlines()] == ["bpb", "sums", "foxes"]
    assert "of 5 questions" in out
    code, out, _ = leanseek("report", run)
    assert code == 0
    assert str(run / "report.html") in out
    assert "n 5" in (run / "report.html").read_text()
    assert "gone.jsonl" in refusal("eval", run, "--task", "gone.jsonl")
    assert "samples must be at least 1" in refusal("eval", run, *asked, "--samples", 0)
    assert "not a run" in refusal("report", tmp_path)


def test_eval_prints_the_contract_keys(leanseek, run: Path, tmp_path: Path) -> None:
    _, out, _ = leanseek("eval", run, "--json")
    on_validation = json.loads(out)
    assert set(on_validation) == {"bpb", "bytes", "tokens"}
    assert on_validation["bpb"] == pytest.approx(json.loads((run / "receipt.json").read_text())["bpb"], rel=1e-6)
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"text": "Ada found a lamp."}) + "\n")
    _, out, _ = leanseek("eval", run, "--tasks", "bpb", "--text", text, "--json")
    assert json.loads(out)["bytes"] == 17


def test_generate(leanseek, run: Path) -> None:
    ask = ("generate", run, "--prompt", "Ada found", "--max-tokens", 12, "--seed", 3)
    _, text, _ = leanseek(*ask)
    _, again, _ = leanseek(*ask)
    _, other, _ = leanseek(*ask[:-1], 4)
    _, raw, _ = leanseek(*ask, "--raw")
    assert text.startswith("Ada found")
    assert text == again == raw
    assert text != other
    _, out, _ = leanseek(*ask, "--json")
    answer = json.loads(out)
    assert {"text", "token_ids", "prompt_tokens", "tokens_per_second"} <= set(answer)
    assert len(answer["token_ids"]) <= 12
    assert "Ada found" + answer["text"] == text.removesuffix("\n")


def test_generate_goes_through_the_template_where_a_run_chats(leanseek, run: Path, tmp_path: Path) -> None:
    import shutil

    chatty = tmp_path / "chatty"
    shutil.copytree(run, chatty)
    facts = json.loads((chatty / "run.json").read_text())
    assert facts["chats"] is False
    (chatty / "run.json").write_text(json.dumps({**facts, "chats": True}))
    ask = ("generate", chatty, "--prompt", "Ada", "--max-tokens", 4, "--json")
    templated, raw = (json.loads(leanseek(*ask, *more)[1])["prompt_tokens"] for more in ((), ("--raw",)))
    plain = json.loads(leanseek("generate", run, *ask[2:])[1])["prompt_tokens"]
    assert templated == raw + 2  # the marks of user and assistant
    assert raw == plain


def test_chat_streams_as_the_answer_is_drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text reaches stdout between two tokens, not only at the end."""
    from leanseek.serve import engine

    out, seen, draw = io.StringIO(), [], engine.draw
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who found the lamp?\nWhere?\n\n"))
    monkeypatch.setattr(engine, "draw", lambda *args: seen.append(len(out.getvalue())) or draw(*args))
    with pytest.raises(SystemExit) as end:
        main(["chat", str(run), "--max-tokens", "12"])
    assert end.value.code == 0
    assert len({length for length in seen if length}) > 5
    assert out.getvalue().count("\n") >= 2  # two answers


def test_chat_as_a_process_takes_any_bytes(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "leanseek", "chat", str(run), "--max-tokens", "4"],
        input=b"Gr\xf6\xdfe?\n\n",
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_chat_lets_the_oldest_exchange_go(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from leanseek.serve import chat
    from leanseek.serve.sampling import Sampling

    asked: list[int] = []
    answer = chat._answer
    monkeypatch.setattr(
        chat, "_answer", lambda llm, messages, *rest: asked.append(len(messages)) or answer(llm, messages, *rest)
    )
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("one\ntwo\nthree\n" + "Ada found a lamp by the river. " * 40 + "\nfour\n")
    )
    chat.chat(run, None, Sampling(temperature=0.0, max_tokens=12))
    assert asked[0] == 1
    assert len(asked) == 4  # the overlong message was refused, not fatal
    assert max(asked) < 7
    assert "too long" in capsys.readouterr().err


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pretran",), "pretrain"),
        (("pretrain",), "RECIPE"),
        (("pretrain", "nano", "--data", "D"), "--out"),
        (("pretrain", "nanno", "--data", "D", "--out", "R"), "did you mean 'nano'"),
        (("pretrain", "gone.toml", "--data", "D", "--out", "R"), "gone.toml"),
        (("pretrain", "nano", "--data", "D", "--out", "R", "train.tken=1"), "did you mean 'tokens'"),
        (("pretrain", "nano", "--data", "D", "--out", "R", "train.tokens=-1"), "train.tokens"),
        (("pretrain", "nano", "--data", "D", "--out", "R", "model.num_experts_per_tok=17"), "n_routed_experts"),
        (("pretrain", "nano", "--data", "D", "--out", "R", "nonsense"), "section.key=value"),
        (("pretrain", "nano", "--data", "D", "--out", "R"), "D"),
        (("recipes", "v4"), "v3"),
        (("prepare", "gone.jsonl", "--out", "D"), "gone.jsonl"),
        (("prepare", "x.txt", "--out", "D", "--vocab-size", "many"), "--vocab-size"),
        (("generate", "gone", "--prompt", "x"), "gone"),
        (("chat", "gone"), "gone"),
        (("eval", "gone"), "gone"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: tuple[str, ...], words: str, refusal, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refusal(*arguments)
    assert not list(tmp_path.rglob("config.toml"))


def test_empty_file(refusal, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl" in refusal("prepare", tmp_path / "empty.jsonl", "--out", tmp_path / "D")
    assert not (tmp_path / "D").exists()


def test_wrong_encoding_names_the_byte(refusal, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Größe über Öl. ".encode("latin-1") * 20)
    assert "byte 2" in refusal("prepare", tmp_path / "latin.txt", "--out", tmp_path / "D")


def test_corrupted_shard(refusal, tmp_path: Path) -> None:
    data = make_data(tmp_path, documents=20)
    shard = next((data / "shards").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    assert shard.name in refusal("pretrain", RECIPE, "--data", data, "--out", tmp_path / "R")


def test_a_tokenizer_that_did_not_write_the_shards(refusal, data: Path, tmp_path: Path) -> None:
    import shutil

    other = make_data(tmp_path / "", documents=50, seed=3)
    shutil.rmtree(other / "tokenizer")
    shutil.copytree(data / "tokenizer", other / "tokenizer")
    assert "tokenizer" in refusal("pretrain", RECIPE, "--data", other, "--out", tmp_path / "R")


def test_a_run_of_another_configuration(refusal, run: Path, data: Path) -> None:
    line = refusal("pretrain", RECIPE, "--data", data, "--out", run, FEW, "train.seed=3")
    assert "train.seed" in line


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a model of no size, few questions and no chat at its end."""
    from leanseek import demo

    longer = ("model.vocab_size=4096", "model.max_position_embeddings=512", "stages.0.sequence_length=256")
    like_nano = (
        *(
            "model.vocab_size=6144",
            "counts.order=3",
            "schedule.count_weight=[{until=0.9,value=1.0},{until=1,value=0.0}]",
        ),
        "stages=[{sequence_length=64,share=0.3},{sequence_length=256,share=0.7}]",
    )
    of = {"demo": longer, "nano": (*longer[1:2], *like_nano)}
    monkeypatch.setattr(demo, "read_recipe", lambda name: read_recipe(str(RECIPE), of[name]))
    for name, value in {"EXAM": 5, "AT_ONCE": 3, "SAMPLES": 2, "SHOWN": 1, "CHATS_PER_MINUTE": 600}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def test_demo_goes_from_nothing_to_a_chat_and_takes_up_where_it_stopped(leanseek, small_demo, tmp_path: Path) -> None:
    ask = ("demo", "--minutes", 0.02, "--out", tmp_path / "demo")
    code, out, _ = leanseek(*ask)
    assert code == 0
    titles = ("Text and tokenizer", "Pre-training", "Instruction", "Exam", "Samples", "The bill")
    assert all(f"{i}/6  {title}" in out for i, title in enumerate(titles, 1))
    results = json.loads((tmp_path / "demo" / "exam.json").read_text())
    right = [answer["right"] for answer in results["answers"]]
    assert len(right) == 5
    assert results["accuracy"] == sum(right) / 5
    assert f"{results['accuracy']:.0%} right" in out
    assert f"{results['bpb']:.4f} bits per byte" in out
    assert results["samples"][0]["request"] in out
    base, chats = (json.loads((tmp_path / name / "receipt.json").read_text()) for name in ("demo-base", "demo"))
    assert chats["tokens"] == pytest.approx(base["tokens"] * 0.35 / 0.65, abs=512)
    assert f"{base['tokens'] + chats['tokens']:,}" in out  # one bill for both stages
    code, again, _ = leanseek(*ask)
    assert code == 0
    assert "read 1," not in again
    assert json.loads((tmp_path / "demo" / "exam.json").read_text()) == results


@pytest.mark.parametrize("tokens", [20_000, 3_000_000, 30_000_000])
def test_demo_begins_with_vignettes_alone_and_ends_with_stories(tokens: int) -> None:
    from leanseek.demo import from_vignettes_to_stories

    config = read_recipe("demo", [f"train.tokens={tokens}"])
    stages = from_vignettes_to_stories(config)
    Config.model_validate(config.model_dump() | {"stages": [stage.model_dump() for stage in stages]})
    mixtures = [stage.mixture["vignettes"] for stage in stages]
    assert mixtures == sorted(mixtures, reverse=True)
    assert (mixtures[0], mixtures[-1]) == (1.0, 0.0)
    assert stages[0].share * tokens <= 0.06 * tokens
    if tokens == 3_000_000:  # fifty steps of 2,048 tokens at full rate, and as many again
        assert 100_000 < (stages[0].share - config.schedule.learning_rate[0].until) * tokens < 200_000


@pytest.mark.parametrize(
    ("chats", "of_a_step"), [(0.35, 0.65 * (0.75 * 1 + 0.25 * 2) + 0.35 * 4), (0.0, 0.75 * 1 + 0.25 * 2)]
)
def test_demo_gives_every_kind_of_token_its_own_time(
    chats: float, of_a_step: float, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this clock a step takes a second, two where MTP learns, and four where it learns of whole rows (chats)."""
    from leanseek import demo
    from leanseek.data.shards import open_data
    from leanseek.data.tokenizer import Tokenizer

    clock, opened = [0.0], open_data(data)
    late = (
        "train.dtype=fp32",
        "schedule.mtp_weight=[{until=0.75,value=0.0},{until=1.0,value=0.1}]",
        "train.mtp_length=8",
    )

    def step(*asked: object) -> None:
        now, config = asked[-2:]
        clock[0] += (2 if config.train.mtp_length else 4) if now.mtp_weight else 1

    monkeypatch.setattr(demo, "train_step", step)
    monkeypatch.setattr(demo.time, "perf_counter", lambda: clock[0])
    config = demo.budgeted(read_recipe(str(RECIPE), late), 1000, chats, opened, Tokenizer.load(opened.tokenizer_folder))
    steps = int((1 - chats) * (1000 - clock[0]) / of_a_step)
    assert clock[0] == demo.SPEED_STEPS * (1 + 2 + (4 if chats else 0))
    assert config.train.tokens == 256 * steps


def test_demo_on_ones_own_text(leanseek, refusal, small_demo, tmp_path: Path) -> None:
    import random

    dice = random.Random(0)
    text = tmp_path / "stories.jsonl"
    text.write_text("\n".join(json.dumps({"text": story(dice)}) for _ in range(200)))
    ask = ("demo", "--minutes", 0.05, "--text", text, "--out", tmp_path / "demo")
    code, out, _ = leanseek(*ask)
    assert code == 0
    assert all(f"{i}/4  {title}" in out for i, title in enumerate(("Text", "Pre-training", "Samples", "The bill"), 1))
    receipt = json.loads((tmp_path / "demo" / "receipt.json").read_text())
    ran = read_recipe(str(tmp_path / "demo" / "config.toml"))
    assert receipt["tokens"] == pytest.approx(ran.train.tokens, abs=64 + 256)  # whole rows of either length
    assert (ran.model.vocab_size, ran.counts is None, len(ran.stages)) == (6144, False, 2)  # nano's method
    (tmp_path / "other.txt").write_text("Other text.\n" * 99)
    assert "other text" in refusal("demo", "--text", tmp_path / "other.txt", "--out", tmp_path / "demo")
    assert "--minutes" in refusal("demo", "--minutes", "nan", "--out", tmp_path / "x")


def test_demo_finds_text_on_this_machine(tmp_path: Path) -> None:
    from leanseek.data.at_hand import text_at_hand

    code, prose = (Path(source.partition("=")[2]) for source in text_at_hand(tmp_path))
    assert code.stat().st_size > 2e6
    assert prose.stat().st_size > 2e5
    assert all(json.loads(line)["text"].strip() for line in prose.read_text().splitlines())


def test_a_run_with_no_whole_checkpoint(refusal, data: Path, tmp_path: Path, leanseek) -> None:
    run = tmp_path / "run"
    leanseek("pretrain", RECIPE, "--data", data, "--out", run, "train.max_steps=1")
    for file in run.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    for arguments in (
        ("generate", run, "--prompt", "x"),
        ("pretrain", RECIPE, "--data", data, "--out", run, "train.max_steps=1"),
    ):
        assert "none of its" in refusal(*arguments)


def test_options_out_of_range(refusal, run: Path) -> None:
    assert "temperature" in refusal("generate", run, "--prompt", "x", "--temperature", -1)
    assert "top_p" in refusal("generate", run, "--prompt", "x", "--top-p", 2)
    assert "max_tokens" in refusal("generate", run, "--prompt", "x", "--max-tokens", 0)
    assert "context" in refusal("generate", run, "--prompt", "Ada found a lamp. " * 100)
    assert "did you mean 'bpb'" in refusal("eval", run, "--tasks", "bbp")
    assert "gone.jsonl" in refusal("eval", run, "--text", "gone.jsonl")
