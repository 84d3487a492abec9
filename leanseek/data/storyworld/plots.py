"""The plots: what somebody wants or what goes wrong, and the events that lead from there to an ending.

A plot is a function of a stage. It draws its cast, lets events happen one after another, and leaves a theme for the
request. What is optional happens while the story has room.
"""

from leanseek.data.storyworld import words
from leanseek.data.storyworld.cast import Stage
from leanseek.data.storyworld.words import even, pick
from leanseek.data.storyworld.world import Being, Place, Role, Thing

# ── pieces that plots share ───────────────────────────────────────────────────────────────────────────────────────


def begin(t: Stage, where: Place | None = None) -> tuple[Being, Place]:
    """Who and where; then, one day, what the main character was doing."""
    home = where or t.home()
    hero = t.hero_at(home)
    if t.maybe(0.75):
        t.do("live", A=hero, P=home)
    return hero, home


def scene(t: Stage, hero: Being, place: Place, other: Being | None = None) -> None:
    """The day the story begins; the main character is at the place."""
    if t.world.at[hero] is not place:
        t.do("place", A=hero, P=place)
    when = {"W": t.weather, "D": t.time, "Z": t.season, "X": t.doing(place)}
    if other is None:
        t.do("scene", A=hero, P=place, **when)
    else:
        t.do("place", A=other, P=place)
        t.do("scene_with", A=hero, B=other, P=place, **when)


def friend_of(t: Stage, hero: Being, at: Place, peer: bool = False) -> Being:
    """Somebody close, whom the reader meets now; a peer is about as old as the main character."""
    if t.chance(0.5):
        friend = t.person("friend", at=at)
        if t.maybe(0.6):
            t.do("know", A=hero, B=friend)
    else:
        friend = t.person("peer" if peer else "kin", trait=True, at=at)
        if t.maybe(0.6):
            t.do("know_kin", A=hero, B=friend)
    return friend


def owned(t: Stage, hero: Being, family: dict[str, str]) -> Thing:
    """Something that the main character has and loves."""
    thing = t.thing(family, hero)
    if t.maybe(0.9):
        t.do("own", A=hero, T=thing)
    if t.done("own") and t.maybe(0.45):
        giver = pick(t.rng, words.SHE_KIN if t.chance(0.5) else words.HE_KIN)
        t.do("prize", A=hero, T=thing, X=f"{even(t.rng, ('an old', 'a dear', 'a distant', 'a kind'))} {giver}")
    return thing


def pause(t: Stage, hero: Being, other: Being | None = None) -> None:
    """Something small on the way that changes nothing of the rest."""
    here = t.world.at[hero]
    if t.room() < 4 or not t.maybe(0.75):
        return
    which = int(t.rng.random() * 10)
    if which <= 2:
        t.do("aside", A=hero)
    elif which == 3 and t.weather not in ("snowy", "frosty", "rainy") and not t.done("rain"):
        t.do("rain", A=hero, P=here)
        if t.maybe(0.5):
            t.do("shelter", A=hero, S=t.spot(here))
        t.do(
            "fire",
            A=hero,
            X=t.fresh(("dry branches", "old wood", "pine cones", "straw and sticks", "birch bark", "logs")),
        )
    elif which == 4 and not t.done("hunger"):
        t.do("hunger", A=hero, X=t.fresh(words.SNACKS))
        if other is not None:
            t.do("share_snack", A=hero, B=other, X=t.fresh(words.SNACKS))
        else:
            t.do("eat", A=hero, X=t.fresh(words.SNACKS))
    elif which == 5 and not t.done("tired"):
        spot = t.spot(here)
        t.do("tired", A=hero, S=spot)
        t.do("rest", A=hero, S=t.spot(here))
    elif which == 6 and other is not None:
        t.do("tell_tale", A=hero, B=other)
    elif which == 7 and other is not None:
        t.do("drink", A=hero, B=other)
    elif which in (6, 7) and not t.done("time"):
        t.do("time", A=hero)
    elif which == 8 and not t.done("sing"):
        t.do("sing", A=hero)
    elif which == 9 and other is not None and not t.done("fall"):
        hurt = t.fresh(("knee", "elbow", "foot", "chin", "ankle", "toe", "nose"))
        t.do("fall", A=hero, Y=t.fresh(TRIPS), X=hurt)
        t.do("bandage", A=hero, B=other, X=hurt, Y=t.fresh(("some honey", "cold water", "a wet leaf", "some ointment")))
    else:
        t.do("aside", A=hero)


TRIPS = ("a root", "a stone", "a stool", "a bucket", "the doorstep", "a sleeping cat", "a log", "a rake",
         "a heap of wood",
         "an old boot", "a turnip", "a basket", "a molehill", "the edge of a rug", "a rolling ball")  # fmt: skip
PUDDLES = ("the mud", "a puddle", "a ditch", "a heap of soot", "wet paint", "the swamp", "a pot of jam", "the ashes",
           "a bowl of soup", "a muddy pond")  # fmt: skip
SOAPS = (
    "soap",
    "hot water",
    "cold water",
    "sand and water",
    "soapy water",
    "lemon juice",
    "ashes and water",
    "rain water",
)
SAFE = ("in a wooden chest", "on a high shelf", "in a small box", "behind the clock", "in a deep drawer",
        "on a strong hook",
        "in an old tin", "under the pillow", "beside the lamp", "in a glass jar")  # fmt: skip
SMALL_GIFTS = ("a bunch of flowers", "an apple", "a jar of honey", "a warm bun", "a smooth pebble", "some nuts",
               "a basket of eggs", "a kiss", "a drawing", "a pot of jam", "a bag of plums", "a slice of cake",
               "a shiny shell", "two candles", "a ribbon", "a daisy chain")  # fmt: skip


def walk(t: Stage, hero: Being, place: Place) -> None:
    """Go there; a short story leaves the way out."""
    if t.maybe(1.2):
        t.do("go", "so" if t.chance(0.4) else "", A=hero, P=place)
    else:
        t.do("place", A=hero, P=place)


def visit(t: Stage, hero: Being, other: Being) -> None:
    """Go to somebody; a short story leaves the way out."""
    if t.maybe(1.2):
        t.do("visit", "so" if t.chance(0.3) else "", A=hero, B=other)
    else:
        t.do("place", A=hero, P=t.world.at[other])


def thanks(t: Stage, hero: Being, other: Being) -> None:
    t.do("thank", A=hero, B=other, X=t.fresh(SMALL_GIFTS))


def finish(t: Stage, hero: Being, other: Being | None = None, thing: Thing | None = None) -> None:
    """A feeling, and perhaps a small thought."""
    world = t.world
    feeling = t.word("glad")
    ways = ["end_glad", "end_glad"]
    with_other = other is not None and world.at.get(other) is world.at[hero]
    if with_other and other is not None and other.speaks:
        ways += ["end_friends", "end_friends"]
    put_away = t.done("keep_safe")
    if (
        thing is not None
        and not put_away
        and world.holder.get(thing) is hero
        and not world.is_(thing, "broken")
        and other is not None
    ):
        ways += ["end_thing", "end_thing"]
    first = even(t.rng, ways)
    roles: dict[str, Role] = {"A": hero, "F": feeling, "P": world.at[hero]}
    if other is not None:
        roles["B"] = other
    if thing is not None:
        roles["T"] = thing
    t.do(first, "", **roles)
    if t.room() > 0 or t.chance(0.5):
        last = even(t.rng, ("end_thought", "end_thought", "end_home"))
        if first != last:
            t.do(last, A=hero, B=other or hero)


def helper(t: Stage, hero: Being, friend: Being | None, task: str, trouble: bool = True) -> Being:
    """Somebody comes, or is asked, and agrees to help; in a long story somebody else refuses first."""
    here = t.world.at[hero]
    if friend is None and t.room() > 7 and t.chance(0.4):
        other = t.person(at=here)
        t.do("come_by", A=hero, B=other)
        t.do("ask_help", A=hero, B=other, X=task)
        t.do("refuse", "but", A=hero, B=other, X=t.fresh(words.CHORES))
    if friend is None:
        friend = t.person("friend" if t.chance(0.3) else "", at=here)
        t.do("come_by", "luck", A=hero, B=friend)
    elif t.world.at.get(friend) is not here:
        t.do("visit", A=hero, B=friend)
    if trouble and t.maybe(0.5):
        t.do("ask_wrong", A=hero, B=friend, F=t.word("sad"))
        if t.maybe(0.3):
            t.do("comfort", A=hero, B=friend)
    t.do("ask_help", A=hero, B=friend, X=task)
    if t.maybe(0.7):
        t.do("agree", A=hero, B=friend)
    return friend


# ── the plots ─────────────────────────────────────────────────────────────────────────────────────────────────────


# what the wind can carry
LIGHT = {**words.WEAR, "feather": "", "letter": "", "card": "", "picture": "", "map": "", "ball": "", "parcel": ""}


def lost_thing(t: Stage) -> None:
    """Lost, missed, searched for in wrong places, found where it was."""
    t.lesson = "search"
    hero, home = begin(t)
    friend = friend_of(t, hero, home) if t.chance(0.5) else None
    thing = owned(t, hero, words.LOSABLE)
    lost_at = t.place()
    spot = t.spot(lost_at)
    t.theme = f"who lost {t.a(thing)}"
    scene(t, hero, lost_at)
    how = t.rng.random()
    if how < 0.6:
        t.do("lose", A=hero, T=thing, P=lost_at)
        t.do("home" if t.maybe(0.5) else "place", A=hero, P=home)
    elif how < 0.8 and thing.noun in LIGHT:
        lost_at = t.place("wild", "water", "green")
        spot = t.spot(lost_at)
        t.do("wind_takes", A=hero, T=thing, P=lost_at)
    else:
        lost_at = t.place("wild", "house")
        spot = t.spot(lost_at)
        thief, came = even(t.rng, (("a magpie", "down from the sky"), ("a jackdaw", "out of a tree"), ("a goat",
                           "along"),
                                   ("a monkey", "over the wall"), ("a raven", "down from a roof")))  # fmt: skip
        t.do("snatched", A=hero, T=thing, P=lost_at, X=thief, V=came)
    seen = not t.done("lose")
    t.do("dismay" if seen else "miss", A=hero, T=thing, F=t.word("sad"))
    t.narrator.paragraph()
    pause(t, hero)
    searches = 0
    while not seen and searches < 2 and t.room() > 6 and t.chance(0.65):
        wrong = t.place()
        t.do("look_for", A=hero, T=thing, P=wrong, S=t.spot(wrong))
        searches += 1
    if seen:  # where it went, so there is nothing to ask but company
        if friend is not None and t.world.at[friend] is not t.world.at[hero]:
            t.do("visit", A=hero, B=friend)
    elif friend is not None and t.chance(0.8):
        if t.world.at[friend] is not t.world.at[hero]:
            t.do("visit", A=hero, B=friend)
        t.do("ask_seen", A=hero, B=friend, T=thing)
        t.do("tell_where", A=hero, B=friend, T=thing, P=lost_at)
    elif t.chance(0.6):
        friend = t.person(at=t.world.at[hero])
        t.do("come_by", A=hero, B=friend)
        t.do("ask_seen", A=hero, B=friend, T=thing)
        if t.room() > 5 and t.chance(0.5):
            t.do("not_seen", "but", A=hero, B=friend)
            t.do("remember_where", A=hero, T=thing, P=lost_at)
        else:
            t.do("tell_where", A=hero, B=friend, T=thing, P=lost_at)
    else:
        t.do("remember_where", A=hero, T=thing, P=lost_at)
    together = friend is not None and t.world.at[friend] is t.world.at[hero] and t.chance(0.5)
    if together and friend is not None:
        t.do("go_with", A=hero, B=friend, P=lost_at)
    else:
        t.do("go", "so", A=hero, P=lost_at)
    pause(t, hero, friend if together else None)
    t.do("find", "last" if t.chance(0.4) else "", A=hero, T=thing, S=spot)
    if friend is not None and t.chance(0.6):
        if t.world.at.get(friend) is not t.world.at[hero]:
            t.do("visit", A=hero, B=friend)
        thanks(t, hero, friend)
    if t.maybe(0.25):
        t.do("keep_safe", A=hero, T=thing, S=t.fresh(SAFE))
    finish(t, hero, friend, thing)


def broken_thing(t: Stage) -> None:
    """Broken, tried in vain, mended with help."""
    t.lesson = "care"
    hero, home = begin(t)
    thing = owned(t, hero, words.BREAKABLE)
    here = t.place() if t.chance(0.5) else home
    t.theme = f"whose {thing.noun} broke" if t.chance(0.5) else f"with a broken {thing.noun}"
    scene(t, hero, here)
    t.do("wind_breaks" if t.weather in ("windy", "stormy") else "break", A=hero, T=thing, Y=t.fresh(TRIPS))
    t.do("see_damage", A=hero, T=thing, F=t.word("sad"))
    t.narrator.paragraph()
    if t.maybe(0.5):
        t.do("try_mend", A=hero, T=thing, X=t.fresh(words.GLUES))
    pause(t, hero)
    glue = t.fresh(words.GLUES)
    way = t.rng.random()
    if way < 0.4 and not t.fable:
        mender = t.person(kind=t.fresh(words.MENDERS), at=t.place("town", "house"))
        t.do("visit", A=hero, B=mender)
        if t.maybe(0.6):
            t.do("ask_help", A=hero, B=mender, X=f"mend the {thing.noun}")
        t.do("mend_for", A=mender, B=hero, T=thing, X=glue)
    elif way < 0.85:
        mender = helper(t, hero, None, f"mend the {thing.noun}")
        t.do("mend_together", A=hero, B=mender, T=thing, X=glue)
    else:
        mender = None
        t.do("mend", A=hero, T=thing, X=glue)
    if t.maybe(1.0):
        t.do("works_again", A=hero, T=thing, F=t.word("glad"))
    if mender is not None and t.maybe(1.2):
        thanks(t, hero, mender)
    finish(t, hero, mender, thing)


def hungry_guest(t: Stage) -> None:
    """Somebody is hungry; food is found, cooked and shared."""
    t.lesson = "share"
    t.not_in_winter()
    hero, home = begin(t)
    scene(t, hero, home)
    dish, with_ = t.fresh(words.DISHES), t.fresh(words.FOODS)
    t.theme = f"who cooked {dish}"
    t.do("hunger", A=hero, X=t.fresh(words.SNACKS))
    if t.maybe(0.5):
        t.do("nothing_left", A=hero, X=t.fresh(words.SNACKS), P=home)
    place = t.place("wild", "green", "town") if not t.fable else t.place("wild", "green")
    walk(t, hero, place)
    pause(t, hero)
    t.do("pick", A=hero, N=pick(t.rng, words.NUMBERS), X=with_, P=place)
    t.narrator.paragraph()
    guest = t.person("friend" if t.chance(0.4) else "", at=t.world.at[hero])
    t.do("meet", A=hero, B=guest, P=place, X=t.doing(place))
    if t.maybe(0.5):
        t.do("hunger", A=guest, X=t.fresh(words.SNACKS))
    if t.maybe(0.4):
        t.do("invite", A=hero, B=guest, P=home, X=dish)
    t.do("home_with", A=hero, B=guest, P=home)
    t.do("cook", A=hero, X=dish, Y=with_)
    t.do("share_food", A=hero, B=guest, X=dish)
    if t.maybe(0.6):
        t.do("praise", A=hero, B=guest)
    pause(t, hero, guest)
    finish(t, hero, guest)


def runaway(t: Stage) -> None:
    """A storm breaks the fence, the animal runs away, is searched for and brought back."""
    t.lesson = "search"
    hero, home = begin(t, t.home(with_yard=True))
    pet = t.pet(home)
    fence = t.fresh(("fence", "gate", "hedge", "barn door", "garden wall", "stable door"))
    food = words.FEED.get(pet.kind, "some berries")
    t.theme = f"who lost {words.with_article(pet.kind)}" if t.chance(0.5) else f"who looked for {pet.name}"
    scene(t, hero, home)
    if t.maybe(1.5):
        t.do("feed", A=hero, C=pet, X=food)
    t.do("fence_breaks", X=fence, P=home)
    t.do("wander_off", "so", C=pet, X=f"the broken {fence}")
    t.narrator.paragraph()
    if t.maybe(1.5):
        t.do("call_pet", A=hero, C=pet, X=t.fresh(("corn", "oats", "crumbs", "seeds", "nuts")))
    friend = None
    if t.maybe(0.6):
        friend = helper(t, hero, None, f"find {pet.name}")
    if t.room() > 6:
        wrong = t.place()
        if friend is None:
            t.do("go", A=hero, P=wrong)
        else:
            t.do("go_with", A=hero, B=friend, P=wrong)
        pause(t, hero, friend)
    far = t.place("wild", "water", "green")
    tracks = t.fresh(("a trail of feathers", "some small tracks", "a line of crumbs", "bent grass", "muddy prints",
                      "a trail of leaves", "tufts of hair"))  # fmt: skip
    t.do("follow_tracks", A=hero, C=pet, P=far, X=tracks)
    t.do(
        "find_pet",
        A=hero,
        C=pet,
        P=far,
        S=t.spot(far),
        X=t.fresh(("clover", "an old hat", "a thistle", "a rope", "leaves")),
    )
    if t.maybe(0.6):
        t.do("nuzzle", A=hero, C=pet, X=food)
    t.do("lead_back", A=hero, C=pet, P=home, X=food)
    if friend is not None:
        t.do("place", A=friend, P=home)
        t.do("mend_fence", A=hero, B=friend, X=fence, Y=t.fresh(words.STUFF))
        thanks(t, hero, friend)
    if t.maybe(0.5):
        t.do("end_pet", A=hero, C=pet, X=food, S=t.spot(home), F=t.word("glad"))
    finish(t, hero, friend)


def present(t: Stage) -> None:
    """A birthday: a present is made, baked or traded for, and given."""
    t.lesson = "give"
    hero, home = begin(t)
    friend = t.person("kin" if t.chance(0.5) else "friend", trait=True, at=t.place())
    scene(t, hero, home)
    t.do("plan", A=hero, X=f"give {friend.name} a present")
    way = t.rng.random()
    if way < 0.35:
        thing = t.thing(words.TREATS)
        t.do("bake_treat", A=hero, T=thing, X=t.fresh(words.FILLINGS))
        t.theme = f"who made {t.a(thing)} for {friend.name}"
    elif way < 0.65:
        thing = t.thing(words.CRAFTS)
        t.do("make", A=hero, T=thing, P=home, X=t.fresh(words.MADE_FROM[words.CRAFTS[thing.noun]]))
        t.theme = f"who made {t.a(thing)} for {friend.name}"
    else:
        old = owned(t, hero, words.GIFTS)
        seller = t.person(at=t.place())
        thing = t.thing(words.GIFTS, seller)
        t.do("meet", A=hero, B=seller, P=t.world.at[seller], X=t.doing(t.world.at[seller]))
        t.do("offer_trade", A=hero, B=seller, T=old, U=thing)
        t.do("trade", A=hero, B=seller, T=old, U=thing)
        t.theme = f"who traded {t.a(old)} for a present"
    t.narrator.paragraph()
    pause(t, hero)
    if not thing.treat and t.chance(0.6):
        t.do("wrap", A=hero, T=thing)
    t.do("visit", A=hero, B=friend)
    if t.maybe(0.4) and not thing.treat and thing.noun not in words.BOOKS and t.room() > 5:
        t.do("soil", "but", A=hero, T=thing, Y=t.fresh(PUDDLES))
    if t.world.is_(thing, "dirty"):
        t.do("wash", A=hero, T=thing, X=t.fresh(SOAPS), P=t.world.at[hero])
    t.do("give", A=hero, B=friend, T=thing)
    if t.maybe(1.0):
        thanks(t, friend, hero)
    if thing.treat:
        t.do("eat_treat", A=friend, B=hero, T=thing)
    elif t.chance(0.6):
        t.do("praise", A=hero, B=friend)
    pause(t, hero, friend)
    finish(t, hero, friend)


def kept_promise(t: Stage) -> None:
    """A promise is made, almost forgotten, remembered and kept."""
    t.lesson = "promise"
    hero, home = begin(t)
    friend = friend_of(t, hero, home)
    chore = t.fresh(words.CHORES)
    t.theme = f"who promised to {chore}"
    scene(t, hero, home, friend)
    t.do("promise", A=hero, B=friend, X=chore)
    if t.maybe(0.5):
        t.do("leave", A=friend)
    place = t.place()
    t.do("go", A=hero, P=place)
    pause(t, hero)
    if t.maybe(0.8):
        t.do("forget", "but", A=hero, X=chore)
        t.narrator.paragraph()
        if t.room() > 5:
            t.do("aside", A=hero)
        t.do("recall", A=hero, X=chore)
    if t.maybe(0.4):
        t.do("home", A=hero, P=home)
    pause(t, hero)
    t.do("keep_promise", "so", A=hero, X=chore)
    if t.world.at.get(friend) is None:
        t.do("place", A=friend, P=t.world.at[hero])
        t.do("come_by", A=hero, B=friend)
    else:
        t.do("visit", A=hero, B=friend)
    if t.maybe(0.5):
        t.do("praise", A=hero, B=friend)
    t.do("thank", A=friend, B=hero, X=t.fresh(SMALL_GIFTS))
    finish(t, hero, friend)


def borrowed(t: Stage) -> None:
    """Lent, spoilt by accident, put right, and given back."""
    t.lesson = "care"
    hero, home = begin(t)
    lender = friend_of(t, hero, home)
    thing = t.thing(words.LENDABLE, lender)
    job = even(t.rng, words.USES[thing.noun])
    t.theme = f"who borrowed {t.a(thing)}"
    scene(t, hero, home)
    if t.maybe(0.8):
        t.do("want", A=hero, X=job)
    t.do("ask_lend", A=hero, B=lender, T=thing, X=job)
    t.do("lend", A=lender, B=hero, T=thing)
    t.narrator.paragraph()
    place = t.place()
    walk(t, hero, place)
    t.do("use", A=hero, T=thing, X=job)
    pause(t, hero)
    if thing.noun in words.WEAR or t.chance(0.4):
        t.do("soil", "but", A=hero, T=thing, Y=t.fresh(PUDDLES))
        t.do("wash", A=hero, T=thing, X=t.fresh(SOAPS), P=place)
        if t.maybe(0.5):
            t.do("dry", A=hero, T=thing)
    elif t.chance(0.7):
        t.do("break", "but", A=hero, T=thing, Y=t.fresh(TRIPS))
        t.do("see_damage", A=hero, T=thing, F=t.word("sorry"))
        t.do("mend", A=hero, T=thing, X=t.fresh(words.GLUES))
    visit(t, hero, lender)
    t.do("return", A=hero, B=lender, T=thing)
    if t.maybe(0.5):
        t.do("confess", A=hero, B=lender, T=thing, X=f"I was not careful with the {thing.noun}")
        t.do("forgive", A=hero, B=lender)
    else:
        thanks(t, hero, lender)
    finish(t, hero, lender)


def rescue(t: Stage) -> None:
    """A young animal is stuck; the first try fails, a tool from elsewhere saves it."""
    t.lesson = "help"
    hero, _ = begin(t)
    place = t.place("wild", "water", "green")
    pet = t.pet(place, words.CLIMBERS if t.chance(0.6) else words.PET_KINDS)
    gone, back, spot = even(
        t.rng,
        (
            ("fallen", "out", "into a deep hole"),
            ("crawled", "out again", "into a hollow log"),
            ("slipped", "back up", "into the old well"),
            ("swum", "back", "to a rock in the water"),
            ("run", "out", "into a thorn bush"),
            ("climbed", "down", "to the top of a tree"),
            ("jumped", "down", "onto a high roof"),
        ),
    )
    t.theme = f"who saved {words.with_article(pet.kind)}"
    scene(t, hero, place)
    t.do("place", A=pet, P=place)
    t.do("stuck", C=pet, V=gone, S=spot, Y=back)
    if t.maybe(0.9):
        t.do("hear_cry", A=hero, C=pet)
    t.narrator.paragraph()
    if t.room() > 6:
        short = t.thing({"walking stick": "wood", "hook": "metal", "umbrella": "cloth", "broom": "wood"}, hero)
        t.do("reach", "but", A=hero, C=pet, T=short, S="out")
    friend = helper(t, hero, None, f"get {pet.name} {back}") if t.chance(0.6) else None
    shed = t.place("house", "town")
    tool = t.thing(
        {"ladder": "wood", "rope": "paper", "net": "paper", "basket": "paper", "plank": "wood", "pole": "wood"}, at=shed
    )
    saver = friend if friend is not None and t.chance(0.5) else hero
    t.do("place", A=saver, P=shed)
    t.do("fetch_tool", A=saver, T=tool, P=shed)
    t.do("place", A=saver, P=place)
    t.do("rescue", "last", A=saver, C=pet, T=tool)
    t.do("nuzzle", A=saver, C=pet, X=words.FEED.get(pet.kind, "some berries"))
    pause(t, hero, friend)
    if friend is not None:
        thanks(t, hero, friend)
    finish(t, hero, friend)


def found_thing(t: Stage) -> None:
    """Somebody else's thing is found; the finder asks about until its owner has it again."""
    t.lesson = "finder"
    hero, _ = begin(t)
    place = t.place()
    thing = t.thing(words.SMALL | words.WEAR | words.BAGS | words.BOOKS, at=place)
    owner = t.person(trait=True, at=t.place())
    t.theme = f"who found {t.a(thing)}"
    scene(t, hero, place)
    t.do("spot", A=hero, T=thing, S=t.spot(place))
    if t.maybe(0.5):
        t.do("plan", A=hero, X="find its owner" if t.chance(0.5) else f"bring the {thing.noun} back")
    t.narrator.paragraph()
    if t.room() > 5 or t.chance(0.5):
        other = t.person(at=t.place())
        t.do("meet", A=hero, B=other, P=t.world.at[other], X=t.doing(t.world.at[other]))
        t.do("whose", A=hero, B=other, T=thing)
        t.do("not_mine", A=hero, B=other, X=owner)
    pause(t, hero)
    t.do("meet", A=hero, B=owner, P=t.world.at[owner], X=t.doing(t.world.at[owner]))
    if t.maybe(1.3):
        t.do("whose", A=hero, B=owner, T=thing)
    t.do("hand_back", A=hero, B=owner, T=thing)
    t.do("thank", A=owner, B=hero, X=t.fresh(SMALL_GIFTS))
    if t.room() > 2:
        t.do("praise", A=hero, B=owner)
        pause(t, hero, owner)
    finish(t, hero, owner)


def afraid(t: Stage) -> None:
    """Somebody is afraid and, with a friend, gets over it."""
    t.lesson = "brave"
    hero, home = begin(t)
    fear = t.fresh(words.FEARS)
    friend = friend_of(t, hero, home)
    t.theme = f"who was afraid of {fear}"
    t.do("fear", A=hero, X=fear, F=t.word("afraid"))
    scene(t, hero, home, friend)
    place = t.place()
    if t.maybe(1.2):
        t.do("go_with", A=hero, B=friend, P=place)
    else:
        place = home
    t.do("freeze", "but", A=hero, P=place)
    t.narrator.paragraph()
    if t.maybe(0.6):
        t.do("ask_wrong", A=hero, B=friend, F=t.word("afraid"))
        t.do("explain", A=hero, B=friend, X=f"I cannot stand {fear}", F=t.word("afraid"))
    if t.maybe(0.5):
        t.do("comfort", A=hero, B=friend)
    if t.maybe(1.3):
        t.do("take_hand", A=hero, B=friend)
    pause(t, hero, friend)
    t.do("brave", "last", A=hero, X=fear, N=pick(t.rng, words.NUMBERS))
    if t.maybe(1.0):
        t.do("praise", A=hero, B=friend)
    if t.maybe(0.5):
        t.do("play", A=hero, B=friend, X=t.fresh(words.GAMES), P=place, N=pick(t.rng, words.NUMBERS))
    if t.maybe(0.4):
        thanks(t, hero, friend)
    finish(t, hero, friend)


def quarrel(t: Stage) -> None:
    """Two want the same thing, quarrel, are sorry, and take turns."""
    t.lesson = "peace"
    hero, home = begin(t)
    friend = friend_of(t, hero, home, peer=True)
    place = t.place() if t.chance(0.6) else home
    thing = t.thing(words.PLAYABLE, at=place)
    t.theme = f"who quarrelled about {t.a(thing)}"
    scene(t, hero, place, friend)
    finder = hero if t.chance(0.5) else friend
    t.do("spot", A=finder, T=thing, S=t.spot(place))
    t.do("quarrel", "but", A=hero, B=friend, T=thing)
    if t.maybe(0.6):
        t.do("take_unasked", A=friend if finder is hero else hero, B=finder, T=thing)
        if t.maybe(0.5):
            holder = t.world.holder[thing]
            t.do("break", A=holder, T=thing, Y=t.fresh(TRIPS))
    t.narrator.paragraph()
    if t.maybe(1.0):
        t.do("apart", A=hero, B=friend, S=t.spot(place), X=t.spot(place))
    pause(t, hero)
    holder = t.world.holder[thing]
    other = friend if holder is hero else hero
    t.do("sorry", "last" if t.chance(0.3) else "", A=holder, B=other, F=t.word("sorry"))
    t.do("forgive", A=holder, B=other)
    if t.world.is_(thing, "broken"):
        t.do("mend_together", A=holder, B=other, T=thing, X=t.fresh(words.GLUES))
    if t.maybe(1.0):
        t.do("take_turns", A=hero, B=friend, T=thing)
    t.do("make_up", A=hero, B=friend, T=thing)
    if t.maybe(0.5):
        t.do("play", A=hero, B=friend, X=t.fresh(words.GAMES), P=place, N=pick(t.rng, words.NUMBERS))
    finish(t, hero, friend)


def growing(t: Stage) -> None:
    """Seeds are planted, nothing comes, then much does, and is shared."""
    t.lesson = "patience"
    hero, _ = begin(t)
    seeds = t.fresh(words.SEEDS)
    place = t.place("green")
    t.theme = f"who planted {seeds}"
    t.season = "spring"
    t.weather = even(t.rng, words.DRY_WEATHER)
    scene(t, hero, place)
    t.do("plant", A=hero, N=pick(t.rng, words.NUMBERS[3:]), X=seeds, P=place)
    t.do(
        "tend",
        A=hero,
        P=place,
        X=seeds,
        Y=t.fresh(("a small can", "rain water", "a leaky bucket", "a blue jug", "well water")),
    )
    t.narrator.paragraph()
    t.do("doubt", "but", A=hero, X=seeds, N=pick(t.rng, words.NUMBERS))
    friend = None
    if t.maybe(0.6):
        friend = t.person("kin", at=place)
        t.do("come_by", A=hero, B=friend)
        t.do("advise", A=hero, B=friend, X=t.fresh(("wait a little longer", "give them more water", "be patient",
             "sing to them", "keep the birds away", "cover them at night")))  # fmt: skip
    pause(t, hero, friend)
    t.do("sprout", A=hero, P=place, X=seeds, N=pick(t.rng, words.NUMBERS), W=even(t.rng, words.DRY_WEATHER))
    t.do(
        "harvest",
        A=hero,
        N=pick(t.rng, words.NUMBERS),
        X=seeds,
        P=place,
        Z=t.fresh(("summer", "late summer", "autumn")),
    )
    if friend is None:
        friend = t.person("friend", at=place)
        t.do("come_by", A=hero, B=friend)
    if seeds in ("sunflowers", "tulips", "roses", "poppies"):
        thanks(t, friend, hero)
    else:
        dish = f"{seeds.removesuffix('s') if not seeds.endswith(('toes', 'ries', 'hes')) else 'vegetable'} soup"
        dish = dish if seeds not in ("melons", "strawberries") else "fruit salad"
        t.do("cook", A=hero, X=dish, Y=seeds)
        t.do("share_food", A=hero, B=friend, X=dish)
    finish(t, hero, friend)


def race(t: Stage) -> None:
    """The boaster is fast but sleeps; the slow one keeps going."""
    t.lesson = "patience"
    hero, home = begin(t)
    slow = t.person(trait=True, at=home)
    goal = t.place()
    t.theme = f"who ran a race against {slow.name}"
    t.do("boast", A=hero, B=slow, X="run")
    if t.maybe(0.5):
        t.do("tease", A=hero, B=slow)
    t.do("dare", A=slow, B=hero, P=goal)
    t.narrator.paragraph()
    judge = t.person(at=home)
    t.do("race_start", A=hero, B=slow, C=judge, P=goal)
    if t.maybe(1.5):
        t.do("race_lead", A=hero, B=slow)
    t.do("race_nap", A=hero, X=t.fresh(("fell asleep", "lay down for a nap", "stopped for lunch",
         "began to pick berries",
         "watched the clouds", "played with a frog")), S=t.spot(goal))  # fmt: skip
    t.do("race_plod", "but", A=hero, B=slow)
    t.do("place", A=slow, P=goal)
    t.do("place", A=hero, P=goal)
    t.do("race_win", "so", A=slow, B=hero, P=goal)
    if t.maybe(0.9):
        t.do("praise", A=slow, B=hero)
    if t.maybe(0.6):
        t.do("sorry", A=hero, B=slow, F=t.word("sorry"))
        t.do("forgive", A=hero, B=slow)
    finish(t, slow if t.chance(0.3) else hero, slow)


def sickbed(t: Stage) -> None:
    """Somebody is ill; the other does the work, brings food, and health comes back."""
    t.lesson = "help"
    t.not_in_winter()
    hero, home = begin(t)
    sick = friend_of(t, hero, t.place("house"))
    bed = t.world.at[sick]
    scene(t, hero, home)
    chore, dish = t.fresh(words.CHORES), t.fresh(words.DISHES)
    t.theme = f"who helped {sick.name}, who was ill"
    t.do("sick", A=hero, B=sick, X=chore, P=bed)
    if t.maybe(1.0):
        t.do("plan", A=hero, X=f"help {sick.name}")
    t.narrator.paragraph()
    place = t.place("wild", "green")
    herb = t.fresh(words.FOODS)
    walk(t, hero, place)
    t.do("pick", A=hero, N=pick(t.rng, words.NUMBERS), X=herb, P=place)
    pause(t, hero)
    t.do("cook", A=hero, X=dish, Y=herb)
    t.do("visit", A=hero, B=sick)
    t.do("share_food", A=hero, B=sick, X=dish)
    if t.room() > 4:
        t.do("tell_tale", A=hero, B=sick)
    t.do("well", A=hero, B=sick, N=pick(t.rng, words.NUMBERS))
    if t.maybe(1.0):
        t.do("thank", A=sick, B=hero, X=t.fresh(SMALL_GIFTS))
    finish(t, hero, sick)


def building(t: Stage) -> None:
    """Something is built; it falls apart for a reason, and the second one stands."""
    t.lesson = "patience"
    hero, home = begin(t)
    what, stuff = t.fresh(words.BUILDS), t.fresh(words.STUFF)
    place = t.place("wild", "water", "green")
    t.theme = f"who built {words.with_article(what)}"
    scene(t, hero, home)
    if t.maybe(0.7):
        t.do("plan", A=hero, X=f"build {words.with_article(what)}")
    friend = helper(t, hero, None, f"build {words.with_article(what)}", trouble=False)
    t.do("go_with", A=hero, B=friend, P=place)
    if t.maybe(1.2):
        t.do("gather", A=hero, X=stuff, P=place)
    t.do("build", A=hero, B=friend, X=what, Y=stuff)
    t.narrator.paragraph()
    if t.room() > 4:
        t.do("build_fails", "but", X=what, Y=t.fresh(("the knots were loose", "the ground was soft",
             "the wood was rotten",
             "a storm came up", "the nails were too short", "one side was too heavy",
             "the rope was thin")))  # fmt: skip
        pause(t, hero, friend)
        better = t.fresh(words.STUFF)
        t.do("advise", A=hero, B=friend, X=f"use {better}")
        t.do("build", A=hero, B=friend, X=f"better {what}", Y=better)
    t.do("build_done", "last", A=hero, B=friend, X=what, P=place, F=t.word("glad"))
    if t.maybe(0.6):
        t.do("paint_it", A=hero, B=friend, X=what, Y=pick(t.rng, words.COLOURS))
    pause(t, hero, friend)
    finish(t, hero, friend)


def spilt(t: Stage) -> None:
    """Something is spilt; hiding it is tempting, the truth is better."""
    t.lesson = "honest"
    hero, home = begin(t)
    elder = t.person("kin", trait=True, at=home)
    vessel = t.thing(words.VESSELS, hero)
    liquid = t.fresh(words.LIQUIDS)
    where = t.fresh(("the floor", "the rug", "the letters", "a white shirt", "the new curtains", "the bed", "the books",
                     "the flour", "the tablecloth", "the firewood"))  # fmt: skip
    t.theme = f"who spilt the {liquid}"
    scene(t, hero, home)
    t.do("fill", A=hero, T=vessel, X=liquid, P=home)
    if t.maybe(1.0):
        t.do(
            "warn",
            A=hero,
            B=elder,
            X=t.fresh(("you will fall", "there will be tears", "something will break", "it will spill")),
        )
    t.do("spill", "but", A=hero, T=vessel, X=liquid, Y=where)
    if t.maybe(0.3):
        t.do("break", A=hero, T=vessel, Y=t.fresh(TRIPS))
    t.narrator.paragraph()
    t.do("mop_up", A=hero, X=liquid, Y=where)
    pause(t, hero)
    if t.maybe(1.2):
        t.do("ask_wrong", A=hero, B=elder, F=t.word("sorry"))
    t.do("confess", A=hero, B=elder, T=vessel, X=f"I spilt the {liquid}")
    t.do("forgive", A=hero, B=elder)
    if t.world.is_(vessel, "broken"):
        t.do("mend_together", A=hero, B=elder, T=vessel, X=t.fresh(words.GLUES))
    elif t.chance(0.5):
        t.do("fill_again", A=hero, B=elder, T=vessel, X=liquid)
    finish(t, hero, elder)


def delivery(t: Stage) -> None:
    """Something must be brought to somebody far away; the way is long."""
    t.lesson = "promise"
    hero, home = begin(t)
    sender = friend_of(t, hero, home)
    receiver = t.person(trait=True, at=t.place())
    end = t.world.at[receiver]
    thing = t.thing(words.BOOKS | words.BAGS | words.TREATS, sender)
    t.theme = f"who had to bring {t.a(thing)} to {receiver.name}"
    scene(t, hero, home)
    t.do("send", A=hero, B=sender, T=thing, C=receiver, P=end)
    t.narrator.paragraph()
    legs = 0
    while legs < 3 and (legs == 0 or t.room() > 5):
        stop = t.place()
        ways = ("go", "go", "climb_hill", "ride", "cross") if stop.sort in ("wild", "water") else ("go",)
        t.do(even(t.rng, ways), A=hero, P=stop)
        pause(t, hero)
        legs += 1
    if t.maybe(0.5):
        guide = t.person(at=t.world.at[hero])
        t.do("come_by", "luck", A=hero, B=guide)
        t.do("ask_way", A=hero, B=guide, P=end)
        t.do("show_way", A=hero, B=guide, P=end)
        if t.maybe(0.5):
            t.do("place", A=guide, P=end)
            thanks(t, hero, guide)
    else:
        t.do("visit", A=hero, B=receiver)
    t.do("deliver", "last", A=hero, B=receiver, T=thing, X=sender)
    t.do("thank", A=receiver, B=hero, X=t.fresh(SMALL_GIFTS))
    pause(t, hero, receiver)
    finish(t, hero, receiver)


def greedy(t: Stage) -> None:
    """All for oneself gives a stomach ache; sharing is better."""
    t.lesson = "share"
    t.not_in_winter()
    hero, home = begin(t)
    friend = friend_of(t, hero, home, peer=True)
    food = t.fresh(words.fruit(t.fable))
    place = t.place("wild", "green")
    number = pick(t.rng, words.NUMBERS[3:])
    t.theme = f"who did not want to share the {food}"
    scene(t, hero, home, friend)
    if t.maybe(1.2):
        t.do("go_with", A=hero, B=friend, P=place)
    else:
        t.do("place", A=hero, P=place)
        t.do("place", A=friend, P=place)
    t.do("pick", A=hero, N=number, X=food, P=place)
    if t.maybe(1.0):
        t.do("hunger", A=friend, X=t.fresh(words.SNACKS))
    t.do("greedy", "but", A=hero, B=friend, X=food, N=number)
    t.narrator.paragraph()
    t.do("ache", A=hero, X=food, N=number)
    pause(t, hero)
    if t.maybe(0.4):
        t.do("comfort", A=hero, B=friend)
    t.do("sorry", A=hero, B=friend, F=t.word("sorry"))
    if t.maybe(1.2):
        t.do("forgive", A=hero, B=friend)
    more = t.fresh(words.fruit(t.fable))
    t.do("pick", A=hero, N=pick(t.rng, words.NUMBERS), X=more, P=place)
    t.do("share_food", A=hero, B=friend, X=more)
    finish(t, hero, friend)


def learning(t: Stage) -> None:
    """A skill is wanted, taught, practised and mastered."""
    t.lesson = "patience"
    hero, home = begin(t)
    skill = t.fresh(words.SKILLS)
    teacher = t.person("kin" if t.chance(0.4) else "", trait=True, at=t.place())
    t.theme = f"who wanted to learn to {skill}"
    scene(t, hero, home)
    t.do("want", A=hero, X=f"learn to {skill}")
    if t.maybe(0.5):
        t.do("practise", A=hero, P=home, N=pick(t.rng, words.NUMBERS))
    visit(t, hero, teacher)
    t.do("ask_help", A=hero, B=teacher, X=f"learn to {skill}")
    if t.maybe(0.6):
        t.do("agree", A=hero, B=teacher)
    t.narrator.paragraph()
    t.do("teach", A=hero, B=teacher, X=skill)
    pause(t, hero, teacher)
    t.do("practise", A=hero, P=t.world.at[hero], N=pick(t.rng, words.NUMBERS))
    if t.room() > 3:
        t.do("comfort", A=hero, B=teacher)
    t.do("manage", "last", A=hero, X=skill, N=pick(t.rng, words.NUMBERS),
         Y=t.fresh(("third", "fourth", "tenth", "seventh", "last", "fifth", "ninth")))  # fmt: skip
    if t.maybe(0.9):
        t.do("praise", A=hero, B=teacher)
    if t.maybe(0.5):
        thanks(t, hero, teacher)
    finish(t, hero, teacher)


def hidden(t: Stage) -> None:
    """A thing is hidden as a joke, and the joke goes too far."""
    t.lesson = "peace"
    hero, home = begin(t)
    victim = friend_of(t, hero, home, peer=True)
    thing = t.thing(words.LOSABLE, victim)
    place = t.place()
    spot = t.spot(place)
    t.theme = f"who hid {t.a(thing)}"
    scene(t, hero, home, victim)
    if t.maybe(0.8):
        t.do("own", A=victim, T=thing)
    t.do("take_unasked", A=hero, B=victim, T=thing)
    t.do("hide", A=hero, T=thing, P=place, S=spot)
    t.do("miss", A=victim, T=thing, F=t.word("sad"))
    t.narrator.paragraph()
    if t.maybe(1.2):
        t.do("ask_seen", A=victim, B=hero, T=thing)
    if t.room() > 5 and t.chance(0.6):
        wrong = t.place()
        t.do("look_together", A=victim, B=hero, T=thing, P=wrong, S=t.spot(wrong))
        pause(t, victim, hero)
    t.do("confess", A=hero, B=victim, T=thing, X=f"I hid the {thing.noun}")
    t.do("go_with", A=hero, B=victim, P=place)
    t.do("find", A=victim, T=thing, S=spot)
    t.do("sorry", A=hero, B=victim, F=t.word("sorry"))
    t.do("forgive", A=hero, B=victim)
    if t.maybe(0.5):
        t.do("play", A=hero, B=victim, X=t.fresh(words.GAMES), P=place, N=pick(t.rng, words.NUMBERS))
    finish(t, hero, victim)


def repainted(t: Stage) -> None:
    """Something dull is made bright."""
    t.lesson = "care"
    hero, home = begin(t)
    thing = t.thing(words.PAINTABLE, hero)
    t.world.look[thing] = pick(t.rng, ("grey", "brown", "black", "white", "green"))
    old = t.world.look[thing]
    new = even(t.rng, tuple(c for c in words.COLOURS if c != old))
    t.theme = f"who painted {t.a(thing)}"
    t.do("own", A=hero, T=thing)
    scene(t, hero, home)
    t.do("want", A=hero, X=f"paint the {thing.noun} {new}")
    friend = t.person(at=t.place("town", "house") if not t.fable else t.place("house"))
    pot = t.thing({"paint pot": "paper", "paintbrush": "wood", "brush": "wood", "ladder": "wood"}, friend)
    t.do("visit", A=hero, B=friend)
    t.do("ask_lend", A=hero, B=friend, T=pot, X=f"paint the {thing.noun}")
    t.do("lend", A=friend, B=hero, T=pot)
    t.narrator.paragraph()
    if t.maybe(1.2):
        t.do("home", A=hero, P=home)
    pause(t, hero)
    t.do("paint", A=hero, T=thing, X=new)
    if t.maybe(1.0):
        t.do("see_paint", A=hero, T=thing, X=new, F=t.word("glad"))
    pause(t, hero)
    visit(t, hero, friend)
    t.do("return", A=hero, B=friend, T=pot)
    finish(t, hero, friend)


# Common plots first: earlier ones are told more often.
PLOTS = (
    lost_thing, broken_thing, present, found_thing, borrowed, delivery, hungry_guest, runaway, rescue, kept_promise,
    afraid, quarrel, hidden, learning, building, growing, sickbed, spilt, race, repainted, greedy,
)  # fmt: skip
