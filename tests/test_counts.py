"""Counts as a teacher: Kneser-Ney against a slow twin of dictionaries, the loss against autograd, runs to the bit."""

import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanseek.config import BadInput, read_recipe
from leanseek.data.ngrams import Followers, NGrams, count
from leanseek.data.shards import open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE, Expected, linear_cross_entropy, linear_expected_cross_entropy
from leanseek.train.counts import Counts, counts_of
from leanseek.train.optim import build_optimizers
from leanseek.train.pretrain import pretrain
from leanseek.train.schedule import Kind, Knobs, kinds_of_tokens
from leanseek.train.step import train_step
from tests.pool import Pool
from tests.tiny import RECIPE, make_data


def text(vocabulary: int, size: int, seed: int) -> NDArray[np.int64]:
    """Tokens that follow each other by a rule and by chance: many n-grams come once, some often."""
    rng = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(size - 1):
        skewed = int(vocabulary * rng.random() ** 3)
        tokens.append((3 * tokens[-1] + 1) % vocabulary if rng.random() < 0.5 else skewed)
    return np.array(tokens)


class SlowKneserNey:
    """Chen and Goodman's interpolated, modified Kneser-Ney by their formulas, in dictionaries."""

    def __init__(self, stream: list[int], vocabulary: int, longest: int) -> None:
        self.vocabulary, self.longest = vocabulary, longest
        of = {n: [tuple(stream[i : i + n]) for i in range(len(stream) - n + 1)] for n in range(1, longest + 1)}
        self.times = {longest: Counter(of[longest])}
        for n in range(longest - 1, 0, -1):
            self.times[n] = Counter(gram[1:] for gram in set(self.times[n + 1]))
        self.after: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        for n in range(2, longest + 1):
            for gram, times in self.times[n].items():
                self.after[gram[:-1]][gram[-1]] = times

    def discount(self, n: int, times: int) -> float:
        ones, twos, threes, fours = (max(sum(c == i for c in self.times[n].values()), 1) for i in (1, 2, 3, 4))
        y = ones / (ones + 2 * twos)
        asked = {1: (1 - 2 * y * twos / ones, 0.9), 2: (2 - 3 * y * threes / twos, 1.8)}
        value, most = asked.get(times, (3 - 4 * y * fours / threes, 2.7))
        return min(max(value, 0.1), most)

    def p(self, token: int, context: tuple[int, ...]) -> float:
        if not context:
            total = sum(self.times[1].values()) + 0.5 * self.vocabulary
            return (self.times[1][(token,)] + 0.5) / total
        shorter = self.p(token, context[1:])
        if context not in self.after:
            return shorter
        n, seen = len(context) + 1, self.after[context]
        total, left = sum(seen.values()), sum(self.discount(n, times) for times in seen.values())
        own = seen[token] - self.discount(n, seen[token]) if token in seen else 0.0
        return (own + left * shorter) / total


def dense(ngrams: NGrams, after: Followers) -> NDArray[np.float64]:
    """[N, V] of what follows at N places."""
    found = ngrams.base[after.row].astype(np.float64) * after.scale[:, None]
    place = np.repeat(np.arange(len(after.row)), np.diff(after.first))
    np.add.at(found, (place, after.tokens), after.shares)
    return found


@pytest.mark.parametrize("longest", [2, 3, 4, 5])
@pytest.mark.parametrize("largest", [8192, 8])
def test_counts_are_those_of_a_slow_twin(longest: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanseek.data.ngrams.LARGEST_TABLE", largest)
    vocabulary, stream = 9, text(9, 400, longest)
    ngrams, slow = (
        count([stream[:150], stream[150:]], vocabulary, longest, math.inf),
        SlowKneserNey(stream.tolist(), vocabulary, longest),
    )
    rows = np.concatenate([stream[100:130], text(vocabulary, 30, 99)]).reshape(4, 15)  # seen text and other text
    found = dense(ngrams, ngrams.after(rows)).reshape(4, 15, vocabulary)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    for row, places in zip(rows.tolist(), found, strict=True):
        for i, place in enumerate(places):
            context = tuple(row[max(0, i - longest + 2) : i + 1])  # none reaches into the row before
            wanted = [slow.p(token, context) for token in range(vocabulary)]
            np.testing.assert_allclose(place, wanted, rtol=2e-5)


def test_no_more_text_is_counted_than_asked_for() -> None:
    stream = text(9, 300, 0)
    some, first = (
        count([stream[:100], stream[100:200], stream[200:]], 9, 3, 150),
        count([stream[:200]], 9, 3, math.inf),
    )
    np.testing.assert_array_equal(some.base, first.base)
    np.testing.assert_array_equal(some.longer[0].shares, first.longer[0].shares)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match="do not fit"):
        count([np.arange(9)], 4096, 6, math.inf)


def as_expected(ngrams: NGrams, rows: NDArray[np.int64]) -> tuple[Expected, Tensor]:
    """What counts expect at each place of rows, as the loss takes it, and dense [N, V]."""
    expected = Counts(ngrams, torch.from_numpy(ngrams.base)).expected(torch.from_numpy(rows))
    return expected, torch.from_numpy(dense(ngrams, ngrams.after(rows)))


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("rows_at_once", [3, 100])
def test_the_loss_is_the_texts_and_its_gradient_that_of_the_mixture(
    share: float, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanseek.ops.loss._LOGITS_IN_CACHE", 9 * rows_at_once)
    stream = text(9, 400, 1)
    expected, q = as_expected(count([stream], 9, 4, math.inf), stream[20:34].reshape(2, 7))
    torch.manual_seed(0)
    hidden, weight = torch.randn(14, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    targets = torch.from_numpy(stream[21:35].copy())
    targets[[4, 13]] = IGNORE
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    told = linear_expected_cross_entropy(h, w, targets, expected, share)
    (0.7 * told).backward()

    valid = targets != IGNORE
    twin_h, twin_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = (twin_h @ twin_w.T).log_softmax(-1)[valid]
    text_alone = -logp.gather(1, targets[valid, None]).sum()
    wanted = (1 - share) * text_alone - share * (q[valid] * logp).sum()
    (0.7 * wanted).backward()
    torch.testing.assert_close(told.detach(), text_alone.detach(), rtol=1e-6, atol=1e-6)
    assert h.grad is not None
    assert w.grad is not None
    torch.testing.assert_close((h.grad, w.grad), (twin_h.grad, twin_w.grad), rtol=1e-5, atol=1e-6)


def test_a_step_learns_from_counts_and_tells_of_the_text() -> None:
    """MTP modules learn from the text alone; micro-batches change nothing."""
    config = read_recipe(str(RECIPE), ("train.balance_loss_alpha=0", "optimizer.name=adamw"))
    vocabulary = config.model.vocab_size
    stream = text(vocabulary, 5000, 2)
    ngrams = count([stream], vocabulary, 3, math.inf)
    counts = Counts(ngrams, torch.from_numpy(ngrams.base))
    ids, targets = (torch.from_numpy(stream[100 + i : 184 + i].copy()).view(7, 12) for i in (0, 1))
    targets = torch.where(torch.rand(7, 12, generator=torch.Generator().manual_seed(4)) < 0.2, IGNORE, targets)
    now = Knobs(learning_rate=0.0, batch_tokens=1, bias_speed=0.0, mtp_weight=0.3, count_weight=0.6)
    told = []
    for micro_batch in (2, 7):
        model = Transformer(config.model, torch.float64)
        model.initialise(0.3, torch.Generator().manual_seed(0))
        model.double()
        own = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})
        told.append(train_step(model, build_optimizers(model, own.optimizer), ids, targets, now, own, counts=counts))

    twin = Transformer(config.model, torch.float64)
    twin.initialise(0.3, torch.Generator().manual_seed(0))
    twin.double()
    places, valid = torch.arange(12).expand_as(ids), targets != IGNORE
    hidden = twin(ids, places)
    assert twin.lm_head is not None
    logp = (hidden[valid] @ twin.lm_head.weight.T).log_softmax(-1)
    q = torch.from_numpy(dense(ngrams, ngrams.after(ids.numpy()))).view(7, 12, -1)[valid]
    plain = -logp.gather(1, targets[valid][:, None]).sum() / valid.sum()
    (further,) = twin.predict_further(hidden, ids, places)
    wanted = targets[:, 1:]
    mtp = linear_cross_entropy(further.flatten(0, 1), twin.lm_head.weight, wanted.flatten()) / (wanted != IGNORE).sum()
    (0.4 * plain - 0.6 * (q * logp).sum() / valid.sum() + 0.3 * mtp).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None))
    for result in told:
        assert (result.loss, result.mtp_loss) == pytest.approx((plain.item(), mtp.item()), rel=1e-9)
        assert result.grad_norm == pytest.approx(norm, rel=1e-6)


ASKED = (
    *("train.dtype=fp32", "train.eval_every=1000", "train.checkpoint_every=1000", "counts.order=3"),
    "schedule.count_weight=[{until=0.5,value=1.0},{until=1.0,value=0.0,shape='linear'}]",
)


def losses_of_run(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_with_counts_is_ahead_goes_on_to_the_same_bits_and_is_billed(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    config = read_recipe(str(RECIPE), (*ASKED, "train.tokens=4096"))
    whole = pretrain(config, data, tmp_path / "whole")
    without = read_recipe(str(RECIPE), (*ASKED[:3], "train.tokens=4096"))
    assert whole["bpb"] < pretrain(without, data, tmp_path / "without")["bpb"]

    pretrain(read_recipe(str(RECIPE), (*ASKED, "train.tokens=4096", "train.max_steps=3")), data, tmp_path / "cut")
    assert pretrain(config, data, tmp_path / "cut")["ended"] == "complete"
    assert losses_of_run(tmp_path / "cut") == losses_of_run(tmp_path / "whole")


def test_counting_is_billed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path)
    config = read_recipe(str(RECIPE), (*ASKED, "train.tokens=2048"))
    cheap = pretrain(config, data, tmp_path / "cheap")

    def slow(*given: object) -> Counts | None:
        until = time.process_time() + 1.5
        while time.process_time() < until:
            pass
        return counts_of(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("leanseek.train.pretrain.counts_of", slow)
    assert pretrain(config, data, tmp_path / "dear")["cpu_seconds"] > cheap["cpu_seconds"] + 1


def test_counts_know_the_ends_of_documents(tmp_path: Path) -> None:
    data = open_data(make_data(tmp_path))
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    counts = counts_of(read_recipe(str(RECIPE), ASKED), data, tokenizer, torch.device("cpu"))
    assert counts is not None
    assert counts.ngrams.base[tokenizer.eos_id].argmax() == tokenizer.bos_id


def test_what_cannot_go_with_counts_is_refused() -> None:
    for asked, said in (
        (("schedule.count_weight=[{until=1.0,value=0.5}]",), "nothing to weigh"),
        (("counts.order=3", "schedule.count_weight=[{until=1.0,value=1.5}]"), "at most 1"),
        (("counts.order=1",), "counts.order"),
        (("counts.order=3", "mesh.pp=2"), "whole rows"),
        (("counts.order=3", "teacher.run=somewhere"), "no teacher"),
    ):
        with pytest.raises(BadInput, match=said):
            read_recipe(str(RECIPE), asked)


def test_kinds_of_tokens_are_weighed() -> None:
    asked = (
        *ASKED,
        "schedule.mtp_weight=[{until=0.75,value=0},{until=1.0,value=0.3}]",
        "stages=[{sequence_length=16,share=0.6},{sequence_length=32,share=0.4}]",
    )
    kinds = kinds_of_tokens(read_recipe(str(RECIPE), asked))
    batch = round(read_recipe(str(RECIPE)).schedule.batch_tokens[-1].value)
    shares = {(0, False, True): 0.6, (1, False, True): 0.15, (1, True, True): 0.25}
    wanted = {Kind(*kind, batch=batch): share for kind, share in shares.items()}
    assert kinds == pytest.approx(wanted, abs=2e-3)
    without = kinds_of_tokens(read_recipe(str(RECIPE), asked[-2:]))
    assert without == pytest.approx({kind._replace(counted=False): share for kind, share in wanted.items()}, abs=2e-3)


def trains(rank: int, world: int, data: Path, run: Path, *overrides: str) -> None:
    pretrain(read_recipe(str(RECIPE), (*ASKED, "train.tokens=2048", *overrides)), data, run)


@pytest.mark.parametrize("mesh", ["mesh.dp=2", "mesh.ep=2"])
def test_ranks_learn_from_counts_what_one_process_learns(pool: Pool, tmp_path: Path, mesh: str) -> None:
    data = make_data(tmp_path)
    trains(0, 1, data, tmp_path / "one")
    pool.run(2, trains, data, tmp_path / "two", mesh)
    one, two = losses_of_run(tmp_path / "one"), losses_of_run(tmp_path / "two")
    assert len(one) == len(two) == 8
    assert two == pytest.approx(one, rel=1e-4)
