"""What can happen: for every kind of event its conditions and effects, as sentences of three words over its roles.

Conditions: "A has T", "A near B" (same place), "A by T" (T lies where A is), "A at P", "A can speak", "T is broken",
"T not broken". Effects: "A at P", "A joins B", "A leaves –", "A has T", "A owns T", "A drops T", "T lies P",
"T gone –", "T looks X", "T is broken", "T not broken".
"""

from dataclasses import dataclass

from leanseek.data.storyworld.world import Clause, Event, Impossible, Role, World, change, holds


@dataclass(frozen=True, slots=True)
class Kind:
    needs: tuple[Clause, ...]
    makes: tuple[Clause, ...]


def _clauses(text: str) -> tuple[Clause, ...]:
    parts = (part.split() for part in text.split(",") if part.strip())
    return tuple((left, verb, right) for left, verb, right in parts)


def _kinds(table: dict[str, str]) -> dict[str, Kind]:
    halves = {name: row.partition("->") for name, row in table.items()}
    return {name: Kind(_clauses(needs), _clauses(makes)) for name, (needs, _, makes) in halves.items()}


KINDS = _kinds(
    {
        # set-up, never told
        "place": "-> A at P",
        "hand": "-> A has T, A owns T",
        "lay": "-> T lies P",
        # who and where
        "live": "A at P",
        "know": "",
        "scene": "A at P",
        "own": "A has T",
        "prize": "A has T",
        "want": "",
        "plan": "",
        "aside": "",
        # moving
        "go": "A not stuck -> A at P",
        "go_with": "A near B, A not stuck, B not stuck -> A at P, B at P",
        "home": "A not stuck -> A at P",
        "home_with": "A near B -> A at P, B at P",
        "come_by": "B not stuck -> B joins A",
        "visit": "A not stuck -> A joins B",
        "meet": "A not stuck -> A joins B",
        "leave": "A not stuck -> A leaves –",
        "wander_off": "C not stuck -> C leaves –",
        "follow_tracks": "-> A at P",
        "cross": "A not stuck -> A at P, A is wet",
        "climb_hill": "A not stuck -> A at P",
        "ride": "A not stuck -> A at P",
        "show_way": "A near B, B can speak -> A at P",
        # losing and finding
        "lose": "A has T -> A drops T, T is lost",
        "snatched": "A has T -> T lies P, T is lost",
        "miss": "T is lost -> A is sad",
        "dismay": "T is lost -> A is sad",
        "look_for": "T is lost -> A at P",
        "look_together": "T is lost, A near B -> A at P, B at P",
        "find": "A by T, T is lost -> A has T, T not lost, A not sad",
        "spot": "A by T -> A has T",
        "ask_seen": "A near B, A can speak, B can speak, T is lost",
        "not_seen": "A near B, B can speak",
        "tell_where": "A near B, B can speak, T is lost",
        "remember_where": "T is lost",
        "hide": "A has T -> T lies P, T is lost",
        "whose": "A has T, A can speak, A near B, B can speak",
        "hand_back": "A has T, A near B -> B has T, B not sad",
        # giving and lending
        "give": "A has T, A near B -> B has T, B owns T",
        "lend": "A has T, A near B, T not broken -> B has T",
        "ask_lend": "A near B, B has T, A can speak, B can speak",
        "return": "A has T, A near B, T not broken, T not dirty -> B has T",
        "trade": "A has T, B has U, A near B -> A has U, B has T, A owns U, B owns T",
        "offer_trade": "A has T, B has U, A near B, A can speak, B can speak",
        "take_unasked": "B has T -> A has T",
        "wrap": "A has T, T not broken",
        "keep_safe": "A has T",
        "deliver": "A has T, A near B -> B has T, B owns T",
        # breaking and mending
        "break": "A has T, T not broken -> T is broken",
        "wind_breaks": "A has T, T not broken -> T is broken",
        "try_mend": "A has T, T is broken",
        "mend": "A has T, T is broken -> T not broken",
        "mend_for": "A near B, B has T, T is broken -> T not broken",
        "mend_together": "A near B, A has T, T is broken -> T not broken",
        "use": "A has T, T not broken",
        "soil": "A has T, T not dirty -> T is dirty",
        "wash": "A has T, T is dirty -> T not dirty",
        "paint": "A has T -> T looks X",
        "spill": "A has T -> T not full",
        "fill": "A has T -> T is full",
        "mop_up": "",
        "fence_breaks": "",
        "mend_fence": "A near B",
        "build": "A near B",
        "gather": "",
        "make": "-> A has T, A owns T",
        # food
        "hunger": "-> A is hungry",
        "pick": "A at P",
        "cook": "",
        "share_food": "A near B -> A not hungry, B not hungry",
        "share_snack": "A near B -> A not hungry",
        "eat": "-> A not hungry",
        "feed": "A near C -> C not hungry",
        "greedy": "A near B",
        "drink": "A near B",
        "bake_treat": "-> A has T, A owns T",
        "eat_treat": "A has T, A near B -> T gone –, A not hungry, B not hungry",
        # talking
        "ask_help": "A near B, A can speak, B can speak",
        "agree": "A near B, B can speak",
        "refuse": "A near B, B can speak",
        "thank": "A near B, A can speak",
        "praise": "A near B, B can speak",
        "ask_wrong": "A near B, A can speak, B can speak",
        "explain": "A near B, A can speak",
        "comfort": "A near B, B can speak",
        "advise": "A near B, B can speak",
        "warn": "A near B, B can speak",
        "sorry": "A near B, A can speak",
        "forgive": "A near B, B can speak",
        "confess": "A near B, A can speak",
        "quarrel": "A near B, A can speak, B can speak -> A is cross, B is cross",
        "make_up": "A near B -> A not cross, B not cross",
        "promise": "A near B, A can speak -> A is bound",
        "forget": "A is bound",
        "recall": "A is bound",
        "keep_promise": "A is bound -> A not bound",
        "boast": "A near B, A can speak",
        "tease": "A near B, A can speak",
        "dare": "A near B, A can speak, B can speak",
        "tell_tale": "A near B, A can speak",
        "invite": "A near B, A can speak, B can speak",
        "teach": "A near B, B can speak",
        "practise": "",
        "manage": "",
        # weather, body and mind
        "rain": "-> A is wet",
        "shelter": "A is wet",
        "fire": "A is wet -> A not wet",
        "wind_takes": "A has T -> T lies P, T is lost",
        "tired": "-> A is tired",
        "rest": "A is tired -> A not tired",
        "fall": "-> A is hurt",
        "bandage": "A near B, A is hurt -> A not hurt",
        "sick": "-> B is sick",
        "well": "B is sick -> B not sick",
        "fear": "-> A is afraid",
        "brave": "A is afraid -> A not afraid",
        "take_hand": "A near B",
        "sing": "",
        "play": "A near B",
        # animals
        "hear_cry": "C is stuck",
        "stuck": "-> C is stuck",
        "rescue": "A near C, C is stuck -> C not stuck",
        "fetch_tool": "A by T -> A has T",
        "reach": "A has T, C is stuck",
        "call_pet": "",
        "find_pet": "-> A at P, C at P",
        "lead_back": "A near C -> A at P, C at P",
        "nuzzle": "A near C",
        # growing, racing, passing time
        "plant": "A at P",
        "tend": "A at P",
        "sprout": "",
        "harvest": "A at P",
        "race_start": "A near B",
        "race_lead": "A near B",
        "race_nap": "",
        "race_win": "A near B",
        "time": "",
        "end_glad": "",
        "end_home": "",
        "end_thought": "",
        "end_friends": "A near B",
        "end_thing": "A has T, T not broken",
        "end_pet": "",
        # what others lead to: how it looks, feels or goes on
        "know_kin": "",
        "scene_with": "A at P, B at P",
        "not_mine": "A near B, B can speak",
        "see_damage": "A has T, T is broken -> A is sad",
        "works_again": "T not broken -> A not sad",
        "dry": "A has T, T not dirty",
        "build_fails": "",
        "build_done": "A near B",
        "nothing_left": "",
        "ache": "-> A is ill",
        "apart": "",
        "take_turns": "A near B, A can speak, B can speak",
        "freeze": "A is afraid",
        "doubt": "",
        "race_plod": "A near B",
        "paint_it": "A near B",
        "see_paint": "A has T, T not broken",
        "fill_again": "A has T, A near B, T not broken -> T is full",
        "send": "B has T, A near B, B can speak -> A has T",
        "ask_way": "A near B, A can speak, B can speak",
    }
)
SILENT = ("place", "hand", "lay")  # what sets the stage and is not told


def require(world: World, kind: str, roles: dict[str, Role]) -> None:
    """Raises Impossible when a condition of the event does not hold."""
    for clause in KINDS[kind].needs:
        if not holds(world, clause, roles):
            raise Impossible(f"{kind}: {' '.join(clause)}")


def happen(world: World, kind: str, roles: dict[str, Role]) -> None:
    """Let an event happen: its effects become true and the log grows. Raises Impossible when it cannot happen."""
    require(world, kind, roles)
    for clause in KINDS[kind].makes:
        change(world, clause, roles)
    world.log.append(Event(kind, roles))
