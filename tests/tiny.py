"""A recipe and a corpus of a size for tests: seconds, not minutes."""

import json
import random
from pathlib import Path

from leanseek.data.prepare import prepare

RECIPE = Path(__file__).with_name("tiny.toml")
PLAIN = Path(__file__).with_name("plain.toml")

PEOPLE = ("Ada", "Ben", "Cleo", "Dov", "Edda", "Finn", "Gus", "Hana")
THINGS = ("a lamp", "the red boat", "an old map", "her bell", "some bread", "the last key", "a blue stone")
PLACES = ("by the river", "in the attic", "on the hill", "under the bridge", "at the market", "near the sea")
VERBS = ("found", "lost", "mended", "carried", "hid", "wanted", "sold", "painted", "forgot")


def story(dice: random.Random) -> str:
    """A few sentences about who did what, where."""
    sentences = []
    for _ in range(dice.randint(4, 12)):
        who, thing, place = dice.choice(PEOPLE), dice.choice(THINGS), dice.choice(PLACES)
        sentences.append(f"{who} {dice.choice(VERBS)} {thing} {place}.")
    return " ".join(sentences)


def make_data(folder: Path, documents: int = 300, seed: int = 0) -> Path:
    """A DATA folder of generated stories, with a vocabulary of 320 ids."""
    dice = random.Random(seed)
    text = folder / "stories.jsonl"
    text.write_text("".join(json.dumps({"text": story(dice)}) + "\n" for _ in range(documents)))
    prepare([str(text)], folder / "data", vocab_size=320, workers=1)
    return folder / "data"
