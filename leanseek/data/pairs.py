"""Preferences to batches (report §5.2.1): two chats that differ in the last answer, of which one is the better.

A line is {"chosen", "rejected"}: both lists of messages, or both transcripts of "Human:" and "Assistant:" turns; or
both answers, with what was asked in "prompt". A pair's chats lie at the same place of two rows, so that they meet.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from leanseek.config import BadInput, Stage
from leanseek.data.chats import SUFFIX, encoded, held_out, key_of, pack
from leanseek.data.loader import NO_TARGET, ORDER, Batch, part_of, shuffled, whole_rows
from leanseek.data.packing import Rows
from leanseek.data.read import batches, find_source
from leanseek.data.tokenizer import Tokenizer, check_messages, token_dtype

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")
ROLES = {"Human": "user", "Assistant": "assistant"}
HELD_OUT = 0.1  # share of the different questions that is for validation
SIDES = ("chosen", "rejected")

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Pairs:
    """P pairs of chats as token ids, each to the end of its last answer; `keys` [P] hash what was asked."""

    chosen: list[np.ndarray]
    rejected: list[np.ndarray]
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Places [P] that each pair takes in both of its rows."""
        return np.array([max(len(a), len(b)) for a, b in zip(self.chosen, self.rejected, strict=True)], np.int64)

    def select(self, which: np.ndarray) -> "Pairs":
        """The pairs where `which` [P] is true."""
        places = np.flatnonzero(which)
        return Pairs([self.chosen[i] for i in places], [self.rejected[i] for i in places], self.keys[which])


def open_pairs(file: Path, tokenizer: Tokenizer, longest: int) -> tuple[Pairs, Pairs, int, int]:
    """Pairs to train on and to validate on, no question in both; how many were left out as too long, and as the same.

    Raises BadInput for a file or a line that cannot be read, and where too few pairs are left.
    """
    pairs, same = read_pairs(file, tokenizer)
    kept = pairs.select(pairs.lengths <= longest)
    apart = held_out(kept.keys, HELD_OUT) if len(kept) else np.zeros(0, bool)
    if not len(kept) or apart.all():
        raise BadInput(
            f"{file}: training and validation need pairs on two different questions, of at most {longest} tokens: "
            f"{len(kept)} of {len(pairs)} are not longer; a longer stages.0.sequence_length takes more"
        )
    return kept.select(~apart), kept.select(apart), len(pairs) - len(kept), same


def read_pairs(file: Path, tokenizer: Tokenizer) -> tuple[Pairs, int]:
    """Every pair of a JSONL file, plain or packed, and how many say the same twice. Raises BadInput naming the line."""
    if not SUFFIX.search(file.name):
        raise BadInput(f"{file}: pairs are read from .jsonl files, plain or packed (.gz, .zst)")
    source = find_source(str(file))
    if source.files != (file,):
        raise BadInput(f"{file}: not a file of pairs")
    sides: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    keys, same = [], 0
    for batch in batches([source]):
        chats: dict[str, list[tuple[str, Messages]]] = {side: [] for side in SIDES}
        for number, row in enumerate(batch.rows, batch.first):
            if row.strip():
                where = f"{file} line {number}"
                chosen, rejected = _pair(row, where)
                if chosen == rejected:
                    same += 1
                    continue
                chats["chosen"].append((where, chosen))
                chats["rejected"].append((where, rejected))
                keys.append(key_of(chosen[:-1]))
        for side in SIDES:
            for ids, _ in encoded(chats[side], tokenizer):
                sides[side].append(np.array(ids, token_dtype(tokenizer.vocab_size)))
    if not keys:
        raise BadInput(f"{file}: there is no pair in it")
    return Pairs(sides["chosen"], sides["rejected"], np.array(keys, np.uint64)), same


class PairLoader:
    """Batches of every stage: a sample is two rows, the chosen chats in the first and the rejected in the second.

    Chats are segments 1, 2, … with positions of their own; the target at a chat's last token is 1, all others -100.
    """

    def __init__(self, pairs: Pairs, stages: tuple[Stage, ...], total_tokens: int, seed: int, pad_id: int) -> None:
        self.pairs, self.stages, self.total_tokens, self.seed, self.pad_id = pairs, stages, total_tokens, seed, pad_id
        self.rows = lru_cache(maxsize=None)(self._rows)
        self._order = lru_cache(maxsize=2)(self._permutation)

    def samples(self, stage: int) -> int:
        """Double rows that the stage trains on: its share of the budget."""
        return whole_rows(self.stages[stage], self.total_tokens // 2)

    def batch(self, stage: int, sample: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Double rows sample … sample + count − 1 of a stage, or this rank's part of them: [2 · count, T]."""
        rows, mine = self.rows(stage), part_of(sample, count, rank, ranks)
        lengths, shape = self.pairs.lengths, (2 * len(mine), self.stages[stage].sequence_length)
        ids, targets = np.full(shape, self.pad_id, np.int64), np.full(shape, NO_TARGET, np.int64)
        positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, number in enumerate(mine):
            epoch, place = divmod(number, len(rows))
            row, at = self._order(stage, epoch)[place], 0
            for segment, pair in enumerate(rows.document[rows.first[row] : rows.first[row + 1]], start=1):
                for line, chat in ((2 * i, self.pairs.chosen[pair]), (2 * i + 1, self.pairs.rejected[pair])):
                    own = slice(at, at + len(chat))
                    ids[line, own], positions[line, own], segments[line, own] = chat, np.arange(len(chat)), segment
                    targets[line, at + len(chat) - 1] = 1
                at += int(lengths[pair])
        return Batch(ids, targets, positions, segments)

    def _rows(self, stage: int) -> Rows:
        return pack(self.pairs.lengths, self.stages[stage].sequence_length)

    def _permutation(self, stage: int, epoch: int) -> np.ndarray:
        return shuffled(len(self.rows(stage)), self.seed, ORDER, stage, epoch)


def _pair(row: bytes, where: str) -> tuple[Messages, Messages]:
    """The chosen and the rejected chat of one line."""
    try:
        pair = json.loads(row)
    except (ValueError, RecursionError):
        raise BadInput(f"{where}: not JSON") from None
    if not isinstance(pair, dict) or not all(side in pair for side in SIDES):
        raise BadInput(f'{where}: not an object with "chosen" and "rejected"')
    chosen, rejected = (_chat(pair[side], pair.get("prompt"), f'{where}: "{side}"') for side in SIDES)
    return chosen, rejected


def _chat(said: Any, prompt: Any, where: str) -> Messages:
    """One side of a pair as messages, of which the last is an answer."""
    if isinstance(said, str) and isinstance(prompt, str):
        messages: Messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
    elif isinstance(said, str):
        parts = TURN.split(said)
        if parts[0].strip() or len(parts) < 3:
            raise BadInput(f'{where}: neither messages nor a transcript that begins with "Human:", and no "prompt"')
        messages = [
            {"role": ROLES[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2], strict=True)
        ]
    elif isinstance(said, list):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        messages = [*asked, *said] if isinstance(asked, list) else said
    else:
        raise BadInput(f"{where}: must be a string or a list of messages")
    try:
        check_messages(messages)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    if messages[-1]["role"] != "assistant":
        raise BadInput(f"{where}: must end with an answer of the assistant, which is what is judged")
    return messages
