"""Chats to batches (report §5.1): whole samples packed into rows that isolate them, only the answers learnt.

A batch is a pure function of (seed, stage, sample, rank, ranks), as in pre-training.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from leanseek.config import BadInput, Stage
from leanseek.data.loader import NO_TARGET, ORDER, Batch, part_of, shuffled, whole_rows
from leanseek.data.packing import Rows, best_fit
from leanseek.data.read import batches, find_source
from leanseek.data.tokenizer import Tokenizer, check_messages, token_dtype, without_thoughts

SUFFIX = re.compile(r"\.jsonl(\.gz|\.zst)?$", re.IGNORECASE)
HELD_OUT, MOST_HELD_OUT = 0.02, 500  # share of the different chats that is for validation, and their largest number


@dataclass(frozen=True)
class Chats:
    """C chats one after another, N tokens in all: chat c is tokens starts[c] … starts[c + 1] − 1.

    One that thinks before its last answer is several of them; see `as_asked`.
    """

    ids: np.ndarray  # [N]
    learnt: np.ndarray  # [N] whether a token is the assistant's
    starts: np.ndarray  # [C+1]
    keys: np.ndarray  # [C] a hash of what the chat says

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> np.ndarray:
        """Places [C] that each chat takes in a row: its last token is only ever a target."""
        return np.diff(self.starts) - 1

    def sample(self, chat: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets [length] of a chat; a target is the token after where that is learnt, else -100."""
        own = slice(self.starts[chat], self.starts[chat + 1])
        ids = self.ids[own].astype(np.int64)
        return ids[:-1], np.where(self.learnt[own], ids, NO_TARGET)[1:]

    def select(self, which: np.ndarray) -> "Chats":
        """The chats where `which` [C] is true."""
        sizes = np.diff(self.starts)
        tokens = np.repeat(which, sizes)
        starts = np.concatenate([[0], np.cumsum(sizes[which])])
        return Chats(self.ids[tokens], self.learnt[tokens], starts, self.keys[which])


def open_chats(file: Path, tokenizer: Tokenizer, longest: int) -> tuple[Chats, Chats, int]:
    """Chats to train on and to validate on, and how many were left out for being above `longest` places in a row.

    Raises BadInput for a file or a line that cannot be read, and where too few chats are left.
    """
    chats = read_chats(file, tokenizer)
    fitting = chats.lengths <= longest
    if not fitting.any():
        raise BadInput(
            f"{file}: all {len(chats)} chats are longer than the {longest} tokens of a row: "
            "take shorter ones or a longer stages.0.sequence_length"
        )
    kept = chats.select(fitting)
    apart = held_out(kept.keys)
    if apart.all():
        raise BadInput(f"{file}: training and validation need two different chats of at most {longest} tokens")
    return kept.select(~apart), kept.select(apart), len(chats) - len(kept)


def longest_of(stages: tuple[Stage, ...]) -> int:
    """The longest chat that every stage's rows can hold."""
    return min(stage.sequence_length for stage in stages)


def fingerprint_of(file: Path) -> str:
    """The SHA-256 of a file of chats: runs on it are told by this."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_chats(file: Path, tokenizer: Tokenizer) -> Chats:
    """Every chat of a JSONL file, plain or packed, up to its last answer. Raises BadInput naming file and line."""
    if not SUFFIX.search(file.name):
        raise BadInput(f"{file}: chats are read from .jsonl files, plain or packed (.gz, .zst)")
    source = find_source(str(file))
    if source.files != (file,):
        raise BadInput(f"{file}: not a file of chats")
    ids, learnt, keys = [], [], []
    for batch in batches([source]):
        chats, known = [], []  # of each sample: where it stands and what it says, how many answers of it are not new
        for number, row in enumerate(batch.rows, batch.first):
            if row.strip():
                where = f"{file} line {number}"
                messages = messages_of(row, where)
                for sample, before in as_asked(messages):
                    chats.append((where, sample))
                    known.append(before)
                    keys.append(key_of(messages))
        for numbers, answers in encoded(chats, tokenizer, known):
            mask = np.zeros(len(numbers), bool)
            for first, after in answers:
                mask[first:after] = True
            ids.append(np.array(numbers, token_dtype(tokenizer.vocab_size)))
            learnt.append(mask)
    if not ids:
        raise BadInput(f"{file}: there is no chat in it")
    starts = np.concatenate([[0], np.cumsum([len(numbers) for numbers in ids])])
    return Chats(np.concatenate(ids), np.concatenate(learnt), starts, np.array(keys, np.uint64))


def as_asked(messages: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], int]]:
    """A chat as the samples it makes, and how many of the first answers in each are not to be learnt there.

    Who is asked again does not see what it thought before, only what it said, as R1's template has it and as a server
    is sent it. So a sample ends with an answer that thinks, and the next one goes on from its last words.
    """
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    samples, past, known, answers = [], list(messages), 0, 0
    for i, message in enumerate(messages[: last + 1]):
        if message["role"] != "assistant":
            continue
        answers += 1
        said = message["content"] or ""
        if i == last or without_thoughts(said) != said:
            samples.append((past[: i + 1], known))
            past[i], known = {**message, "content": without_thoughts(said)}, answers
    return samples


def held_out(keys: np.ndarray, share: float = HELD_OUT) -> np.ndarray:
    """Which chats [C] are for validation: about 2% of the different ones, one at least and 500 at most, by their hash.

    A chat that is there twice goes to one side only.
    """
    different = np.unique(keys)
    count = min(max(int((different < np.uint64(share * 2**64)).sum()), 1), MOST_HELD_OUT)
    return keys <= different[count - 1]


def pack(lengths: np.ndarray, width: int) -> Rows:
    """Samples of so many places [C], none above `width`, packed whole into rows of that width."""
    return best_fit(np.arange(len(lengths)), np.maximum(lengths, 2), width)  # it knows no piece of one token


class ChatLoader:
    """Batches of every stage: the same rows in every epoch, each time in another order."""

    def __init__(self, chats: Chats, stages: tuple[Stage, ...], total_tokens: int, seed: int, pad_id: int) -> None:
        self.chats, self.stages, self.total_tokens, self.seed, self.pad_id = chats, stages, total_tokens, seed, pad_id
        self.rows = lru_cache(maxsize=None)(self._rows)
        self._order = lru_cache(maxsize=2)(self._permutation)

    def samples(self, stage: int) -> int:
        """Rows the stage trains on: its share of the budget, in whole rows."""
        return whole_rows(self.stages[stage], self.total_tokens)

    def batch(self, stage: int, sample: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Rows sample … sample + count − 1 of a stage, or this rank's consecutive part of them.

        The samples of a row are segments 1, 2, …, with positions that begin at 0 in each; padding is segment 0.
        """
        rows, mine = self.rows(stage), part_of(sample, count, rank, ranks)
        shape = len(mine), self.stages[stage].sequence_length
        ids, targets = np.full(shape, self.pad_id, np.int64), np.full(shape, NO_TARGET, np.int64)
        positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, number in enumerate(mine):
            epoch, place = divmod(number, len(rows))
            row, at = self._order(stage, epoch)[place], 0
            for segment, chat in enumerate(rows.document[rows.first[row] : rows.first[row + 1]], start=1):
                inputs, wanted = self.chats.sample(chat)
                own = slice(at, at + len(inputs))
                ids[i, own], targets[i, own] = inputs, wanted
                positions[i, own], segments[i, own] = np.arange(len(inputs)), segment
                at += len(inputs)
        return Batch(ids, targets, positions, segments)

    def _rows(self, stage: int) -> Rows:
        return pack(self.chats.lengths, self.stages[stage].sequence_length)

    def _permutation(self, stage: int, epoch: int) -> np.ndarray:
        return shuffled(len(self.rows(stage)), self.seed, ORDER, stage, epoch)


def messages_of(row: bytes, where: str) -> list[dict[str, Any]]:
    """The messages of one line, in either of the two forms."""
    try:
        chat = json.loads(row)
    except (ValueError, RecursionError):
        raise BadInput(f"{where}: not JSON") from None
    if not isinstance(chat, dict):
        raise BadInput(f'{where}: not an object with "messages", or with "prompt" and "response"')
    if "messages" in chat:
        messages: list[dict[str, Any]] = chat["messages"]
    elif "prompt" in chat and "response" in chat:
        if not isinstance(chat["prompt"], str) or not isinstance(chat["response"], str):
            raise BadInput(f'{where}: "prompt" and "response" must be strings')
        messages = [{"role": "user", "content": chat["prompt"]}, {"role": "assistant", "content": chat["response"]}]
    else:
        raise BadInput(f'{where}: needs "messages", or "prompt" and "response"')
    try:
        check_messages(messages)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    if not any(message["role"] == "assistant" for message in messages):
        raise BadInput(f"{where}: no message of the assistant, so there is nothing to learn")
    return messages


def encoded(
    chats: list[tuple[str, list[dict[str, Any]]]], tokenizer: Tokenizer, known: list[int] | None = None
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """`encode_chat_turns` of chats, each with where it stands. Raises BadInput that says where."""
    try:
        return tokenizer.encode_chat_turns([messages for _, messages in chats], known)
    except BadInput:
        for (where, messages), before in zip(chats, known or [0] * len(chats), strict=True):  # which line was it?
            try:
                tokenizer.encode_chat_turns([messages], [before])
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
        raise


def key_of(messages: list[dict[str, Any]]) -> int:
    """A hash of what a chat says."""
    said = json.dumps(messages, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")
