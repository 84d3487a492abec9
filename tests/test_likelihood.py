"""Likelihoods of continuations against the definition, token by token, in whatever company and order."""

import itertools

import numpy as np
import pytest
import torch

from leanseek.eval import likelihood
from leanseek.eval.likelihood import Asked, Likelihood, likelihoods
from leanseek.model.transformer import Transformer
from tests.oracle import ours, tiny

Found = list[Likelihood]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """In FP64: how far two ways of computing may differ leaves no room for a fault."""
    return ours(tiny(), dtype=torch.float64)


def questions(many: int = 6) -> list[Asked]:
    """Choices of one token and of several, behind prompts that share much, little or nothing, one of a single token."""
    dice = np.random.default_rng(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(dice.integers(3, 64, count).tolist())

    examples = some(25)
    asked = [Asked((2,), some(3)), Asked((2,), some(1)), Asked(some(30), some(2))]
    for _ in range(many):
        prompt = (2, *examples, *some(14))
        asked += [Asked(prompt, some(length)) for length in (1, 1, 4, 2)]
        asked += [Asked((2, *examples[:20], *some(2)), some(3)), Asked(prompt[:-3], some(2))]
    return asked


def by_definition(model: Transformer, one: Asked) -> Likelihood:
    """Each token after all those before it, from the whole softmax, without a cache."""
    model.eval()
    logprob, greedy = 0.0, True
    for i, token in enumerate(one.continuation):
        seen = torch.tensor([[*one.prompt, *one.continuation[:i]]])
        with torch.no_grad():
            logits = model.lm_head(model(seen, torch.arange(seen.shape[1])[None]))[0, -1]
        logprob += logits.log_softmax(dim=0)[token].item()
        greedy &= int(logits.argmax()) == token
    return Likelihood(logprob, greedy)


def the_same(found: Found, expected: Found) -> bool:
    """FP64 sums over at most 45 tokens in another order differ by about 1e-14; a fault differs by 1e-3 and more."""
    return all(
        a.logprob == pytest.approx(b.logprob, rel=1e-10) and a.greedy == b.greedy
        for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def expected(model: Transformer) -> Found:
    return [by_definition(model, one) for one in questions()]


def test_likelihood_is_the_direct_computation(model: Transformer, expected: Found) -> None:
    assert the_same(likelihoods(model, questions()), expected)


def test_what_the_model_would_write_is_greedy(model: Transformer) -> None:
    text = [2, 7, 9]
    for _ in range(4):
        with torch.no_grad():
            hidden = model.eval()(torch.tensor([text]), torch.arange(len(text))[None])
            text.append(int(model.lm_head(hidden)[0, -1].argmax()))
    wrong = (*text[3:6], text[6] % 60 + 3)
    assert [one.greedy for one in likelihoods(model, [Asked((2, 7, 9), tuple(text[3:])), Asked((2, 7, 9), wrong)])] == [
        True,
        False,
    ]


@pytest.mark.parametrize(("cache_tokens", "batch_tokens"), [(1, 1), (60, 10), (150, 64), (10**4, 10**4)])
def test_neither_batch_nor_order_changes_a_score(
    model: Transformer, expected: Found, cache_tokens: int, batch_tokens: int
) -> None:
    asked = questions()
    assert the_same(likelihoods(model, asked, cache_tokens, batch_tokens), expected)
    shuffled = np.random.default_rng(1).permutation(len(asked)).tolist()
    found = likelihoods(model, [asked[i] for i in shuffled], cache_tokens, batch_tokens)
    assert the_same(found, [expected[i] for i in shuffled])
    assert the_same(likelihoods(model, asked[:1], cache_tokens, batch_tokens), expected[:1])


def test_asking_twice_is_answered_twice(model: Transformer, expected: Found) -> None:
    assert the_same(likelihoods(model, [*questions(), *questions()]), [*expected, *expected])
    assert likelihoods(model, []) == []


def test_what_prompts_share_is_read_once(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    plain = likelihood._read

    def counted(model, cache, rows):
        read.append(sum(len(stretch.tokens) for stretch in rows))
        return plain(model, cache, rows)

    monkeypatch.setattr(likelihood, "_read", counted)
    examples = tuple(range(3, 53))
    asked = [Asked((2, *examples, 3 + i, 5), (letter,)) for i in range(10) for letter in (7, 8, 9, 10)]
    likelihoods(model, asked)
    assert sum(read) == len(examples) + 1 + 10 * 2  # the beginning once, each question once for its four letters
    assert sum(len(one.read) for one in asked) > 20 * sum(read)


def test_the_tree_fits_into_its_cache(model: Transformer, expected: Found) -> None:
    """The bound by which texts are portioned is one: no stretch finds the cache full (`next` would say so)."""
    for cache_tokens in itertools.chain(range(44, 120, 7)):
        assert the_same(likelihoods(model, questions(), cache_tokens), expected)


def test_the_model_is_left_in_its_mode(model: Transformer) -> None:
    for training in (True, False):
        likelihoods(model.train(training), questions(1))
        assert model.training == training


# ── planted faults ────────────────────────────────────────────────────────────────────────────────────────────────


def shifted_span(by: int):
    """The scored span begins one place off."""

    def scored(one: Asked) -> Asked:
        text, begins = (*one.prompt, *one.continuation), len(one.prompt) + by
        return Asked(text[:begins], text[begins:])

    return lambda model, asked: likelihoods(model, [scored(one) for one in asked if len(one.prompt) > 1])


def one_place_early(model: Transformer, asked: list[Asked], patch: pytest.MonkeyPatch) -> Found:
    plain = likelihood._scores
    patch.setattr(likelihood, "_scores", lambda m, hidden, targets: plain(m, hidden.roll(1, 0), targets))
    return likelihoods(model, asked)


def shared_one_too_far(model: Transformer, asked: list[Asked], patch: pytest.MonkeyPatch) -> Found:
    plain = likelihood._common
    patch.setattr(likelihood, "_common", lambda a, b: plain(a, b) + (plain(a, b) > 20))
    return likelihoods(model, asked)


def forgotten_beginning(model: Transformer, asked: list[Asked], patch: pytest.MonkeyPatch) -> Found:
    patch.setattr(likelihood.Stretch, "before", property(lambda self: []))
    return likelihoods(model, asked)


@pytest.mark.parametrize("fault", [one_place_early, shared_one_too_far, forgotten_beginning])
def test_planted_faults_are_seen(fault, model: Transformer, expected: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        found = fault(model, questions(), monkeypatch)
    except (KeyError, IndexError, RuntimeError, AssertionError):
        return
    assert not the_same(found, expected)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_span_one_token_off_is_seen(by: int, model: Transformer, expected: Found) -> None:
    usable = [i for i, one in enumerate(questions()) if len(one.prompt) > 1 and len(one.continuation) > 1]
    asked = [questions()[i] for i in usable]
    found = shifted_span(by)(model, asked)
    assert not any(the_same([a], [expected[i]]) for a, i in zip(found, usable, strict=True))
