"""From events to sentences: patterns are compiled once, then filled with names, pronouns and descriptions.

A pronoun stands only for who was the subject of the sentence before, or was named earlier in the same sentence, and
only while nobody else in the two sentences could be meant.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from leanseek.data.storyworld.phrases import PATTERNS
from leanseek.data.storyworld.words import CLOTH, COLOURS, LISTS, METAL, even, listed, pick, with_article
from leanseek.data.storyworld.world import Being, Place, Role, Thing, World


@dataclass(frozen=True, slots=True)
class Slot:
    role: str
    form: str


@dataclass(frozen=True, slots=True)
class Choice:
    options: tuple[tuple["Part", ...], ...]


# A pattern is a row of these: literal text, a slot for a role, words to pick from, patterns to choose from.
Part = str | Slot | tuple[str, ...] | Choice

# What may stand before a sentence that begins with its subject.
OPENERS = {
    "": ("then", "so", "soon", "after that,", "now", "a little later,"),
    "but": ("but", "however,", "still,", "but then"),
    "so": ("so", "that is why", "therefore", "and so"),
    "last": ("at last", "in the end,", "finally,", "after all that,"),
    "luck": ("luckily,", "just then", "by good luck", "as it happened,"),
}
# What is so, or ends the story, does not follow from the sentence before.
STILL = listed(
    "live, know, know_kin, own, prize, scene, scene_with, want, fear, aside, sick, send, stuck, boast, come_by"
)
HIM = {"he": "him", "she": "her"}
HIS = {"he": "his", "she": "her"}


def compiled(pattern: str) -> tuple[Part, ...]:
    """The parts of a pattern; (a|b) may not be nested."""
    parts: list[Part] = []
    at = 0
    while at < len(pattern):
        closing = {"{": "}", "<": ">", "(": ")"}.get(pattern[at])
        if closing is None:
            ends = [i for i in (pattern.find(c, at) for c in "{<(") if i >= 0]
            end = min(ends, default=len(pattern))
            parts.append(pattern[at:end])
            at = end
            continue
        end = pattern.index(closing, at)
        inside = pattern[at + 1 : end]
        if closing == "}":
            role, _, form = inside.partition(":")
            parts.append(Slot(role, form))
        elif closing == ">":
            parts.append(LISTS[inside])
        else:
            parts.append(Choice(tuple(compiled(option) for option in inside.split("|"))))
        at = end + 1
    return tuple(parts)


COMPILED = {kind: tuple(compiled(pattern) for pattern in patterns) for kind, patterns in PATTERNS.items()}


def _introduces(parts: tuple[Part, ...]) -> bool:
    """Whether the first being that the pattern names is A, by name or introduction."""
    slots = [part for part in parts if type(part) is Slot and part.role in "ABC"]
    return bool(slots) and slots[0].role == "A" and slots[0].form in ("", "n", "full")


# kind → which of its patterns can be the first about the main character
OPENING = {
    kind: tuple(number for number, parts in enumerate(patterns) if _introduces(parts))
    for kind, patterns in COMPILED.items()
}


@dataclass(frozen=True, slots=True)
class Sentence:
    """One filled pattern, with the words that each role got in it (names of beings, phrases of things and places)."""

    text: str
    kind: str
    roles: dict[str, Role]
    words: dict[str, str]


@dataclass(slots=True)
class Narrator:
    """What the reader knows and remembers while the story is told."""

    rng: random.Random
    world: World
    told: list[Sentence] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)  # a paragraph begins at these sentences
    known: dict[Being | Thing | Place, bool] = field(default_factory=dict)  # who and what has been mentioned
    hero: Being | None = None
    subject: Being | None = None  # of the sentence before
    before: list[Being] = field(default_factory=list)  # who the sentence before was about
    here: list[Being] = field(default_factory=list)  # who has been mentioned in this one
    first: Being | None = None  # the subject of this one
    speaker: Role | None = None  # who plays A in this one
    words: dict[str, str] = field(default_factory=dict)
    last_pattern: dict[str, int] = field(default_factory=dict)

    def tell(self, kind: str, roles: dict[str, Role], link: str = "") -> None:
        """Say in one sentence that the event happened."""
        rng = self.rng
        patterns = COMPILED[kind]
        number = int(len(patterns) * rng.random())
        if self.hero not in self.known and OPENING[kind]:  # nobody is "her" or a bare name before being introduced
            number = even(rng, OPENING[kind])
        elif number == self.last_pattern.get(kind):  # not the same words twice in one story
            number = (number + 1) % len(patterns)
        self.last_pattern[kind] = number
        pattern = patterns[number]
        self.here, self.first, self.words, self.speaker = [], None, {}, roles.get("A")
        out: list[str] = []
        self._fill(pattern, roles, out)
        text = " ".join("".join(out).split())  # choices that were empty leave double spaces
        opens = type(pattern[0]) is Slot and pattern[0].role in "ABC" and bool(self.told) and " at last" not in text
        if opens and rng.random() < (0.8 if link else 0.0 if kind in STILL else 0.2):
            text = f"{even(rng, OPENERS[link])} {text}"
        text = _capitalised(text.replace(" ,", ",")) + ("" if text[-1] == '"' and text[-2] in ".!?" else ".")
        if text.endswith('".') and text[-3] not in ".!?,":
            text = text[:-2] + '."'
        self.told.append(Sentence(text, kind, roles, self.words))
        if self.here:
            self.before, self.subject = self.here, self.first

    def paragraph(self) -> None:
        if self.told and len(self.told) not in self.breaks:
            self.breaks.append(len(self.told))
            self.subject = None

    def _fill(self, parts: Sequence[Part], roles: dict[str, Role], out: list[str]) -> None:
        for part in parts:
            if type(part) is str:
                out.append(part)
            elif type(part) is Slot:
                out.append(self._slot(part.role, roles[part.role], part.form))
            elif type(part) is tuple:
                out.append(pick(self.rng, part))
            elif type(part) is Choice:
                self._fill(even(self.rng, part.options), roles, out)

    def _slot(self, role: str, value: Role, form: str) -> str:
        if isinstance(value, Being):
            text = self._being(value, form)
            if value.name in text:
                self.words[role] = value.name
            return text
        if isinstance(value, Thing):
            text = self._thing(value, form)
        elif isinstance(value, Place):
            text = self._place(value, form)
        else:
            text = _capitalised(value) if form == "cap" else value
        if form in ("the", "The"):
            self.words[f"the {role}"] = text
        elif form not in ("it", "glint", "my", "My", "your"):  # in speech it is another's "my"
            self.words[role] = text
        return text

    # ── who ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _clear(self, who: Being) -> bool:
        """Whether a pronoun would be understood as this being."""
        rivals = self.here if who in self.here else self.here + self.before
        if any(other is not who and other.he == who.he for other in rivals):
            return False
        return who in self.here or who is self.subject

    def _being(self, who: Being, form: str) -> str:
        if form in ("kind", "trait", "tie"):
            return {"kind": who.kind, "trait": who.trait, "tie": who.tie}[form]
        clear = self._clear(who)
        if form in ("he", "him", "his", "himself") and (clear or (form == "his" and who is self.first)):
            if form == "he":
                return who.he
            return HIS[who.he] if form == "his" else HIM[who.he] + ("self" if form == "himself" else "")
        if form == "titled":
            self.known[who] = True
            return f"{who.name} the {who.kind}" if who.kind not in ("girl", "boy") else who.name
        if form == "" and clear and not self.here and self.rng.random() < 0.5:
            text = who.he
        elif form == "full":
            text = self._introduction(who, in_full=True)
        elif form in ("", "n") and who not in self.known:
            text = self._introduction(who)
        elif form == "his":
            text = f"{who.name}'s"
        else:
            text = who.name
        self.known[who] = True
        if who not in self.here:
            self.here.append(who)
        if self.first is None and form in ("", "n", "full"):
            self.first = who
        return text

    def _introduction(self, who: Being, in_full: bool = False) -> str:
        hero = self.hero
        if not in_full and who.tie and hero is not None and who is not hero:
            whose = HIS[hero.he] if hero in self.here and self._clear(hero) else f"{hero.name}'s"
            if hero not in self.here:
                self.here.append(hero)
            return f"{whose} {who.tie} {who.name}"
        kind = f"{who.trait} {who.kind}" if who.trait and self.rng.random() < 0.7 else who.kind
        return f"{with_article(kind)} {'called' if self.rng.random() < 0.3 else 'named'} {who.name}"

    # ── what and where ────────────────────────────────────────────────────────────────────────────────────────────

    def described(self, thing: Thing, much: float) -> str:
        """The thing's noun with all, one or none of its attributes; `much` from 0 to 1."""
        look = self.world.look.get(thing, "")
        full = " ".join(word for word in (thing.size, look, thing.noun) if word)
        if much > 0.9:
            return full
        if much > 0.5:
            return f"{look or thing.size} {thing.noun}"
        return thing.noun

    def _thing(self, thing: Thing, form: str) -> str:
        new = thing not in self.known
        if form == "noun":
            return thing.noun
        if form == "glint":
            look = self.world.look.get(thing, "")
            if look in METAL:
                return "shiny"
            return "soft" if look in CLOTH else look if look in COLOURS else "strange"
        if form == "it":
            return "it"
        self.known[thing] = True
        much = 1.0 if new or form == "a" else self.rng.random()
        words = self.described(thing, much)
        if form in ("my", "My") and self.world.owner.get(thing) not in (None, self.speaker):
            form = "the" if form == "my" else "The"  # only borrowed
        if form in ("my", "your", "My", "The", "the"):
            return f"{form} {words}"
        if form == "a":
            return with_article(words)
        owner = self.world.owner.get(thing)
        if owner is not None and owner is self.first and self._clear(owner) and self.rng.random() < 0.4:
            return f"{HIS[owner.he]} {words}"
        if new and owner is not None and owner in self.known and owner not in self.here:
            return f"{owner.name}'s {words}"
        return with_article(words) if new else f"the {words}"

    def _place(self, place: Place, form: str) -> str:
        new = place not in self.known
        self.known[place] = True
        noun = f"{place.look} {place.noun}" if new or self.rng.random() < 0.2 else place.noun
        if form in ("the", "The"):
            return f"{form} {noun}"
        return f"{'to' if form == 'to' else place.preposition} the {noun}"


def _capitalised(text: str) -> str:
    """The text with its first letter large, also after a quotation mark."""
    at = 1 if text[0] == '"' else 0
    return text[:at] + text[at].upper() + text[at + 1 :]
