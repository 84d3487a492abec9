"""The state of a small world: who is where, who holds what, and what is broken, wet, hungry or afraid."""

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False, slots=True)
class Being:
    """A person or an animal; two are the same only if they are one object."""

    name: str
    kind: str  # "girl", "baker", "fox"
    he: str  # "he" or "she"
    speaks: bool = True
    trait: str = ""
    tie: str = ""  # what it is to the main character: "brother", "friend", "dog"; empty for strangers


@dataclass(frozen=True, eq=False, slots=True)
class Thing:
    """Something that can be held; its colour or material stands in the world, because paint changes it."""

    noun: str
    size: str
    treat: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    noun: str
    preposition: str
    sort: str  # "house", "green", "wild", "water" or "town": which spots and doings it has
    look: str


Entity = Being | Thing | Place
Role = Entity | str


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: its kind, and who or what played which part.

    A, B and C are beings, T and U things, P is a place; the other letters are words.
    """

    kind: str
    roles: dict[str, Role]


@dataclass(slots=True)
class World:
    """Everything that is true now, and the log of what made it so."""

    at: dict[Being, Place] = field(default_factory=dict)
    holder: dict[Thing, Being] = field(default_factory=dict)
    lies: dict[Thing, Place] = field(default_factory=dict)
    owner: dict[Thing, Being] = field(default_factory=dict)
    look: dict[Thing, str] = field(default_factory=dict)  # colour or material
    states: dict[Entity, dict[str, bool]] = field(default_factory=dict)
    log: list[Event] = field(default_factory=list)

    def is_(self, who: Entity, state: str) -> bool:
        return self.states.get(who, {}).get(state, False)


class Impossible(Exception):
    """A plot asked for an event whose conditions do not hold."""


# A condition or an effect: three words, as "A has T". Roles stand for what plays them.
Clause = tuple[str, str, str]


def holds(world: World, clause: Clause, roles: dict[str, Role]) -> bool:
    """Whether a condition is true now."""
    left, verb, right = clause
    subject = roles[left]
    match verb, subject:
        case "has", Being():
            thing = roles[right]
            return isinstance(thing, Thing) and world.holder.get(thing) is subject
        case "near", Being():
            other = roles[right]
            place = world.at.get(subject)
            return place is not None and isinstance(other, Being) and world.at.get(other) is place
        case "by", Being():  # the thing lies where the being is
            thing = roles[right]
            place = world.at.get(subject)
            return place is not None and isinstance(thing, Thing) and world.lies.get(thing) is place
        case "at", Being():
            return world.at.get(subject) is roles[right]
        case "can", Being():
            return subject.speaks
        case "is", Being() | Thing():
            return world.is_(subject, right)
        case "not", Being() | Thing():
            return not world.is_(subject, right)
    raise ValueError(f"no condition: {clause}")


def change(world: World, clause: Clause, roles: dict[str, Role]) -> None:
    """Make an effect true."""
    left, verb, right = clause
    subject = roles[left]
    match verb, subject, roles.get(right, right):
        case "at", Being(), Place() as place:
            world.at[subject] = place
        case "joins", Being(), Being() as other:
            world.at[subject] = world.at[other]
        case "leaves", Being(), _:
            world.at.pop(subject, None)
        case "has", Being(), Thing() as thing:
            world.lies.pop(thing, None)
            world.holder[thing] = subject
        case "owns", Being(), Thing() as thing:
            world.owner[thing] = subject
        case "drops", Being(), Thing() as thing:
            world.holder.pop(thing, None)
            world.lies[thing] = world.at[subject]
        case "lies", Thing(), Place() as place:
            world.holder.pop(subject, None)
            world.lies[subject] = place
        case "gone", Thing(), _:
            world.holder.pop(subject, None)
            world.lies.pop(subject, None)
        case "looks", Thing(), str(look):
            world.look[subject] = look
        case "is", (Being() | Thing()), str(state):
            world.states.setdefault(subject, {})[state] = True
        case "not", (Being() | Thing()), str(state):
            world.states.setdefault(subject, {})[state] = False
        case _:
            raise ValueError(f"no effect: {clause}")
