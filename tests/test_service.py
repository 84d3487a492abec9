"""The HTTP service: OpenAI's own client against it, the engine as the oracle, and what a client can break."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from leanseek.config import BadInput
from leanseek.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer
from leanseek.serve.answers import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, Part, Reader
from leanseek.serve.endpoint import Limits, create_app
from leanseek.serve.llm import LLM
from leanseek.serve.markdown import Renderer
from leanseek.serve.prompts import Prompts
from leanseek.serve.sampling import Sampling
from leanseek.serve.schemas import ChatRequest, CompletionRequest
from leanseek.serve.server import Options, listen, serve
from tests.runs import make_run, model_of, tokenizer
from tests.served import CONTEXT, NAME, Scripted, Served, engine_of, ids_of, served, until

FOX = [{"role": "user", "content": "Nobody saw the fox; the wall was old. What did the fox say?"}]
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks behind a wall.",
        "parameters": {
            "type": "object",
            "properties": {"where": {"enum": ["left", "right"]}},
            "required": ["where"],
            "additionalProperties": False,
        },
    },
}
SLEEP = {"type": "function", "function": {"name": "sleep"}}


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module")
def tiny(vocabulary: Tokenizer) -> Iterator[Served]:
    with served(engine_of(vocabulary)) as found:
        yield found


@pytest.fixture(scope="module")
def client(tiny: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def http(tiny: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny.url, timeout=30) as found:
        yield found


@pytest.fixture(scope="module")
def llm(vocabulary: Tokenizer) -> LLM:
    return LLM(model_of(vocabulary, max_position_embeddings=CONTEXT, num_nextn_predict_layers=1), vocabulary)


def chat(**more: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": FOX, "max_tokens": 8, "seed": 1} | more


def events(lines: Iterator[str]) -> list[Any]:
    """What a stream of events said, [DONE] as None."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [None if item == "[DONE]" else json.loads(item) for item in data]


# ── the answer is the engine's ────────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_is_what_the_model_says(client: openai.OpenAI, llm: LLM) -> None:
    for temperature in (0.0, 0.9):
        expected = llm.chat(FOX, Sampling(temperature=temperature, seed=5, max_tokens=20))
        found = client.chat.completions.create(model=NAME, messages=FOX, temperature=temperature, seed=5, max_tokens=20)
        assert found.choices[0].message.content == expected.text
        assert found.choices[0].finish_reason == expected.finish_reason
        assert found.usage.completion_tokens == len(expected.token_ids) > 5
        assert found.usage.prompt_tokens == expected.prompt_tokens
        stream = client.chat.completions.create(
            model=NAME,
            messages=FOX,
            temperature=temperature,
            seed=5,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected.text
        assert len(chunks) > 4, "a stream that comes at once is none"
        assert chunks[-2].choices[0].finish_reason == expected.finish_reason
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == len(expected.token_ids)
        assert all(chunk.usage is None for chunk in chunks[:-1])


def test_many_at_once_each_get_their_own(tiny: Served, llm: LLM) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:

            async def one(seed: int) -> str:
                if seed % 2:
                    found = await client.chat.completions.create(model=NAME, messages=FOX, seed=seed, max_tokens=16)
                    return found.choices[0].message.content
                stream = await client.chat.completions.create(
                    model=NAME, messages=FOX, seed=seed, max_tokens=16, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, range(10)))

    assert asyncio.run(ask()) == [llm.chat(FOX, Sampling(seed=seed, max_tokens=16)).text for seed in range(10)]


def test_choices_have_seeds_that_follow_one_another(client: openai.OpenAI, llm: LLM) -> None:
    found = client.chat.completions.create(model=NAME, messages=FOX, seed=3, n=3, max_tokens=12)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    expected = [llm.chat(FOX, Sampling(seed=seed, max_tokens=12)).text for seed in (3, 4, 5)]
    assert [choice.message.content for choice in found.choices] == expected
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(model=NAME, messages=FOX, seed=3, n=3, max_tokens=12, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == expected


def test_without_a_seed_chance_chooses(client: openai.OpenAI) -> None:
    said = {
        client.chat.completions.create(model=NAME, messages=FOX, max_tokens=12).choices[0].message.content
        for _ in "abc"
    }
    assert len(said) == 3


def test_completions_one_or_many_echoed_or_not(client: openai.OpenAI, llm: LLM, vocabulary: Tokenizer) -> None:
    sampling = Sampling(seed=2, max_tokens=10)
    expected = [llm.generate(prompt, sampling).text for prompt in ("the fox", "a wall")]
    one = client.completions.create(model=NAME, prompt="the fox", seed=2, max_tokens=10)
    assert one.choices[0].text == expected[0]
    many = client.completions.create(model=NAME, prompt=["the fox", "a wall"], seed=2, max_tokens=10, echo=True)
    assert [choice.text for choice in many.choices] == ["the fox" + expected[0], "a wall" + expected[1]]
    ids = [vocabulary.bos_id, *vocabulary.encode("the fox")]
    assert client.completions.create(model=NAME, prompt=ids, seed=2, max_tokens=10).choices[0].text == expected[0]
    two = client.completions.create(model=NAME, prompt=[ids, ids], n=2, seed=2, max_tokens=10)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[2].text == expected[0] != two.choices[1].text
    assert two.usage.prompt_tokens == 2 * len(ids)
    stream = client.completions.create(model=NAME, prompt="the fox", seed=2, max_tokens=10, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "the fox" + expected[0]


def test_drawing_does_what_it_is_told(client: openai.OpenAI, vocabulary: Tokenizer) -> None:
    (the,) = vocabulary.encode(" the")
    biased = client.chat.completions.create(model=NAME, messages=FOX, max_tokens=3, logit_bias={str(the): 100})
    assert biased.choices[0].message.content == " the the the"
    stopped = client.chat.completions.create(
        model=NAME, messages=FOX, max_tokens=9, logit_bias={str(the): 100}, stop=["the the"]
    )
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (" ", "stop")
    likeliest = [
        client.chat.completions.create(model=NAME, messages=FOX, max_tokens=9, extra_body=extra)
        .choices[0]
        .message.content
        for extra in ({"top_k": 1}, {"min_p": 1.0}, {"temperature": 0}, {"top_p": 1e-9})
    ]
    assert len(set(likeliest)) == 1
    tired = client.chat.completions.create(
        model=NAME, messages=FOX, max_tokens=3, temperature=0, presence_penalty=2, frequency_penalty=2,
        logit_bias={str(the): 100}, extra_body={"repetition_penalty": 10},
    )  # fmt: skip
    assert tired.choices[0].message.content.startswith(" the")


def test_logprobs_are_the_engines(client: openai.OpenAI, llm: LLM, vocabulary: Tokenizer) -> None:
    request = llm.engine.submit(vocabulary.encode_chat(FOX), Sampling(seed=4, max_tokens=8, logprobs=3))
    while llm.engine.busy:
        llm.engine.step()
    found = (
        client.chat.completions.create(model=NAME, messages=FOX, seed=4, max_tokens=8, logprobs=True, top_logprobs=3)
        .choices[0]
        .logprobs.content
    )
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in request.logprobs], abs=1e-5)
    assert [bytes(entry.bytes) for entry in found] == [vocabulary.token_bytes(token) for token in request.drawn]
    assert [len(entry.top_logprobs) for entry in found] == [3] * 8
    chunks = client.chat.completions.create(model=NAME, messages=FOX, seed=4, max_tokens=8, logprobs=True, stream=True)
    streamed = [entry.logprob for chunk in chunks for entry in (chunk.choices[0].logprobs or ChatNone).content]
    assert streamed == pytest.approx([entry.logprob for entry in found])
    text = client.completions.create(model=NAME, prompt="the fox", seed=4, max_tokens=8, logprobs=2).choices[0].logprobs
    assert len(text.tokens) == len(text.token_logprobs) == len(text.top_logprobs) == len(text.text_offset) == 8


class ChatNone:
    content: tuple[Any, ...] = ()


def test_a_prompt_seen_before_is_found_in_the_cache(http: httpx.Client) -> None:
    body = chat(messages=[{"role": "user", "content": "the rain came over the old wall, " * 8}])
    first, second = (http.post("/v1/chat/completions", json=body).json()["usage"] for _ in "ab")
    for usage in (first, second):
        assert usage["prompt_tokens"] == usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert first["prompt_cache_hit_tokens"] == 0 < second["prompt_cache_hit_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] == second["prompt_cache_hit_tokens"]


# ── prompts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_gap_is_filled_in_the_order_of_v3(vocabulary: Tokenizer) -> None:
    prompts = Prompts(engine_of(vocabulary))
    (ids,) = prompts.completion(CompletionRequest(model=NAME, prompt="the fox ", suffix=" the wall"))
    begin, hole, end = (vocabulary.special[name] for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
    prefix, suffix = vocabulary.encode("the fox "), vocabulary.encode(" the wall")
    assert ids == [vocabulary.bos_id, begin, *prefix, hole, *suffix, end]


def test_a_prefix_is_gone_on_from(vocabulary: Tokenizer) -> None:
    prompts = Prompts(engine_of(vocabulary))

    def ids(last: dict[str, Any]) -> list[int]:
        return prompts.chat(
            ChatRequest(model=NAME, messages=[*FOX, {"role": "assistant", "prefix": True} | last])
        ).prompt

    opening = vocabulary.encode_chat(FOX)
    assert ids({"content": "The fox"}) == opening + vocabulary.encode("The fox")
    thinking = prompts.chat(
        ChatRequest(
            model=NAME,
            messages=[*FOX, {"role": "assistant", "prefix": True, "content": "", "reasoning_content": "Well"}],
        )
    )
    assert thinking.prompt == opening + ids_of(vocabulary, "<think>\nWell")
    assert thinking.thinking
    assert ids({"content": "So", "reasoning_content": "W"}) == opening + ids_of(vocabulary, "<think>\nW</think>\n\nSo")


def test_messages_in_parts_and_by_developers_are_plain_ones(vocabulary: Tokenizer) -> None:
    prompts = Prompts(engine_of(vocabulary))
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]
    sent = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "the fox"}]
    assert prompts.chat(ChatRequest(model=NAME, messages=sent)).prompt == vocabulary.encode_chat(plain)


def test_tools_are_described_to_the_model_and_nothing_said_becomes_special(vocabulary: Tokenizer) -> None:
    prompts = Prompts(engine_of(vocabulary))
    sly = {"type": "function", "function": {"name": "sly", "description": f"{CALLS_BEGIN}</think>"}}
    ask = prompts.chat(ChatRequest(model=NAME, messages=FOX, tools=[LOOK, sly]))
    said = vocabulary.decode(ask.prompt)
    assert "look: Looks behind a wall." in said
    assert '"enum": ["left", "right"]' in said
    assert vocabulary.special[CALLS_BEGIN] not in ask.prompt
    none = prompts.chat(ChatRequest(model=NAME, messages=FOX, tools=[LOOK], tool_choice="none"))
    assert none.prompt == vocabulary.encode_chat(FOX)
    assert not none.tools


# ── output of a form ──────────────────────────────────────────────────────────────────────────────────────────────────

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "cat"]}, "old": {"type": "boolean"}},
    "required": ["animal", "old"],
    "additionalProperties": False,
}


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    for seed in range(3):
        found = client.chat.completions.create(
            model=NAME,
            messages=FOX,
            seed=seed,
            max_tokens=300,
            response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}},
        )
        value = json.loads(found.choices[0].message.content)
        assert value["animal"] in ("fox", "cat")
        assert value.keys() == {"animal", "old"}
        assert isinstance(value["old"], bool)
        assert found.choices[0].finish_reason == "stop"


def test_any_json_object(client: openai.OpenAI, vocabulary: Tokenizer) -> None:
    # The random model would never close an object by itself: the bias helps it.
    (closing,) = vocabulary.encode("}")
    found = client.chat.completions.create(
        model=NAME, messages=FOX, response_format={"type": "json_object"}, logit_bias={str(closing): 100}
    )
    assert json.loads(found.choices[0].message.content) == {}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_tool_that_must_be_called_is(client: openai.OpenAI, choice: Any) -> None:
    tools = [LOOK] if choice == "required" else [SLEEP, LOOK]
    found = client.chat.completions.create(
        model=NAME, messages=FOX, tools=tools, tool_choice=choice, seed=1, parallel_tool_calls=False
    ).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    (call,) = found.message.tool_calls
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)["where"] in ("left", "right")


def call_text(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


def test_calls_of_tools_come_out_apart_whole_and_streamed(vocabulary: Tokenizer) -> None:
    calls = call_text("look", '{"where": "left"}') + "\n" + call_text("sleep", "{}")
    with (
        served(Scripted(vocabulary, f"I look.{CALLS_BEGIN}{calls}{CALLS_END}")) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = client.chat.completions.create(model=NAME, messages=FOX, tools=[LOOK, SLEEP]).choices[0]
        assert whole.message.content == "I look."
        assert whole.finish_reason == "tool_calls"
        names = [("look", '{"where": "left"}'), ("sleep", "{}")]
        assert [(call.function.name, call.function.arguments) for call in whole.message.tool_calls] == names
        streamed: dict[int, list[str]] = {}
        content = ""
        for chunk in client.chat.completions.create(model=NAME, messages=FOX, tools=[LOOK, SLEEP], stream=True):
            content += chunk.choices[0].delta.content or ""
            for part in chunk.choices[0].delta.tool_calls or []:
                if part.id is not None:
                    assert part.index not in streamed
                    streamed[part.index] = [part.function.name, ""]
                streamed[part.index][1] += part.function.arguments
        assert content == "I look."
        assert [tuple(call) for call in streamed.values()] == names
        # What came back goes in again, with what the tool said.
        answered = [
            *FOX,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call.model_dump() for call in whole.message.tool_calls],
            },
            {"role": "tool", "tool_call_id": whole.message.tool_calls[0].id, "content": "a fox"},
        ]
        client.chat.completions.create(model=NAME, messages=answered, tools=[LOOK, SLEEP])
        plain = client.chat.completions.create(model=NAME, messages=FOX).choices[0]
        assert plain.message.content == f"I look.{CALLS_BEGIN}{calls}{CALLS_END}", "nobody asked for tools"
        assert plain.finish_reason == "stop"


def test_thoughts_stand_beside_the_answer(vocabulary: Tokenizer) -> None:
    script = "<think>\nthe wall is old\n</think>\n\nNothing."
    thoughts = len(ids_of(vocabulary, script[: script.index("</think>")])) + 1
    with (
        served(Scripted(vocabulary, script)) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = client.chat.completions.create(model=NAME, messages=FOX)
        assert whole.choices[0].message.content == "Nothing."
        assert whole.choices[0].message.reasoning_content == "the wall is old\n"
        assert whole.usage.completion_tokens_details.reasoning_tokens == thoughts
        content = reasoning = ""
        for chunk in client.chat.completions.create(model=NAME, messages=FOX, stream=True):
            content += chunk.choices[0].delta.content or ""
            reasoning += getattr(chunk.choices[0].delta, "reasoning_content", "") or ""
        assert (reasoning, content) == ("the wall is old\n", "Nothing.")


CASES: dict[str, tuple[bool, bool, bool, str, list[Part]]] = {
    "plain": (False, False, True, "a < b", [Part("content", "a < b")]),
    "thoughts": (False, False, True, " <think>\nx\n</think>\n\ny", [Part("reasoning", "x\n"), Part("content", "y")]),
    "thoughts from the prompt": (True, False, True, "x</think>y", [Part("reasoning", "x"), Part("content", "y")]),
    "thoughts without an end": (True, False, True, "\nx</thi", [Part("reasoning", "x</thi")]),
    "no thoughts later": (False, False, True, "a<think>b", [Part("content", "a<think>b")]),
    "not quite thoughts": (False, False, True, "<thin", [Part("content", "<thin")]),
    "a call": (
        False,
        True,
        True,
        f"Well. {CALLS_BEGIN}" + call_text("f", '{"a": "`"}') + "\n" + call_text("g", "") + CALLS_END,
        [
            Part("content", "Well. "),
            Part("call", "f"),
            Part("arguments", '{"a": "`"}'),
            Part("call", "g", 1),
            Part("arguments", "{}", 1),
        ],
    ),
    "a call after thoughts": (
        True,
        True,
        True,
        f"x</think>\n\n{CALLS_BEGIN}" + call_text("f", "{}") + CALLS_END,
        [Part("reasoning", "x"), Part("call", "f"), Part("arguments", "{}")],
    ),
    "V3.1's form": (
        False,
        True,
        False,
        f"{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{}}{CALL_END}{CALL_BEGIN}g{SEPARATOR}[1]{CALL_END}{CALLS_END}",
        [Part("call", "f"), Part("arguments", "{}"), Part("call", "g", 1), Part("arguments", "[1]", 1)],
    ),
    "a call cut off": (
        False,
        True,
        True,
        CALLS_BEGIN + call_text("f", '{"a"').removesuffix(CALL_END),
        [Part("call", "f"), Part("arguments", '{"a"')],
    ),
    "cut off before its name": (
        False,
        True,
        True,
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}f",
        [Part("content", f"{CALL_BEGIN}function{SEPARATOR}f")],
    ),
    "no call after all": (
        False,
        True,
        True,
        f"{CALLS_BEGIN}{CALL_BEGIN}what{CALL_END}{CALLS_END}",
        [Part("content", f"{CALL_BEGIN}what{CALL_END}")],
    ),
    "calls that are none": (False, True, True, f"{CALLS_BEGIN}x", [Part("content", "x")]),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_do_not_depend_on_the_pieces(case: str) -> None:
    thinking, tools, fenced, text, expected = CASES[case]
    for size in (1, 2, 3, 7, len(text)):
        reader, parts = Reader(thinking, tools, fenced), []
        for start in range(0, len(text), size):
            parts += reader.push(text[start : start + size])
        parts += reader.finish()
        assert joined(parts) == expected, size


def joined(parts: list[Part]) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        if found and (found[-1].kind, found[-1].call) == (part.kind, part.call):
            found[-1] = Part(part.kind, found[-1].text + part.text, part.call)
        else:
            found.append(part)
    return found


def test_parts_come_as_soon_as_they_are_certain() -> None:
    reader = Reader(True, True)
    assert reader.push("one </th") == [Part("reasoning", "one ")]
    assert reader.push("ink>two") == [Part("content", "two")]
    assert reader.push(" <｜tool") == [Part("content", " ")]
    assert reader.push("▁calls▁begin｜>" + CALL_BEGIN + f'function{SEPARATOR}f\n```json\n{{"a": 1') == [
        Part("call", "f"),
        Part("arguments", '{"a": 1'),
    ]


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────

NO_WAY = {"type": "object", "properties": {"a": {"type": "string", "enum": []}}, "required": ["a"]}
WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 404, "no model 'other' is served here: tiny is"),
    ({"model": "tinny"}, 404, "did you mean 'tiny'?"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": CONTEXT + 1}, 400, f"max_tokens is at most {CONTEXT} here"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "two names of one thing"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": -1}, 400, "top_k"),
    ({"min_p": 1.5}, 400, "min_p"),
    ({"n": 0}, 400, "n: "),
    ({"n": 10_000}, 400, "n: "),
    ({"seed": 2**70}, 400, "seed"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"logit_bias": {"-3": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias: there is no token 99999"),
    ({"logit_bias": {"1": 1000}}, 400, "logit_bias"),
    ({"top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"max_token": 5}, 400, "unknown field 'max_token' (did you mean 'max_tokens'?)"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "owl", "content": "hu"}]}, 400, "messages.0"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.user.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages.0"),
    ({"messages": [{"role": "user", "content": "fox " * 1000}]}, 400, "the model's context holds 512: shorten it"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half of a surrogate pair"),
    ({"messages": [{"role": "assistant", "content": "a", "prefix": True}, *FOX]}, 400, "only the last one"),
    ({"tool_choice": "required"}, 400, "there are no tools"),
    ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "no"}}}, 400, "none of the tools"),
    ({"tools": [LOOK, LOOK]}, 400, "the same name"),
    ({"tools": [LOOK], "tool_choice": "required", "response_format": {"type": "json_object"}}, 400, "exclude"),
    ({"tools": [{"type": "function", "function": {"name": 'x"y'}}]}, 400, "tools.0.function.name"),
    ({"response_format": {"type": "yaml"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": NO_WAY}}}, 400, "schema: "),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "fish"}}}}, 400, "schema: "),
]


@pytest.mark.parametrize(("change", "status", "says"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_request_is_one_clear_line(http: httpx.Client, change: dict[str, Any], status: int, says: str) -> None:
    sent = json.dumps(chat() | change)
    found = http.post("/v1/chat/completions", content=sent, headers={"content-type": "application/json"})
    error = found.json()["error"]
    assert found.status_code == status, error
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [5000]}, "no token has the id 5000"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": ["a", "b"], "suffix": "c"}, "one text"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True, "suffix": "x"}, "echo"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_completion_too(http: httpx.Client, change: dict[str, Any], says: str) -> None:
    found = http.post("/v1/completions", json={"model": NAME, "prompt": "the fox", "max_tokens": 3} | change)
    assert found.status_code == 400
    assert says in found.json()["error"]["message"]


BODIES = {
    "not JSON": b"{",
    "not UTF-8": b'{"model": "\xff"}',
    "not an object": b'"x"',
    "nothing": b"",
    "too deep": b"[" * 100_000,
    "a number too long": b'{"model": "tiny", "max_tokens": ' + b"9" * 5000 + b"}",
    "not a number": b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "infinite": b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
}


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/page/render"])
def test_a_malformed_body_is_refused(http: httpx.Client, path: str, case: str) -> None:
    found = http.post(path, content=BODIES[case], headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_codes_and_fields_say_what_to_mend(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=NAME, messages=FOX, max_tokens=100_000)
    assert wrong.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "fox " * 1000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gone", messages=FOX)
    assert unknown.value.code == "model_not_found"


def test_ten_megabytes_are_too_much(client: openai.OpenAI, http: httpx.Client, tiny: Served) -> None:
    with pytest.raises(openai.APIStatusError) as large:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a" * 10_000_000}])
    assert large.value.status_code == 413

    def drops() -> Iterator[bytes]:  # no Content-Length: it has to be counted while it comes
        for _ in range(160):
            yield b" " * 65536

    found = http.post("/v1/chat/completions", content=drops(), headers={"content-type": "application/json"})
    assert found.status_code == 413
    assert "4,194,304 bytes" in found.json()["error"]["message"]


def test_a_body_that_never_ends_is_let_go(vocabulary: Tokenizer) -> None:
    with served(Scripted(vocabulary), Limits(body_seconds=0.2)) as found:
        host, port = found.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            line.sendall(b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in line.recv(1000)


def test_paths_and_methods_that_are_none(http: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/nothing", 404),
        ("GET", "/page/secrets.txt", 404),
        ("GET", "/page/..%2f..%2fengine.py", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/docs", 404),
        ("POST", "/", 405),
    ):
        found = http.request(method, path)
        assert found.status_code == status, path
        assert "message" in found.json()["error"]


# ── limits, keys, numbers ─────────────────────────────────────────────────────────────────────────────────────────────


def test_models_health_and_the_bases_of_deepseek(client: openai.OpenAI, http: httpx.Client) -> None:
    (card,) = client.models.list().data
    assert card.id == NAME == client.models.retrieve(NAME).id
    assert card.context_length == CONTEXT
    assert http.get("/health").json()["status"] == "ok"
    for base in ("", "/v1", "/beta"):
        assert http.get(f"{base}/models").json()["data"][0]["id"] == NAME
        assert http.post(f"{base}/chat/completions", json=chat()).status_code == 200


def test_a_key_is_asked_for(vocabulary: Tokenizer) -> None:
    with served(Scripted(vocabulary, "yes"), key="geheim ß") as found:
        with httpx.Client(base_url=found.url) as http:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "geheim"}):
                for path in ("/v1/models", "/metrics", "/openapi.json"):
                    refused = http.get(path, headers=headers)
                    assert refused.status_code == 401
                    assert refused.headers["www-authenticate"] == "Bearer"
                assert http.post("/v1/chat/completions", json=chat(), headers=headers).status_code == 401
                assert http.post("/page/render", json={"text": "x"}, headers=headers).status_code == 401
            assert http.get("/").status_code == http.get("/health").status_code == http.get("/page/page.js").status_code
            key = {"authorization": "Bearer geheim ß".encode()}
            assert http.post("/v1/chat/completions", json=chat(), headers=key).status_code == 200
        assert "geheim" not in found.log.getvalue()
        wrong = openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0)
        with wrong as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_full_house_says_when_to_come_again(vocabulary: Tokenizer) -> None:
    with (
        served(Scripted(vocabulary, "a" * 100, pause=0.02), Limits(most=1)) as found,
        httpx.Client(base_url=found.url) as http,
    ):
        with http.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=100)) as stream:
            lines = stream.iter_lines()
            next(lines)
            refused = http.post("/v1/chat/completions", json=chat())
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["type"] == "rate_limit_error"
        until(lambda: not found.server.worker.open)
        assert http.post("/v1/chat/completions", json=chat(max_tokens=2)).status_code == 200
        two = http.post("/v1/chat/completions", json=chat(n=2))
        assert two.status_code == 429, "all choices or none"
        assert found.server.worker.open == 0


def test_an_answer_has_the_limit_where_nobody_asks(vocabulary: Tokenizer) -> None:
    with (
        served(Scripted(vocabulary, "a" * 50), Limits(max_tokens=7)) as found,
        httpx.Client(base_url=found.url) as http,
    ):
        body = chat()
        del body["max_tokens"]
        got = http.post("/v1/chat/completions", json=body).json()
        assert got["usage"]["completion_tokens"] == 7
        assert got["choices"][0]["finish_reason"] == "length"
        assert http.post("/v1/chat/completions", json=chat(max_tokens=8)).status_code == 400


def test_silence_is_filled(vocabulary: Tokenizer) -> None:
    with (
        served(Scripted(vocabulary, "ab", pause=0.3), Limits(keep_alive_seconds=0.05)) as found,
        httpx.Client(base_url=found.url) as http,
        http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as stream,
    ):
        lines = list(stream.iter_lines())
    assert ": keep-alive" in lines
    assert lines[-2] == "data: [DONE]"


def test_the_log_has_a_line_per_request_and_no_word_of_it(vocabulary: Tokenizer) -> None:
    with served(Scripted(vocabulary, "the secret answer")) as found, httpx.Client(base_url=found.url) as http:
        http.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": "a secret question"}]))
        http.post("/v1/chat/completions", json=chat(max_tokens=-1))
        http.get("/health")
        until(lambda: found.log.getvalue().count("\n") == 2)
        first, second = map(json.loads, found.log.getvalue().splitlines())
    assert first["status"] == 200
    assert first["tokens"] == 8
    assert first["first_token_ms"] > 0
    assert first["tokens_per_second"] > 0
    assert first["prompt_tokens"] > 3
    assert (second["status"], second["path"]) == (400, "/v1/chat/completions")
    assert "secret" not in found.log.getvalue()


def numbers(http: httpx.Client) -> dict[str, float]:
    text = http.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value for sample in samples}


def test_metrics_count_what_happened(http: httpx.Client) -> None:
    before = numbers(http)
    http.post("/v1/chat/completions", json=chat(max_tokens=9, temperature=0))
    http.post("/v1/chat/completions", json=chat(max_tokens=-1))
    http.get("/some/path/that/nobody/knows")
    after = numbers(http)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("leanseek_drawn_tokens_total") == 9
    assert more("leanseek_finished_total") == 1
    assert more("leanseek_first_token_seconds_count") == 1
    assert more("leanseek_next_token_seconds_count") == 8
    assert more("leanseek_http_requests_total /v1/chat/completions 200") == 1
    assert more("leanseek_http_requests_total /v1/chat/completions 400") == 1
    assert more("leanseek_http_requests_total other 404") == 1
    assert more("leanseek_drafted_total") > 0
    assert after["leanseek_pages_used"] == 0 < after["leanseek_pages_total"]


# ── clients that leave, engines that fail, the end ────────────────────────────────────────────────────────────────────


def test_who_leaves_frees_what_he_held(vocabulary: Tokenizer) -> None:
    with served(Scripted(vocabulary, "a" * 400, pause=0.01)) as found:
        with httpx.Client(base_url=found.url) as http:
            with http.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=400, n=3)) as stream:
                lines = stream.iter_lines()
                next(lines)
                until(lambda: found.pages_used > 0)
            until(lambda: found.pages_used == 0, 2)
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=chat(max_tokens=400), timeout=0.3)
            until(lambda: found.pages_used == 0 and not found.server.worker.open, 2)
        until(lambda: found.log.getvalue().count("\n") == 2)
        assert [json.loads(line)["cancelled"] for line in found.log.getvalue().splitlines()] == [True, True]
        assert found.engine.metrics.cancelled == 4


def test_an_engine_that_fails_is_told_and_takes_nothing_more(
    vocabulary: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fails(Scripted):
        def step(self) -> Any:
            if self.metrics.steps == 3:
                raise RuntimeError("the engine's own mistake")
            return super().step()

    with served(Fails(vocabulary, "abcdefgh")) as found, httpx.Client(base_url=found.url) as http:
        with http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as stream:
            last = events(stream.iter_lines())[-1]
        assert last["error"]["type"] == "unavailable_error"
        assert http.post("/v1/chat/completions", json=chat()).status_code == 503
        assert http.get("/health").status_code == 503
        assert http.get("/health").json()["status"] == "failed"
    assert "the engine's own mistake" in capsys.readouterr().err


def test_our_own_mistake_is_no_trace_to_the_client(vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(Scripted(vocabulary), NAME)
    monkeypatch.setattr(Prompts, "chat", lambda self, body: 1 / 0)
    with TestClient(app, raise_server_exceptions=False) as client:
        found = client.post("/v1/chat/completions", json=chat())
    assert found.status_code == 500
    assert found.json()["error"]["type"] == "server_error"
    assert "Zero" not in found.text


def test_closing_lets_what_runs_end_and_nobody_in(vocabulary: Tokenizer) -> None:
    with served(Scripted(vocabulary, "a" * 40, pause=0.02)) as found, httpx.Client(base_url=found.url) as http:
        with http.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=60)) as stream:
            lines = stream.iter_lines()
            next(lines)
            found.server.drain()
            refused = http.post("/v1/chat/completions", json=chat())
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert http.get("/health").json()["status"] == "closing"
            said = events(lines)
        assert said[-1] is None, "the answer came to its end"
        assert said[-2]["choices"][0]["finish_reason"] == "stop"
        found.thread.join(5)
        assert not found.thread.is_alive()


def test_what_outlasts_the_grace_is_cut_off(vocabulary: Tokenizer) -> None:
    with served(Scripted(vocabulary, "a" * 400, pause=0.02), grace=0.1) as found:
        body = chat(stream=True, max_tokens=400)
        with httpx.stream("POST", f"{found.url}/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            found.server.drain()
            said = events(lines)
        assert said[-1]["error"]["message"] == "the service is shutting down"
        found.thread.join(5)
        assert not found.thread.is_alive()
        assert found.pages_used == 0


# ── the page's Markdown ───────────────────────────────────────────────────────────────────────────────────────────────

EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](&#106;avascript:alert(1))",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "![a](https://example.org/pixel.png)",
    '[a](https://example.org "x\\" onmouseover=alert(1) ")',
    '<https://example.org/"onclick=alert(1)>',
    '```html" onclick=alert(1)\nx\n```',
    "<svg/onload=alert(1)>",
    "<a href='//example.org' style='position:fixed'>x</a>",
    "[a](//example.org) [b](/v1/models)",
    "[a]: javascript:alert(1)\n\n[a]",
    "<style>*{display:none}</style>",
    "| <b onclick=x> | [a](vbscript:x) |\n|-|-|\n| <iframe> | y |",
]


@pytest.mark.parametrize("text", EVIL)
def test_nothing_a_model_writes_can_run_or_load(text: str) -> None:
    rendered = Renderer()(text)
    tags = re.findall(r"<(/?)([a-z0-9]+)([^>]*)>", rendered)
    assert {tag for _, tag, _ in tags} <= {"p", "a", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"}
    for _, tag, attributes in tags:
        names = set(re.findall(r'([a-z-]+)="', re.sub(r'="[^"]*"', '=""', attributes)))
        assert names <= {"a": {"href", "title", "target", "rel"}, "code": {"class"}}.get(tag, set())
        for target in re.findall(r'href="([^"]*)"', attributes):
            assert target.startswith(("https://", "http://", "mailto:"))


def test_markdown_keeps_its_shape() -> None:
    rendered = Renderer()(
        "# One\n\n- **two** ~~three~~\n\n```python\nx < 1\n```\n\n| a |\n|---|\n| b |\n\n[c](https://d.org)"
    )
    for part in (
        "<h1>One</h1>",
        "<strong>two</strong> <s>three</s>",
        '<pre><code class="language-python">x &lt; 1\n</code></pre>',
        "<td>b</td>",
        '<a href="https://d.org" target="_blank" rel="noopener noreferrer nofollow">c</a>',
    ):
        assert part in rendered


def test_the_page_may_load_only_what_is_its_own(http: httpx.Client) -> None:
    page = http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org)", page.text)
    for file in set(re.findall(r'"/page/([^"]+)"', page.text)):
        found = http.get(f"/page/{file}")
        assert found.status_code == 200
        assert "://" not in found.text.replace("http://www.w3.org/2000/svg", "")


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, vocabulary: Tokenizer) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "fox", model_of(vocabulary), vocabulary)


def test_options_that_cannot_be_are_one_line(tmp_path: Path, run_folder: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        for options, says in (
            (Options(port=port), f"cannot listen on 127.0.0.1 port {port}: address already in use"),
            (Options(host="no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
            (Options(port=70000), "--port must lie between 0 and 65535, got 70000"),
            (Options(port=0, max_running=0), "--max-running must be at least 1, got 0"),
            (Options(port=0, max_tokens=0), "--max-tokens must be at least 1"),
            (Options(port=0, max_waiting=-1), "--max-waiting must be at least 0"),
            (Options(port=0, body_mb=0), "--body-mb must be at least"),
            (Options(port=0, grace=-1), "--grace must be at least 0"),
            (Options(port=0, cache_tokens=0), "cache_tokens must be at least 1"),
            (Options(port=0, api_key="a", api_key_file=tmp_path), "give one of the two"),
            (Options(port=0, api_key_file=tmp_path / "gone"), "not a text file that can be read"),
            (Options(port=0, api_key_file=tmp_path / "empty"), "the API key is empty"),
            (Options(port=0, device="toaster"), "device must be auto, cpu, cuda or mps"),
        ):
            with pytest.raises(BadInput, match=re.escape(says)):
                serve(run_folder, options)
    with pytest.raises(BadInput, match="gone"):
        serve(tmp_path / "gone", Options(port=0))


def test_the_command_serves_until_it_is_asked_to_stop(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("open sesame\n")
    command = [sys.executable, "-m", "leanseek", "serve", str(run_folder), "--port", "0", "--device", "cpu"]
    command += ["--api-key-file", str(tmp_path / "key")]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        url = re.match(r"fox: (http://127\.0\.0\.1:\d+) has the chat page", line)
        assert url, line
        with openai.OpenAI(base_url=f"{url[1]}/v1", api_key="open sesame", max_retries=20) as client:
            assert client.chat.completions.create(
                model="fox", messages=[{"role": "user", "content": "so"}], max_tokens=3
            )
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_a_crowd_leaves_nothing_behind(run_folder: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "load.py"
    command = [sys.executable, str(script), str(run_folder), "--seconds", "10"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"pages and requests left over +0\n", done.stdout)


# ── anything at all ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_that_fits_the_documents_or_does_not_breaks_the_service(vocabulary: Tokenizer) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    torch.set_flush_denormal(False)  # a test of training may have set it, and hypothesis wants every float there is
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    seen: set[tuple[str, int]] = set()
    with served(engine_of(vocabulary), Limits(max_tokens=6)) as service:
        schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")

        def explore(path: str, cases: Any) -> None:
            @settings(
                max_examples=20,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=cases)
            def one(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = NAME  # else all there is to see is 404
                response = case.call(base_url=service.url)
                seen.add((path, response.status_code))
                case.validate_response(response, checks=checks)

            one()

        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            for operation in schema.get_all_operations():
                if mode is GenerationMode.NEGATIVE and operation.ok().method.lower() == "get":
                    continue  # there is nothing to get wrong
                explore(operation.ok().path, operation.ok().as_strategy(generation_mode=mode))
    assert {("/v1/chat/completions", 200), ("/v1/completions", 200), ("/v1/chat/completions", 400)} <= seen, seen
