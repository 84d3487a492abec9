"""Small worlds in which things happen, told as stories, with questions whose answers follow from what happened.

Everything is a pure function of a seed and a number: story n is the same on every machine, and there is no last one.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from leanseek.data import puzzles
from leanseek.data.storyworld.cast import Stage, stage
from leanseek.data.storyworld.gatherings import asked_below, gathering
from leanseek.data.storyworld.plots import PLOTS
from leanseek.data.storyworld.questions import Fact, answer_is, as_reply, facts_of, request_for, sentences
from leanseek.data.storyworld.talk import small_talk
from leanseek.data.storyworld.vignettes import vignette
from leanseek.data.storyworld.words import pick

__all__ = [
    "CHATS",
    "MADE",
    "NEEDLES",
    "PRETRAINING",
    "QUESTIONS",
    "Fact",
    "Story",
    "answer_is",
    "chats",
    "documents",
    "played",
    "questions",
    "story",
]

# Seeds of what is trained on and of what is asked afterwards: no two share a story.
PRETRAINING, CHATS, QUESTIONS, NEEDLES = range(4)
GATHERINGS = 0.4  # share of the documents
BATCH = 10_000  # story numbers per batch: no two batches share one
SHORTEST, LONGEST, FEWEST_FACTS = 5, 25, 3


@dataclass(frozen=True)
class Story:
    text: str  # paragraphs are lines
    request: str  # what one would say to be told it
    facts: tuple[Fact, ...]


def played(seed: int, number: int) -> tuple[Story, Stage]:
    """Story number `number` and the stage it was played on, with the log of its events."""
    for attempt in range(100):
        rng = random.Random(f"story:{seed}:{number}:{attempt}")
        set_up = stage(rng)
        pick(rng, PLOTS)(set_up)
        told, breaks = set_up.narrator.told, set_up.narrator.breaks
        text, begins = "", []
        for i, sentence in enumerate(told):
            text += ("\n" if i in breaks else " ") if i else ""
            begins.append(len(text))
            text += sentence.text
        hero = set_up.narrator.hero
        assert hero is not None  # every plot has one
        starts = [start for start, _ in sentences(text)]
        facts = facts_of(rng, set_up.world, hero, told, begins, text, starts)
        if SHORTEST <= len(starts) <= LONGEST and len(facts) >= FEWEST_FACTS:
            return Story(text, request_for(rng, hero, set_up.theme), facts), set_up
    raise AssertionError(f"no story {number} of seed {seed} has {FEWEST_FACTS} facts")


def story(seed: int, number: int) -> Story:
    """Story number `number`."""
    return played(seed, number)[0]


def documents(seed: int, number: int, size: int) -> Iterator[str]:
    """Batch `number` of texts to learn to read from: until they have `size` bytes of UTF-8 or more.

    Stories, half of them with two to six questions and answers below; gatherings; now and then a few sums.
    """
    rng = random.Random(f"documents:{seed}:{number}")
    written = 0
    for k in range(BATCH):
        if written >= size:
            return
        r = rng.random()
        if r < GATHERINGS:
            text = gathering(random.Random(f"gathering:{seed}:{number * BATCH + k}"))
        elif r < GATHERINGS + 0.02:
            sums = (puzzles.sum_of(seed, (number * BATCH + k) * 8 + i) for i in range(rng.randrange(3, 8)))
            text = "\n".join(f"Problem: {asked} = {asked.result}" for asked in sums)
        else:
            told = story(seed, number * BATCH + k)
            text = told.text
            if rng.random() < 1 / 2:
                asked_facts = rng.sample(told.facts, min(len(told.facts), rng.randrange(2, 7)))
                text += "\n" + asked_below((f.question, f.answer) for f in asked_facts)
        written += len(text.encode())
        yield text
    raise ValueError(f"a batch has {BATCH} texts, which is less than {size} bytes: take several batches")


def vignettes(seed: int, number: int, size: int) -> Iterator[str]:
    """Batch `number` of vignettes about one being each: until they have `size` bytes of UTF-8 or more."""
    rng = random.Random(f"vignettes:{seed}:{number}")
    written = 0
    while written < size:
        text = vignette(rng)
        written += len(text.encode())
        yield text


MADE = {"storyworld": documents, "vignettes": vignettes}  # texts to pre-train on, by the name of the input


def chats(seed: int, number: int, count: int) -> Iterator[dict[str, Any]]:
    """Batch `number` of conversations: stories on request, questions about them, small talk, sums and puzzles."""
    rng = random.Random(f"chats:{seed}:{number}")
    for k in range(_checked(count)):
        at = number * BATCH + k
        r = rng.random()
        if r < 0.75 or r >= 0.88:
            told = story(seed, at)
            some = rng.sample(told.facts, min(len(told.facts), rng.choice((1, 1, 2, 3))))
        if r < 0.35:
            turns = [told.request, told.text]
        elif r < 0.75:
            turns = _asked(some)
            turns[0] = f"{told.text}\n\n{turns[0]}"
        elif r < 0.80:
            turns = small_talk(rng)
        elif r < 0.88:
            turns = _puzzle(rng, seed, at)
        else:
            turns = [told.request, told.text, *_asked(some)]
        roles = ("user", "assistant")
        yield {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def questions(seed: int, number: int, count: int) -> Iterator[dict[str, Any]]:
    """Batch `number` of tasks whose answers can be verified: a story and a question about it."""
    rng = random.Random(f"questions:{seed}:{number}")
    for k in range(_checked(count)):
        told = story(seed, number * BATCH + k)
        fact = rng.choice(told.facts)
        yield {"prompt": f"{told.text}\n\n{fact.question}", "verify": "exact", "answer": fact.answer}


def _asked(facts: list[Fact]) -> list[str]:
    return [turn for fact in facts for turn in (fact.question, as_reply(fact.answer))]


def _puzzle(rng: random.Random, seed: int, number: int) -> list[str]:
    if rng.random() < 0.65:
        row = puzzles.arithmetic(seed, number)
        return [row["prompt"], row["answer"]]
    row = puzzles.countdown(seed, number)
    return [row["prompt"], row["solution"]]


def _checked(count: int) -> int:
    if count > BATCH:
        raise ValueError(f"a batch has {BATCH} rows, not {count}: take several batches")
    return count
