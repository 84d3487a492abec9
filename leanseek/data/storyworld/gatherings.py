"""A gathering: many people, what each has, does, feels or brings in short sentences, and questions about all of it.

Nothing happens here. Most answers can only be known by looking them up a few sentences before, which is what a model
needs much practice in: a story asks for it less often.
"""

import random
from collections.abc import Callable, Iterable

from leanseek.data.storyworld import words
from leanseek.data.storyworld.words import even, with_article

Said = tuple[str, tuple[tuple[str, str], ...]]  # a sentence, and questions with their answers


def gathering(rng: random.Random) -> str:
    """The text of one gathering with its questions and answers."""
    names = rng.sample(NAMES, rng.randrange(3, 8))
    place = even(rng, tuple(words.PLACES))
    opening = even(rng, OPENINGS).format(
        D=even(rng, ("day", "morning", "afternoon", "evening")),
        W=even(rng, ("sunny", "cloudy", "cold", "warm", "windy", "rainy", "grey", "bright")),
        P=f"at the {even(rng, SIZES_OF_PLACES)} {place}",
        N=", ".join(names[:-1]) + " and " + names[-1],
    )
    used: set[str] = set()
    sentences, asked = [opening], []
    for name in names:
        kinds = rng.sample(KINDS, 1 if len(names) > 4 else 2)
        for kind in kinds:
            sentence, questions = kind(rng, name, used)
            sentences.append(sentence)
            asked.append(even(rng, questions))
    rng.shuffle(asked)
    return f"{' '.join(sentences)}\n{asked_below(asked[:6])}"


def asked_below(asked: Iterable[tuple[str, str]]) -> str:
    """Questions with their answers, as they stand below a text."""
    return "".join(f"\nQuestion: {question}\nAnswer: {answer}." for question, answer in asked)


def _fresh(rng: random.Random, items: tuple[str, ...], used: set[str]) -> str:
    """One of the items that nobody in this gathering has yet."""
    while True:
        item = even(rng, items)
        if item not in used:
            used.add(item)
            return item


def _has(rng: random.Random, name: str, used: set[str]) -> Said:
    noun = _fresh(rng, THINGS, used)
    thing = f"{even(rng, words.COLOURS)} {noun}"
    if rng.random() < 0.5:
        thing = f"{even(rng, words.SIZES)} {thing}"
    verb, asks = even(rng, (("had", "have"), ("brought", "bring"), ("found", "find"), ("carried", "carry")))
    colour = thing.split()[-1 - len(noun.split())]
    return f"{name} {verb} {with_article(thing)}.", (
        (f"What did {name} {asks}?", with_article(thing)),
        (f"Who {verb} the {noun}?", name),
        (f"What colour was the {noun}?", colour),
    )


def _is_in(rng: random.Random, name: str, used: set[str]) -> Said:
    place = f"{even(rng, SIZES_OF_PLACES)} {_fresh(rng, tuple(words.PLACES), used)}"
    return f"{name} came from the {place}.", (
        (f"Where did {name} come from?", f"the {place}"),
        (f"Who came from the {place}?", name),
    )


def _feels(rng: random.Random, name: str, used: set[str]) -> Said:
    feeling = _fresh(rng, FEELINGS, used)
    return f"{name} felt {feeling}.", ((f"How did {name} feel?", feeling), (f"Who felt {feeling}?", name))


def _eats(rng: random.Random, name: str, used: set[str]) -> Said:
    food = _fresh(rng, words.GOODS, used)
    number = even(rng, words.NUMBERS)
    return f"{name} picked {number} {food}." if food in words.FRUIT else f"{name} brought {food}.", (
        ((f"How many {food} did {name} pick?", number), (f"Who picked {food}?", name))
        if food in words.FRUIT
        else ((f"Who brought {food}?", name), (f"What did {name} bring along?", food))
    )


def _gives(rng: random.Random, name: str, used: set[str]) -> Said:
    noun = _fresh(rng, THINGS, used)
    other = even(rng, [each for each in NAMES if each != name and each not in used][:400])
    used.add(other)
    return f"{name} gave {other} {with_article(noun)}.", (
        (f"What did {name} give {other}?", with_article(noun)),
        (f"Who gave {other} {with_article(noun)}?", name),
        (f"Who got the {noun}?", other),
    )


NAMES = [*words.SHE_NAMES, *words.HE_NAMES, *words.PET_NAMES]
THINGS = tuple(words.THINGS)
SIZES_OF_PLACES = ("old", "little", "big", "quiet", "green", "white", "dark", "busy", "crooked", "stony", "sleepy")
FEELINGS = (*("happy", "sad", "proud", "tired", "angry", "afraid", "merry", "lonely", "hungry", "thirsty", "brave"),
            *("worried", "glad", "sleepy", "curious", "cross", "calm", "shy"))  # fmt: skip
OPENINGS = (
    "On a {W} {D}, {N} met {P}.",
    "It was a {W} {D}, and {N} came together {P}.",
    "One {W} {D} there was a feast {P}, with {N}.",
    "{N} sat {P} on a {W} {D}.",
)
Kind = Callable[[random.Random, str, set[str]], Said]
ALONE: tuple[Kind, ...] = (_has, _has, _is_in, _feels, _eats)
KINDS: tuple[Kind, ...] = (*ALONE, _gives)
