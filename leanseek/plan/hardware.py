"""What machines can do and cost: peak by precision, memory, links, power, price, each figure with its source.

The figures are the makers' own, dense (without structured sparsity), one device of the part as it is sold in servers.
What a kernel reaches of them is in `estimate`. A user's machine comes from a TOML file with the same keys. No torch.
"""

import time
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from leanseek.config import BadInput, nearest


@dataclass(frozen=True)
class Hardware:
    name: str
    bf16_tflops: float
    fp8_tflops: float | None  # None: no FP8 units, an FP8 recipe runs in BF16 here
    memory_gib: float  # 2³⁰ bytes: an "80 GB" H100 has 79.6 of them
    memory_gb_per_second: float
    domain: int  # devices that reach each other over the fast links
    fast_gb_per_second: float  # per device and direction inside the domain
    slow_gb_per_second: float  # per device and direction to other domains
    watts: float  # of the device alone
    usd_per_hour: float
    exponentials_per_second: float | None = None  # 10¹² a second; None: not known to bind
    sources: str = ""

    def peak(self, precision: str) -> float:
        """FLOP/s of dense matmuls."""
        tflops = self.fp8_tflops if precision == "fp8" and self.fp8_tflops else self.bf16_tflops
        return tflops * 1e12


# Prices are what such a device rented for on demand at specialised providers in spring 2026, rounded; they change
# monthly and spread by a factor of 2.5 for the same part, so every bill is shown with its sensitivity to them.
_MARKET = "price: middle of public 2026 on-demand lists (aimultiple.com/gpu-index, mercatus-ai.com), rounded"
_GUESS = "price: an assumption, no public list found"
_NVIDIA = "NVIDIA data sheet"

_SHIPPED = (
    Hardware(
        "a100", 312, None, 80, 2039, 8, 300, 25, 400, 1.4,
        sources=f"{_NVIDIA} A100 80GB SXM; 8 × 200 Gb/s InfiniBand (DGX A100); {_MARKET}",
    ),
    Hardware(
        "h100", 989.5, 1979, 80, 3350, 8, 450, 50, 700, 2.95, 3.7,
        sources=f"{_NVIDIA} H100 SXM; 8 × 400 Gb/s (DGX H100); exponentials: FlashAttention-3 paper; "
        + _MARKET,
    ),
    Hardware(
        "h800", 989.5, 1979, 80, 3350, 8, 160, 50, 700, 2.0, 3.7,
        sources="H100 with slower links: 160 and 50 GB/s by the V3 report (§3.2.2); price: its table 1",
    ),
    Hardware(
        "h20", 148, 296, 96, 4000, 8, 450, 50, 400, 1.5,
        sources=f"{_NVIDIA} H20 (as reported by resellers); links of HGX H20, 8 × 400 Gb/s; {_GUESS}",
    ),
    Hardware(
        "h200", 989.5, 1979, 141, 4800, 8, 450, 50, 700, 3.5, 3.7,
        sources=f"{_NVIDIA} H200 SXM; 8 × 400 Gb/s; {_MARKET}",
    ),
    Hardware(
        "b200", 2250, 4500, 180, 7700, 8, 900, 50, 1000, 5.0, 5.0,
        sources=f"{_NVIDIA} HGX B200; memory, bandwidth and exponentials: verda.com/blog/gb300-nvl72-architecture; "
        f"8 × 400 Gb/s; {_MARKET}",
    ),
    Hardware(
        "gb200", 2500, 5000, 186, 8000, 72, 900, 50, 1200, 6.0, 5.0,
        sources=f"{_NVIDIA} GB200 NVL72 (rack ÷ 72); 400 Gb/s per device; exponentials as B200; {_GUESS}",
    ),
    Hardware(
        "gb300", 2500, 5000, 279, 8000, 72, 900, 100, 1400, 7.0, 10.7,
        sources=f"{_NVIDIA} GB300 NVL72 and verda.com/blog/gb300-nvl72-architecture; 800 Gb/s per device; {_GUESS}",
    ),
    Hardware(
        "mi300x", 1307, 2615, 192, 5300, 8, 448, 50, 750, 3.0,
        sources="AMD data sheet MI300X: 7 links of 64 GB/s a direction; 8 × 400 Gb/s; price: 2026 lists, rounded",
    ),
    Hardware(
        "ascend-910b", 320, None, 64, 1600, 8, 196, 25, 400, 1.5,
        sources=f"Huawei's figures as reported by third parties (FP16 320 TFLOPS, HCCS 392 GB/s both ways); {_GUESS}",
    ),
    Hardware(
        "rtx-4090", 165.2, 330.3, 24, 1008, 1, 0, 25, 450, 0.5,
        sources="NVIDIA Ada whitepaper, FP32 accumulation; PCIe 4.0 × 16 in practice; price: 2026 lists, rounded",
    ),
    Hardware(
        "rtx-5090", 209.5, 419, 32, 1792, 1, 0, 50, 575, 0.76,
        sources="NVIDIA Blackwell RTX whitepaper, FP32 accumulation; PCIe 5.0 × 16; price: spheron.network, March 2026",
    ),
)  # fmt: skip
SHIPPED = {each.name: each for each in _SHIPPED}


def find(name: str) -> Hardware:
    """A shipped machine by name, `cpu` for this one, measured, or a `.toml` file. Raises BadInput."""
    if name == "cpu":
        return measured()
    if name.endswith(".toml"):
        return read_hardware(Path(name))
    key = name.lower()
    if key not in SHIPPED:
        known = [*SHIPPED, "cpu"]
        raise BadInput(f"--hardware {name!r}: not known{nearest(key, known)}; {', '.join(known)}, or a .toml file")
    return SHIPPED[key]


def read_hardware(path: Path) -> Hardware:
    """A machine from TOML with the keys of `Hardware`; `like = "h100"` takes what is left out from there."""
    try:
        tree: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not TOML: {error}") from None
    like = tree.pop("like", None)
    known = [field.name for field in fields(Hardware)]
    for key, value in tree.items():
        if key not in known:
            raise BadInput(f"{path}: unknown key {key!r}{nearest(key, [*known, 'like'])}")
        wants_text = key in ("name", "sources")
        if isinstance(value, bool) or not isinstance(value, str if wants_text else (int, float)):
            raise BadInput(f"{path}: {key}: must be a {'text' if wants_text else 'number'}, got {value!r}")
        least = 0 if key in ("fast_gb_per_second", "slow_gb_per_second", "usd_per_hour", "watts") else 1e-9
        if not isinstance(value, str) and value < least:
            raise BadInput(f"{path}: {key}: must be {'at least 0' if not least else 'above 0'}, got {value!r}")
    if like is not None:
        return replace(find(str(like)), **{"name": path.stem, "sources": str(path)} | tree)
    optional = {"fp8_tflops": None, "exponentials_per_second": None, "sources": str(path), "name": path.stem}
    missing = [key for key in known if key not in tree and key not in optional]
    if missing:
        raise BadInput(f'{path}: key {missing[0]!r} is missing; like = "h100" takes such from a known machine')
    return Hardware(**optional | tree)


def measured() -> Hardware:
    """This machine: FP32 matmul and copy rates of numpy, which is all that can be known here without torch.

    The trainer measures its own peak, in its own precision, at the start of each run; where that is at hand, put it
    into a TOML file instead.
    """
    import os

    import numpy as np

    def best(work: Any, rounds: int = 4) -> float:
        seconds = []
        for _ in range(rounds):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        return min(seconds[1:])

    size = 1024
    x = np.ones((size, size), dtype=np.float32)
    flops = 2 * size**3 / best(lambda: x @ x)
    long = np.ones(1 << 25, dtype=np.float32)  # 128 MiB: no cache holds it
    there = np.empty_like(long)
    moved = 2 * long.nbytes / best(lambda: np.copyto(there, long))
    # The planner counts two bytes a value, and FP32 has four: half the rate comes to the same.
    moved /= 2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        "cpu", flops / 1e12, None, memory / 2**30, moved / 1e9, 1, 0, 1, 65, 0.1,
        sources="measured here with numpy in FP32; watts and price are assumptions",
    )  # fmt: skip
