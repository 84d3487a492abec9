"""A conversation in the terminal: the answer appears as it is drawn; Ctrl-C stops it, an empty line or Ctrl-D ends."""

import sys
from dataclasses import replace
from pathlib import Path

from leanseek.data.tokenizer import without_thoughts
from leanseek.serve.llm import LLM
from leanseek.serve.sampling import Sampling


def chat(run: Path, system: str | None, sampling: Sampling) -> None:
    """Talks until told to stop. When a conversation outgrows the context, its oldest exchange is let go."""
    llm = LLM.load(run)
    opening = [] if system is None else [{"role": "system", "content": system}]
    exchanges: list[dict[str, str]] = []
    print(f"{run}: an empty line ends the chat, Ctrl-C an answer.", file=sys.stderr)
    while question := _ask():
        exchanges.append({"role": "user", "content": question})
        while exchanges and not _fits(llm, [*opening, *exchanges]):
            del exchanges[:2]
        if not exchanges:
            print(f"too long for the model's context of {llm.config.max_position_embeddings} tokens", file=sys.stderr)
            continue
        answer = _answer(llm, [*opening, *exchanges], sampling)
        exchanges.append({"role": "assistant", "content": without_thoughts(answer)})
        sampling = replace(sampling, seed=sampling.seed + 1)


def _fits(llm: LLM, messages: list[dict[str, str]]) -> bool:
    return len(llm.tokenizer.encode_chat(messages)) < llm.config.max_position_embeddings


def _ask() -> str:
    try:
        return input("\n› " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _answer(llm: LLM, messages: list[dict[str, str]], sampling: Sampling) -> str:
    said = []
    try:
        for piece in llm.stream_chat(messages, sampling):
            print(piece, end="", flush=True)
            said.append(piece)
    except KeyboardInterrupt:
        pass  # what was said so far stands
    print(flush=True)
    return "".join(said)
