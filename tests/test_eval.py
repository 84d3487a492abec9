"""Bits per byte against the definition, computed letter by letter, and the files it is asked for."""

import gzip
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from leanseek.config import BadInput
from leanseek.data.prepare import prepare
from leanseek.data.shards import open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval import bpb
from leanseek.eval.bpb import BPB, Window, bits_per_byte
from leanseek.eval.harness import evaluate
from leanseek.model.transformer import Transformer
from tests.oracle import ours, tiny
from tests.runs import TEXT, make_run, model_of, tokenizer
from tests.tiny import story

BOS, EOS, T = 2, 1, 6
Document = tuple[list[int], int]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """In FP64: how far two ways of computing may differ leaves no room for a fault."""
    return ours(tiny(bos_token_id=BOS), dtype=torch.float64)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Every case of a length against the window: none, one, just below, equal, just above, several."""
    dice = np.random.default_rng(0)
    return [(dice.integers(3, 64, n).tolist(), 4 * n + 1) for n in (0, 1, T - 1, T, T + 1, 2 * T, 3 * T - 1)]


def surprise(model: Transformer, seen: list[int], token: int) -> float:
    """−log2 p of one token after `seen`, from the whole softmax."""
    model.eval()
    with torch.no_grad():
        hidden = model(torch.tensor([seen]), torch.arange(len(seen))[None])
        return -math.log2(model.lm_head(hidden)[0, -1].softmax(dim=0)[token].item())


def by_definition(model: Transformer, documents: list[Document]) -> BPB:
    """Document by document, token by token."""
    bits = 0.0
    for ids, _ in documents:
        for i, token in enumerate(ids):
            begin = i - i % T  # of the window that scores token i; the token before it is its first input
            seen = [BOS, *ids][begin : i + 1]
            assert 1 <= len(seen) <= T
            bits += surprise(model, seen, token)
    in_all = sum(raw_bytes for _, raw_bytes in documents)
    return BPB(bits / in_all, in_all, sum(len(ids) for ids, _ in documents))


def agrees(found: BPB, expected: BPB) -> bool:
    return found.bpb == pytest.approx(expected.bpb, rel=1e-12) and found.bytes == expected.bytes


def test_bpb_is_what_the_definition_says(model: Transformer, documents: list[Document]) -> None:
    found, expected = bits_per_byte(model, documents, T, BOS), by_definition(model, documents)
    assert agrees(found, expected)
    assert found.tokens == expected.tokens == sum(len(ids) for ids, _ in documents)


def without_the_first_token(ids: np.ndarray, context: int, bos_id: int) -> Iterator[Window]:
    for start in range(0, len(ids) - 1, context):
        yield ids[start : start + context][: len(ids) - 1 - start], ids[start + 1 : start + 1 + context]


def with_the_end(ids: np.ndarray, context: int, bos_id: int) -> Iterator[Window]:
    yield from bpb_windows(np.concatenate((ids, [EOS])), context, bos_id)


def overlapping(ids: np.ndarray, context: int, bos_id: int) -> Iterator[Window]:
    """Every window but the first sees half of the one before it as well."""
    shifted = np.concatenate(([bos_id], ids[:-1])) if len(ids) else ids
    for start in range(0, len(ids), context // 2):
        begin = max(0, start - context // 2)
        targets = np.full(min(len(ids), start + context // 2) - begin, bpb.IGNORE)
        targets[start - begin :] = ids[start : start + context // 2]
        yield shifted[begin : begin + len(targets)], targets


def bos_in_every_window(ids: np.ndarray, context: int, bos_id: int) -> Iterator[Window]:
    for inputs, targets in bpb_windows(ids, context, bos_id):
        yield np.concatenate(([bos_id], inputs[1:])), targets


def windows_one_too_long(ids: np.ndarray, context: int, bos_id: int) -> Iterator[Window]:
    yield from bpb_windows(ids, context + 1, bos_id)


bpb_windows = bpb.windows_of


@pytest.mark.parametrize(
    "faulty", [without_the_first_token, with_the_end, overlapping, bos_in_every_window, windows_one_too_long]
)
def test_planted_faults_are_seen(
    faulty: Callable[..., Iterator[Window]],
    model: Transformer,
    documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bpb, "windows_of", faulty)
    found, expected = bits_per_byte(model, documents, T, BOS), by_definition(model, documents)
    assert not agrees(found, expected)
    assert abs(found.bpb / expected.bpb - 1) > 1e-4


def test_batch_size_changes_nothing(model: Transformer, documents: list[Document]) -> None:
    expected = bits_per_byte(model, documents, T, BOS)
    for batch_tokens in (1, T, 17, 10**6):
        assert agrees(bits_per_byte(model, documents, T, BOS, batch_tokens), expected)
    assert agrees(bits_per_byte(model, documents[::-1], T, BOS), expected)


def test_windows_are_sorted_in_stretches_without_loss(
    model: Transformer, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bits_per_byte(model, documents, T, BOS)
    monkeypatch.setattr(bpb, "SORTED_AT_ONCE", 3)
    assert agrees(bits_per_byte(model, documents, T, BOS), expected)


def test_batches_are_padded_little_and_never_too_large(documents: list[Document]) -> None:
    windows = [w for ids, _ in documents for w in bpb_windows(np.array(ids, np.int64), T, BOS)]
    made = list(bpb.batches(iter(windows), 3 * T))
    assert all(ids.numel() <= 3 * T for ids, _ in made)
    assert sum(int((targets != bpb.IGNORE).sum()) for _, targets in made) == sum(len(ids) for ids, _ in documents)
    assert sum(ids.numel() for ids, _ in made) < 1.1 * sum(len(ids) for ids, _ in documents)


def test_documents_may_be_small_integers_of_a_shard(model: Transformer, documents: list[Document]) -> None:
    as_stored = ((np.array(ids, "<u2"), raw_bytes) for ids, raw_bytes in documents)
    assert bits_per_byte(model, as_stored, T, BOS) == bits_per_byte(model, documents, T, BOS)


def test_model_is_left_as_it_was(documents: list[Document]) -> None:
    model = ours(tiny(num_nextn_predict_layers=1))
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for training in (True, False):
        bits_per_byte(model.train(training), documents, T, BOS)
        assert all(module.training == training for module in model.modules())
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(before[name], after[name]) for name in before)  # loads and balance losses among them

    def fails() -> Iterator[Document]:
        yield documents[3]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        bits_per_byte(model.train(), fails(), T, BOS)
    assert model.training


def test_no_text_is_no_score(model: Transformer) -> None:
    with pytest.raises(BadInput, match="no text to score"):
        bits_per_byte(model, [], T, BOS)


# ── eval RUN ──────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = ["The old fox — le renard — slept.\r\n", "狐は壁の下で眠った。🦊", "  \tx", TEXT * 3]


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vocabulary: Tokenizer) -> Path:
    return make_run(tmp_path_factory.mktemp("eval") / "run", model_of(vocabulary), vocabulary)


def directly(vocabulary: Tokenizer, texts: list[str]) -> BPB:
    documents = [(vocabulary.encode(text), len(text.encode())) for text in texts]
    return bits_per_byte(model_of(vocabulary), documents, 16, vocabulary.bos_id)


def close(found: dict[str, dict[str, float]], expected: BPB) -> bool:
    assert list(found) == ["bpb"]
    assert found["bpb"].keys() == {"bpb", "bytes", "tokens"}
    same = (found["bpb"]["bytes"], found["bpb"]["tokens"]) == (expected.bytes, expected.tokens)
    return same and found["bpb"]["bpb"] == pytest.approx(expected.bpb, rel=1e-6)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.jsonl.zst"])
def test_records_are_documents_and_bytes_are_as_given(
    name: str, run: Path, vocabulary: Tokenizer, tmp_path: Path
) -> None:
    raw = "".join(json.dumps({"text": text, "by": "us"}) + "\n" for text in TEXTS).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(packed(raw))
    found = evaluate(run, ["bpb"], tmp_path / name)
    assert close(found, directly(vocabulary, TEXTS))
    assert found["bpb"]["bytes"] == sum(len(text.encode()) for text in TEXTS) > sum(map(len, TEXTS))


def test_a_text_file_is_one_document(run: Path, vocabulary: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("".join(TEXTS).encode())
    assert close(evaluate(run, ["bpb"], file), directly(vocabulary, ["".join(TEXTS)]))


def test_undecodable_bytes_count_once(run: Path, vocabulary: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"x" * 500 + b"\xff" + b"y" * 500)
    found = evaluate(run, ["bpb"], tmp_path / "t.txt")["bpb"]
    assert found["bytes"] == 1001
    assert found["tokens"] == len(vocabulary.encode("x" * 500 + "\ufffd" + "y" * 500))


def test_records_left_out_are_told(
    run: Path, vocabulary: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"text": "the fox"}) + "\n{broken\n")
    assert close(evaluate(run, ["bpb"], file), directly(vocabulary, ["the fox"]))
    assert capsys.readouterr().err == f"warning: left out 1 records: not JSON; the first is {file} line 2\n"


def test_without_text_the_validation_split_of_the_run_is_scored(tmp_path: Path, vocabulary: Tokenizer) -> None:
    text = tmp_path / "stories.jsonl"
    dice = random.Random(0)
    text.write_text("".join(json.dumps({"text": story(dice)}) + "\n" for _ in range(120)))
    vocabulary.save(tmp_path / "known")
    prepare([str(text)], tmp_path / "data", tokenizer=tmp_path / "known", workers=1)
    data = open_data(tmp_path / "data")
    run = make_run(tmp_path / "run", model_of(vocabulary), vocabulary, data.fingerprint, "data")
    expected = bits_per_byte(model_of(vocabulary), data.documents("validation"), 16, vocabulary.bos_id)
    assert 0 < expected.tokens < data.counts("train").tokens
    assert close(evaluate(run, ["bpb"]), expected)

    other = make_run(tmp_path / "other", model_of(vocabulary), vocabulary, "another", "data")
    with pytest.raises(BadInput, match="begun on other data"):
        evaluate(other, ["bpb"])


def test_bad_input(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no task 'bbp' \(did you mean 'bpb'\?\)"):
        evaluate(run, ["bpb", "bbp"])
    with pytest.raises(BadInput, match="no task ''"):
        evaluate(run, [""])
    with pytest.raises(BadInput, match="not a run"):
        evaluate(tmp_path, ["bpb"])
    with pytest.raises(BadInput, match=r"no longer at .*gone: give --text"):
        evaluate(run, ["bpb"])
    with pytest.raises(BadInput, match="no such file"):
        evaluate(run, ["bpb"], tmp_path / "missing.txt")
    for name, content, says in (
        ("empty.txt", b"", "the file is empty"),
        ("blank.txt", b" \n", "no text to score"),
        ("latin.txt", "é".encode("latin-1") * 40, "not UTF-8: byte 0"),
        ("latin.jsonl", b'{"text": "' + b"\xe9" * 40 + b'"}', "not UTF-8: byte 10"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], "damaged or truncated archive"),
        ("picture.png", b"x", "not a kind of file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=says):
            evaluate(run, ["bpb"], tmp_path / name)
