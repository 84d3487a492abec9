"""How fast `prepare` tokenises, from the disk to checksummed shards, beside the tokenizers library's own batch call.

    python -m scripts.tokenise_speed FILE.jsonl.zst [--megabytes 20] [--rounds 5]

In turn: the phase "tokenise" of `prepare` on one core, and `encode_batch` over the same texts in memory on all cores.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers

from leanseek.data.prepare import prepare
from leanseek.data.read import read_texts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    texts: list[str] = []
    size = 0
    for text, raw_bytes in read_texts(asked.file, print):
        texts.append(text)
        size += raw_bytes
        if size >= asked.megabytes * 1e6:
            break
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "in.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare([str(file)], Path(folder) / "first", workers=1)
        tokenizer = Path(folder) / "first" / "tokenizer"
        library = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        ratios = []
        for i in range(asked.rounds):
            ours = prepare([str(file)], Path(folder) / str(i), tokenizer=tokenizer, workers=1).seconds["tokenise"]
            began = time.perf_counter()
            library.encode_batch(texts, add_special_tokens=False)
            theirs = time.perf_counter() - began
            ratios.append(theirs / ours)
            print(f"prepare {size / ours / 1e6:.1f} MB/s, library {size / theirs / 1e6:.1f} MB/s, {ratios[-1]:.2f}")
    print(f"{statistics.median(ratios):.2f} times the library's rate ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
