"""What tokenizers make of kinds of text: bytes per token, and of numbers.

python -m scripts.compression NAME=TOKENIZER... --text NAME=FILE...
"""

import argparse
import random
from itertools import islice
from pathlib import Path

from leanseek.data.read import read_texts
from leanseek.data.tokenizer import Tokenizer

BYTES = 400_000  # of each text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--text", nargs="+", required=True)
    asked = parser.parse_args()
    texts = {}
    for name, _, file in (text.partition("=") for text in asked.text):
        texts[name] = "\n".join(text for text, _ in islice(read_texts(Path(file), print), 200)).encode()[:BYTES]
    rng = random.Random(0)
    numbers = [rng.randrange(10 ** rng.randint(1, 9)) for _ in range(40_000)]
    texts["numbers"] = " ".join(map(str, numbers)).encode()
    print("| tokenizer | ids | " + " | ".join(texts) + " |")
    print("|---|---|" + "---|" * len(texts))
    for name, _, folder in (text.partition("=") for text in asked.tokenizers):
        tokenizer = Tokenizer.load(folder)
        rates = [len(raw) / len(tokenizer.encode(raw.decode(errors="ignore"))) for raw in texts.values()]
        print(f"| {name} | {tokenizer.vocab_size:,} | " + " | ".join(f"{rate:.2f}" for rate in rates) + " |")


if __name__ == "__main__":
    main()
