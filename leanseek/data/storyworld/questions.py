"""From what was told to questions with one right answer each, and to the check of a reply.

A question is asked about an event in the words that told it. Its answer is the phrase of that very sentence, so that it
can be copied; a question that two events would answer differently is not asked.
"""

import random
from bisect import bisect_right
from dataclasses import dataclass

from leanseek.data.storyworld.narrate import Sentence
from leanseek.data.storyworld.words import COLOURS, METAL, even
from leanseek.data.storyworld.world import Being, Role, Thing, World


@dataclass(frozen=True)
class Fact:
    """What one sentence of a story says, as a question and its answer."""

    question: str
    answer: str  # 1 to 4 words, as they stand in that sentence
    sentence: int  # which one of `sentences(text)`


# kind of event: (question, role that answers); {A} is a name, {T} "the kite"; a|b are two ways to ask the same
ASKED: dict[str, tuple[tuple[str, str], ...]] = {
    "live": (("Where did {A} live?|Where was {A}'s home?", "P"),),
    "know": (("Who was {A}'s friend?", "B"),),
    "know_kin": (("What was the name of {A}'s {B:tie}?", "B"),),
    "scene": (
        ("Where was {A} at first?", "P"),
        ("What was {A} doing at first?", "X"),
        ("What was the weather like at first?|What kind of {D} was it at first?", "W"),
        ("What season was it at first?", "Z"),
    ),
    "scene_with": (
        ("Who was with {A} at first?", "B"),
        ("What was the weather like at first?|What kind of {D} was it at first?", "W"),
        ("What season was it at first?", "Z"),
    ),
    "own": (("What did {A} have?|Which thing did {A} have?", "T"), ("Who had {T}?", "A")),
    "prize": (("Who had given {A} {T}?", "X"),),
    "want": (("What did {A} want to do?|What was {A}'s wish?", "X"),),
    "plan": (("What did {A} want to do?|What was {A}'s plan?", "X"),),
    "cross": (("Where did {A} wade?", "P"),),
    "climb_hill": (("Where did {A} climb?", "P"),),
    "ride": (("Where did {A} ride?", "P"),),
    "meet": (("Where did {A} meet {B}?", "P"),),
    "show_way": (("Who showed {A} the way?", "B"),),
    "lose": (
        ("Where did {A} lose {T}?|In which place did {A} lose {T}?", "P"),
        ("Who lost {T}?", "A"),
        ("What did {A} lose?", "T"),
    ),
    "snatched": (("Who took {T}?", "X"), ("Where was {T} taken?", "P")),
    "wind_takes": (("Where did the wind carry {T}?", "P"), ("What did the wind carry away?", "T")),
    "miss": (("How did {A} feel about {T}?", "F"),),
    "dismay": (("How did {A} feel about {T}?", "F"),),
    "find": (
        ("Where did {A} find {T}?|Where was {T} when {A} found it?|In which spot did {A} find {T}?", "S"),
        ("Who found {T}?", "A"),
        ("What did {A} find?", "T"),
    ),
    "spot": (
        ("Where did {A} find {T}?|Where was {T} when {A} found it?|In which spot did {A} find {T}?", "S"),
        ("Who found {T}?", "A"),
        ("What did {A} find?", "T"),
    ),
    "tell_where": (("Who told {A} where to look?", "B"),),
    "hide": (("Where did {A} hide {T}?", "S"), ("Who hid {T}?", "A"), ("What did {A} hide?", "T")),
    "hand_back": (("Who got {T} back?", "B"), ("What did {A} give back to {B}?", "T")),
    "give": (("What did {A} give {B}?|Which present did {B} get from {A}?", "T"), ("Who got {T}?", "B")),
    "lend": (("Who lent {T} to {B}?", "A"), ("What did {A} lend to {B}?", "T")),
    "return": (("Who brought {T} back?", "A"), ("What did {A} bring back to {B}?", "T")),
    "trade": (("What did {A} get for {T}?", "U"), ("Who got {T}?", "B")),
    "take_unasked": (("Who took {T} without asking?", "A"), ("What did {A} take without asking?", "T")),
    "keep_safe": (("Where did {A} keep {T}?", "S"),),
    "deliver": (("Who got {T} at last?", "B"), ("What did {A} bring to {B}?", "T")),
    "break": (("What broke?", "T"), ("What was {T} broken on?", "Y"), ("Who broke {T}?", "A")),
    "wind_breaks": (("What did the wind break?", "T"),),
    "see_damage": (("How did {A} feel about the broken {T:noun}?", "F"),),
    "try_mend": (("What did {A} try first?", "X"),),
    "mend": (
        ("What did {A} mend {T} with?|What did {A} use to mend {T}?", "X"),
        ("Who mended {T}?", "A"),
        ("What did {A} mend?", "T"),
    ),
    "mend_for": (("Who mended {T}?", "A"), ("What did {A} mend {T} with?|What did {A} use to mend {T}?", "X")),
    "mend_together": (("What did they mend {T} with?", "X"), ("Who helped {A} to mend {T}?", "B")),
    "soil": (("What got dirty?", "T"), ("What made {T} dirty?", "Y")),
    "wash": (("What did {A} wash {T} with?", "X"), ("What did {A} wash?", "T")),
    "paint": (("What did {A} paint?", "T"), ("Which colour did {A} paint {T}?", "X")),
    "spill": (("What did {A} spill?", "X"), ("What did {A} spill the {X} over?", "Y")),
    "mop_up": (("What did {A} clean?", "Y"),),
    "fence_breaks": (("What broke in the storm?", "the X"),),
    "mend_fence": (("What did they mend the {X} with?", "Y"), ("Who helped {A} to mend the {X}?", "B")),
    "gather": (("What did {A} gather?", "X"),),
    "build": (("What did they build the {X} from?", "Y"), ("Who built the {X} with {A}?", "B")),
    "build_fails": (("Why did the first {X} break?", "Y"),),
    "paint_it": (("Which colour did they paint the {X}?", "Y"),),
    "make": (("What did {A} make?", "T"), ("What did {A} make {T} from?", "X")),
    "hunger": (("What had {A} eaten before?", "X"),),
    "nothing_left": (("What was left in the kitchen?", "X"),),
    "pick": (
        ("How many {X} did {A} pick?|How many {X} were there?", "N"),
        ("What did {A} pick?", "X"),
        ("Who picked {X}?", "A"),
    ),
    "cook": (("What did {A} cook?", "X"), ("What was in the {X}?", "Y"), ("Who cooked the {X}?", "A")),
    "share_food": (("Who shared the {X} with {B}?", "A"), ("What did {A} share with {B}?", "X")),
    "share_snack": (("What did {B} share with {A}?", "X"),),
    "eat": (("What did {A} eat?", "X"),),
    "feed": (("What did {A} give {C}?", "X"), ("Who fed {C}?", "A")),
    "greedy": (("What did {A} not want to share?", "X"),),
    "ache": (("What had {A} eaten too much of?", "X"),),
    "bake_treat": (("What did {A} bake?", "T"), ("What did {A} bake {T} with?", "X")),
    "eat_treat": (("What did {A} and {B} eat?", "T"),),
    "agree": (("Who agreed to help {A}?|Who said yes to {A}?", "B"),),
    "refuse": (("Who had no time to help {A}?", "B"), ("What did {B} have to do?", "X")),
    "thank": (("What did {A} give {B} as thanks?", "X"),),
    "advise": (("What did {B} tell {A} to do?", "X"),),
    "promise": (("What did {A} promise to do?|What was {A}'s promise?", "X"), ("Who promised to {X}?", "A")),
    "forget": (("What did {A} forget to do?", "X"),),
    "boast": (("Who boasted to {B}?", "A"),),
    "teach": (("Who taught {A} to {X}?", "B"), ("What did {B} teach {A}?", "X")),
    "manage": (("What could {A} do at last?", "X"),),
    "rain": (("Who got wet in the rain?", "A"),),
    "fire": (("What did {A} burn in the fire?", "X"),),
    "rest": (("Where did {A} rest?", "S"),),
    "shelter": (("Where did {A} wait for the rain to end?", "S"),),
    "fall": (("What did {A} hurt?", "X"), ("What did {A} fall over?", "Y")),
    "bandage": (("Who took care of {A}'s {X}?", "B"),),
    "sick": (("Who was ill?", "B"),),
    "fear": (("What was {A} afraid of?|What frightened {A}?", "X"),),
    "play": (("What did {A} and {B} play?", "X"),),
    "follow_tracks": (("Where did the tracks lead {A}?", "P"), ("What did {A} follow?", "X")),
    "find_pet": (("Where did {A} find {C}?", "S"), ("Who found {C}?", "A")),
    "stuck": (("Where had {C} {V}?", "S"),),
    "fetch_tool": (("What did {A} fetch?", "T"), ("Where did {A} get {T} from?", "the P")),
    "rescue": (("Who saved {C}?", "A"), ("What did {A} save {C} with?", "T")),
    "plant": (
        ("What did {A} plant?", "X"),
        ("Where did {A} plant the {X}?", "P"),
        ("How many {X} did {A} plant?", "N"),
    ),
    "tend": (("What did {A} water the {X} with?", "Y"),),
    "sprout": (("How many days did it take?", "N"),),
    "harvest": (("How many baskets were there?", "N"),),
    "race_nap": (("What did {A} do halfway?", "X"), ("Where did {A} stop in the race?", "S")),
    "race_win": (("Who won the race?", "A"), ("Who came second?", "B")),
    "send": (("Who was to get {T}?", "C"), ("Who sent {A} with {T}?", "B"), ("Where was {C}?", "P")),
    "end_glad": (("How did {A} feel in the end?|What did {A} feel in the end?", "F"),),
}
ENDS = ".!?"


def sentences(text: str) -> list[tuple[int, int]]:
    """Where each sentence of a text begins and ends.

    A sentence ends at a full stop, an exclamation or a question mark and the quotation mark after it, unless a small
    letter follows: speech and who speaks are one.
    """
    spans: list[tuple[int, int]] = []
    start, at, size = 0, 0, len(text)
    while at < size:
        if text[at] in ENDS:
            end = at + 1
            while end < size and text[end] in '.!?"':
                end += 1
            if end == size or (text[end] in " \n" and not text[end + 1 : end + 2].islower()):
                spans.append((start, end))
                start = end + 1
            at = end
        else:
            at += 1
    if start < size:
        spans.append((start, size))
    return spans


def facts_of(
    rng: random.Random, world: World, hero: Being, told: list[Sentence], begins: list[int], text: str, starts: list[int]
) -> tuple[Fact, ...]:
    """Up to eight facts of a story in its order, in which patterns begin at `begins` and sentences at `starts`."""
    found: dict[str, tuple[str, int, str, str]] = {}  # question → answer, sentence, group, how it is asked
    twice: list[str] = []  # questions that have no answer, or two

    def add(question: str, answer: str, number: int, group: str, asked: str = "") -> None:
        """Ask the question of sentence `number`, if its answer stands there."""
        if question in found:
            if found[question][0] != answer:
                twice.append(question)
            return
        at = text.find(answer, begins[number], begins[number] + len(told[number].text))
        if at >= 0:
            found[question] = (answer, bisect_right(starts, at) - 1, group, asked or question)

    painted = [event.roles["T"] for event in world.log if event.kind == "paint"]
    for number, sentence in enumerate(told):
        names = Names(sentence.roles)
        for phrasings, role in ASKED.get(sentence.kind, ()):
            question, *others = phrasings.split("|")
            asked = even(rng, (question, *others)) if others else question
            if any(
                form in question and sentence.roles[form[1]] is not hero and form[1] not in sentence.words
                for form in BEINGS
            ):
                continue  # the sentence says only "she", and not of the main character
            answer = sentence.words.get(role, "")
            if role == "the X" and "X" in sentence.words:
                answer = f"the {sentence.words['X']}"
            misplaced = answer.startswith("to the ") and not any(word in question for word in ONWARD)
            if not answer or misplaced or answer.count(" ") > 3 or answer.rstrip("s") in asked.format_map(names):
                twice.append(question.format_map(names))  # a second event might answer otherwise
                continue
            group = "scene" if sentence.kind.startswith("scene") else question[:9] + role
            add(question.format_map(names), answer, number, group, asked.format_map(names))
        for role, words in sentence.words.items():
            value = sentence.roles.get(role)
            if isinstance(value, Thing) and not value.treat and value not in painted:
                look = world.look[value]
                if look and f" {look} " in words:
                    if look in COLOURS:
                        add(f"What colour was the {value.noun}?", look, number, "colour")
                    elif look in METAL:
                        add(f"What was the {value.noun} made of?", look, number, "metal")
            elif isinstance(value, Being) and value.kind in CHILDREN and f"{value.kind} named {words}" in sentence.text:
                add(f"What was the name of the {value.kind}?", value.name, number, "name")
    kept = [found[question] for question in found if question not in twice]
    rng.shuffle(kept)
    facts: list[Fact] = []
    groups: dict[str, int] = {}
    for answer, sentence_number, group, asked in kept:
        groups[group] = groups.get(group, 0) + 1
        if answer == hero.name:  # the main character would be a good guess
            groups["hero"] = groups.get("hero", 0) + 1
            if groups["hero"] > 1:
                continue
        if len(facts) < MOST_FACTS and groups[group] <= (2 if group == "scene" else 1):
            facts.append(Fact(asked, answer, sentence_number))
    return tuple(sorted(facts, key=lambda fact: fact.sentence))


MOST_FACTS = 8
ONWARD = ("carry", "taken", "lead", "wade", "climb", "ride")  # they are asked of a way, the others of a place
BEINGS = ("{A}", "{B}", "{C}")
CHILDREN = ("girl", "boy")


@dataclass(frozen=True, slots=True)
class Name:
    """A role for str.format: {A} and {T} as such, {B:tie} and {T:noun} by form."""

    value: Role

    def __format__(self, form: str) -> str:
        value = self.value
        if isinstance(value, Being):
            return value.tie if form == "tie" else value.name
        if isinstance(value, Thing):
            return value.noun if form == "noun" else f"the {value.noun}"
        return value if isinstance(value, str) else f"the {value.noun}"


class Names(dict[str, Role]):
    """Roles by letter, each as a Name when it is looked up."""

    def __getitem__(self, role: str) -> Name:  # type: ignore[override]
        return Name(super().__getitem__(role))


# ── replies ───────────────────────────────────────────────────────────────────────────────────────────────────────

ARTICLES = ("the", "a", "an", "some", "his", "her")
PREPOSITIONS = ("in", "on", "at", "by", "near", "to")
LONGEST_REPLY = 12  # words; whoever repeats the whole story has not answered


def bare(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation."""
    kept = "".join(c if c.isalnum() or c in "'-" else " " for c in text.lower())
    return kept.split()


def answer_is(reply: str, answer: str) -> bool:
    """Whether a reply gives the answer, alone or in a short sentence, articles and a leading preposition aside."""
    said = [word for word in bare(reply) if word not in ARTICLES]
    wanted = [word for word in bare(answer) if word not in ARTICLES]
    if not wanted or len(bare(reply)) > LONGEST_REPLY:
        return False
    if len(wanted) > 1 and wanted[0] in PREPOSITIONS:
        wanted = wanted[1:]
    size = len(wanted)
    return any(said[i : i + size] == wanted for i in range(len(said) - size + 1))


def as_reply(answer: str) -> str:
    """The answer as the assistant says it: after other words, so that its tokens are those of the story."""
    return f"The story says: {answer}."


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────

REQUESTS = (
    "Tell me a story about {who} {theme}.",
    "Please tell me about {who} {theme}.",
    "Write a story about {who} {theme}.",
    "Can you tell a story about {who} {theme}?",
    "I would like to hear about {who} {theme}.",
    "Do you know a story about {who} {theme}?",
)


def request_for(rng: random.Random, hero: Being, theme: str) -> str:
    """What one would say to be told this story."""
    article = "an" if hero.kind[0] in "aeiou" else "a"
    who = even(
        rng, (f"{article} {hero.kind}", f"{article} {hero.kind} named {hero.name}", f"{hero.name} the {hero.kind}")
    )
    comma = "," if who.startswith(hero.name) else ""
    return even(rng, REQUESTS).format(who=who + comma, theme=theme)
