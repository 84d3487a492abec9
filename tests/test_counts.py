"""Counts as a teacher: Kneser-Ney against a slow twin of dictionaries, the loss against autograd, runs to the bit."""

import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanseek.config import BadInput, CountsConfig, read_recipe
from leanseek.data.ngrams import Followers, NGrams, count
from leanseek.data.shards import open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE, linear_cross_entropy
from leanseek.ops.sampled import LIKELY, Vocabulary, by_frequency, sampled_cross_entropy
from leanseek.train.counts import Counts, counted, counts_of
from leanseek.train.optim import build_optimizers
from leanseek.train.pretrain import pretrain
from leanseek.train.schedule import Kind, Knobs, kinds_of_tokens
from leanseek.train.step import train_step
from tests.pool import Pool
from tests.tiny import RECIPE, make_data

CPU = torch.device("cpu")


def text(vocabulary: int, size: int, seed: int) -> NDArray[np.int64]:
    """Tokens that follow each other by a rule and by chance: many n-grams come once, some often."""
    rng = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(size - 1):
        skewed = int(vocabulary * rng.random() ** 3)
        tokens.append((3 * tokens[-1] + 1) % vocabulary if rng.random() < 0.5 else skewed)
    return np.array(tokens)


class SlowKneserNey:
    """Chen and Goodman's interpolated, modified Kneser-Ney by their formulas, in dictionaries.

    After `whole` tokens or more, a token with less than the `least` share is left to the shorter context.
    """

    def __init__(self, stream: list[int], vocabulary: int, longest: int, least: float = 0.0, whole: int = 1) -> None:
        self.vocabulary, self.longest, self.least, self.whole = vocabulary, longest, least, whole
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
        total, kept = sum(seen.values()), dict[int, float]()
        for other, times in seen.items():
            share = (times - self.discount(n, times)) / total
            if len(context) < self.whole or share >= self.least:
                kept[other] = share
        return kept.get(token, 0.0) + (1 - sum(kept.values())) * shorter


def dense(ngrams: NGrams, after: Followers) -> NDArray[np.float64]:
    """[N, V] of what follows at N places."""
    found = ngrams.base[after.row].astype(np.float64) * after.scale[:, None]
    place = np.repeat(np.arange(len(after.row)), np.diff(after.first))
    np.add.at(found, (place, after.tokens), after.shares)
    return found


@pytest.mark.parametrize("least", [5e-4, 0.2])
@pytest.mark.parametrize("longest", [2, 3, 4, 5])
@pytest.mark.parametrize("largest", [8192, 8])
def test_counts_are_those_of_a_slow_twin(
    longest: int, largest: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanseek.data.ngrams.LARGEST_TABLE", largest)
    monkeypatch.setattr("leanseek.data.ngrams.LEAST", least)
    vocabulary, stream = 9, text(9, 400, longest)
    ngrams = count(stream, vocabulary, longest)
    slow = SlowKneserNey(stream.tolist(), vocabulary, longest, least, whole=2 if largest > vocabulary else 1)
    for order in ngrams.longer:
        assert (len(order.tokens) < len(slow.times[order.n])) == (least > 0.1)
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
    some = counted([stream[:100], stream[100:200], stream[200:]], 9, CountsConfig(order=3, tokens=150), CPU)
    first = counted([stream[:200]], 9, CountsConfig(order=3), CPU)
    np.testing.assert_array_equal(some.ngrams.base, first.ngrams.base)
    np.testing.assert_array_equal(some.ngrams.longer[0].shares, first.ngrams.longer[0].shares)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match="do not fit"):
        count(np.arange(9), 4096, 6)


def expectations(counts: Counts, rows: NDArray[np.int64]) -> Tensor:
    """What counts expect at each place of rows, by id, dense [N, V]."""
    number = counts.vocabulary.number
    return torch.from_numpy(dense(counts.ngrams, counts.ngrams.after(number.numpy()[rows])))[:, number]


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    targets: Tensor
    counts: Counts

    def told(self, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the gradients of 0.7 of it."""
        h, w = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        loss = self.counts.loss(h, w, self.ids, self.targets, share)
        return loss.detach(), *torch.autograd.grad(0.7 * loss, (h, w))

    def wanted(self, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """The same by autograd, over all ids."""
        h, w = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        valid = (self.targets != IGNORE).flatten()
        logp = (h.flatten(0, 1) @ w.T).log_softmax(-1)[valid]
        text_alone = -logp.gather(1, self.targets.flatten()[valid, None]).sum()
        q = expectations(self.counts, self.ids.numpy())[valid]
        mixed = (1 - share) * text_alone - share * (q * logp).sum()
        return text_alone.detach(), *torch.autograd.grad(0.7 * mixed, (h, w))


def case(vocabulary: int, rows: int, config: CountsConfig) -> Case:
    stream = text(vocabulary, 60 * vocabulary, 1)
    counts = counted([stream], vocabulary, config, CPU)
    torch.manual_seed(0)
    hidden = torch.randn(rows, 7, 5, dtype=torch.float64)
    weight = torch.randn(vocabulary, 5, dtype=torch.float64)
    ids, targets = (torch.from_numpy(stream[20 + i : 20 + i + 7 * rows].copy()).view(rows, 7) for i in (0, 1))
    targets[0, 4] = targets[-1, 6] = IGNORE
    return Case(hidden, weight, ids, targets, counts)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("rows_at_once", [3, 100])
def test_the_loss_is_the_texts_and_its_gradient_that_of_the_mixture(
    share: float, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanseek.ops.loss._LOGITS_IN_CACHE", 9 * rows_at_once)
    whole = case(9, 2, CountsConfig(order=4))
    torch.testing.assert_close(whole.told(share), whole.wanted(share), rtol=1e-5, atol=1e-6)


def test_in_bf16_the_loss_and_its_gradient_are_as_near_as_bf16_is() -> None:
    config, stream = CountsConfig(order=4), text(9, 540, 1)
    wide = case(9, 40, config)
    narrow = wide._replace(
        hidden=wide.hidden.bfloat16(),
        weight=wide.weight.bfloat16(),
        counts=counted([stream], 9, config, CPU, torch.bfloat16),
    )
    assert narrow.counts.base.dtype == torch.bfloat16
    wide = wide._replace(hidden=narrow.hidden.double(), weight=narrow.weight.double())
    for found, wanted in zip(narrow.told(0.6), wide.wanted(0.6), strict=True):
        assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("by", ["our kernel", "PyTorch"])
def test_in_bf16_a_group_stands_for_as_many_as_ever(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were logits rounded before and after the logarithm of four is added, the loss would be 0.005 nats too low."""
    if by == "PyTorch":  # as on a GPU
        monkeypatch.setattr("leanseek.ops.cpu_kernels.takes", lambda *_: False)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20_000, 16).bfloat16(), torch.randn(100, 16).bfloat16()
    vocabulary, targets = by_frequency(torch.arange(100, 0, -1), 10, 4), torch.randint(10, (20_000,))
    found, wanted = (
        sampled_cross_entropy(hidden.to(dtype), weight.to(dtype), targets, vocabulary)
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert abs(found - wanted).item() / 20_000 < 1e-3


def test_a_target_that_is_impossible_has_a_loss_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sure = torch.zeros(10, 1, dtype=torch.float32)
    sure[3] = 1e4
    given = torch.ones(2, 1), sure, torch.tensor([3, 4]), by_frequency(torch.ones(10), 10, 0)
    assert sampled_cross_entropy(*given).item() == 1e4
    monkeypatch.setattr("leanseek.ops.cpu_kernels.takes", lambda *_: False)
    assert 87 < sampled_cross_entropy(*given).item() < 88


def of_ten(frequent: int, groups: int) -> Vocabulary:
    """Ten ids, the first the most frequent."""
    return by_frequency(torch.arange(10, 0, -1), frequent, groups)


def test_candidates_are_the_frequent_a_group_and_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanseek.ops.sampled.MULTIPLE", 8)
    vocabulary = of_ten(3, 3)
    assert vocabulary.begins == (3, 6, 8, 10)
    asked = torch.tensor([9, 1, 4, 9])
    found = vocabulary.of(asked, turn=4)  # the second of three groups
    assert found.tokens.tolist() == [0, 1, 2, 6, 7, 4, 9, 0]  # the last fills up, and stands for nothing
    assert found.times.tolist() == [1, 1, 1, 3, 3, 1, 1, 0]
    assert found.column.tolist() == [0, 1, 2, -1, 5, -1, 3, 4, -1, 6]
    assert vocabulary.of(asked, turn=0).times.tolist() == [1, 1, 1, 3, 1, 3, 1, 0]  # 4 stands for itself alone
    assert of_ten(10, 3).of(asked, turn=7).tokens.tolist() == list(range(10))


@pytest.mark.parametrize(("frequent", "groups"), [(3, 2), (1, 4), (9, 3), (20, 2)])
def test_over_all_turns_each_token_is_counted_as_often(frequent: int, groups: int) -> None:
    vocabulary = of_ten(frequent, groups)
    times = torch.zeros(10)
    for turn in range(groups):
        found = vocabulary.of(torch.tensor([2, 5, 5]), turn)
        times.index_add_(0, vocabulary.ids[found.tokens], found.times)
    assert times.tolist() == [groups] * 10


def test_numbers_are_by_frequency_and_groups_alike() -> None:
    stream = np.repeat(np.arange(9), [1, 7, 2, 8, 3, 0, 5, 4, 6])
    vocabulary = counted([stream], 9, CountsConfig(order=2, frequent=3, groups=2), CPU).vocabulary
    assert vocabulary.ids.tolist() == [3, 1, 8, 6, 4, 0, 7, 2, 5]
    assert vocabulary.ids[vocabulary.number].tolist() == list(range(9))
    assert (vocabulary.frequent, vocabulary.begins) == (3, (3, 6, 9))
    assert vocabulary.numbers(torch.tensor([8, IGNORE])).tolist() == [2, IGNORE]
    assert CountsConfig(frequent=3, groups=2).candidates(9) == vocabulary.candidates == 6
    assert CountsConfig().candidates(9) == counted([stream], 9, CountsConfig(order=2), CPU).vocabulary.candidates == 9


def test_a_sampled_loss_is_on_average_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ exp of the logits is, on average over the groups, that of all tokens, and so is what the counts expect; its
    logarithm is a little less, by how far the groups differ: with logits that differ by 0.03, very little."""
    sampled = case(200, 6, CountsConfig(order=3, frequent=20, groups=3))
    sampled = sampled._replace(weight=0.03 * sampled.weight)
    turns = []
    for turn in range(3):
        monkeypatch.setattr("leanseek.ops.sampled.first_turn", lambda _, begin=turn: begin)
        turns.append(sampled.told(0.6))
    averages = [torch.stack(each).mean(0) for each in zip(*turns, strict=True)]
    for found, wanted in zip(averages, sampled.wanted(0.6), strict=True):
        assert (found - wanted).norm() < 5e-3 * wanted.norm()
    for found, wanted in zip(turns[0][1:], sampled.wanted(0.6)[1:], strict=True):
        assert (found - wanted).norm() > 5e-2 * wanted.norm()  # one turn alone is no oracle for itself


def test_pieces_have_one_group_after_the_other_and_ask_for_what_they_may_not_miss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("leanseek.ops.loss._LOGITS_IN_CACHE", 80 * 7)
    sampled = case(200, 6, CountsConfig(order=3, frequent=20, groups=3))
    of, given = Vocabulary.of, []
    monkeypatch.setattr(Vocabulary, "of", lambda *them: given.append(them[1:]) or of(*them))
    firsts = set()
    for shift in range(6):
        given.clear()
        moved = sampled._replace(targets=sampled.targets.roll(shift, 0).where(sampled.targets != IGNORE, IGNORE))
        moved.told(0.5)
        assert [turn for _, turn in given] == list(range(given[0][1], given[0][1] + 6))
        firsts.add(given[0][1] % 3)
    assert len(firsts) > 1
    given.clear()
    sampled.told(0.5)
    expected, targets = sampled.counts.expected(sampled.ids), sampled.counts.vocabulary.numbers(sampled.targets)
    rare = 0
    for i, (asked, _) in enumerate(given):
        known = slice(int(expected.first[7 * i]), int(expected.first[7 * i + 7]))
        likely = expected.tokens[known][expected.shares[known] >= LIKELY]
        assert set(asked.tolist()) == set(targets[i].tolist()) - {IGNORE} | set(likely.tolist())
        rare += int((likely >= 20).sum())
    assert rare > 10


def test_a_sampled_run_costs_fewer_flops_and_learns_as_well(tmp_path: Path) -> None:
    """As well: it loses less than a tenth of what counts bring at this length."""
    data = make_data(tmp_path)
    config = read_recipe(str(RECIPE))
    sampled = "counts.frequent=128", "counts.groups=2"
    runs = [
        pretrain(read_recipe(str(RECIPE), (*asked, "train.tokens=8192")), data, tmp_path / str(len(asked)))
        for asked in (ASKED[:3], ASKED, (*ASKED, *sampled))
    ]
    saved = 6 * config.model.hidden_size * (config.model.vocab_size - 128) / 2
    assert runs[1]["flops"] - runs[2]["flops"] == pytest.approx(8192 * saved, rel=2e-2)
    without, whole, less = (run["bpb"] for run in runs)
    assert less < whole + 0.1 * (without - whole)


def test_a_run_keeps_its_table_in_the_precision_of_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Counts | None] = []
    monkeypatch.setattr("leanseek.train.pretrain.counts_of", lambda *given: made.append(counts_of(*given)) or made[-1])
    config = read_recipe(str(RECIPE), (*ASKED, "train.dtype=bf16", "train.max_steps=1"))
    pretrain(config, make_data(tmp_path), tmp_path / "run")
    assert made[0] is not None
    assert made[0].base.dtype == torch.bfloat16


def test_a_step_learns_from_counts_and_tells_of_the_text() -> None:
    """MTP modules learn from the text alone; micro-batches change nothing."""
    config = read_recipe(str(RECIPE), ("train.balance_loss_alpha=0", "optimizer.name=adamw"))
    vocabulary = config.model.vocab_size
    stream = text(vocabulary, 5000, 2)
    counts = counted([stream], vocabulary, CountsConfig(order=3), CPU)
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
    q = expectations(counts, ids.numpy()).view(7, 12, -1)[valid]
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
        until = time.process_time() + 2.5
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
    ids, number = counts.vocabulary.ids, counts.vocabulary.number
    assert ids[counts.ngrams.base[number[tokenizer.eos_id]].argmax()] == tokenizer.bos_id


def test_what_cannot_go_with_counts_is_refused() -> None:
    for asked, said in (
        (("schedule.count_weight=[{until=1.0,value=0.5}]",), "nothing to weigh"),
        (("counts.order=3", "schedule.count_weight=[{until=1.0,value=1.5}]"), "at most 1"),
        (("counts.order=1",), "counts.order"),
        (("counts.frequent=0",), "counts.frequent"),
        (("counts.groups=1",), "counts.groups"),
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
    asked = (*ASKED, "counts.begin=true", "train.tokens=2048", *overrides)
    pretrain(read_recipe(str(RECIPE), asked), data, run)


@pytest.mark.parametrize("mesh", ["mesh.dp=2", "mesh.ep=2"])
def test_ranks_learn_from_counts_what_one_process_learns(pool: Pool, tmp_path: Path, mesh: str) -> None:
    data = make_data(tmp_path)
    trains(0, 1, data, tmp_path / "one")
    pool.run(2, trains, data, tmp_path / "two", mesh)
    one, two = losses_of_run(tmp_path / "one"), losses_of_run(tmp_path / "two")
    assert len(one) == len(two) == 8
    assert two == pytest.approx(one, rel=1e-4)
