"""Peak memory and speed of conversions with DeepSeek-V3's own shapes: one MoE layer and the MTP module, 26 GB in FP8.

    python -m scripts.stream_v3 FOLDER [EXPERTS]

Reads a release whose files are sparse and counts what would be written, so that FOLDER needs no room; times are those
of reading, converting and hashing. With EXPERTS, so many in a layer instead of 256, and a vocabulary of 8,192, it reads
and writes random content in earnest. That the content is right is shown on small releases in tests/test_hub.py.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import BinaryIO

import torch

from leanseek import weightfiles
from leanseek.hub import export_release, import_release
from tests.releases import V3, in_fp8, shapes
from tests.runs import tokenizer

DEPTH = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
SHARD = 4_300_000_000  # bytes, as released


class Counter:
    """A file that has as many bytes as were written to it, and none on the disk but those that are no zeros."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, content: memoryview) -> None:
        self.file.truncate(self.file.seek(len(content), 1))


def write_counted(self: weightfiles.Planned, file: BinaryIO, advance: object) -> None:
    SOUND(self, Counter(file), advance)  # type: ignore[arg-type]


SOUND = weightfiles.Planned.write


def write_release(folder: Path, experts: int | None) -> int:
    """Shards with true headers, and no content unless `experts` is given; returns their bytes."""
    folder.mkdir(parents=True)
    config = V3 | DEPTH | ({"n_routed_experts": experts, "vocab_size": 8192} if experts else {})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save(folder)
    files: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
    end, total, file_of = 0, 0, {}
    for name, shape in shapes(config).items():
        scale = (-(-shape[0] // 128), -(-shape[-1] // 128))
        kind = "F8_E4M3" if in_fp8(name) else "F32" if name.endswith("bias") else "BF16"
        entries = [(name, kind, shape)]
        if in_fp8(name):
            entries.append((name.replace(".weight", ".weight_scale_inv"), "F32", scale))
        for entry, dtype, size in entries:
            nbytes = torch.Size(size).numel() * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
            if end + nbytes > SHARD:
                files.append({})
                end = 0
            files[-1][entry] = (dtype, size, nbytes)
            file_of[entry] = f"model-{len(files):05d}.safetensors"
            end, total = end + nbytes, total + nbytes
    for number, content in enumerate(files, start=1):
        header, place = {}, 0
        for entry, (dtype, size, nbytes) in content.items():
            header[entry] = {"dtype": dtype, "shape": size, "data_offsets": [place, place + nbytes]}
            place += nbytes
        text = json.dumps(header).encode()
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if experts is None:
                file.truncate(file.tell() + place)
            for dtype, _, nbytes in content.values() if experts else ():
                # Below 120 no byte makes a NaN; of one size, tensors are alike: embedding, head and their copies.
                chance = torch.Generator().manual_seed(nbytes)
                noise = torch.randint(0, 120, (nbytes,), dtype=torch.uint8, generator=chance)
                file.write(torch.ones(nbytes // 4).numpy().data if dtype == "F32" else noise.numpy().data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return total


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    experts = int(sys.argv[2]) if len(sys.argv) > 2 else None
    size = write_release(folder / "release", experts)
    if experts is None:
        weightfiles.Planned.write = write_counted  # type: ignore[method-assign]
    base = peak()
    print(f"release: {size / 1e9:.1f} GB in FP8; base: {base / 1e9:.2f} GB")
    for what, call in (
        ("import", lambda: import_release(folder / "release", folder / "run")),
        ("export as stored", lambda: export_release(folder / "run", folder / "fp8")),
        ("export --dtype bf16", lambda: export_release(folder / "run", folder / "bf16", "bf16")),
    ):
        began, cpu = time.perf_counter(), time.process_time()
        call()
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        print(
            f"{what}: {size / 1e6 / took:,.0f} MB/s of FP8 read ({took:.0f} s, {cpu:.0f} of them CPU), "
            f"peak {(peak() - base) / 1e9:.2f} GB above base"
        )


if __name__ == "__main__":
    main()
