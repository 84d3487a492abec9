"""The lexicon of the small worlds: every name, thing, place and choice of words, as plain data.

Lists are ordered from common to rare: `pick` takes early entries more often, so that words are as unequal as in speech.
"""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """One of the items, early ones more often than late ones."""
    drawn = rng.random()
    return items[int(len(items) * drawn * math.sqrt(drawn))]  # a square root is rounded alike on every machine


def even(rng: random.Random, items: Sequence[Item]) -> Item:
    """One of the items, each as often as the others."""
    return items[int(len(items) * rng.random())]


def with_article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"an {words}" if words[0] in "aeiou" or words.startswith("honest") else f"a {words}"


def listed(text: str) -> tuple[str, ...]:
    """The entries of a list with commas, however it is broken into lines."""
    return tuple(" ".join(entry.split()) for entry in text.split(","))


# ── who ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SHE_NAMES = listed(
    """Mira, Anna, Lily, Rosa, Ella, Nora, Clara, Ida, Maya, Tess, Ruby, Hanna, Lena, Molly, Ada, Sara, Vera, Lucy,
    Zoe, Emma, Petra, Dora, Ivy, Greta, Nina, Olga, Kate, Jane, Flora, Marta, Alma, Betty, Wanda, Elsa, Gwen, Hilda,
    Iris, June, Kira, Lotte, Mabel, Nell, Opal, Pia, Sofia, Thea, Una, Violet, Willa, Yara, Zelda, Bella, Carla,
    Dina, Edith, Fay, Helga, Inez, Judith, Leona"""
)
HE_NAMES = listed(
    """Tom, Ben, Max, Leo, Sam, Jonas, Otto, Felix, Paul, Finn, Hugo, Ivan, Karl, Milo, Ned, Oscar, Peter, Ravi, Simon,
    Theo, Victor, Will, Adam, Boris, Colin, David, Emil, Frank, Gus, Henry, Ian, Jack, Kurt, Luis, Marco, Nico,
    Omar, Pablo, Quinn, Ralf, Stefan, Tobin, Uli, Vito, Walter, Yuri, Zeno, Albert, Bruno, Casper, Dario, Edgar,
    Fred, Gilbert, Harold, Igor, Jasper, Knut, Lars, Martin"""
)
PET_NAMES = listed(
    """Biscuit, Patch, Pepper, Daisy, Snowy, Rusty, Ginger, Button, Misty, Shadow, Clover, Pebble, Nutmeg, Dusty,
    Bramble, Toffee, Speckle, Poppy, Socks, Smoky, Honey, Cricket, Tumble, Sorrel, Pudding, Marble, Whisper, Hazel,
    Thistle, Bounce, Copper, Dapple, Fern, Juniper, Mocha, Paprika, Raisin, Sunny, Waffle, Ziggy"""
)
TRAITS = listed(
    """kind, shy, brave, curious, clever, quiet, cheerful, careful, gentle, proud, patient, busy, lazy, stubborn,
    friendly, honest, merry, thoughtful, lively, bold, dreamy, greedy, grumpy, modest, polite, clumsy, playful,
    hopeful, nosy, restless"""
)
JOBS = listed(
    """farmer, baker, miller, gardener, smith, carpenter, fisher, weaver, potter, shepherd, tailor, teacher, cook,
    painter, beekeeper, sailor, woodcutter, cobbler, postman, nurse, clockmaker, musician"""
)
MENDERS = ("carpenter", "smith", "tailor", "cobbler", "clockmaker", "weaver", "potter")
SHE_KIN = ("sister", "cousin", "aunt", "grandmother", "mother", "neighbour")
HE_KIN = ("brother", "cousin", "uncle", "grandfather", "father", "neighbour")
FABLE_KINDS = listed(
    """fox, hare, bear, mouse, owl, badger, hedgehog, squirrel, frog, crow, wolf, otter, mole, beaver, rabbit, turtle,
    goose, deer, sparrow, raccoon, lizard, heron, toad, weasel, stork, robin"""
)
PET_KINDS = listed(
    """dog, cat, goat, pony, lamb, hen, duck, donkey, calf, rabbit, goose, kitten, puppy, piglet, foal, rooster"""
)
CLIMBERS = ("kitten", "cat", "rooster", "hen")

# ── what ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SIZES = listed(
    """small, little, big, old, new, tiny, heavy, shiny, large, round, long, plain, pretty, smooth, fine, thin, light,
    odd"""
)
COLOURS = listed("red, blue, green, yellow, white, black, brown, grey, orange, purple, pink, golden")
METAL = ("silver", "brass", "copper", "tin", "iron", "gold")
WOOD = ("wooden", "oak", "pine", "birch")
CLOTH = ("woollen", "silk", "cotton", "velvet", "linen")
# what is made of it, besides being coloured: the family a thing belongs to → its possible materials
MATERIALS = {"metal": METAL, "wood": WOOD, "cloth": CLOTH, "clay": ("clay", "glass", "china"), "paper": (), "food": ()}

# family of uses → things, each with its material family
SMALL = {
    "key": "metal", "ring": "metal", "whistle": "metal", "bell": "metal", "button": "clay", "coin": "metal",
    "spoon": "metal", "comb": "wood", "marble": "clay", "compass": "metal", "brooch": "metal", "locket": "metal",
    "medal": "metal", "thimble": "metal", "feather": "paper", "pencil": "paper", "watch": "metal", "needle": "metal",
    "bead": "clay", "shell": "paper", "magnet": "paper", "buckle": "metal", "charm": "metal",
}  # fmt: skip
TOYS = {
    "kite": "paper", "ball": "paper", "doll": "cloth", "drum": "wood", "top": "wood", "toy boat": "wood",
    "puppet": "wood", "hoop": "metal", "wagon": "wood", "rattle": "wood", "rocking horse": "wood", "toy train": "metal",
    "sledge": "wood", "swing": "wood", "balloon": "paper", "windmill": "paper", "slingshot": "wood",
    "toy castle": "wood",
}  # fmt: skip
TOOLS = {
    "hammer": "metal", "ladder": "wood", "rope": "paper", "broom": "wood", "spade": "metal", "rake": "wood",
    "saw": "metal", "net": "paper", "axe": "metal", "brush": "wood", "fishing rod": "wood", "wheelbarrow": "metal",
    "lantern": "metal", "hook": "metal", "shovel": "metal", "oar": "wood", "tent": "cloth", "chisel": "metal",
}  # fmt: skip
WEAR = {
    "hat": "cloth", "scarf": "cloth", "coat": "cloth", "cap": "cloth", "apron": "cloth", "shawl": "cloth",
    "cloak": "cloth", "mitten": "cloth", "ribbon": "cloth", "belt": "cloth", "jacket": "cloth", "dress": "cloth",
    "sock": "cloth", "shirt": "cloth", "vest": "cloth", "bonnet": "cloth", "blanket": "cloth", "quilt": "cloth",
}  # fmt: skip
VESSELS = {
    "cup": "clay", "bowl": "clay", "jug": "clay", "bucket": "metal", "pot": "metal", "jar": "clay", "bottle": "clay",
    "kettle": "metal", "mug": "clay", "pail": "metal", "teapot": "clay", "vase": "clay", "barrel": "wood",
}  # fmt: skip
MUSIC = {
    "flute": "wood", "fiddle": "wood", "horn": "metal", "harp": "wood", "guitar": "wood", "trumpet": "metal",
    "accordion": "paper", "banjo": "wood", "pipe": "wood",
}  # fmt: skip
BAGS = {
    "basket": "paper", "box": "wood", "bag": "cloth", "purse": "cloth", "sack": "cloth", "chest": "wood",
    "trunk": "wood", "case": "wood", "crate": "wood",
}  # fmt: skip
BOOKS = {
    "book": "paper", "letter": "paper", "map": "paper", "picture": "paper", "card": "paper", "notebook": "paper",
    "parcel": "paper", "diary": "paper",
}  # fmt: skip
HOUSEHOLD = {
    "chair": "wood", "table": "wood", "stool": "wood", "clock": "wood", "lamp": "metal", "mirror": "metal",
    "umbrella": "cloth", "cart": "wood", "bench": "wood", "cradle": "wood", "shelf": "wood", "spinning wheel": "wood",
    "birdhouse": "wood", "weather vane": "metal",
}  # fmt: skip
TREATS = {
    "cake": "food", "pie": "food", "loaf": "food", "cheese": "food", "pumpkin": "food", "melon": "food",
    "pudding": "food", "tart": "food", "sausage": "food",
}  # fmt: skip
TREAT_SIZES = listed("big, small, round, fresh, warm, sweet, large, tiny")
LOSABLE = SMALL | WEAR | BOOKS | {k: TOYS[k] for k in ("ball", "doll", "top", "puppet", "toy boat")} | {"flute": "wood"}
BREAKABLE = TOYS | VESSELS | MUSIC | {k: HOUSEHOLD[k] for k in ("chair", "stool", "clock", "lamp", "mirror", "cart")}
PAINTABLE = {k: v for k, v in (HOUSEHOLD | TOYS).items() if v == "wood" or k in ("kite", "wagon")}
# what is lent → what it is needed for
USES = {
    "hammer": ("hang up a picture", "build a shelf"), "ladder": ("pick cherries", "climb to the roof"),
    "rope": ("tie up a boat", "climb a cliff"), "broom": ("sweep the yard", "clean the chimney"),
    "spade": ("dig a pond", "look for gold"), "rake": ("clear the leaves", "make hay"),
    "saw": ("cut some wood", "make a sign"), "net": ("catch some fish", "catch butterflies"),
    "axe": ("chop firewood", "cut down a dead tree"), "brush": ("paint a fence", "clean the boots"),
    "fishing rod": ("catch a big fish", "fish for trout"), "wheelbarrow": ("carry some stones", "move the pumpkins"),
    "lantern": ("look into a cave", "walk home in the dark"), "shovel": ("clear the snow", "dig a ditch"),
    "tent": ("sleep outside", "keep the rain off"), "oar": ("row across the water", "push off a boat"),
    "book": ("learn about birds", "read to a friend"), "map": ("find the old path", "plan a long trip"),
    "flute": ("play at a wedding", "call the sheep"), "fiddle": ("play at a dance", "learn a song"),
    "horn": ("wake the village", "call the hunters"), "guitar": ("sing at the fair", "play by the fire"),
    "hat": ("keep the sun off", "dress up as a king"), "coat": ("cross the snow", "walk through the rain"),
    "scarf": ("keep warm", "build a snowman"), "cloak": ("put on a play", "look like a wizard"),
    "dress": ("dance at the fair", "visit a queen"), "blanket": ("have a picnic", "sleep under the stars"),
    "kite": ("scare away the crows", "play on the hill"), "umbrella": ("go out in the rain", "keep dry"),
    "sledge": ("race down the hill", "pull some logs"), "basket": ("bring home the apples", "carry the eggs"),
    "bucket": ("put out a fire", "water the garden"), "apron": ("bake a cake", "paint a wall"),
}  # fmt: skip
THINGS = SMALL | TOYS | TOOLS | WEAR | VESSELS | MUSIC | BAGS | BOOKS | HOUSEHOLD
LENDABLE = {noun: THINGS[noun] for noun in USES}
# what people make themselves, and what they make it from
CRAFTS = {
    "comb": "wood", "toy boat": "wood", "top": "wood", "puppet": "wood", "flute": "wood", "rocking horse": "wood",
    "whistle": "wood", "stool": "wood", "birdhouse": "wood", "sledge": "wood", "scarf": "cloth", "hat": "cloth",
    "doll": "cloth", "blanket": "cloth", "apron": "cloth", "ribbon": "cloth", "shawl": "cloth", "kite": "paper",
    "picture": "paper", "card": "paper", "ball": "paper", "notebook": "paper", "bowl": "clay", "mug": "clay",
}  # fmt: skip
MADE_FROM = {
    "wood": listed("""a fallen branch, an old board, a piece of driftwood, a log, some planks, a broken chair"""),
    "cloth": listed("""an old curtain, some wool, a torn sheet, two old shirts, a bag of rags, some thread"""),
    "paper": listed("""paper and glue, an old sack, some string and paper, leaves and paste, strips of leather"""),
    "clay": ("some clay", "red earth", "river mud", "soft clay"),
}
GIFTS = SMALL | TOYS | WEAR | MUSIC | BOOKS
PLAYABLE = TOYS | MUSIC

FRUIT = listed("apples, pears, plums, cherries, berries, nuts, figs, peaches, apricots, acorns")
FOODS = listed(
    """carrots, mushrooms, potatoes, onions, eggs, beans, nuts, turnips, tomatoes, leeks, peas, beets, chestnuts,
    cabbages, radishes, cucumbers"""
)
FILLINGS = listed(
    """apples, nuts, honey, berries, plums, cherries, butter and sugar, eggs, pears, raisins, cinnamon, almonds,
    cream"""
)
GOODS = (*FRUIT, "eggs", "flowers", "carrots", "potatoes", "shells", "candles", "onions", "fish", "buns", "turnips",
         "pebbles", "pine cones", "tomatoes", "daisies", "beans", "tulips", "lemons")  # fmt: skip


def fruit(fable: bool) -> tuple[str, ...]:
    """What grows on trees and bushes and is eaten; only animals eat acorns."""
    return FRUIT if fable else FRUIT[:-1]


NUMBERS = listed("three, five, four, six, seven, two, eight, ten, nine, twelve, eleven, twenty")
DISHES = listed(
    """soup, stew, pancakes, fish soup, pie, noodles, rice, dumplings, broth, salad, porridge, fried fish, omelette,
    hot pot, roast chicken, cheese toast, flat bread, pasta"""
)
SNACKS = listed(
    """bread, an apple, cheese, a bun, some nuts, a pear, cake, some berries, a carrot, a sandwich, an egg, a biscuit,
    a plum, honey"""
)
FEED = {"dog": "a bone", "cat": "some milk", "goat": "some hay", "pony": "some oats", "lamb": "some milk",
        "hen": "some corn", "duck": "some crumbs", "donkey": "some carrots", "calf": "some milk",
        "rabbit": "some clover", "goose": "some barley", "kitten": "some milk", "puppy": "some meat",
        "piglet": "some turnips", "foal": "some oats", "rooster": "some seeds"}  # fmt: skip
LIQUIDS = listed("water, milk, tea, juice, paint, soup, cider, honey, ink, lemonade")
SEEDS = listed(
    """beans, peas, pumpkins, sunflowers, carrots, tomatoes, tulips, roses, melons, cabbages, radishes, strawberries,
    corn, poppies, onions, cucumbers"""
)
GAMES = listed("""tag, hide and seek, ball, chess, marbles, pirates, cards, catch, riddles, leapfrog, knights""")
FEARS = listed(
    """the dark, deep water, thunder, high places, big dogs, spiders, the old bridge, strangers, bees, the cellar, loud
    noises, the tall ladder, ghosts, geese, shadows, snakes"""
)
SKILLS = listed(
    """whistle, swim, read, skate, bake bread, tie knots, play the flute, ride a pony, sew, climb trees, fish, count to
    a hundred, paint, row a boat, dance, knit, juggle, carve wood, write letters, sing, walk on stilts, milk a goat"""
)
CHORES = listed(
    """water the plants, feed the hens, sweep the floor, milk the goat, fetch some water, chop wood, pick the beans,
    watch the sheep, wash the windows, bring in the hay, collect the eggs, lock the gate, ring the bell, light the
    lamps, rake the leaves, shell the peas, post the letters, guard the boat, dust the shelves, turn the cheese"""
)
BUILDS = listed(
    """raft, hut, bridge, bench, birdhouse, sledge, boat, treehouse, table, scarecrow, swing, cart, ladder, dam, stage,
    shed, kennel"""
)
STUFF = listed(
    """planks, branches, old boxes, rope and wood, reeds, logs, nails and boards, willow sticks, driftwood, barrels,
    crates, bamboo"""
)
GLUES = listed(
    """glue, a nail, some string, wire, a needle and thread, tape, two screws, a strip of leather, wax, a bit of tin,
    clay, a wooden peg"""
)

WISHES = listed(
    """see the sea, learn to fly, own a pony, visit the city, cook a feast, find a treasure, sleep under the stars,
    hear some music, bake a cake, meet a king, build a boat, win a race"""
)

# ── where ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# noun: (preposition, the sort of place)
PLACES: dict[str, tuple[str, str]] = {
    "garden": ("in", "green"), "barn": ("in", "house"), "forest": ("in", "wild"), "river": ("by", "water"),
    "market": ("at", "town"), "hill": ("on", "wild"), "kitchen": ("in", "house"), "mill": ("at", "town"),
    "meadow": ("in", "wild"), "school": ("at", "town"), "pond": ("by", "water"), "bridge": ("near", "water"),
    "orchard": ("in", "green"), "village square": ("in", "town"), "beach": ("on", "water"), "bakery": ("in", "town"),
    "workshop": ("in", "house"), "park": ("in", "green"), "lake": ("by", "water"), "cottage": ("in", "house"),
    "field": ("in", "wild"), "stable": ("in", "house"), "harbour": ("at", "water"), "attic": ("in", "house"),
    "library": ("in", "town"), "well": ("by", "green"), "crossroads": ("at", "town"), "stream": ("by", "water"),
    "station": ("at", "town"), "farm": ("on", "green"), "village": ("in", "town"), "cellar": ("in", "house"),
    "valley": ("in", "wild"), "tower": ("in", "house"),
    "inn": ("at", "town"), "smithy": ("in", "town"), "courtyard": ("in", "town"), "cave": ("in", "wild"),
    "island": ("on", "water"), "vineyard": ("in", "green"), "greenhouse": ("in", "green"), "castle": ("in", "house"),
    "lighthouse": ("at", "water"), "swamp": ("in", "wild"), "hen house": ("in", "house"), "shed": ("in", "house"),
    "playground": ("in", "green"), "clearing": ("in", "wild"), "shop": ("in", "town"), "quarry": ("in", "wild"),
    "ferry": ("at", "water"), "waterfall": ("by", "water"), "ruin": ("in", "wild"), "fountain": ("by", "town"),
    "haystack": ("by", "green"), "theatre": ("in", "town"), "canal": ("by", "water"), "pasture": ("on", "wild"),
    "oak grove": ("in", "wild"), "cornfield": ("in", "green"), "museum": ("in", "town"), "bay": ("on", "water"),
}  # fmt: skip
HUMAN_HOMES = listed(
    """mill, farm, village, cottage, bakery, inn, lighthouse, harbour, castle, station, orchard, vineyard"""
)
YARDS = ("farm", "mill", "orchard", "vineyard", "village", "inn")
FABLE_HOMES = listed("""forest, meadow, pond, river, hill, valley, swamp, clearing, stream, lake, field, cave""")
PLACE_LOOKS = {
    "house": listed("old, little, big, dusty, quiet, dark, tidy, crooked, warm, grey, tall, empty"),
    "green": listed("green, old, little, big, wild, pretty, quiet, lovely, small, narrow, large"),
    "wild": listed("dark, wide, green, quiet, lonely, far, stony, old, big, wild, silent"),
    "water": listed("blue, old, wide, quiet, little, calm, lonely, grey, clear, long, muddy"),
    "town": listed("busy, old, little, noisy, big, crooked, pretty, new, white, quiet, sleepy"),
}
SPOTS = {
    "house": listed(
        """under the table, behind the door, in a drawer, under the bed, on the shelf, behind the stove, in a basket,
        under a blanket, in the corner, beside the window, inside a boot, on the stairs, behind a barrel, under some
        straw, in a coat pocket, between two boxes"""
    ),
    "green": listed(
        """under a bush, in the tall grass, behind the fence, beside the roses, in a flower pot, under the bench,
        beneath an apple tree, between the cabbages, near the gate, in the hedge, on the garden wall, under some
        leaves, beside the scarecrow, in a wheelbarrow"""
    ),
    "wild": listed(
        """under a tree, behind a rock, in a hollow log, in the tall grass, between two stones, under some leaves,
        beside the path, in a bird's nest, behind a fir tree, in a thorn bush, on a mossy stone, in a rabbit hole,
        among the ferns"""
    ),
    "water": listed(
        """on the sand, under a boat, among the reeds, between two rocks, on the bank, in a fishing net, behind a
        willow, in the mud, near the landing, under the bridge, on a flat stone, in shallow water, beside a post, in
        a rowing boat"""
    ),
    "town": listed(
        """under a bench, behind the counter, on the steps, beside the fountain, under a cart, on a windowsill, near
        the door, behind a barrel, in the gutter, under the stairs, on the counter, beside a lamp post, between two
        crates, on a wall"""
    ),
}
DOINGS = {
    "house": listed(
        """sweeping the floor, mending a shirt, looking out of the window, washing the dishes, sorting old boxes,
        peeling potatoes, reading a book, oiling a lock, folding sheets, stirring a pot, writing a list, humming a
        tune"""
    ),
    "green": listed(
        """picking beans, pulling weeds, watering the flowers, raking leaves, sitting on a bench, watching the bees,
        digging a hole, planting bulbs, resting in the shade, tying up the roses"""
    ),
    "wild": listed(
        """gathering sticks, looking for mushrooms, watching the clouds, picking flowers, walking along a path,
        listening to the birds, lying in the grass, counting butterflies, following some tracks, collecting pine
        cones"""
    ),
    "water": listed(
        """throwing stones, catching fish, watching the ducks, building a dam, looking for shells, dipping both feet in
        the water, cutting reeds, skipping pebbles, watching the boats, filling a pail"""
    ),
    "town": listed(
        """buying bread, talking to the neighbours, looking at the windows, waiting for a cart, carrying a bag,
        listening to a band, selling eggs, sweeping the steps, watching the pigeons, running an errand"""
    ),
}
FABLE_DOINGS = listed(
    """looking for breakfast, sunning on a stone, gathering leaves, watching the clouds, listening to the birds,
    digging a hole, counting acorns, sniffing the air, cleaning the den, practising a song, resting in the shade,
    chasing a butterfly, sorting seeds, collecting pine cones, oiling a cart, folding blankets, mending a roof,
    washing carrots"""
)

# ── when ──────────────────────────────────────────────────────────────────────────────────────────────────────────

WEATHER = listed(
    """sunny, windy, cold, rainy, warm, foggy, cloudy, bright, stormy, snowy, frosty, misty, mild, hot, grey, clear,
    chilly, damp"""
)
DRY_WEATHER = tuple(w for w in WEATHER if w not in ("rainy", "stormy", "snowy", "damp"))
SEASONS = {"spring": ("snowy", "hot"), "summer": ("snowy", "frosty", "cold", "chilly"), "autumn": ("snowy", "hot"),
           "winter": ("warm", "hot", "mild")}  # fmt: skip
TIMES = ("morning", "afternoon", "evening", "day")

# weather: what the sky and the ground may be like; the first row always fits
ANY_SKY = listed(
    """the air was still, everything was quiet, smoke rose from the chimneys, the sky was wide,
    birds sat on the roofs"""
)
BRIGHT_SKY = listed(
    """the sun was shining, the light was golden, the sky was blue, swallows flew high, long shadows lay on the ground,
    the air was clear, not a cloud was in sight"""
)
GREY_SKY = listed(
    """clouds drifted by, the sky was pale, the grass was wet, mist hung over the fields, the light was dim, grey
    clouds hung low, the ground was soft"""
)
WILD_SKY = listed(
    """the wind pulled at the trees, dark clouds raced by, leaves flew through the air, the trees bent low, the
    shutters rattled, a cold wind blew"""
)
COLD_SKY = listed(
    """the air smelled of snow, ice covered the puddles, the ground was hard, breath hung in the air, the roofs were
    white, frost lay on the grass, the branches were bare"""
)
SKIES = {
    "sunny": BRIGHT_SKY, "warm": BRIGHT_SKY, "bright": BRIGHT_SKY, "hot": BRIGHT_SKY, "clear": BRIGHT_SKY,
    "mild": BRIGHT_SKY, "windy": WILD_SKY, "stormy": WILD_SKY, "rainy": GREY_SKY, "foggy": GREY_SKY, "cloudy": GREY_SKY,
    "misty": GREY_SKY, "grey": GREY_SKY, "damp": GREY_SKY, "cold": GREY_SKY, "snowy": COLD_SKY, "frosty": COLD_SKY,
    "chilly": GREY_SKY,
}  # fmt: skip
# Words for what needs the sun, and for what nobody does in winter.
SUNNY = ("shade", "sunning", "butterfl", "lying", "bees")
SUMMERY = listed(
    """picking, watering, butterfl, bees, mushrooms, shade, lying, dipping, planting, roses, weeds, digging, sunning,
    shells"""
)

# ── what it all comes to ──────────────────────────────────────────────────────────────────────────────────────────

LESSONS: dict[str, tuple[str, ...]] = {
    "search": listed(
        """things often turn up, it pays to look twice, what is lost can be found, asking is better than guessing, it
        is good to know where things are"""
    ),
    "help": listed(
        """two can do more than one, a friend is worth more than gold, it is good to ask for help, many hands make
        light work, help is never far away"""
    ),
    "honest": listed(
        """the truth is lighter to carry, it is best to tell the truth, the truth comes out in the end, an honest word
        helps"""
    ),
    "finder": listed(
        """what is found should go back, an honest finder makes friends, it is good to give things back, somebody
        misses every lost thing"""
    ),
    "share": listed(
        """sharing makes a meal taste better, there is enough for two, half a meal with a friend is best, whoever
        shares is never alone, who gives also gets"""
    ),
    "patience": listed(
        """good things take time, small steps go far, it is good to try again, slow and steady gets there, nobody
        learns in one day"""
    ),
    "care": listed(
        """care saves work, it is good to be careful, what is broken can be mended, a mistake can be put right"""
    ),
    "brave": listed(
        """nobody is too small to be brave, fear grows small when you look at it, every fear ends, it is easier
        together"""
    ),
    "peace": listed(
        """kind words cost nothing, a quarrel makes no one happy, friends matter more than things, a joke should make
        everyone laugh"""
    ),
    "promise": listed(
        """a promise is a promise, friends count on each other, it is better late than never,
        a kept promise feels good"""
    ),
    "give": listed(
        """giving makes two people happy, a present need not be big, what comes from the heart is best, kind deeds come
        back"""
    ),
}
COMFORTS = listed(
    """things often turn up, every trouble ends, it is not so bad, tomorrow is another day, you are not alone, it is
    good to try, we have time, everybody needs help sometimes, it could be worse"""
)

# ── choices of words, by the name that templates call them ────────────────────────────────────────────────────────

LISTS: dict[str, tuple[str, ...]] = {
    "walked": listed(
        """walked, went, ran, hurried, wandered, marched, strolled, rushed, skipped, hiked, raced, trotted, tiptoed,
        plodded, set off, headed"""
    ),
    "said": listed("said, answered, replied, called, whispered, murmured"),
    "cried": listed("cried, shouted, called, exclaimed, yelled, said, declared"),
    "wailed": listed("cried, wailed, sobbed, gasped, exclaimed, moaned, sighed"),
    "ran": listed("ran, walked, wandered, hurried, trotted, strolled, rushed, marched"),
    "gladly": listed(
        """gladly, happily, cheerfully, with a smile, kindly, eagerly, warmly, with a nod, proudly, merrily, with a
        grin, with shining eyes"""
    ),
    "sadly": listed(
        """sadly, quietly, with a sigh, slowly, in a low voice, with tears, gloomily, with a heavy heart"""
    ),
    "quickly": listed(
        """quickly, at once, right away, in a hurry, without waiting, straight away, in no time, swiftly, without a
        word, before long"""
    ),
    "carefully": ("carefully", "slowly", "gently", "patiently", "with great care", "very slowly", "calmly"),
    "hard": listed(
        """hard, for a long time, for an hour, all morning, again and again, all afternoon, with great care, until
        noon, until dusk, for a good while, as well as possible"""
    ),
    "glad": listed(
        """glad, happy, proud, cheerful, joyful, thankful, delighted, pleased, merry, relieved, content, hopeful,
        grateful"""
    ),
    "sad": listed("""sad, upset, worried, unhappy, gloomy, miserable, downcast, heartbroken, troubled"""),
    "angry": listed("angry, cross, furious, annoyed, grumpy, mad, sulky, bitter"),
    "afraid": listed("afraid, scared, frightened, nervous, anxious, terrified, uneasy, timid"),
    "sorry": ("sorry", "ashamed", "guilty", "embarrassed", "regretful"),
    "tired": ("tired", "weary", "sleepy", "worn out", "exhausted", "drowsy"),
    "surprised": ("surprised", "amazed", "puzzled", "astonished", "startled", "curious"),
    "very": ("very", "really", "truly", "quite"),
    "good": listed("good, fine, clever, wonderful, great, splendid, sensible, brilliant, lovely"),
    "looked": ("looked", "searched", "peered", "hunted", "poked around", "felt about"),
    "smiled": listed("smiled, laughed, nodded, grinned, clapped, beamed, giggled, chuckled, winked"),
    "sound": listed(
        """a bird sang, a bell rang, a dog barked, the leaves rustled, a cart rolled by, the wind hummed, a cricket
        chirped, an owl called, somebody whistled, a branch creaked, a gate squeaked, a cow mooed, thunder
        rolled, a door banged, geese honked, a twig snapped, water dripped, crows cawed, a woodpecker knocked, a
        horse neighed"""
    ),
    "smell": listed(
        """fresh bread, wet grass, wood smoke, apples, hay, roses, rain, mint, pine trees, honey, onions, old leaves,
        lavender, mud, cinnamon, warm stone"""
    ),
    "sight": listed(
        """a red berry, a line of ants, a swallow, a thin cloud, a snail, two pigeons, a robin, a spider's web, a
        rainbow, a puddle, an empty nest, a bent nail, some fat sheep, a hawk, a row of poplars, three crows, a
        passing wagon, a pile of logs, a tiny beetle, a grey cat, an old wheel, some muddy tracks, a grey heron, a
        broken wheel, a squirrel's tail"""
    ),
    "wow": listed("Oh, Look, Well, My goodness, Ah, Goodness, Hurrah, Dear me, Wonderful"),
    "ohno": ("Oh no", "Oh dear", "What a pity", "How terrible", "Dear me", "Alas", "What bad luck"),
    "yes": listed("Yes, Of course, Gladly, Certainly, Sure, All right, Very well, Why not"),
    "no": ("No", "Sorry, no", "Not today", "I am afraid not", "Not at all", "Never"),
    "cause": listed(
        """the old storm, a long trip, last winter, a fair, a birthday, the harvest, a wedding, many years ago,
        a dream"""
    ),
    "for_long": listed(
        """for years, since last spring, for a long time, since childhood, for many months, since the last fair, for a
        week, since winter"""
    ),
    "drink": listed("tea, milk, warm cider, cocoa, juice, mint tea, cold water, honey milk, lemonade"),
    "wish": listed(
        """see the sea, learn to fly, own a pony, visit the city, cook a feast, find a treasure, sleep under the stars,
        hear some music, bake a cake, meet a king, build a boat, win a race"""
    ),
    "song": listed(
        """an old song, a song about the sea, a silly song, a slow tune, a dance tune, a song about spring, a lullaby,
        a marching song, a song without words"""
    ),
    "joke": listed(
        """a goose in a hat, a king without shoes, a talking turnip, a sleepy rooster, a goat on a roof, a bear at
        school, a fish in a tree, a pig with a drum, a snail in a hurry, a cow in the bath"""
    ),
    "part": ("a crack", "a loose piece", "a big hole", "a bent corner", "a long tear", "a missing piece"),
}
LISTS["later"] = ("soon", "a little later", "after a while", "some time later", "before long", "after that", "next",
                  "in the end", "a moment later", "not long after")  # fmt: skip
LISTS |= {"snack": SNACKS, "goods": GOODS}
LISTS["comfort"] = COMFORTS
