"""The stage of one story: draws its people, things and places from the lexicon, and lets events happen and be told."""

import random
from dataclasses import dataclass, field

from leanseek.data.storyworld import words
from leanseek.data.storyworld.events import SILENT, happen, require
from leanseek.data.storyworld.narrate import Narrator
from leanseek.data.storyworld.words import even, pick
from leanseek.data.storyworld.world import Being, Place, Role, Thing, World


@dataclass(slots=True)
class Stage:
    """One story while it is being made."""

    rng: random.Random
    world: World
    narrator: Narrator
    fable: bool  # the animals speak, and there are no people
    wanted: int  # about how many sentences it should have
    season: str
    weather: str
    time: str
    taken: list[str] = field(default_factory=list)  # names, nouns and kinds that are in use
    lesson: str = "help"  # what it all comes to
    theme: str = ""  # "who lost a silver key", for the request

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────────────

    def do(self, kind: str, link: str = "", **roles: Role) -> None:
        """Let an event happen and tell it. Sentences speak of the world as it was just before."""
        roles.setdefault("K", self.sky())
        roles |= {"D": self.time, "Z": self.season} | roles
        roles.setdefault("L", even(self.rng, words.LESSONS[self.lesson]))
        require(self.world, kind, roles)
        if kind not in SILENT:
            self.narrator.tell(kind, roles, link)
        happen(self.world, kind, roles)

    def done(self, kind: str) -> bool:
        return any(event.kind == kind for event in self.world.log)

    def room(self) -> int:
        """How many more sentences the story may have."""
        return self.wanted - len(self.narrator.told)

    def maybe(self, share: float) -> bool:
        """Whether an optional step happens: less often in a short story."""
        return self.rng.random() < share * (1.0 if self.wanted > 14 else 0.7 if self.wanted > 10 else 0.15)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    # ── who ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def person(self, tie: str = "", kind: str = "", trait: bool = False, at: Place | None = None) -> Being:
        """Somebody new who can speak: a person, or an animal of a fable."""
        hero = self.narrator.hero
        she = self.chance(0.5)
        if hero is not None and self.chance(0.8):  # mostly the other sex, so that pronouns stay clear
            she = hero.he == "he"
        if tie in ("kin", "peer"):  # of any age, or of the main character's
            kin = words.SHE_KIN if she else words.HE_KIN
            tie = pick(self.rng, kin[:2] if tie == "peer" else kin)
            tie = "neighbour" if self.fable and tie in ("grandmother", "grandfather") and self.chance(0.5) else tie
        if self.fable:
            names = words.PET_NAMES if self.chance(0.5) else words.SHE_NAMES if she else words.HE_NAMES
            kind = self._fresh(words.FABLE_KINDS)
        else:
            names = words.SHE_NAMES if she else words.HE_NAMES
            if not kind:
                grown = hero is not None and tie not in ("friend",)
                kind = self._fresh(words.JOBS) if grown else ("girl" if she else "boy")
        being = Being(
            self._fresh(names),
            kind,
            "she" if she else "he",
            True,
            pick(self.rng, words.TRAITS),
            tie,
        )
        if at is not None:
            self.do("place", A=being, P=at)
        return being

    def hero_at(self, home: Place) -> Being:
        being = self.person(trait=True, at=home)
        self.narrator.hero = being
        return being

    def pet(self, at: Place, kinds: tuple[str, ...] = words.PET_KINDS) -> Being:
        """An animal that does not speak; in a fable it is a baby animal that is too young to."""
        if self.fable:
            kind = self._fresh(("duckling", "chick", "fawn", "gosling", "cub", "fledgling"))
        else:
            kind = self._fresh(kinds)
        he = "she" if kind in ("hen", "calf") or self.chance(0.5) else "he"
        tie = "baby" if self.fable else kind
        being = Being(self._fresh(words.PET_NAMES), kind, he, False, "", "" if self.fable else tie)
        self.do("place", A=being, P=at)
        return being

    def a(self, thing: Thing) -> str:
        """The thing in full: "a small red kite"."""
        return words.with_article(self.narrator.described(thing, 1.0))

    # ── what and where ────────────────────────────────────────────────────────────────────────────────────────────

    def thing(self, family: dict[str, str], owner: Being | None = None, at: Place | None = None) -> Thing:
        """A new thing of the family, in its owner's hands or lying at a place."""
        noun = self._fresh(tuple(family))
        matter = family[noun]
        rng = self.rng
        if matter == "food":
            thing, look = Thing(noun, even(rng, words.TREAT_SIZES), True), ""
        else:
            made_of = words.MATERIALS.get(matter, ())
            plain = not made_of or self.chance(0.3 if matter in ("metal", "wood") else 0.65)
            look = pick(rng, words.COLOURS if plain else made_of)
            thing = Thing(noun, pick(rng, words.SIZES))
        self.world.look[thing] = look
        if owner is not None:
            self.do("hand", A=owner, T=thing)
        if at is not None:
            self.do("lay", T=thing, P=at)
        return thing

    def place(self, *sorts: str) -> Place:
        """A new place, of one of the sorts when any are named."""
        towns = ("town",) if self.fable else ()
        nouns = tuple(
            noun
            for noun, (_, sort) in words.PLACES.items()
            if (not sorts or sort in sorts)
            and noun not in self.taken
            and (sort not in towns or noun in words.FABLE_HOMES)
        )
        return self._place(pick(self.rng, nouns))

    def home(self, with_yard: bool = False) -> Place:
        homes = words.YARDS if with_yard else words.HUMAN_HOMES
        return self._place(even(self.rng, words.FABLE_HOMES if self.fable else homes))

    def _place(self, noun: str) -> Place:
        self.taken.append(noun)
        preposition, sort = words.PLACES.get(noun, ("in", "town"))
        return Place(noun, preposition, sort, pick(self.rng, words.PLACE_LOOKS[sort]))

    def spot(self, place: Place) -> str:
        return self._fresh(words.SPOTS[place.sort])

    def doing(self, place: Place) -> str:
        """What one may be doing there at this time of the year."""
        doings: tuple[str, ...] = words.FABLE_DOINGS
        if not self.fable:
            doings = words.DOINGS[place.sort]
        elif place.sort in ("wild", "water"):
            doings = words.DOINGS[place.sort] + doings
        out: tuple[str, ...] = words.SUMMERY if self.season == "winter" else ()
        out += words.SUNNY if words.SKIES[self.weather] is not words.BRIGHT_SKY else ()
        doings = tuple(doing for doing in doings if not any(word in doing for word in out))
        return self._fresh(doings)

    def sky(self) -> str:
        return even(self.rng, words.SKIES[self.weather] if self.chance(0.7) else words.ANY_SKY)

    def not_in_winter(self) -> None:
        """Things must be growing."""
        if self.season == "winter":
            self.season = "autumn"
            self.weather = even(self.rng, tuple(w for w in words.WEATHER if w not in ("snowy", "frosty", "hot")))

    def word(self, name: str) -> str:
        return pick(self.rng, words.LISTS[name])

    def fresh(self, items: tuple[str, ...]) -> str:
        return self._fresh(items)

    def _fresh(self, items: tuple[str, ...]) -> str:
        """One that the story does not use yet, early ones more often."""
        for _ in range(20):
            item = pick(self.rng, items)
            if item not in self.taken:
                break
        self.taken.append(item)
        return item


def stage(rng: random.Random) -> Stage:
    """An empty stage with its season, weather and length."""
    season = even(rng, tuple(words.SEASONS))
    weather = even(rng, tuple(w for w in words.WEATHER if w not in words.SEASONS[season]))
    r = rng.random()
    wanted = (
        6 + int(5 * rng.random()) if r < 0.6 else 11 + int(5 * rng.random()) if r < 0.87 else 15 + int(9 * rng.random())
    )
    world = World()
    return Stage(rng, world, Narrator(rng, world), rng.random() < 0.38, wanted, season, weather, pick(rng, words.TIMES))
