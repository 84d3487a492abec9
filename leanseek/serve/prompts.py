"""What a client sent, turned into what the engine takes: token ids, a way of drawing, a grammar.

Chats go through the tokenizer's template, so that nothing a client says becomes a special token. V3's template has no
place for tools, so they are described in a system message of ours; the calls are written and read in V3's own form.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from leanseek.config import BadInput
from leanseek.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, THINK
from leanseek.serve.answers import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, FENCE_OPENS, SEPARATOR
from leanseek.serve.sampling import Sampling
from leanseek.serve.schemas import (
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    Content,
    Drawing,
    JsonSchemaFormat,
    Message,
    NamedTool,
    Tool,
)

if TYPE_CHECKING:
    from leanseek.serve.engine import Engine
    from leanseek.serve.grammar import Grammar

TOOLS = (
    "You can call functions. Where one helps, answer with a call of it and nothing else, its arguments one JSON object "
    "that fits the function's schema; you will be told what it returns. These are the functions:"
)
GRAMMARS_KEPT = 32


@dataclass(frozen=True)
class Ask:
    """One chat, ready for the engine, and how to read what comes back."""

    prompt: list[int]
    grammar: "Grammar | None"
    thinking: bool  # the answer begins inside the thoughts
    tools: bool  # calls are looked for
    fenced: bool  # as V3 writes them


class Prompts:
    """Turns requests into prompts for one engine. Everything raises BadInput."""

    def __init__(self, engine: "Engine") -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.fenced = "```json" in self.tokenizer.chat_template
        # Schemas come again and again, and compiling one takes longer than a step.
        self._compiled: Callable[[str, str], Grammar] = lru_cache(GRAMMARS_KEPT)(self._compile)

    def chat(self, body: ChatRequest) -> Ask:
        """The generation prompt of a chat, or the chat up to the prefix that the answer goes on from."""
        tools = [] if body.tool_choice == "none" else body.tools or []
        messages = [_plain(message) for message in body.messages]
        if tools:
            messages.insert(0, {"role": "system", "content": _described(tools)})
        last = body.messages[-1]
        if isinstance(last, AssistantMessage) and last.prefix:
            ids = self.tokenizer.encode_chat(messages, add_generation_prompt=False)
            while ids and ids[-1] == self.tokenizer.eos_id:
                ids.pop()
        else:
            ids = self.tokenizer.encode_chat(messages)
        thinking = self._thinks(ids)
        return Ask(ids, self._grammar(body, tools, thinking), thinking, bool(tools), self.fenced)

    def completion(self, body: CompletionRequest) -> list[list[int]]:
        """The prompts of a completion, BOS first where they came as text."""
        bos, encode = self.tokenizer.bos_id, self.tokenizer.encode
        if body.suffix is not None:
            assert isinstance(body.prompt, str)
            begin, hole, end = (self._special(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
            return [[bos, begin, *encode(body.prompt), hole, *encode(body.suffix), end]]
        prompts = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
        ids = [[bos, *encode(prompt)] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for prompt in ids:
            unknown = next((number for number in prompt if number >= self.tokenizer.vocab_size), None)
            if unknown is not None:
                raise BadInput(f"prompt: no token has the id {unknown}, there are {self.tokenizer.vocab_size}")
        return ids

    def _thinks(self, ids: list[int]) -> bool:
        """Whether the prompt leaves thoughts open."""
        begin, end = (self.tokenizer.special.get(name) for name in THINK)
        last = next((number for number in reversed(ids) if number in (begin, end, self.tokenizer.eos_id)), None)
        return last is not None and last == begin

    def _special(self, name: str) -> int:
        if name not in self.tokenizer.special:
            raise BadInput(f"this model's tokenizer has no token {name}: what was asked for cannot be written")
        return self.tokenizer.special[name]

    # ── grammars ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _grammar(self, body: ChatRequest, tools: list[Tool], thinking: bool) -> "Grammar | None":
        if isinstance(body.tool_choice, NamedTool):
            named = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
            return self._compiled("lark", self._calls(named, False, thinking))
        if body.tool_choice == "required":
            return self._compiled("lark", self._calls(tools, body.parallel_tool_calls is not False, thinking))
        form = body.response_format
        if form is None or form.type == "text":
            return None
        schema = form.json_schema.schema_ if isinstance(form, JsonSchemaFormat) else None
        if thinking:  # the form is the answer's, not the thoughts'
            rules = f"start: thoughts answer\nanswer: %json {json.dumps(schema or {'type': 'object'})}\n"
            return self._compiled("lark", rules + self._thoughts())
        if schema is None:
            return self._compiled("json", "")
        return self._compiled("schema", json.dumps(schema, sort_keys=True))

    def _calls(self, tools: list[Tool], several: bool, thinking: bool) -> str:
        """The rules of one call or several of these tools, and of nothing else."""
        begin, end, separator = (f"<[{self._special(name)}]>" for name in (CALL_BEGIN, CALL_END, SEPARATOR))
        first, last = (f"<[{self._special(name)}]>" for name in (CALLS_BEGIN, CALLS_END))
        opens, closes = json.dumps(FENCE_OPENS), json.dumps("\n```")
        thoughts = "thoughts " if thinking else ""
        rules = [
            f"start: {thoughts}{first} call {'(_next call)* ' if several else ''}{last}",
            '_next: "\\n"' if self.fenced else "_next:",
            "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
        ]
        for i, tool in enumerate(tools):
            name = json.dumps(tool.function.name)
            if self.fenced:
                rules.append(f'call_{i}: {begin} "function" {separator} {name} {opens} arguments_{i} {closes} {end}')
            else:
                rules.append(f"call_{i}: {begin} {name} {separator} arguments_{i} {end}")
            rules.append(f"arguments_{i}: %json {json.dumps(_schema(tool))}")
        return "\n".join(rules) + "\n" + (self._thoughts() if thinking else "")

    def _thoughts(self) -> str:
        return f"thoughts: THOUGHT <[{self._special(THINK[1])}]> GAP\nTHOUGHT: /(?s:.*)/\nGAP: /\\n{{0,2}}/\n"

    def _compile(self, kind: str, text: str) -> "Grammar":
        grammars = self.engine.grammars
        if kind == "json":
            return grammars.json_object()
        if kind == "schema":
            return grammars.json_schema(json.loads(text))
        return grammars.lark(text)


def sampling(body: Drawing, most: int, unasked: int | None, logprobs: int | None) -> Sampling:
    """How to draw. `most` tokens may be asked for; `unasked` is what stands where nobody asks.

    Where no seed is given, chance chooses one.
    """
    asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if asked is not None and asked > most:
        raise BadInput(f"max_tokens is at most {most} here, got {asked}")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []

    def given(value: Any, otherwise: Any) -> Any:
        return otherwise if value is None else value

    return Sampling(
        temperature=given(body.temperature, 1.0),
        top_k=given(body.top_k, 0),
        top_p=given(body.top_p, 1.0),
        min_p=given(body.min_p, 0.0),
        max_tokens=given(asked, unasked),
        stop=tuple(stop),
        seed=secrets.randbits(61) if body.seed is None else body.seed,
        repetition_penalty=given(body.repetition_penalty, 1.0),
        presence_penalty=given(body.presence_penalty, 0.0),
        frequency_penalty=given(body.frequency_penalty, 0.0),
        logit_bias=tuple((int(number), bias) for number, bias in (body.logit_bias or {}).items()),
        logprobs=logprobs,
    )


def _plain(message: Message) -> dict[str, Any]:
    """A message as the chat template takes it."""
    text = _text(message.content)
    if isinstance(message, AssistantMessage):
        if message.prefix and message.reasoning_content is not None:
            closed = THINK[1] + "\n\n" if text else ""
            text = f"{THINK[0]}\n{message.reasoning_content}{closed}{text or ''}"
        plain: dict[str, Any] = {"role": "assistant", "content": text}
        if message.tool_calls:
            plain["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.model_dump()}
                for call in message.tool_calls
            ]
        elif text is None:
            plain["content"] = ""
        return plain
    return {"role": "system" if message.role == "developer" else message.role, "content": text}


def _text(content: Content | None) -> str | None:
    return content if content is None or isinstance(content, str) else "".join(part.text for part in content)


def _described(tools: list[Tool]) -> str:
    lines = [TOOLS]
    for tool in tools:
        function = tool.function
        lines.append(f"\n{function.name}: {function.description or 'a function'}")
        lines.append(f"Arguments: {json.dumps(_schema(tool), ensure_ascii=False)}")
    return "\n".join(lines)


def _schema(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object"}
