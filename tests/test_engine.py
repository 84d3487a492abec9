"""The engine: many texts at once, drafts, prefixes, preemption, grammars, new weights; each against the text alone."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from leanseek.config import BadInput
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.transformer import Transformer
from leanseek.serve import engine as engine_module
from leanseek.serve.cache import Cache
from leanseek.serve.engine import Engine, Request
from leanseek.serve.runner import Runner
from leanseek.serve.sampling import Sampling, adjust, draw, probabilities
from tests.oracle import fill
from tests.runs import TEXT, model_of, tokenizer
from tests.test_serve import GREEDY, LONG, SHAPES, greedy

DRAFTS = {"num_nextn_predict_layers": 1}


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module")
def model(vocabulary: Tokenizer) -> Transformer:
    return model_of(vocabulary, max_position_embeddings=160, **DRAFTS)


def ids_of(vocabulary: Tokenizer, text: str) -> list[int]:
    return [vocabulary.bos_id, *vocabulary.encode(text)]


def served(engine: Engine, *requests: Request) -> list[list[int]]:
    while any(request.finish_reason is None for request in requests):
        engine.step()
    assert not engine.scheduler.pages.used
    return [request.drawn for request in requests]


def alone(model: Transformer, vocabulary: Tokenizer, prompt: list[int], sampling: Sampling) -> list[int]:
    """In an engine of its own, without drafts."""
    engine = Engine(model, vocabulary, speculate=False)
    return served(engine, engine.submit(prompt, sampling))[0]


PROMPTS = ["the fox", "", LONG, "rain", "A small fox walked over the long wall", "the fox slept"]
SAMPLINGS = [
    greedy(20),
    Sampling(seed=4, max_tokens=15),
    Sampling(temperature=0.8, top_p=0.9, seed=5, max_tokens=25),
    Sampling(temperature=0.0, max_tokens=9, repetition_penalty=1.3, presence_penalty=0.5),
    Sampling(temperature=1.2, seed=-7, max_tokens=12, frequency_penalty=0.7, logit_bias=((40, 3.0),)),
    Sampling(temperature=0.5, top_k=5, min_p=0.1, seed=2**62, max_tokens=18, stop=("e",)),
]


# ── many at once ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("shape", ["plain", "groups", "YaRN", "V2 groups", "tokens that bring"])
def test_texts_that_come_and_go_at_any_time_are_what_they_are_alone(
    shape: str, speculate: bool, vocabulary: Tokenizer
) -> None:
    model = model_of(vocabulary, **(SHAPES[shape] | DRAFTS))
    engine = Engine(model, vocabulary, max_running=4, chunk=7, speculate=speculate)
    requests = []
    for prompt, sampling in product(PROMPTS, SAMPLINGS):
        requests.append(engine.submit(ids_of(vocabulary, prompt), sampling))
        engine.step()  # others are in the middle of theirs
    found = served(engine, *requests)
    for request, drawn in zip(requests, found, strict=True):
        assert drawn == alone(model, vocabulary, request.prompt, request.sampling)
    assert engine.metrics.finished == engine.metrics.submitted == len(requests)
    assert engine.metrics.cached_tokens == sum(request.cached for request in requests) > 0
    assert (engine.metrics.accepted > 0) == speculate
    assert not engine.busy


def test_a_cache_too_small_for_all_changes_nothing_but_the_order(vocabulary: Tokenizer, model: Transformer) -> None:
    engine = Engine(model, vocabulary, cache_tokens=100)
    prompts = [ids_of(vocabulary, prompt) for prompt in PROMPTS]
    requests = [engine.submit(prompt, greedy(50)) for prompt in prompts]
    found = served(engine, *requests)
    assert engine.scheduler.preemptions > 2
    assert found == [alone(model, vocabulary, prompt, greedy(50)) for prompt in prompts]


def test_a_text_that_was_sent_back_keeps_what_it_had_said(vocabulary: Tokenizer, model: Transformer) -> None:
    engine = Engine(model, vocabulary, cache_tokens=100)
    requests = [engine.submit(ids_of(vocabulary, prompt), greedy(50)) for prompt in PROMPTS]
    said = [""] * len(requests)
    while engine.busy:
        engine.step()
        said = [text + request.read() for text, request in zip(said, requests, strict=True)]
    assert engine.scheduler.preemptions > 2
    assert said == [vocabulary.decode(request.drawn) for request in requests]


def test_a_prompt_that_comes_again_is_not_read_again(vocabulary: Tokenizer, model: Transformer) -> None:
    engine = Engine(model, vocabulary)
    ids = ids_of(vocabulary, TEXT * 2)[:100]
    first = engine.submit(ids, greedy(9))
    served(engine, first)
    seen: list[int] = []
    whole = Transformer.forward
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            Transformer, "forward", lambda self, ids, *a, **k: seen.append(ids.shape[1]) or whole(self, ids, *a, **k)
        )
        again = engine.submit(ids, greedy(9))
        served(engine, again)
    assert (first.cached, again.cached) == (0, 96)
    assert seen == [4]
    assert again.drawn == first.drawn
    assert engine.metrics.prompt_tokens == 200
    assert engine.metrics.cached_tokens == 96


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize(
    ("length", "once"), [(5, 5), (39, 39 + 7)], ids=["less than a page", "pages that are found, and what is behind"]
)
def test_prompts_that_are_alike_are_read_once(
    length: int, once: int, speculate: bool, vocabulary: Tokenizer, model: Transformer
) -> None:
    engine, other = Engine(model, vocabulary, speculate=speculate), ids_of(vocabulary, "rain")
    prompt, read = ids_of(vocabulary, TEXT * 2)[:length], 0

    def count(_: object, arguments: tuple[Tensor, ...]) -> None:
        nonlocal read
        read += arguments[0].numel()

    hook = model.register_forward_pre_hook(count)
    requests = [engine.submit(prompt, sampling) for sampling in SAMPLINGS]
    requests += [engine.submit(other, replace(SAMPLINGS[1], seed=seed)) for seed in (4, 4, 6)]
    found = served(engine, *requests)
    hook.remove()
    padding = max(0, length - len(other)) if length < 16 else 0  # read side by side
    assert read <= once + len(other) + padding
    assert found == [alone(model, vocabulary, request.prompt, request.sampling) for request in requests]


def test_prompts_that_are_alike_are_seen_where_nothing_is_copied(
    vocabulary: Tokenizer, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "copy", lambda self, rows: None)
    engine, prompt = Engine(model, vocabulary, speculate=False), ids_of(vocabulary, TEXT)[:9]
    found = served(engine, *[engine.submit(prompt, greedy(20)) for _ in range(3)])
    assert found[0] == alone(model, vocabulary, prompt, greedy(20))
    assert found[1] != found[0]


def test_a_conversation_goes_on_from_its_last_answer(vocabulary: Tokenizer, model: Transformer) -> None:
    engine = Engine(model, vocabulary)
    first = engine.submit(ids_of(vocabulary, LONG), greedy(40))
    served(engine, first)
    more = [*first.prompt, *first.drawn, *vocabulary.encode(" and then")]
    second = engine.submit(more, greedy(8))
    served(engine, second)
    assert second.cached > len(first.prompt) + len(first.drawn) - 17
    assert second.drawn == alone(model, vocabulary, more, greedy(8))


def test_cancelled_requests_free_their_pages_at_once(vocabulary: Tokenizer, model: Transformer) -> None:
    engine = Engine(model, vocabulary, max_running=2)
    requests = [engine.submit(ids_of(vocabulary, prompt), greedy(40)) for prompt in PROMPTS[2:5]]
    engine.step()
    held = engine.scheduler.pages.used
    assert held
    engine.cancel(requests[0])  # runs
    assert engine.scheduler.pages.used < held
    engine.cancel(requests[2])  # waits
    engine.cancel(requests[2])
    assert [request.finish_reason for request in requests] == ["cancelled", None, "cancelled"]
    assert served(engine, requests[1]) == [alone(model, vocabulary, requests[1].prompt, greedy(40))]
    assert (engine.metrics.cancelled, engine.metrics.finished) == (2, 1)


def test_a_stream_that_nobody_reads_any_more_is_cancelled(vocabulary: Tokenizer, model: Transformer) -> None:
    from leanseek.serve.llm import LLM

    llm = LLM(model, vocabulary)
    pieces = llm.stream("the fox", greedy(40))
    next(pieces)
    assert llm.engine.busy
    pieces.close()
    assert not llm.engine.busy
    assert not llm.engine.scheduler.pages.used


def test_two_streams_taken_in_turns(vocabulary: Tokenizer, model: Transformer) -> None:
    from leanseek.serve.llm import LLM

    llm = LLM(model, vocabulary)
    a, b = llm.stream("the fox", greedy(20)), llm.stream("rain", greedy(20))
    said = ["", ""]
    for left, right in zip(a, b, strict=False):
        said = [said[0] + left, said[1] + right]
    said = [said[0] + "".join(a), said[1] + "".join(b)]
    for prompt, text in zip(("the fox", "rain"), said, strict=True):
        whole = llm.generate(prompt, greedy(20)).text
        assert whole.startswith(text[:-1]) or text.startswith(whole[:-1])


# ── drafts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def drafted(model: Transformer, ids: list[int], closed: Tensor) -> int:
    """The MTP module's likeliest next token, as in training: the whole text through everything."""
    row, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
    with torch.no_grad():
        hidden = model.predict_further(model(row, positions), row, positions)[0]
        return int(model.lm_head(hidden[0, -1]).index_fill(-1, closed, -math.inf).argmax())


@pytest.mark.parametrize("chunk", [5, 512])
def test_drafts_are_what_the_module_says_of_the_whole_text(
    chunk: int, vocabulary: Tokenizer, model: Transformer
) -> None:
    engine = Engine(model, vocabulary, chunk=chunk)
    for prompt in PROMPTS:
        engine.submit(ids_of(vocabulary, prompt), greedy(25))
    compared = 0
    while engine.busy:
        for request in engine.step():
            if request.finish_reason is None and request.drawn:
                assert request.draft == drafted(model, request.entry.tokens, engine.closed)
                compared += 1
    assert compared > 80
    assert engine.metrics.drafted > 80


def test_a_draft_that_is_always_right_halves_the_steps(
    vocabulary: Tokenizer, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids_of(vocabulary, "the fox")
    text = alone(model, vocabulary, prompt, greedy(41))

    def knows(self: Engine, requests: list[Request], hidden: Tensor, *rest: object) -> None:
        for request in requests:
            request.draft = [*text, 0][len(request.drawn)]

    monkeypatch.setattr(Engine, "_draft", knows)
    engine = Engine(model, vocabulary)
    assert served(engine, engine.submit(prompt, greedy(41))) == [text]
    assert engine.metrics.steps == 1 + 20
    assert engine.metrics.accepted == engine.metrics.drafted == 20


def joint(model: Transformer, vocabulary: Tokenizer, prompt: list[int], sampling: Sampling, length: int) -> dict:
    """The exact distribution of the next `length` tokens, the end of the text among them."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    engine = Engine(model, vocabulary)
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, chance in found.items():
            if tokens and tokens[-1] == vocabulary.eos_id:
                longer[tokens] = longer.get(tokens, 0) + chance
                continue
            ids = torch.tensor([[*prompt, *tokens]])
            with torch.no_grad():
                logits = model.lm_head(model(ids, torch.arange(ids.shape[1])[None])[0, -1])
            bent = probabilities(logits.index_fill(-1, engine.closed, -math.inf), sampling)
            for token in bent.nonzero().flatten().tolist():
                longer[(*tokens, token)] = chance * bent[token].item()
        found = longer
    return found


def surprise(model: Transformer, vocabulary: Tokenizer, expected: dict, sampling: Sampling, length: int) -> float:
    """Chi-square over its degrees of freedom of 1,500 texts of `length` tokens drawn with drafts."""
    prompt, engine = ids_of(vocabulary, "the fox"), Engine(model, vocabulary)
    draws = 1_500
    requests = [
        engine.submit(prompt, Sampling(sampling.temperature, sampling.top_k, max_tokens=length, seed=seed))
        for seed in range(draws)
    ]
    served(engine, *requests)
    ends = {"stop": (vocabulary.eos_id,), "length": ()}
    counts = Counter((*request.drawn, *ends[str(request.finish_reason)]) for request in requests)
    assert engine.metrics.accepted > 200
    rare = sum(chance for chance in expected.values() if chance * draws < 5)
    often = {tokens: chance for tokens, chance in expected.items() if chance * draws >= 5}
    pairs = [(counts[tokens], chance * draws) for tokens, chance in often.items()]
    pairs.append((draws - sum(n for n, _ in pairs), max(rare * draws, 1e-3)))
    return sum((n - mean) ** 2 / mean for n, mean in pairs) / (len(pairs) - 1)


def test_texts_drawn_with_drafts_have_the_exact_distribution(
    vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(vocabulary, **DRAFTS)
    # A module that foretells about as well as a trained one: the main model's own next token, its head's logits shaken.
    sampling, length = Sampling(temperature=1.3, top_k=3), 4
    expected = joint(model, vocabulary, ids_of(vocabulary, "the fox"), sampling, length)
    assert len(expected) > 60
    assert sum(expected.values()) == pytest.approx(1)
    monkeypatch.setattr(Engine, "_draft", _often_right(model))
    at_999 = 1.6  # chi-square over its degrees of freedom, at least 60 of them, 99.9%
    assert surprise(model, vocabulary, expected, sampling, length) < at_999

    def one_off(self: Engine, logits: Tensor, requests: list[Request], tell: bool = True) -> list[int]:
        """What follows a draft is drawn from what preceded it."""
        held = getattr(self, "held", None)
        self.held = logits if len(requests) == len(self.scheduler.running) else None
        return plain(self, logits if held is None or len(held) < len(logits) else held[: len(logits)], requests, tell)

    plain = Engine.choose
    monkeypatch.setattr(Engine, "choose", one_off)
    assert surprise(model, vocabulary, expected, sampling, length) > 2 * at_999


def _often_right(model: Transformer) -> object:
    """Drafts from the model's own distribution over the next token, by the race that will decide there."""

    def drafts(self: Engine, requests: list[Request], hidden: Tensor, *rest: object) -> None:
        alike: dict[int, list[Request]] = {}
        for request in requests:
            alike.setdefault(len(request.entry.tokens), []).append(request)
        for length, some in alike.items():
            ids = torch.tensor([request.entry.tokens for request in some])
            logits = model.lm_head(model(ids, torch.arange(length).expand_as(ids))[:, -1])
            softer = [replace(request.sampling, temperature=request.sampling.temperature * 1.5) for request in some]
            tokens = draw(
                logits.index_fill(-1, self.closed, -math.inf),
                softer,
                lambda rows, some=some: self._times([some[row] for row in rows]),
            )
            for request, token in zip(some, tokens, strict=True):
                request.draft = token

    return drafts


# ── what bends the draw ───────────────────────────────────────────────────────────────────────────────────────────


def test_penalties_and_bias_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, -1.0])
    found = logits.clone()
    adjust(found, Sampling(repetition_penalty=2.0), prompt=[0, 0, 1], drawn=[3])
    assert found.tolist() == [1.0, -4.0, 1.0, 0.25, -1.0]  # divided above 0, multiplied below, once each
    found = logits.clone()
    adjust(found, Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt=[0, 0, 1], drawn=[2, 2, 4])
    assert found.tolist() == [2.0, -2.0, 0.0, 0.5, -1.75]  # what was drawn only: 0.5 + 2 · 0.25, 0.5 + 0.25
    found = logits.clone()
    adjust(found, Sampling(logit_bias=((1, 5.0), (4, -100.0))), prompt=[], drawn=[])
    assert found.tolist() == [2.0, 3.0, 1.0, 0.5, -101.0]


def test_bias_forces_and_forbids(vocabulary: Tokenizer, model: Transformer) -> None:
    engine, prompt = Engine(model, vocabulary), ids_of(vocabulary, "the fox")
    (first,) = served(engine, engine.submit(prompt, greedy(5)))
    forced = engine.submit(prompt, Sampling(max_tokens=5, logit_bias=((77, 1000.0),)))
    forbidden = engine.submit(prompt, Sampling(0.0, max_tokens=5, logit_bias=((first[0], -1000.0),)))
    served(engine, forced, forbidden)
    assert forced.drawn == [77] * 5
    assert first[0] not in forbidden.drawn
    with pytest.raises(BadInput, match=f"there is no token {vocabulary.vocab_size}"):
        engine.submit(prompt, Sampling(logit_bias=((vocabulary.vocab_size, 1.0),)))


@pytest.mark.parametrize("sampling", [greedy(12), Sampling(temperature=0.7, top_k=4, max_tokens=12, seed=1)], ids=str)
def test_logprobs_are_the_models_own(sampling: Sampling, vocabulary: Tokenizer, model: Transformer) -> None:
    engine, prompt = Engine(model, vocabulary), ids_of(vocabulary, "the fox")
    request = engine.submit(prompt, replace(sampling, logprobs=3, presence_penalty=0.1))
    served(engine, request)
    ids = torch.tensor([[*prompt, *request.drawn]])
    with torch.no_grad():
        logits = model.lm_head(model(ids, torch.arange(ids.shape[1])[None])[0])
    chances = logits.index_fill(-1, engine.closed, -math.inf).log_softmax(dim=-1)[len(prompt) - 1 : -1]
    assert [told.token for told in request.logprobs] == request.drawn
    for told, expected in zip(request.logprobs, chances, strict=True):
        assert told.logprob == pytest.approx(expected[told.token].item(), abs=1e-4)
        assert [token for token, _ in told.top] == expected.topk(3).indices.tolist()
        assert [chance for _, chance in told.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        assert all(a >= b for (_, a), (_, b) in pairwise(told.top))


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}, "old": {"type": "boolean"}},
    "required": ["name", "age", "old"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("speculate", [False, True])
def test_what_a_schema_asks_for_parses(speculate: bool, vocabulary: Tokenizer, model: Transformer) -> None:
    engine = Engine(model, vocabulary, speculate=speculate)
    prompt, grammar = ids_of(vocabulary, "the fox"), engine.grammars.json_schema(SCHEMA)
    requests = [
        engine.submit(prompt, Sampling(temperature=1.5, seed=seed, max_tokens=120), grammar) for seed in range(12)
    ]
    free = engine.submit(prompt, greedy(20))
    served(engine, *requests, free)
    complete = [request for request in requests if request.finish_reason == "stop"]
    assert len(complete) > 3
    for request in complete:
        found = json.loads(request.read())
        assert found.keys() == SCHEMA["properties"].keys()
        assert isinstance(found["name"], str)
        assert isinstance(found["age"], int)
        assert isinstance(found["old"], bool)
    assert free.drawn == alone(model, vocabulary, prompt, greedy(20)), "a grammar beside it has bent a free text"


def test_json_mode_gives_an_object(vocabulary: Tokenizer, model: Transformer) -> None:
    engine = Engine(model, vocabulary)
    grammar = engine.grammars.json_object()
    requests = [
        engine.submit(ids_of(vocabulary, "rain"), Sampling(temperature=2, seed=seed, max_tokens=140), grammar)
        for seed in range(8)
    ]
    served(engine, *requests)
    complete = [json.loads(request.read()) for request in requests if request.finish_reason == "stop"]
    assert complete
    assert all(isinstance(found, dict) for found in complete)


@pytest.mark.parametrize(
    ("text", "goes_on"),
    [
        ('{"age":1}', True),
        ('{"age": 1}', True),
        ('{\n    "age": 1\n}', True),
        ('{"age":' + 24 * " " + "1}", True),
        ('{"age":' + 25 * " ", False),
        ('{"age":' + 13 * " \n", False),
    ],
)
def test_json_may_be_indented_and_not_drown_in_blanks(
    text: str, goes_on: bool, vocabulary: Tokenizer, model: Transformer
) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    matcher = Engine(model, vocabulary).grammars.json_schema(schema).matcher()
    for token in vocabulary.encode(text):
        if not matcher.open_tokens()[token]:
            assert not goes_on
            return
        matcher.push(token)
    assert goes_on


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"enum": []},
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "["},
        [],
    ],
    ids=str,
)
def test_schemas_that_nothing_satisfies(schema: dict, vocabulary: Tokenizer, model: Transformer) -> None:
    with pytest.raises(BadInput, match="schema"):
        Engine(model, vocabulary).grammars.json_schema(schema)


def test_grammars_say_where_they_are_wrong(vocabulary: Tokenizer, model: Transformer) -> None:
    grammars = Engine(model, vocabulary).grammars
    with pytest.raises(BadInput, match=r"grammar: .*nonsense"):
        grammars.lark("start: nonsense")
    matcher = grammars.lark(f'start: "the" <[{vocabulary.special["<think>"]}]> "fox"').matcher()
    for token in (*vocabulary.encode("the"), vocabulary.special["<think>"], *vocabulary.encode("fox")):
        assert matcher.open_tokens()[token]
        assert not matcher.complete
        matcher.push(token)
    assert matcher.complete


# ── new weights ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_new_weights_are_taken_over_in_place(vocabulary: Tokenizer) -> None:
    model, other = (model_of(vocabulary, max_position_embeddings=160, **DRAFTS) for _ in range(2))
    fill(other, seed=9)
    engine, prompt = Engine(model, vocabulary), ids_of(vocabulary, TEXT)[:60]
    before = engine.submit(prompt, Sampling(0.0, max_tokens=20, logprobs=0))
    served(engine, before)
    under_way = engine.submit(prompt, greedy(30))
    for _ in range(6):
        engine.step()
    said = list(under_way.drawn)
    place = model.lm_head.weight.data_ptr()
    engine.take_over(other.state_dict())
    assert model.lm_head.weight.data_ptr() == place
    assert engine.scheduler.pages.available == engine.cache.pages
    served(engine, under_way)
    assert under_way.drawn[: len(said)] == said
    rest = alone(other, vocabulary, [*prompt, *said], greedy(30 - len(said)))
    assert under_way.drawn[len(said) :] == rest
    after = engine.submit(prompt, Sampling(0.0, max_tokens=20, logprobs=0))
    served(engine, after)
    assert after.drawn != before.drawn
    ids = torch.tensor([[*prompt, *after.drawn]])
    with torch.no_grad():
        logits = other.lm_head(other(ids, torch.arange(ids.shape[1])[None])[0])
    chances = logits.index_fill(-1, engine.closed, -math.inf).log_softmax(dim=-1)[len(prompt) - 1 : -1]
    for told, expected in zip(after.logprobs, chances, strict=True):
        assert told.logprob == pytest.approx(expected[told.token].item(), abs=1e-4)


def test_what_diverged_weights_left_in_the_cache_does_not_outlast_them(vocabulary: Tokenizer) -> None:
    model, sound = (model_of(vocabulary, max_position_embeddings=160) for _ in range(2))
    with torch.no_grad():
        model.layers["0"].self_attn.kv_a_proj_with_mqa.weight.fill_(math.nan)
    engine, prompt = Engine(model, vocabulary), ids_of(vocabulary, TEXT)[:60]
    served(engine, engine.submit(prompt, greedy(3)))
    assert engine.cache.values.isnan().any()
    engine.take_over(sound.state_dict())
    # Side by side: behind the shorter one's end lies what was there before, read with weight 0; and 0 · NaN is NaN.
    prompts = [prompt[:5], prompt[:40]]
    found = served(engine, *(engine.submit(each, greedy(20)) for each in prompts))
    assert found == [alone(sound, vocabulary, each, greedy(20)) for each in prompts]


def test_a_prefix_kept_beyond_new_weights_is_noticed(vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (model_of(vocabulary, max_position_embeddings=160) for _ in range(2))
    fill(other, seed=9)
    monkeypatch.setattr(engine_module.Scheduler, "start_over", lambda self: None)
    engine, prompt = Engine(model, vocabulary), ids_of(vocabulary, TEXT)[:60]
    served(engine, engine.submit(prompt, greedy(1)))
    engine.take_over(other.state_dict())
    request = engine.submit(prompt, greedy(20))
    assert served(engine, request) != [alone(other, vocabulary, prompt, greedy(20))]


def test_weights_of_another_model_change_nothing(vocabulary: Tokenizer) -> None:
    model = model_of(vocabulary)
    engine = Engine(model, vocabulary)
    before = alone(model, vocabulary, [0, 5], greedy(5))
    wider = {name: torch.cat((tensor, tensor)) for name, tensor in model.state_dict().items()}
    for wrong in ({}, model.state_dict() | {"more": torch.zeros(1)}, wider):
        with pytest.raises(BadInput, match="another model's"):
            engine.take_over(wrong)
    assert served(engine, engine.submit([0, 5], greedy(5))) == [before]


# ── limits ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_served_is_refused(vocabulary: Tokenizer, model: Transformer) -> None:
    engine = Engine(model, vocabulary, cache_tokens=64)
    with pytest.raises(BadInput, match="the prompt is empty"):
        engine.submit([], GREEDY)
    with pytest.raises(BadInput, match="prompt has 161 tokens, the model's context holds 160"):
        engine.submit([5] * 161, GREEDY)
    with pytest.raises(BadInput, match="are 69 tokens together, the cache holds 64"):
        engine.submit([5] * 60, greedy(10))
    with pytest.raises(BadInput, match="are 70 tokens together, the cache holds 64"):
        engine.submit([5] * 70, Sampling(max_tokens=None))
    assert not engine.busy
    to_the_end = engine.submit([5] * 60, Sampling(0.0, max_tokens=None, logit_bias=((vocabulary.eos_id, -1000.0),)))
    served(engine, to_the_end)
    assert len(to_the_end.drawn) == 5
    for option in ("max_running", "cache_tokens", "chunk"):
        with pytest.raises(BadInput, match=f"{option} must be at least 1, got 0"):
            Engine(model, vocabulary, **{option: 0})


def test_a_cache_is_no_larger_than_the_memory_affords(vocabulary: Tokenizer) -> None:
    small = Engine(model_of(vocabulary), vocabulary, max_running=3)
    assert small.cache.pages * 16 == 3 * 48
    huge = model_of(vocabulary, max_position_embeddings=1 << 24).config
    tokens = engine_module._affordable(huge, 64, torch.float32, torch.device("cpu"))
    assert tokens < 64 << 24
    own = huge.model_copy(update={"value_embeddings": True})
    fewer = engine_module._affordable(own, 64, torch.float32, torch.device("cpu"))
    sizes = [Cache(config, 1, torch.float32, "meta", drafts=True).bytes_per_token for config in (huge, own)]
    assert fewer / tokens == pytest.approx(sizes[0] / sizes[1], rel=1e-6)


def test_a_model_without_the_module_does_not_draft(vocabulary: Tokenizer) -> None:
    model = model_of(vocabulary)
    assert Runner(model).mtp is None
    engine = Engine(model, vocabulary)
    assert not engine.speculates
    served(engine, engine.submit([0, 5], greedy(5)))
    assert engine.metrics.drafted == 0
    assert len(engine.cache.layers) == model.config.num_hidden_layers
