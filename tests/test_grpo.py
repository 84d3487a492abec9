"""GRPO: the objective against closed forms and loops, the step against a slow twin, the engine against the trainer."""

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from leanseek.config import GRPOConfig
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import token_logprobs
from leanseek.post import rl_step
from leanseek.post.objective import advantages, all_equal, k3, policy_terms
from leanseek.post.policy import differ, judge, padded
from leanseek.post.rl_step import Learnt, learn
from leanseek.post.rollout import Answer, EngineRollouts, Question
from leanseek.train.schedule import Knobs
from tests.oracle import ours, tiny
from tests.runs import config_of, model_of, tokenizer

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # FP64 against FP64: sums in another order
NOTHING_CLOSED = torch.empty(0, dtype=torch.int64)


def settings(**changes: object) -> GRPOConfig:
    return GRPOConfig.model_validate({"max_tokens": 12, "group": 4} | changes)


# ── closed forms ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 2, 2, 2, 2, 0, 0, 0, 4], dtype=torch.float64)
    plain = advantages(rewards, 4, divide_by_std=False)
    assert plain.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, -1, -1, -1, 3]
    divided = advantages(rewards, 4)
    # Deviations 1/2, 0 and √3; an all-equal group has none, and advantages of exactly 0.
    wanted = [1, -1, -1, 1, 0, 0, 0, 0, -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), math.sqrt(3)]
    torch.testing.assert_close(divided, torch.tensor(wanted, dtype=torch.float64), rtol=3e-6, atol=0)
    assert divided[4:8].eq(0).all()
    assert all_equal(rewards, 4).tolist() == [False, True, False]
    assert all_equal(torch.tensor([0.1 + 0.2, 0.1 + 0.2]), 2).item()


def test_k3_is_never_negative_and_is_the_divergence_in_the_mean() -> None:
    torch.testing.assert_close(
        k3(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])), torch.tensor([0.0, math.e - 2])
    )
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 50, dtype=torch.float64, generator=generator).mul(2).log_softmax(dim=-1)
    each = k3(ours, theirs)
    assert each.min() >= 0
    divergence = (ours.exp() * (ours - theirs)).sum()
    torch.testing.assert_close((ours.exp() * each).sum(), divergence, **EXACT)  # over all that may be drawn


# ratio, advantage → the term and its slope along the ratio, with the bounds 0.8 and 1.3
CLIPPING = [
    (0.5, 1.0, 0.5, 1.0),  # too unlikely for a good answer: free to rise
    (1.0, 1.0, 1.0, 1.0),
    (1.29, 1.0, 1.29, 1.0),
    (1.5, 1.0, 1.3, 0.0),  # likely enough
    (0.5, -1.0, -0.8, 0.0),  # unlikely enough for a bad one
    (0.81, -2.0, -1.62, -2.0),
    (1.5, -2.0, -3.0, -2.0),  # too likely: free to fall, however far above
]


@pytest.mark.parametrize(("ratio", "gain", "term", "slope"), CLIPPING)
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_clipping_by_hand(ratio: float, gain: float, term: float, slope: float, kind: str) -> None:
    at = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    config = settings(clip_low=0.2, clip_high=0.3, ratio=kind)
    found = policy_terms(at, zero, None, zero, torch.tensor([gain], dtype=torch.float64), mask, 1, 1, config)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-term, rel=1e-12)
    assert at.grad is not None
    assert at.grad.item() == pytest.approx(-slope * ratio, rel=1e-12)  # d ratio / d log ratio is the ratio
    assert found.clipped.item() == (slope == 0)


def test_each_normalisation_by_hand() -> None:
    # Two answers, of 2 and 4 tokens, with advantages 1 and −1 and ratios of 1: every token's term is its advantage.
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    zero, gain = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)

    def weights(**changes: object) -> list[list[float]]:
        at = zero.clone().requires_grad_()
        policy_terms(at, zero, None, zero, gain, mask, 2, 6, settings(**changes)).loss.backward()
        assert at.grad is not None
        return (-at.grad * gain[:, None]).tolist()

    assert weights() == [[1 / 4, 1 / 4, 0, 0], [1 / 8] * 4]
    assert weights(normalise="token") == [[1 / 6, 1 / 6, 0, 0], [1 / 6] * 4]
    assert weights(normalise="constant", max_tokens=12) == [[1 / 24, 1 / 24, 0, 0], [1 / 24] * 4]
    assert weights(ratio="sequence") == [[1 / 2, 1 / 2, 0, 0], [1 / 2] * 4]


def test_truncated_weights_by_hand() -> None:
    # The trainer finds the tokens twice and four times as likely as the engine did.
    old = torch.tensor([[math.log(0.5), math.log(0.8)]], dtype=torch.float64)
    drawn = torch.tensor([[math.log(0.25), math.log(0.2)]], dtype=torch.float64)
    gain, mask = torch.ones(1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    for cap, wanted in ((None, 1.0), (10.0, (2 + 4) / 2), (3.0, (2 + 3) / 2), (1.0, 1.0)):
        terms = policy_terms(old, old, None, drawn, gain, mask, 1, 2, settings(importance_cap=cap))
        assert terms.loss.item() == pytest.approx(-wanted, rel=1e-12)


# ── the slow twin ─────────────────────────────────────────────────────────────────────────────────────────────────

OPTIONS: list[dict[str, object]] = [
    {},
    {"kl_weight": 0.0},
    {"ratio": "sequence"},
    {"normalise": "token", "clip_high": 0.28},
    {"normalise": "constant", "divide_by_std": False},
    {"importance_cap": 1.1, "drop_cut": True},
    {"ratio": "sequence", "importance_cap": 1.1, "updates": 2},
    {"updates": 2, "drop_cut": True, "normalise": "token"},
    {"updates": 3, "clip_low": 0.001, "clip_high": 0.001},
]


def answers_of(count: int, group: int, seed: int) -> list[Answer]:
    """Made by chance: groups with a prompt in common, answers of every length, some cut."""
    dice, answers = random.Random(seed), []
    for _ in range(count // group):
        question = Question([dice.randrange(64) for _ in range(dice.randrange(1, 6))], {}, "chance")
        for _ in range(group):
            tokens = [dice.randrange(64) for _ in range(dice.randrange(1, 9))]
            logprobs = [-dice.random() * 6 for _ in tokens]
            answers.append(Answer(question, "", tokens, logprobs, None, dice.random() < 0.3))
    return answers


def chances(model: Transformer, answer: Answer) -> list[Tensor]:
    """The log-probability of each of an answer's tokens: its text alone, all logits."""
    assert model.lm_head is not None
    text, first = torch.tensor([answer.question.prompt + answer.tokens]), len(answer.question.prompt)
    logits = model.lm_head(model(text, torch.arange(text.shape[1])[None]))[0]
    return [logits[first + t - 1].log_softmax(dim=-1)[token] for t, token in enumerate(answer.tokens)]


def slow_loss(
    now: list[list[Tensor]],
    old: list[list[float]],
    reference: list[list[float]],
    answers: Sequence[Answer],
    gains: Sequence[float],
    s: GRPOConfig,
) -> Tensor:
    """The objective as the papers write it, answer by answer, token by token."""
    learnt = [i for i, answer in enumerate(answers) if not (s.drop_cut and answer.cut)]
    total, tokens = torch.zeros((), dtype=torch.float64), sum(len(answers[i].tokens) for i in learnt)

    def term(log_now: Tensor, log_old: float, log_reference: float, log_drawn: float, gain: float) -> Tensor:
        ratio = torch.exp(log_now - log_old)
        bounded = min(max(ratio.item(), 1 - s.clip_low), 1 + s.clip_high)
        best = ratio * gain if ratio.item() * gain <= bounded * gain else torch.tensor(bounded * gain)
        weight = 1.0 if s.importance_cap is None else min(math.exp(log_old - log_drawn), s.importance_cap)
        apart = log_reference - log_now
        return weight * best - s.kl_weight * (torch.exp(apart) - apart - 1)

    for i in learnt:
        drawn, n = answers[i].logprobs, len(answers[i].tokens)
        if s.ratio == "sequence":
            told = torch.tensor(drawn).double().sum().item()
            total = total + term(sum(now[i]), sum(old[i]), sum(reference[i]), told, gains[i]) / len(learnt)
            continue
        for t in range(n):
            told = torch.tensor(drawn[t]).item()  # the engine's numbers are FP32
            each = term(now[i][t], old[i][t], reference[i][t], told, gains[i])
            match s.normalise:
                case "answer":
                    total = total + each / n / len(learnt)
                case "token":
                    total = total + each / tokens
                case "constant":
                    total = total + each / s.max_tokens / len(learnt)
    return -total


def slow_step(
    model: Transformer,
    reference: Transformer,
    answers: Sequence[Answer],
    rewards: Sequence[float],
    s: GRPOConfig,
    rate: float,
) -> None:
    """Plain gradient descent on the objective, `updates` times, each on its share of the groups."""
    gains: list[float] = []
    for first in range(0, len(answers), s.group):
        own = rewards[first : first + s.group]
        mean = sum(own) / len(own)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in own) / len(own))
        gains += [(reward - mean) / (std + 1e-6) if s.divide_by_std else reward - mean for reward in own]
    with torch.no_grad():
        old = [[x.item() for x in chances(model, answer)] for answer in answers]
        held_to = [[x.item() for x in chances(reference, answer)] for answer in answers]
    groups = len(answers) // s.group
    share = -(-groups // s.updates) * s.group
    for first in range(0, len(answers), share):
        own = slice(first, first + share)
        now = [chances(model, answer) for answer in answers[own]]
        slow_loss(now, old[own], held_to[own], answers[own], gains[own], s).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
                    parameter.grad = None


def stepped(
    model: Transformer, reference: Transformer, answers: list[Answer], rewards: list[float], s: GRPOConfig, rate: float
) -> Learnt:
    """The same by `learn`, in micro-batches of three."""
    base = config_of(model)
    config = base.model_copy(
        update={
            "train": base.train.model_copy(update={"micro_batch": 3}),
            "optimizer": base.optimizer.model_copy(update={"clip": 1e9}),
        }
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    told = torch.tensor(rewards, dtype=torch.float64)
    held_to = reference if s.kl_weight else None
    return learn(model, [optimizer], held_to, answers, told, NOTHING_CLOSED, Knobs(rate, 1, 0.0, 0.0), config, s)


def both(options: dict[str, object]) -> float:
    """The largest difference between `learn` and the slow twin, over all weights, relative to the largest change."""
    s = settings(**options)
    model = ours(tiny(num_hidden_layers=2), dtype=torch.float64).eval()
    reference = ours(tiny(num_hidden_layers=2), seed=1, dtype=torch.float64).eval()
    answers = answers_of(24, s.group, seed=5)
    rewards = [random.Random(f"reward {i}").choice([0.0, 1.0, 1.5]) for i in range(24)]
    rewards[4:8] = [1.0] * 4  # a group that has nothing to teach
    twin = copy.deepcopy(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stepped(model, reference, answers, rewards, s, rate=0.02)
    slow_step(twin, reference, answers, rewards, s, rate=0.02)
    theirs = dict(twin.named_parameters())
    apart = max((p - theirs[name]).abs().max().item() for name, p in model.named_parameters())
    moved = max((theirs[name] - before[name]).abs().max().item() for name in theirs)
    assert moved > 1e-4
    return apart / moved


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_the_slow_twins(options: dict[str, object]) -> None:
    assert both(options) < 1e-9  # FP64, and engine log-probabilities that are FP32 in both


def advantage_by_batch(rewards: Tensor, group: int, divide_by_std: bool = True) -> Tensor:
    return advantages(rewards, len(rewards), divide_by_std)


def mask_one_late(answers: Sequence[Answer], device: torch.device) -> Any:
    rows = padded(answers, device)
    return type(rows)(rows.ids, rows.targets, rows.mask.roll(1, dims=1), rows.drawn, rows.experts)


def targets_one_late(answers: Sequence[Answer], device: torch.device) -> Any:
    rows = padded(answers, device)
    return type(rows)(rows.ids, rows.targets.roll(1, dims=1), rows.mask, rows.drawn, rows.experts)


def without_group_share(*arguments: Any) -> Any:
    *first, answers, tokens, config = arguments
    return policy_terms(*first, answers + 1, tokens, config)


def old_is_now(logprobs: Tensor, old: Tensor, *more: Any) -> Any:
    return policy_terms(logprobs, logprobs.detach(), *more)


# name → what is replaced in `rl_step`, by what, and the options under which it shows
FAULTS: dict[str, tuple[str, Callable[..., Any], dict[str, object]]] = {
    "the advantage by batch": ("advantages", advantage_by_batch, {}),
    "the mask shifted by one": ("padded", mask_one_late, {}),
    "the targets shifted by one": ("padded", targets_one_late, {}),
    "a count off by one": ("policy_terms", without_group_share, {}),
    "old log-probabilities of the wrong policy": ("policy_terms", old_is_now, {"updates": 3}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, fault, options = FAULTS[name]
    monkeypatch.setattr(rl_step, what, fault)
    assert both(options) > 1e-3


# ── the head, piece by piece ──────────────────────────────────────────────────────────────────────────────────────


def test_token_logprobs_are_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanseek.ops.loss._LOGITS_IN_CACHE", 33 * 4)  # four tokens at a time
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (11, 33))
    targets, closed = torch.randint(3, 33, (11,), generator=generator), torch.tensor([0, 2])
    scale = torch.randn(11, dtype=torch.float64, generator=generator)
    ways = []
    for way in (token_logprobs, plainly):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = way(h, w, targets, closed)
        (logprobs * scale).sum().backward()
        ways.append((logprobs, entropy, h.grad, w.grad))
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert not ways[0][1].requires_grad


def plainly(hidden: Tensor, weight: Tensor, targets: Tensor, closed: Tensor) -> tuple[Tensor, Tensor]:
    is_open = [i for i in range(len(weight)) if i not in closed.tolist()]
    logprobs = (hidden @ weight.T)[:, is_open].log_softmax(dim=-1)
    places = torch.tensor([is_open.index(target) for target in targets.tolist()])
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1).detach()
    return logprobs.gather(1, places[:, None]).squeeze(1), entropy


# ── the engine and the trainer ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def drawing() -> tuple[Transformer, EngineRollouts, list[Question]]:
    """A model with experts in both layers, an engine over it, and questions of several lengths."""
    vocabulary = tokenizer()
    model = model_of(vocabulary, num_hidden_layers=2)
    rollouts = EngineRollouts(model, vocabulary, 10, (), 5)  # fewer side by side than there are answers
    texts = ("A small fox", "Nobody saw", "Later the rain came, and the fox slept under the old wall until")
    return model, rollouts, [Question([vocabulary.bos_id, *vocabulary.encode(text)], {}, "") for text in texts]


def drawn(rollouts: EngineRollouts, questions: Sequence[Question], group: int = 4) -> list[Answer]:
    asked = [question for question in questions for _ in range(group)]
    return rollouts.draw(asked, range(len(asked)), 1.0, lambda: False)


def test_engine_and_trainer_agree_after_every_optimizer_step(
    drawing: tuple[Transformer, EngineRollouts, list[Question]],
) -> None:
    model, rollouts, questions = drawing
    config = config_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    stale = copy.deepcopy(model.state_dict())

    def step() -> Learnt:
        answers = drawn(rollouts, questions)
        rewards = torch.tensor([float(i % 3) for i in range(len(answers))], dtype=torch.float64)
        knobs = Knobs(1e-2, 1, 0.0, 0.0)
        return learn(model, [optimizer], None, answers, rewards, rollouts.closed, knobs, config, settings(kl_weight=0))

    gaps = []
    for _ in range(4):
        gaps.append(step().logprob_gap)
        rollouts.refresh()
    assert max(gaps) < 1e-4
    assert min(gaps) > 0  # another order of sums: it is not the same number twice
    assert step().logprob_gap < 1e-4
    assert step().logprob_gap > 1e-2  # the engine was not told of the step before
    model.load_state_dict(stale)
    rollouts.refresh()


def test_the_engine_tells_the_experts_that_the_trainer_finds(
    drawing: tuple[Transformer, EngineRollouts, list[Question]],
) -> None:
    model, rollouts, questions = drawing
    answers = drawn(rollouts, questions)
    rows = padded(answers, torch.device("cpu"))
    with torch.no_grad():
        here = judge(model, rows, rollouts.closed)
    assert rows.experts is not None
    assert here.experts is not None
    told = rows.experts[rows.mask]
    assert told.shape == (sum(len(answer.tokens) for answer in answers), 2, model.config.num_experts_per_tok)
    assert not differ(told, here.experts).any()
    assert differ(told.roll(1, dims=0), here.experts).float().mean() > 0.5  # another token's are others


def test_replay_sends_tokens_where_the_engine_sent_them(
    drawing: tuple[Transformer, EngineRollouts, list[Question]],
) -> None:
    model, rollouts, questions = drawing
    answers = drawn(rollouts, questions[:1])
    elsewhere = [answer_with(answer, (answer.experts + 1) % 8) for answer in answers if answer.experts is not None]
    rows = padded(elsewhere, torch.device("cpu"))
    free, replayed = (judge(model, rows, rollouts.closed, replay) for replay in (False, True))
    assert rows.experts is not None
    assert replayed.experts is not None
    assert not differ(rows.experts[rows.mask], replayed.experts).any()
    assert not torch.allclose(free.logprobs, replayed.logprobs, atol=1e-2)
    again = judge(model, rows, rollouts.closed)  # the routers are free again
    assert torch.equal(again.logprobs, free.logprobs)
    own = padded(answers, torch.device("cpu"))
    true = judge(model, own, rollouts.closed, replay=True)
    torch.testing.assert_close(true.logprobs, free.logprobs)
    true.logprobs.sum().backward()
    gates = [router.weight.grad for name, router in model.routers().items() if name.startswith("layers.")]
    assert all(grad is not None and grad.abs().max() > 0 for grad in gates)  # weights of given experts still learn
    model.zero_grad()


def answer_with(answer: Answer, experts: Tensor) -> Answer:
    return Answer(answer.question, answer.text, answer.tokens, answer.logprobs, experts, answer.cut)
