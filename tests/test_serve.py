"""Generation: the latent cache against recomputation, sampling against exact probabilities, text as it comes."""

import math
import random
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import leanseek
from leanseek.config import BadInput, read_recipe
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.moe import Experts
from leanseek.model.transformer import Transformer
from leanseek.plan.count import cache_bytes_per_token
from leanseek.serve import runner as runner_module
from leanseek.serve.cache import PAGE, Cache, Places
from leanseek.serve.llm import LLM, Completion, Pieces
from leanseek.serve.runner import Now, Runner, _MoE, _Wide
from leanseek.serve.sampling import Races, Sampling, draw, min_p, probabilities, race, top_k, top_p, with_temperature
from leanseek.serve.writer import StopStrings
from tests.oracle import fill, tiny
from tests.runs import CONTEXT, SPARE_ROWS, TEXT, make_run, model_of, tokenizer

GREEDY = Sampling(temperature=0)


def greedy(tokens: int) -> Sampling:
    return replace(GREEDY, max_tokens=tokens)


LONG = "the fox slept under the wall and the rain came over; nobody saw"  # enough for the direct form
V2 = {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 12, "mscale": 0.7, "mscale_all_dim": 1.0}
SHAPES = {
    "plain": {},
    "no query compression": {"q_lora_rank": None},
    "groups": {"n_group": 4, "topk_group": 2},
    "V2 greedy": V2 | {"topk_method": "greedy"},
    "V2 groups": V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": None},
    "YaRN": {"rope_scaling": YARN},
    "dense first, MTP beside": {"first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
    "tokens that bring": {"value_embeddings": True, "embedding_shares": True, "num_nextn_predict_layers": 1},
    "value embeddings": {"value_embeddings": True, "q_lora_rank": None},
}


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module")
def llm(vocabulary: Tokenizer) -> LLM:
    return LLM(model_of(vocabulary), vocabulary)


class Scripted(LLM):
    """Draws exactly these ids, then EOS for ever."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        super().__init__(model_of(tokenizer, max_position_embeddings=256), tokenizer)
        script = iter(ids)
        self.engine.choose = lambda logits, requests, tell=True: [next(script, tokenizer.eos_id)]  # type: ignore[method-assign]


def collected(pieces: Pieces) -> tuple[list[str], Completion]:
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cache_of_v3_takes_70272_bytes_per_token_and_71424_with_its_mtp_module() -> None:
    for drafts, size in ((False, 70_272), (True, 71_424)):
        cache = Cache(read_recipe("v3").model, 5, torch.bfloat16, "meta", drafts)
        assert cache.bytes_per_token == size
        assert cache.values.nbytes == (1 + 5) * PAGE * size  # page 0 is nobody's


def test_cache_keeps_a_tokens_own_values_as_planned() -> None:
    config = tiny(value_embeddings=True, num_nextn_predict_layers=1)
    for drafts in (False, True):
        cache = Cache(config, 5, torch.float32, "meta", drafts)
        assert cache.bytes_per_token == cache_bytes_per_token(config, 4, drafts) == (2 + drafts) * (16 + 24 + 8) * 4


def test_cache_returns_what_was_appended_wherever_it_lies() -> None:
    config = tiny()
    latent, key = torch.randn(2, 45, config.kv_lora_rank), torch.randn(2, 45, config.qk_rope_head_dim)
    for pages in ([[1, 2, 3], [4, 5, 6]], [[5, 1, 4], [2, 6, 3]]):
        for rows in ([0, 1], [0], [1]):
            cache = Cache(config, 6, torch.float32)
            for first, end in ((0, 3), (3, 4), (4, 45)):
                places = cache.at([pages[row] for row in rows], [first] * len(rows), [end - first] * len(rows))
                for layer in cache.views(places):
                    all_latent, all_keys = layer.append(latent[rows, first:end], key[rows, first:end])
                    assert torch.equal(all_latent, latent[rows, :end])
                    assert torch.equal(all_keys, key[rows, :end])


def test_padding_touches_nobodys_page() -> None:
    cache = Cache(tiny(), 4, torch.float32)
    places = cache.at([[1, 2], [3]], [14, 3], [4, 2])  # two tokens of padding in the second row
    assert places.positions.tolist() == [[14, 15, 16, 17], [3, 4, 5, 6]]
    assert places.slots.tolist() == [30, 31, 32, 33, 51, 52, 0, 0]
    assert places.length == 18
    assert cache.at([[4]], [15], [2]).slots.tolist() == [79, 0]  # a draft behind the last page


# ── greedy: cache against recomputation ───────────────────────────────────────────────────────────────────────────


def recomputed(llm: LLM, prompt: list[int], most: int) -> list[int]:
    """Greedy tokens without any cache: the whole text through the model again for every one."""
    ids = list(prompt)
    drawable = llm.tokenizer.vocab_size
    never = [llm.tokenizer.bos_id, llm.tokenizer.pad_id]
    while len(ids) < len(prompt) + most:
        with torch.no_grad():
            hidden = llm.model(torch.tensor([ids]), torch.arange(len(ids))[None])
            logits = llm.model.lm_head(hidden)[0, -1, :drawable]
        logits[never] = -math.inf
        best = logits.topk(2).values
        assert best[0] - best[1] > 1e-4, "nearly a tie: what is drawn would be chance"
        token = int(logits.argmax())
        if token == llm.tokenizer.eos_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_over_the_cache_equals_recomputation(shape: str, vocabulary: Tokenizer) -> None:
    llm = LLM(model_of(vocabulary, **SHAPES[shape]), vocabulary)
    for prompt in ("the fox said", LONG):
        ids = [vocabulary.bos_id, *vocabulary.encode(prompt)]
        most = CONTEXT - len(ids)
        found = llm.generate(prompt, greedy(most))
        assert found.prompt_tokens == len(ids)
        assert found.token_ids == recomputed(llm, ids, most)
        assert len(set(found.token_ids)) > 5, "a model that repeats itself shows nothing"


def test_a_cache_that_loses_positions_is_noticed(vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Places.seen
    monkeypatch.setattr(Places, "seen", lambda self, layer: whole(self, layer).roll(1, dims=-1))
    llm = LLM(model_of(vocabulary), vocabulary)
    ids = [vocabulary.bos_id, *vocabulary.encode("the fox said")]
    assert llm.generate("the fox said", greedy(32)).token_ids != recomputed(llm, ids, 32)


# ── the runner: its slow twin is the model over the same cache ────────────────────────────────────────────────────


def both_ways(model: Transformer, rows: int, new: int = 1, steps: int = 6) -> tuple[Tensor, Tensor]:
    """Logits [steps, B, new, V] of random tokens after a prompt of 13, `new` at a time: the runner's and the model's.

    Where there is an MTP module, the logits of its draft come behind; the model's are those of the whole text.
    """
    runner, config = Runner(model.eval()), model.config
    tokens = 13 + steps * new
    ids = torch.randint(config.vocab_size, (rows, tokens + 1), generator=torch.Generator().manual_seed(1))
    count = -(-tokens // PAGE)
    scattered = torch.randperm(rows * count, generator=torch.Generator().manual_seed(2)) + 1
    pages = scattered.view(rows, count).tolist() if rows > 1 else [list(range(1, count + 1))]
    drafts = bool(model.mtp)
    caches = [Cache(config, rows * count, dtype, drafts=drafts) for dtype in (runner.dtype, model.dtype)]
    ours, theirs = [], []
    with torch.inference_mode():
        for cache in caches:
            places = cache.at(pages, [0] * rows, [13] * rows)
            hidden = model(ids[:, :13], places.positions, cache=cache.views(places))
            if drafts:
                model.remember(hidden, ids[:, 1:14], places.positions, cache.views(places)[-1])
        for at in range(13, tokens, new):
            fresh, following = ids[:, at : at + new], ids[:, at + 1 : at + new + 1]
            places = caches[0].at(pages, [at] * rows, [new] * rows)
            now = runner.at(places)
            hidden = runner.step(fresh, caches[0], now)
            if drafts:
                last = torch.arange(new - 1, rows * new, new)
                then = runner.at(caches[0].at(pages, [at + new - 1] * rows, [1] * rows))
                drafted = runner.draft(hidden, following, last, caches[0], now, then)
                hidden = torch.cat((hidden, drafted[:, None]), dim=1)
            ours.append(runner.logits(hidden.flatten(0, 1)).unflatten(0, (rows, -1)))
            hidden = model(fresh, places.positions, cache=caches[1].views(places))
            if drafts:
                whole, where = ids[:, : at + new + 1], torch.arange(at + new + 1).expand(rows, -1)
                drafted = model.predict_further(model(whole, where), whole, where)[0][:, -1:]
                hidden = torch.cat((hidden, drafted), dim=1)
            theirs.append(model.lm_head(hidden))
    return torch.stack(ours).double(), torch.stack(theirs).double()


def apart(pair: tuple[Tensor, Tensor]) -> float:
    return ((pair[0] - pair[1]).abs().max() / pair[1].std()).item()


ROUTES = {"one by one": (1, 40, 4), "all of them": (3, 8, 3), "sorted": (260, 8, 3)}  # rows, experts, chosen


@pytest.mark.parametrize("new", [1, 2], ids=["a token", "a token and its draft"])
@pytest.mark.parametrize("small", [0, runner_module.SMALL], ids=["as it is", "products ahead"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_runner_is_the_model(shape: str, route: str, small: int, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "SMALL", small)
    rows, experts, chosen = ROUTES[route]
    size = {"n_routed_experts": experts, "num_experts_per_tok": chosen, "max_position_embeddings": 64}
    model = Transformer(tiny(**(SHAPES[shape] | size)), torch.float64).double()
    fill(model)
    assert apart(both_ways(model, rows, new)) < 1e-6  # angles are FP32 on both sides, everything else FP64


@pytest.mark.parametrize("ffn", ["dense", "experts"])
def test_of_one_ffn_some_matrices_rest_in_bf16_and_some_in_fp32(ffn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up together have twice the elements of down, and may lie on the other side of SMALL."""
    rows, experts, chosen = ROUTES["all of them"]
    size = {"n_routed_experts": experts, "num_experts_per_tok": chosen, "max_position_embeddings": 64}
    model = Transformer(tiny(**size), torch.bfloat16)
    fill(model)
    own = model.config
    wide = own.moe_intermediate_size * (experts + own.n_shared_experts)
    down = own.hidden_size * (own.intermediate_size if ffn == "dense" else wide)
    errors = []
    for small in (0, down):
        monkeypatch.setattr(runner_module, "SMALL", small)
        errors.append(apart(both_ways(model, rows)))
    assert errors[1] < 1.5 * errors[0]  # as near to the model as with all in BF16


def test_ways_through_the_experts_are_the_ones_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    for owner, name in ((_MoE, "one_by_one"), (_Wide, "__call__"), (Experts, "forward")):
        original = getattr(owner, name)

        def spy(self: object, *rest: Tensor, name: str = name, original: object = original) -> Tensor:
            ways.append(name)
            return original(self, *rest)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, spy)
    for rows, experts, chosen in ROUTES.values():
        model = Transformer(tiny(n_routed_experts=experts, num_experts_per_tok=chosen, num_hidden_layers=1))
        fill(model)
        both_ways(model, rows, steps=1)
    theirs = ["forward", "forward"]  # two prompts before the runner's step, the twin's step after it
    assert ways == [*theirs, "one_by_one", "forward", *theirs, "__call__", "forward", *theirs, "forward", "forward"]


FAULTS = {
    "positions one off": lambda: (
        Runner,
        "at",
        lambda whole: lambda self, *rest: _late(self, whole, *rest),
    ),
    "pairs not turned": lambda: (runner_module, "turn", lambda whole: lambda x, turns: None),
    "the token's own place not seen": lambda: (Runner, "at", lambda whole: lambda *rest: _blind(whole(*rest))),
}


def _late(runner: Runner, whole: object, *rest: object) -> Tensor:
    turns, runner.turns = runner.turns, runner.turns.roll(1, 0)
    try:
        return whole(runner, *rest)  # type: ignore[operator]
    finally:
        runner.turns = turns


def _blind(now: Now) -> Now:
    closed = now.closed.clone()
    closed[..., -1] = -math.inf
    return replace(now, closed=closed)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_runner_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(tiny(max_position_embeddings=64))
    fill(model)
    assert apart(both_ways(model, 2, new=2)) < 1e-4
    owner, name, changed = FAULTS[fault]()
    monkeypatch.setattr(owner, name, changed(getattr(owner, name)))
    assert apart(both_ways(model, 2, new=2)) > 1e-2


@pytest.mark.parametrize("rows", [1, 3])
def test_packed_matrices_multiply_in_bf16(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "SMALL", 0)
    model = Transformer(tiny(max_position_embeddings=64), torch.bfloat16)
    fill(model)
    assert Runner(model).head.packed == runner_module.packs_bf16()
    ours, _ = both_ways(model, rows)
    model.dtype = torch.float32
    _, exact = both_ways(model, rows)
    error = ((ours - exact).pow(2).mean() / exact.pow(2).mean()).sqrt()
    assert error < 0.04  # each product rounds to 8 bits: 2⁻⁹ relative, through two layers and the head


def test_small_matrices_rest_in_fp32() -> None:
    model = Transformer(tiny(max_position_embeddings=64), torch.bfloat16)
    fill(model)
    head = Runner(model).head
    assert not head.packed
    assert head.weight.dtype == torch.float32


def test_decoding_does_not_run_the_model(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = Transformer.forward

    def spy(self: Transformer, ids: Tensor, *rest: Tensor, **more: object) -> Tensor:
        seen.append(ids.shape[1])
        return whole(self, ids, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Transformer, "forward", spy)
    found = llm.generate(LONG, greedy(4))
    assert len(found.token_ids) == 4
    assert seen == [found.prompt_tokens]


def test_weights_are_left_alone_and_no_router_counts(llm: LLM) -> None:
    assert not llm.model.training
    llm.generate("the", Sampling(max_tokens=3))
    assert all(not router.load.any() for router in llm.model.routers().values())


@pytest.mark.parametrize("shape", ["plain", "groups", "YaRN", "V2 groups"])
@pytest.mark.parametrize(
    "sampling", [greedy(9), Sampling(seed=3, max_tokens=9), Sampling(seed=1, stop=("e",))], ids=str
)
def test_many_prompts_side_by_side_say_what_each_says_alone(
    shape: str, sampling: Sampling, vocabulary: Tokenizer
) -> None:
    llm = LLM(model_of(vocabulary, **SHAPES[shape]), vocabulary)
    prompts = ["the fox", "", LONG, "rain"]
    together = llm.generate_many(prompts, sampling)
    alone = [llm.generate(prompt, sampling) for prompt in prompts]
    assert [replace(c, tokens_per_second=0.0) for c in together] == [replace(c, tokens_per_second=0.0) for c in alone]


def test_rows_that_are_not_where_they_stand_are_noticed(vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, whole = [LONG[:30], "the fox slept"], Cache.at
    expected = LLM(model_of(vocabulary), vocabulary).generate(prompts[0], greedy(9)).token_ids
    monkeypatch.setattr(
        Cache, "at", lambda self, pages, starts, new: whole(self, pages, [min(starts)] * len(starts), new)
    )
    assert LLM(model_of(vocabulary), vocabulary).generate_many(prompts, greedy(9))[0].token_ids != expected


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────────────────────

CHANCES = [0.05, 0.4, 0.1, 0.2, 0.25]


def open_tokens(logits: Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("filtered", "left"),
    [
        (lambda x: top_k(x, 0), [0, 1, 2, 3, 4]),
        (lambda x: top_k(x, 1), [1]),
        (lambda x: top_k(x, 3), [1, 3, 4]),
        (lambda x: top_k(x, 9), [0, 1, 2, 3, 4]),
        (lambda x: top_p(x, 0.39), [1]),
        (lambda x: top_p(x, 0.41), [1, 4]),
        (lambda x: top_p(x, 0.64), [1, 4]),
        (lambda x: top_p(x, 0.66), [1, 3, 4]),
        (lambda x: top_p(x, 0.96), [0, 1, 2, 3, 4]),
        (lambda x: top_p(x, 1.0), [0, 1, 2, 3, 4]),
        (lambda x: top_p(x, 1e-9), [1]),
        (lambda x: min_p(x, 0.0), [0, 1, 2, 3, 4]),
        (lambda x: min_p(x, 0.2), [1, 2, 3, 4]),
        (lambda x: min_p(x, 0.51), [1, 4]),
        (lambda x: min_p(x, 1.0), [1]),
        # one after another: top-k leaves 0.4, 0.25, 0.2, that is 0.47, 0.29, 0.24; top-p of 0.7 then takes two …
        (lambda x: top_p(top_k(x, 3), 0.7), [1, 4]),
        # … and three of all five, whose first two have only 0.65
        (lambda x: top_p(x, 0.7), [1, 3, 4]),
    ],
)
def test_filters_leave_what_they_should(filtered: object, left: list[int]) -> None:
    logits = torch.tensor(CHANCES, dtype=torch.float64).log() + 3.0
    found = filtered(logits)  # type: ignore[operator]
    assert open_tokens(found) == left
    assert torch.equal(found[left], logits[left])


def test_filters_treat_rows_apart() -> None:
    rows = torch.tensor([CHANCES, CHANCES[::-1], [0.2] * 5], dtype=torch.float64).log()
    for kept in (Sampling(top_k=2), Sampling(top_p=0.6), Sampling(min_p=0.5), Sampling(0.5, 4, 0.9, 0.1)):
        together = probabilities(rows, kept)
        for row, found in zip(rows, together, strict=True):
            assert torch.equal(found, probabilities(row, kept))


def test_tokens_that_tie_with_the_kth_stay() -> None:
    assert open_tokens(top_k(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2)) == [1, 2, 3]


def test_order_is_temperature_then_top_k_then_top_p_then_min_p() -> None:
    # At temperature 1/2 the chances go as their squares: 25, 1600, 100, 400, 625. The best four have 2725 together, of
    # them 1600 and 625 are 0.82, with 400 it is 0.96; and 400 is a quarter of 1600.
    logits = torch.tensor(CHANCES).log()
    assert probabilities(logits, Sampling(0.5, 4, 0.9, 0.0)).tolist() == pytest.approx(
        [0, 1600 / 2625, 0, 400 / 2625, 625 / 2625], rel=1e-6
    )
    assert probabilities(logits, Sampling(0.5, 4, 0.9, 0.3)).tolist() == pytest.approx(
        [0, 1600 / 2225, 0, 0, 625 / 2225], rel=1e-6
    )
    # Top-p before top-k would leave three tokens here, and min-p before top-p only one.
    for sampling in (Sampling(top_k=3, top_p=0.7), Sampling(top_p=0.6, min_p=0.6)):
        assert probabilities(logits, sampling).nonzero().flatten().tolist() == [1, 4]


def test_one_generator_runs_every_race() -> None:
    races = Races()
    for seed, place, size in ((5, 0, 7), (5, 1, 276), (-3, 1, 7), (5, 0, 7), (2**63 - 1, 9, 1)):
        both = torch.stack([race(seed, place, size), race(5, 6, size)])
        assert torch.equal(races([(seed, place), (5, 6)], size), both)


def chi_square(logits: Tensor, drawn_with: Sampling, expected: list[float], draws: int = 20_000) -> float:
    found = draw(
        logits.expand(draws, -1), [drawn_with] * draws, lambda rows: Races()([(5, row) for row in rows], len(expected))
    )
    counts = torch.bincount(torch.tensor(found), minlength=len(expected)).tolist()
    assert all(chance or not count for chance, count in zip(expected, counts, strict=True)), "drew a closed token"
    return sum((n - draws * p) ** 2 / (draws * p) for n, p in zip(counts, expected, strict=True) if p)


def test_drawn_frequencies_are_the_exact_probabilities() -> None:
    logits = torch.tensor(CHANCES).log()
    tempered = [chance ** (1 / 0.7) for chance in CHANCES]
    expected = [chance / sum(tempered) for chance in tempered]
    at_999 = 18.47  # chi-square, four degrees of freedom, 99.9%
    assert chi_square(logits, Sampling(temperature=0.7), expected) < at_999
    assert chi_square(logits, Sampling(temperature=0.75), expected) > at_999  # the test can tell
    three = [0, 0.4 / 0.85, 0, 0.2 / 0.85, 0.25 / 0.85]
    assert chi_square(logits, Sampling(top_k=3), three) < 13.82  # two degrees of freedom


def test_extreme_temperatures() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, -math.inf])
    assert with_temperature(logits.double(), 1e-300).softmax(dim=-1).tolist() == [0, 0.5, 0.5, 0]
    assert probabilities(logits, Sampling(temperature=1e300)).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert draw((logits + torch.tensor([0, 0, 1e-3, 0]))[None], [GREEDY], lambda rows: race(0, 0, 4)[None]) == [2]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or a positive number, got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 1, or 0 for no limit, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number, got 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty must be a number, got nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty must be a number"),
        ({"logit_bias": ((-1, 2.0),)}, "logit_bias needs token ids and numbers, got -1: 2.0"),
        ({"logit_bias": ((1, math.nan),)}, "logit_bias"),
        ({"logprobs": -1}, "logprobs must be between 0 and 20, got -1"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_sampling_out_of_range(values: dict[str, object], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Sampling(**values)  # type: ignore[arg-type]


def test_same_seed_same_text(llm: LLM) -> None:
    first = llm.generate("the wall", Sampling(temperature=1.5, max_tokens=20, seed=3))
    assert first.token_ids == llm.generate("the wall", Sampling(temperature=1.5, max_tokens=20, seed=3)).token_ids
    assert first.token_ids != llm.generate("the wall", Sampling(temperature=1.5, max_tokens=20, seed=4)).token_ids


def test_only_tokens_that_exist_are_drawn(vocabulary: Tokenizer) -> None:
    model = model_of(vocabulary)
    closed = [vocabulary.bos_id, vocabulary.pad_id, *range(vocabulary.vocab_size, vocabulary.vocab_size + SPARE_ROWS)]
    with torch.no_grad():  # the likeliest by far, were they not closed
        model.lm_head.weight[closed] = 10 * torch.randn(len(closed), model.config.hidden_size)
    llm = LLM(model, vocabulary)
    for sampling in (GREEDY, Sampling(temperature=5)):
        several = [replace(sampling, max_tokens=30, seed=seed) for seed in range(5)]
        drawn = {token for each in several for token in llm.generate("rain", each).token_ids}
        assert len(drawn) > 3
        assert not drawn & set(closed)


# ── text as it comes ──────────────────────────────────────────────────────────────────────────────────────────────


def test_pieces_join_to_the_text_and_never_split_a_character(vocabulary: Tokenizer) -> None:
    text = "the fox 狐 says “été” 🦊🦊 and 👩‍🚀, naïvely"
    ids = vocabulary.encode(text)
    assert len(ids) > len(text) / 2
    pieces, whole = collected(Scripted(vocabulary, ids).stream(""))
    assert "".join(pieces) == whole.text == text
    assert whole.token_ids == ids
    assert whole.finish_reason == "stop"
    assert "\ufffd" not in text
    assert all(pieces)
    assert len(pieces) > 20  # it came bit by bit


def test_a_character_that_is_never_completed(vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("old 🦊")[:-1]
    pieces, whole = collected(Scripted(vocabulary, ids).stream(""))
    assert "".join(pieces) == whole.text == "old \ufffd" == vocabulary.decode(ids)


def cut_letter_by_letter(text: str, stops: tuple[str, ...]) -> str:
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


def test_stop_strings_cut_alike_however_the_text_comes() -> None:
    chance = random.Random(0)
    cut = 0
    for _ in range(3000):
        text = "".join(chance.choices("abc", k=12))
        stops = tuple("".join(chance.choices("abc", k=chance.randint(1, 5))) for _ in range(chance.randint(0, 3)))
        held, given, out = StopStrings(stops), "", ""
        while len(given) < len(text):
            piece = text[len(given) : len(given) + chance.randint(1, 4)]
            given += piece
            out += held.push(piece)
            if held.found:
                break
            ends = [n for stop in stops for n in range(len(stop)) if given.endswith(stop[:n])]
            assert out == given[: len(given) - max(ends, default=0)], "held back too much or too little"
        out += held.finish()
        assert out == cut_letter_by_letter(text, stops)
        cut += held.found
    assert 500 < cut < 2900


def test_stop_strings_across_token_borders(vocabulary: Tokenizer) -> None:
    text = "the fox slept under the wall 🦊 until the rain was over."
    ids = vocabulary.encode(text)
    borders = {len(vocabulary.decode(ids[:n])) for n in range(len(ids))}
    across = 0
    for start in range(0, len(text) - 4, 3):
        stop = text[start : start + 4]
        pieces, whole = collected(Scripted(vocabulary, ids).stream("", Sampling(stop=("no such", stop))))
        assert "".join(pieces) == whole.text == text[: text.find(stop)]
        assert whole.finish_reason == "stop"
        across += any(start < border < start + 4 for border in borders)
    assert across > 5


def test_what_looked_like_a_stop_string_is_given_out_in_the_end(vocabulary: Tokenizer) -> None:
    found = Scripted(vocabulary, vocabulary.encode("the fox")).generate("", Sampling(stop=("fox slept",)))
    assert (found.text, found.finish_reason) == ("the fox", "stop")
    found = Scripted(vocabulary, vocabulary.encode("the fox slept")).generate(
        "", Sampling(max_tokens=2, stop=("fox slept",))
    )
    assert (found.text, found.finish_reason) == (vocabulary.decode(found.token_ids), "length")


def test_one_stop_string_may_stand_alone(vocabulary: Tokenizer) -> None:
    found = Scripted(vocabulary, vocabulary.encode("the fox slept")).generate("", Sampling(stop=(" slept",)))
    assert found.text == "the fox"
    with pytest.raises(BadInput, match="stop takes strings"):
        Sampling(stop=" slept")  # type: ignore[arg-type]


# ── where it ends ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_finish_reasons(vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("under the wall")
    ended = Scripted(vocabulary, ids).generate("")
    assert (ended.finish_reason, ended.token_ids) == ("stop", ids)
    exactly = Scripted(vocabulary, ids).generate("", Sampling(max_tokens=len(ids)))
    assert (exactly.finish_reason, exactly.token_ids, exactly.text) == ("length", ids, "under the wall")
    assert ended.tokens_per_second > 0


def test_context_is_used_to_its_last_position_and_no_further(llm: LLM, vocabulary: Tokenizer) -> None:
    never_ends = LLM(llm.model, vocabulary)
    never_ends.engine.closed = torch.cat((llm.engine.closed, torch.tensor([vocabulary.eos_id])))
    found = never_ends.generate("the fox", greedy(10_000))
    assert found.finish_reason == "length"
    assert found.prompt_tokens + len(found.token_ids) == CONTEXT + 1  # the last is drawn and never read
    ids = [vocabulary.bos_id] + [vocabulary.encode(" the")[0]] * (CONTEXT - 1)
    full = vocabulary.decode(ids[1:])
    assert [vocabulary.bos_id, *vocabulary.encode(full)] == ids
    assert len(never_ends.generate(full, greedy(10)).token_ids) == 1
    with pytest.raises(BadInput, match=rf"prompt has {CONTEXT + 1} tokens, the model's context holds {CONTEXT}"):
        llm.stream(full + " the")  # at the call: nothing is drawn yet


def test_empty_prompt_is_bos_alone(llm: LLM) -> None:
    assert llm.generate("", greedy(3)).prompt_tokens == 1
    assert llm.generate("", greedy(3)).token_ids == recomputed(llm, [llm.tokenizer.bos_id], 3)


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    ids = llm.tokenizer.encode_chat(messages)
    found = llm.chat(messages, greedy(8))
    assert found.prompt_tokens == len(ids)
    assert found.token_ids == recomputed(llm, ids, 8)
    pieces, whole = collected(llm.stream_chat(messages, greedy(8)))
    assert "".join(pieces) == whole.text == found.text


def test_bad_options(llm: LLM) -> None:
    with pytest.raises(BadInput, match="max_tokens must be at least 1, got 0"):
        Sampling(max_tokens=0)
    with pytest.raises(BadInput, match="not empty"):
        Sampling(stop=("a", ""))
    with pytest.raises(BadInput, match="seed must be a 64-bit integer"):
        Sampling(seed=2**63)
    with pytest.raises(BadInput, match="surrogate"):
        llm.generate("\ud800")
    with pytest.raises(BadInput, match="needs a role"):
        llm.chat([{"content": "who?"}])


# ── the run folder ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(tmp_path: Path, llm: LLM) -> Path:
    return make_run(tmp_path / "run", llm.model, llm.tokenizer)


def test_loaded_run_says_the_same(run: Path, llm: LLM) -> None:
    loaded = leanseek.load(run)
    assert isinstance(loaded, LLM)
    assert loaded.generate("the", greedy(12)).token_ids == llm.generate("the", greedy(12)).token_ids
    weights = llm.model.state_dict()
    model = leanseek.load_model(str(run))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == weights.keys()


def test_resting_in_bf16_changes_nothing_that_is_computed(run: Path) -> None:
    resting = LLM.load(run, "cpu", torch.bfloat16)
    cast_when_used = leanseek.load_model(run)
    cast_when_used.dtype = torch.bfloat16
    assert resting.model.lm_head.weight.dtype == torch.bfloat16
    ids = torch.tensor([resting.tokenizer.encode(TEXT)[:40]])
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        assert torch.equal(resting.model(ids, positions), cast_when_used.eval()(ids, positions))
    assert 1 <= len(resting.generate("the", greedy(4)).token_ids) <= 4  # and it decodes over a BF16 cache


def test_folders_that_are_no_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(BadInput, match="not a run"):
        LLM.load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="device must be auto, cpu, cuda or mps, got 'tpu'"):
        LLM.load(run, "tpu")
    for folder in (run / "checkpoints").iterdir():
        folder.rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="has no checkpoint yet"):
        LLM.load(run)


def test_damaged_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = next((run / "checkpoints").rglob("model/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadInput, match="none of its 1 checkpoints is whole"):
        LLM.load(run)
    assert "bytes, not" in capsys.readouterr().err


def test_tokenizer_of_another_model(run: Path, vocabulary: Tokenizer) -> None:
    larger = Tokenizer.train([" ".join(f"{a}{b}" for a in "abcdefghijklm" for b in "nopqrstuvwxyz") * 3], 600)
    assert larger.vocab_size > vocabulary.vocab_size + SPARE_ROWS
    larger.save(run / "tokenizer")
    with pytest.raises(BadInput, match=rf"run: the tokenizer has {larger.vocab_size} ids, .* do not belong together"):
        LLM.load(run)
    with pytest.raises(BadInput, match=r"BOS and EOS are \(0, 1\), the model's \(5, 1\)"):
        LLM(Transformer(tiny(vocab_size=400, bos_token_id=5)), vocabulary)


# ── the package ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, leanseek; leanseek.load, leanseek.load_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert leanseek.__version__ == project["project"]["version"]
