"""Embedding and head that begin with what pairs of tokens say, against the table they are made of."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.config import BadInput, CountsConfig, read_recipe
from leanseek.train.counts import counted
from leanseek.train.pairs import beginning, factors
from leanseek.train.pretrain import pretrain
from tests.tiny import RECIPE, make_data

ASKED = (
    *("train.dtype=fp32", "train.eval_every=1000", "train.checkpoint_every=1000", "counts.order=3"),
    *("schedule.count_weight=[{until=0.5,value=1.0},{until=1.0,value=0.0,shape='linear'}]", "counts.begin=true"),
)


def said(embedding: Tensor, head: Tensor) -> Tensor:
    """log p(v | u) of a model without layers [V, V]."""
    return (F.rms_norm(embedding, embedding.shape[-1:], eps=1e-12) @ head.T).log_softmax(-1)


def table(vocabulary: int, rank: int) -> Tensor:
    """Whose logarithms, less what a softmax does not see, have that rank."""
    torch.manual_seed(1)
    return (torch.randn(vocabulary, rank) @ torch.randn(rank, vocabulary)).softmax(-1)


def test_a_table_of_little_rank_is_said_exactly() -> None:
    p, times = table(60, 7), torch.randint(1000, (60,))
    embedding, head = factors(p, times, 8)
    torch.testing.assert_close(embedding.square().mean(-1), torch.ones(60))
    torch.testing.assert_close(said(embedding, head), p.log(), rtol=1e-3, atol=1e-3)


def test_of_another_the_nearest_is() -> None:
    """No nearer than singular values allow (Eckart and Young, 1936), and hardly farther."""
    p, times = table(200, 30), torch.arange(200) ** 2
    logs = p.log() - p.log().mean(-1, keepdim=True)
    weight = (1.0 + times) ** 0.25
    left = torch.linalg.svdvals(weight[:, None] * logs * weight)[11:].square().sum().sqrt()
    embedding, head = factors(p, times, 12)
    found = (weight[:, None] * (F.rms_norm(embedding, (12,), eps=1e-12) @ head.T - logs) * weight).norm()
    assert left * 0.9999 < found < left * 1.02


def test_ids_get_what_their_numbers_have() -> None:
    """Counts go by number, the frequent first; weights by id. Here most ids have one that follows them."""
    chain = np.random.default_rng(0).permutation(40)
    stream = np.concatenate([chain[: 2 + i % 39] for i in range(200)])
    counts = counted([stream], 40, CountsConfig(order=2, frequent=10, groups=2), torch.device("cpu"))
    known = beginning(read_recipe(str(RECIPE), (*ASKED, "model.hidden_size=48", "train.embedding_std=0.5")), counts)
    embedding, head = known["embed_tokens.weight"], known["lm_head.weight"]
    torch.testing.assert_close(embedding.square().mean(-1).sqrt(), torch.full((40,), 0.5))
    assert said(embedding, head).argmax(-1)[chain[:30]].tolist() == chain[1:31].tolist()


def test_a_run_begins_with_them_and_is_ahead(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    with_pairs, without = (
        pretrain(read_recipe(str(RECIPE), (*asked, "train.tokens=4096")), data, tmp_path / str(len(asked)))
        for asked in (ASKED, ASKED[:-1])
    )
    assert with_pairs["bpb"] < without["bpb"]
    cut = read_recipe(str(RECIPE), (*ASKED, "train.tokens=4096", "train.max_steps=3"))
    pretrain(cut, data, tmp_path / "cut")
    again = pretrain(read_recipe(str(RECIPE), (*ASKED, "train.tokens=4096")), data, tmp_path / "cut")
    assert again["bpb"] == with_pairs["bpb"]


def test_more_ids_than_make_a_table_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("leanseek.train.pairs.LARGEST_TABLE", 50)
    with pytest.raises(BadInput, match=r"counts\.begin: pairs of .* ids are no table"):
        pretrain(read_recipe(str(RECIPE), (*ASKED, "train.tokens=2048")), make_data(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()
