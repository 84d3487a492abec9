"""The long context: stages as published, a run that goes on exactly, needles judged as greedy decoding would."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import leanseek
from leanseek import checkpoint
from leanseek.cli import main
from leanseek.config import BadInput, ModelConfig, RopeScaling, read_config, read_recipe
from leanseek.data.needles import KINDS, buried, hay, needle_text, needle_texts, records
from leanseek.data.prepare import prepare
from leanseek.data.storyworld import NEEDLES, documents
from leanseek.eval.bpb import bits_per_byte
from leanseek.eval.harness import evaluate
from leanseek.eval.likelihood import Asked, likelihoods
from leanseek.eval.needle import DEPTHS, Grid, questions, search, straw_of
from leanseek.eval.positions import by_position
from leanseek.hub import export_release, import_release
from leanseek.model import rope
from leanseek.model.rope import rope_frequencies, softmax_scale
from leanseek.post.sft import sft
from leanseek.report import report
from leanseek.serve.llm import LLM
from leanseek.serve.sampling import Sampling
from leanseek.train import extend as extending
from leanseek.train.extend import context_of, extend, extended, stretched
from leanseek.train.pretrain import pretrain
from leanseek.train.schedule import knobs
from tests.oracle import distance, ours, same_weights, tiny
from tests.releases import YARN
from tests.runs import make_run, model_of, tokenizer
from tests.tiny import RECIPE, make_data, story

QUIET = ("train.dtype=fp32", "train.eval_every=1000", "train.checkpoint_every=1000")
LENGTHS = (64, 128)
FEW = ("train.tokens=3072", *QUIET)  # 24 rows of 64 and 12 of 128


# ── the stages ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_short_run_begins_with_is_over() -> None:
    later = extended(read_recipe("nano"), (512, 1024))
    assert later.counts is None
    assert later.train.mtp_length is None
    for at in (0, later.train.tokens - 1):
        now = knobs(later.schedule, at, later.train.tokens)
        assert (now.count_weight, now.layers) == (0.0, None)


def as_published() -> None:
    """Raises AssertionError where V3's stages or the released settings are not what comes out for its recipes."""
    v3 = extended(read_recipe("v3"), (32768, 131072))
    assert v3.model.rope_scaling == RopeScaling.model_validate(YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})
    assert v3.model.max_position_embeddings == 163840
    assert [stage.sequence_length for stage in v3.stages] == [32768, 131072]
    for at in (0, 62.9e9, 125.8e9):
        now = knobs(v3.schedule, at, v3.train.tokens)
        assert now.learning_rate == pytest.approx(7.3e-6)
        assert [now.batch_tokens / stage.sequence_length for stage in v3.stages] == [1920, 480]
        assert (now.bias_speed, now.mtp_weight) == (0.0, 0.1)
    assert v3.train.tokens * v3.stages[0].share == 1000 * 1920 * 32768
    assert v3.train.tokens * v3.stages[1].share == 1000 * 480 * 131072
    lite = extended(read_recipe("v2-lite"), (32768, 131072)).model
    assert lite.rope_scaling == RopeScaling.model_validate(YARN | {"mscale": 0.707, "mscale_all_dim": 0.707})
    assert lite.max_position_embeddings == 163840
    assert softmax_scale(v3.model) * 192**0.5 == pytest.approx(1.87385421, abs=5e-9)
    assert softmax_scale(lite) * 192**0.5 == pytest.approx(1.5896262, abs=5e-8)
    assert rope_frequencies(v3.model)[23:] == pytest.approx([10000 ** (-j / 32) / 40 for j in range(23, 32)])
    assert rope_frequencies(v3.model)[:11] == pytest.approx([10000 ** (-j / 32) for j in range(11)])


def test_the_stages_are_v3s() -> None:
    as_published()


def of_longest(model: ModelConfig, context: int, longest: int) -> ModelConfig:
    """A stretch that takes the new length for the original one."""
    return stretched(model, longest, longest)


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "no headroom": (extending, "HEADROOM", 1.0),
    "V2's mscale for all": (extending, "MSCALE", {"deepseek_v3": 0.707, "deepseek_v2": 0.707}),
    "the new length as the original": (extending, "stretched", of_longest),
    "the peak's rate": (extending, "RATE", 1.0),
    "mscale once": (rope, "_mscale", lambda factor, mscale: math.sqrt(0.1 * mscale * math.log(factor) + 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        as_published()


def test_a_small_run_is_stretched_in_proportion() -> None:
    demo = read_recipe("demo")
    long = extended(demo, (1024, 4096))
    yarn = long.model.rope_scaling
    assert yarn is not None
    assert context_of(demo) == 256
    assert (yarn.factor, yarn.original_max_position_embeddings, long.model.max_position_embeddings) == (20, 256, 5120)
    assert context_of(long) == 4096
    assert long.train.tokens == 2 * round(0.1 * demo.train.tokens)  # a thousand steps would be more than a tenth
    assert long.train.micro_batch == 1
    assert knobs(long.schedule, 0, long.train.tokens).learning_rate == pytest.approx(1.6e-2 * 7.3 / 220)
    assert long.model.num_nextn_predict_layers == demo.model.num_nextn_predict_layers
    further = extended(long, (16384,)).model
    assert further.rope_scaling == yarn.model_copy(update={"factor": 80.0})  # from the length it was pre-trained at
    assert context_of(further_config := long.model_copy(update={"model": further})) == 16384
    assert context_of(further_config.model_copy(update={"stages": read_recipe("demo").stages})) == 16384  # an import


@pytest.mark.parametrize("lengths", [(64, 256), (96,), (32, 64, 2048)], ids=str)
def test_frequencies_and_logits_equal_transformers(lengths: tuple[int, ...]) -> None:
    model = stretched(tiny(qk_rope_head_dim=16), 16, max(lengths))
    mine = ours(model)
    theirs = same_weights(mine).eval()
    frequencies = theirs.model.rotary_emb.inv_freq
    assert rope_frequencies(model) == pytest.approx(frequencies.tolist(), rel=1e-6)
    ids = torch.randint(3, 64, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = mine.eval().lm_head(mine(ids, torch.arange(200)[None]))
        assert distance(logits, theirs(ids).logits) < 1e-5


# ── the verb ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories of some 100 to 300 tokens."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps at 32 tokens: with moments, a routing bias and MTP."""
    folder = tmp_path_factory.mktemp("run") / "run"
    pretrain(read_recipe(str(RECIPE), ("train.max_steps=4", *QUIET)), data, folder)
    return folder


@pytest.fixture(scope="module")
def long_run(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "long"
    receipt = extend(run, data, folder, LENGTHS, FEW)
    assert (receipt["ended"], receipt["tokens"], receipt["steps"]) == ("complete", 3072, 12)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(leanseek.load_model(run).state_dict())


def test_it_begins_with_the_runs_weights_and_keeps_mtp(run: Path, data: Path, tmp_path: Path) -> None:
    still = (
        "train.max_steps=1",
        *(f"schedule.{knob}=[{{until=1,value=0}}]" for knob in ("learning_rate", "bias_speed")),
    )
    extend(run, data, tmp_path / "out", LENGTHS, (*FEW, *still))
    before, after = weights(run), weights(tmp_path / "out")
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert any(tensor.abs().sum() > 0 for name, tensor in after.items() if name.endswith("e_score_correction_bias"))
    assert any(name.startswith("mtp.") for name in after)


def test_what_comes_out_is_a_run(long_run: Path, run: Path, data: Path, tmp_path: Path) -> None:
    config = read_config(long_run / "config.toml")
    yarn = {"factor": 5.0, "original_max_position_embeddings": 32}
    assert config.model.rope_scaling == RopeScaling.model_validate(yarn)
    assert config.model.max_position_embeddings == 160
    metrics = [json.loads(line) for line in (long_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["mtp_loss"] > 0 for row in metrics if "loss" in row] == [True] * 12
    assert [row["lr"] for row in metrics if "lr" in row] == pytest.approx([1e-2 * 7.3 / 220] * 12)
    scored = evaluate(long_run, ["bpb"])["bpb"]
    assert scored["bpb"] == pytest.approx(json.loads((long_run / "receipt.json").read_text())["bpb"], rel=1e-6)
    assert evaluate(long_run, ["bpb"], context=32)["bpb"]["bytes"] == scored["bytes"]
    chats = tmp_path / "chats.jsonl"
    dice = random.Random(0)
    chats.write_text(
        "".join(json.dumps({"prompt": story(dice)[:30], "response": story(dice)[:20]}) + "\n" for _ in range(30))
    )
    sft(long_run, chats, tmp_path / "chat", ("train.max_steps=1", *QUIET))
    assert read_config(tmp_path / "chat" / "config.toml").model == config.model
    assert leanseek.load(tmp_path / "chat").chat([{"role": "user", "content": "Who?"}], Sampling(max_tokens=2))


def test_its_export_is_what_others_read(long_run: Path, tmp_path: Path) -> None:
    export_release(long_run, tmp_path / "release", "fp32")
    released = json.loads((tmp_path / "release" / "config.json").read_text())
    assert released["rope_scaling"]["factor"] * released["rope_scaling"]["original_max_position_embeddings"] == 160
    assert released["max_position_embeddings"] == 160
    model, theirs = leanseek.load_model(long_run).eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    ids = torch.randint(3, 300, (1, 150), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model.lm_head(model(ids, torch.arange(150)[None]))
        assert distance(logits, theirs.eval()(ids).logits) < 1e-5
    import_release(tmp_path / "release", tmp_path / "back")
    assert context_of(read_config(tmp_path / "back" / "config.toml")) == 128


def test_it_goes_on_exactly(long_run: Path, run: Path, data: Path, tmp_path: Path) -> None:
    for steps in (3, 7):  # within the first stage, and just before the second
        receipt = extend(run, data, tmp_path / "out", LENGTHS, (*FEW, f"train.max_steps={steps}"))
        assert (receipt["ended"], receipt["steps"]) == ("max_steps", steps)
    assert extend(run, data, tmp_path / "out", LENGTHS, FEW)["ended"] == "complete"
    whole, parts = weights(long_run), weights(tmp_path / "out")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_a_factor_of_one_is_plain_rope(run: Path, data: Path, tmp_path: Path) -> None:
    extend(run, data, tmp_path / "out", LENGTHS, (*FEW, "train.max_steps=1", "model.rope_scaling.factor=1"))
    plain, model = read_recipe(str(RECIPE)).model, read_config(tmp_path / "out" / "config.toml").model
    assert rope_frequencies(model) == pytest.approx(rope_frequencies(plain), rel=1e-15)
    assert softmax_scale(model) == softmax_scale(plain)


BAD: dict[str, tuple[str, list[str], str]] = {
    "not above the context": ("run", ["--lengths", "32,64"], "reads 32 tokens already"),
    "not growing": ("run", ["--lengths", "128,64"], "must grow"),
    "twice the same": ("run", ["--lengths", "64,64"], "must grow"),
    "not numbers": ("run", ["--lengths", "64;128"], "whole numbers with commas"),
    "too little text": ("run", ["--lengths", "64,1000000"], "less than one row of 1,000,000"),
    "a source that is not there": ("run", ["--lengths", "64", "stages.0.mixture={novels=1}"], "no source 'novels'"),
    "another model": ("run", ["--lengths", "64", "model.hidden_size=64"], "leave all but rope_scaling out"),
    "an unknown key": ("run", ["--lengths", "64", "train.token=5"], "'train.token'"),
    "an extended run, not above": ("long_run", ["--lengths", "100"], "reads 128 tokens already"),
    "no run": ("nothing", ["--lengths", "64"], "not a run"),
    "no checkpoint": ("empty", ["--lengths", "64"], "no checkpoint in it yet"),
    "onto itself": ("run", ["--lengths", "64", "--out", "run"], "take another folder"),
    "another tokenizer": ("run", ["--lengths", "64", "--data", "foreign"], "--tokenizer"),
    "no data": ("run", ["--lengths", "64", "--data", "nothing"], "not a DATA folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, run: Path, long_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, more, said = BAD[case]
    (tmp_path / "foreign-text").mkdir()
    places = {"run": run, "long_run": long_run, "nothing": tmp_path / "nothing", "empty": tmp_path / "empty"}
    if where == "empty":
        checkpoint.create_run(tmp_path / "empty", read_config(run / "config.toml"), "x", run / "tokenizer", data)
    if "foreign" in more:
        places["foreign"] = make_data(tmp_path / "foreign-text", 40, seed=9)
    more = [str(places.get(word, word)) for word in more]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["extend", str(places[where]), "--data", str(data), "--out", str(tmp_path / "out"), *more])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_text_without_long_documents_is_warned_of(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extend(run, data, tmp_path / "a", (64,), (*FEW, "train.max_steps=1"))
    assert "warning" not in capsys.readouterr().err
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"Ada found {n}."}) + "\n" for n in range(200)))
    prepare([str(short)], tmp_path / "short", tokenizer=run / "tokenizer", workers=1)
    extend(run, tmp_path / "short", tmp_path / "b", (64,), (*FEW, "train.max_steps=1"))
    assert "no document is longer than 32 tokens" in capsys.readouterr().err


# ── needles ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_needle_texts_are_what_they_say() -> None:
    texts = list(needle_texts(0, 0, 60_000, 250, 2000))
    assert texts == list(needle_texts(0, 0, 60_000, 250, 2000)) != list(needle_texts(1, 0, 60_000, 250, 2000))
    depths = []
    for text in texts:
        haystack, *asked = text.split("\n")
        assert len(text) <= 2000
        assert [haystack.count(needle) for needle in asked] == [1] * len(asked)
        kinds = {needle.split()[-2] for needle in asked}
        assert haystack.count("The secret of") == len(kinds) == len(asked)
        depths += [haystack.index(needle) / (len(haystack) - len(needle)) for needle in asked]
    assert np.histogram(depths, 4, (0, 1))[0].min() > len(depths) / 6  # at all depths
    bare = needle_text(random.Random(0), 0, 1).split("\n")  # no room for hay
    assert len(set(bare)) == 1
    assert len(bare) > 2


def test_needles_are_at_their_depths() -> None:
    straw = ["One.", "Two and two.", "Three."]
    assert [buried(straw, [(depth, "N.")]).index("N.") for depth in (0, 0.2, 0.3, 0.7, 1)] == [0, 5, 5, 18, 25]
    assert buried(straw, [(0, "A."), (0.3, "B."), (0.3, "C."), (1, "D.")]) == "A. One. B. C. Two and two. Three. D."
    assert buried([], [(0, "A."), (1, "B.")]) == "A. B."


def test_no_secret_is_in_the_hay() -> None:
    words = set("".join(c if c.isalpha() else " " for c in " ".join(documents(NEEDLES, 0, 400_000)).lower()).split())
    secrets = [secret.lower() for kind in KINDS.values() for secret in kind]
    assert not words & set(secrets)
    assert len(secrets) == len(set(secrets)) == 64
    there = records(random.Random(0), len(KINDS))
    assert len({question.split()[-1] for question, _ in there}) == len(KINDS) > len(DEPTHS)
    sentence = hay(random.Random(0), 0)
    assert all(next(sentence).rstrip('"')[-1] in ".!?" for _ in range(200))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A model with random weights that says something definite after every text."""
    vocabulary = tokenizer()
    # No rows of the embedding that no token has: the engine would never write those.
    model = model_of(vocabulary, max_position_embeddings=512, vocab_size=vocabulary.vocab_size)
    return LLM.load(make_run(tmp_path_factory.mktemp("needle") / "run", model, vocabulary))


def test_an_answer_is_right_exactly_when_greedy_decoding_writes_it(llm: LLM) -> None:
    """Answers that the engine writes, and the same with any one token changed, in one go."""
    prompts = [one.prompt for trial in range(3) for one in questions(llm.tokenizer, 350, trial)]
    asked, expected = [], []
    for prompt in prompts:
        request = llm.engine.submit(list(prompt), Sampling(temperature=0, max_tokens=4))
        while request.finish_reason is None:
            llm.engine.step()
        written = tuple(request.drawn)
        for wrong in (None, *range(len(written))):
            answer = tuple((token + (i == wrong)) % llm.config.vocab_size for i, token in enumerate(written))
            asked.append(Asked(prompt, answer))
            expected.append(wrong is None)
    assert sum(expected) == len(prompts)
    assert [one.greedy for one in likelihoods(llm.model, asked)] == expected


@pytest.mark.parametrize("length", [300, 350, 500])
def test_haystacks_fill_their_length(llm: LLM, length: int) -> None:
    vocabulary = llm.tokenizer
    for trial in range(4):
        asked = questions(vocabulary, length, trial)
        sizes = {len(one.prompt) + len(one.continuation) for one in asked}
        assert length - 170 < min(sizes) <= max(sizes) <= length  # less a sentence of these short tokens
        places = []
        for one in asked:
            haystack, _, question = vocabulary.decode(list(one.prompt[1:])).rpartition("\n")
            answer = vocabulary.decode(list(one.continuation))
            assert haystack.count(question + answer) == 1
            whole = vocabulary.encode(f"{haystack}\n{question}{answer}")
            assert [*one.prompt, *one.continuation] == [vocabulary.bos_id, *whole]
            places.append(haystack.index(question + answer))
        assert places == sorted(places)
        assert places[0] == 0
    assert asked != questions(vocabulary, length, 3, seed=1)
    with pytest.raises(BadInput, match="do not fit"):
        questions(vocabulary, 100, 0)


def test_the_grid_counts_by_length_and_depth(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one question after the other, with answers such that some are right."""
    grid = search(llm.model, llm.tokenizer, (320, 400), trials=5, seed=3)
    slow = [[0] * len(DEPTHS) for _ in grid.lengths]
    for row, length in zip(slow, grid.lengths, strict=True):
        for trial in range(5):
            for i, one in enumerate(questions(llm.tokenizer, length, trial, 3)):
                row[i] += likelihoods(llm.model, [one])[0].greedy
    assert grid.right == tuple(map(tuple, slow))
    counted = Grid((150, 220), DEPTHS, 4, ((4, 4, 4, 4, 4, 0), (0, 1, 2, 3, 4, 4)))
    found = counted.results()
    assert Grid.of(json.loads(json.dumps(found))) == counted
    assert found["found"] == [[1, 1, 1, 1, 1, 0], [0, 0.25, 0.5, 0.75, 1, 1]]
    assert found["score"] == pytest.approx(34 / 48)
    assert found["n"] == 48
    assert found["low"] < 34 / 48 < found["high"]


def test_hay_may_be_any_text(llm: LLM) -> None:
    straw = straw_of(["A fox slept. It woke!", "Rain came."])
    text = llm.tokenizer.decode(list(questions(llm.tokenizer, 350, 0, straw=straw)[0].prompt))
    assert "Rain came. A fox slept." in text
    assert "A fox slept. It woke!" in text
    with pytest.raises(BadInput, match="no text to make haystacks of"):
        straw_of(["", " \n"])


# ── positions, and the verb ───────────────────────────────────────────────────────────────────────────────────────


def test_bits_by_position_add_up(llm: LLM) -> None:
    dice = random.Random(1)
    texts = [story(dice) for _ in range(12)]
    documents = [(llm.tokenizer.encode(text), len(text)) for text in texts]
    length = sorted(len(ids) for ids, _ in documents)[5]
    curve = by_position(llm.model, llm.tokenizer, documents, length, batch_tokens=300)
    cut = [
        (ids[:length], len(llm.tokenizer.decode(ids[:length]).encode())) for ids, _ in documents if len(ids) >= length
    ]
    assert curve.documents == len(cut)
    assert curve.edges[0] == 0
    assert curve.edges[-1] == length
    assert curve.edges[1] == 64
    total = bits_per_byte(llm.model, cut, length, llm.tokenizer.bos_id)
    sizes = [
        sum(len(llm.tokenizer.decode(ids[a:b]).encode()) for ids, _ in cut)
        for a, b in zip(curve.edges, curve.edges[1:], strict=False)
    ]
    assert np.dot(curve.by_position, sizes) / sum(sizes) == pytest.approx(total.bpb, rel=1e-5)
    assert curve.bpb == pytest.approx(total.bpb, rel=1e-5)
    with pytest.raises(BadInput, match="no document has 5,000 tokens"):
        by_position(llm.model, llm.tokenizer, documents, 5000)


def test_the_verb_keeps_grid_curve_and_pictures(
    long_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval"
    told = ["--tasks", "needle,positions", "--lengths", "320,400", "--limit", "2"]
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(long_run), *told, "--out", str(out), "--json"])
    assert ended.value.code == 0
    results = json.loads(capsys.readouterr().out)
    assert results["needle"]["n"] == 2 * len(DEPTHS) * 2
    assert set(results["needle"]) >= {"score", "stderr", "n", "lengths", "depths", "found"}
    assert results["positions"]["edges"] == [0, 64, 128]
    for name in ("needle", "positions"):
        assert json.loads((out / f"{name}.json").read_text())
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["eval", str(long_run), *told])
    printed = capsys.readouterr().out
    assert "400 tokens:" in printed
    assert "tokens 64 to 127: bpb" in printed
    page = report([long_run], tmp_path).read_text()
    assert "needle" in page
    assert "positions" in page
    for wrong, said in (
        (["--lengths", "12"], "do not fit"),
        (["--lengths", "x"], "whole numbers"),
        (["--context", "0", "--tasks", "positions"], "at least 1"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["eval", str(long_run), "--tasks", "needle", *wrong])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
