"""What serving takes: tokens per second and dollars per million tokens of prefill and decode (report §3.4).

Each device takes its own texts through attention, the experts are spread over all of them, and two micro-batches
overlap so that one computes while the other's tokens travel (report §3.4). Loads are even and the machines full: what
comes out is what a unit reaches, not the mean of a day. C latent width · R rotary width.
"""

from dataclasses import dataclass

from leanseek.config import BadInput, ModelConfig
from leanseek.parallel.placement import places
from leanseek.plan.count import cache_bytes_per_token, parameters, pieces
from leanseek.plan.estimate import EXCHANGE_UNITS, MATMUL, MEMORY, Stack, matmuls, piece_times
from leanseek.plan.hardware import Hardware
from leanseek.plan.layout import Layout, Precision
from leanseek.plan.memory import RESERVED

ABSORBED = 0.67  # of BF16 peak: FlashMLA's dense decode, 660 TFLOPS on an H800
CACHE_READ = 0.90  # of memory bandwidth: its 3,000 of 3,350 GB/s
SMALL_MESSAGES = 0.78  # of the slow links: DeepEP's low-latency kernels, 39 of 50 GB/s from 128 devices on
PREFILL_TOKENS = 16384  # a device's micro-batch, as DeepSeek's published profile has it


@dataclass(frozen=True)
class Serving:
    """Per device; prices in US dollars per million tokens."""

    tokens_per_second: float
    usd_per_million: float
    batch: int  # texts, or tokens in prefill, that a device works on at a time
    tokens_per_second_per_text: float
    bound: str  # what holds it back


def prefill(
    model: ModelConfig, hardware: Hardware, stack: Stack, gpus: int = 32, prompt: int = 4096, cached: float = 0.0
) -> Serving:
    """Tokens that go in, those found in a cache (the share `cached`) included."""
    precision: Precision = "fp8" if hardware.fp8_tflops else "bf16"
    micro = max(1, PREFILL_TOKENS // prompt)
    layout = Layout(
        gpus, ep=_spread(model, gpus), micro_batch=micro, length=prompt, precision=precision, dispatch_bytes=1
    )  # fmt: skip
    main = [
        piece for piece in pieces(model) if piece not in ("mtp", "head")
    ]  # of a prompt only the last token has logits
    times = [piece_times(model, layout, hardware, piece) for piece in main]
    moving = layout.ep > hardware.domain
    computing = sum(each.forward for each in times) / stack.efficiency / (1 - EXCHANGE_UNITS if moving else 1)
    exchange = sum(each.exchange_forward for each in times)
    seconds = max(computing, exchange)
    rate = layout.tokens_per_rank / seconds / (1 - cached)
    bound = "computing" if computing >= exchange else "all-to-all"
    return Serving(rate, hardware.usd_per_hour / 3600 / rate * 1e6, layout.tokens_per_rank, rate, bound)


def decode(
    model: ModelConfig, hardware: Hardware, stack: Stack, gpus: int = 144, context: int = 4989, speed: float = 20.0
) -> Serving:
    """Tokens that come out when every text gets at least `speed` tokens a second. Raises BadInput when none can."""
    weights = _weights_per_device(model, hardware, gpus)
    room = (1 - RESERVED) * hardware.memory_gib * 2**30 - weights
    most = int(room // (context * cache_bytes_per_token(model)))
    if most < 1:
        raise BadInput(
            f"serving on {gpus} × {hardware.name}: weights take {weights / 1e9:.0f} GB of "
            f"{hardware.memory_gib:.0f} and leave no room for a text of {context} tokens: take more devices"
        )
    if _decode_seconds(model, hardware, stack, gpus, context, 1)[0] > 1 / speed:
        raise BadInput(
            f"serving on {gpus} × {hardware.name}: not even one text a device gets {speed:g} tokens a second"
        )
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if _decode_seconds(model, hardware, stack, gpus, context, middle)[0] <= 1 / speed:
            low = middle
        else:
            high = middle - 1
    seconds, bound = _decode_seconds(model, hardware, stack, gpus, context, low)
    rate = low / seconds
    return Serving(
        rate, hardware.usd_per_hour / 3600 / rate * 1e6, low, 1 / seconds, "memory" if low == most else bound
    )


def _decode_seconds(
    model: ModelConfig, hardware: Hardware, stack: Stack, gpus: int, context: int, batch: int
) -> tuple[float, str]:
    """Seconds of one token of each of a device's `batch` texts, and what they are spent on."""
    precision: Precision = "fp8" if hardware.fp8_tflops else "bf16"
    width = 1 if precision == "fp8" else 2
    bandwidth = hardware.memory_gb_per_second * 1e9
    ep = _spread(model, gpus)
    computing = exchange = 0.0
    pairs = batch * context
    heads, latent, rotary = model.num_attention_heads, model.kv_lora_rank, model.qk_rope_head_dim
    attention = max(
        2 * pairs * heads * (2 * latent + rotary) / (hardware.peak("bf16") * ABSORBED),
        pairs * (latent + rotary) * 2 / (bandwidth * CACHE_READ),
    )
    for piece in pieces(model):
        if piece == "mtp":
            continue
        for m in matmuls(model, piece, ep=ep):
            low = precision if m.low != "never" else "bf16"
            one = width if m.low != "never" else 2
            flops = 2 * batch * m.rows * m.k * m.n
            # Of the experts on a device those are read that some token of the whole unit chose: with any load, all.
            computing += max(flops / (hardware.peak(low) * MATMUL), m.groups * m.k * m.n * one / (bandwidth * MEMORY))
        if piece in ("dense", "moe"):
            computing += attention
        if piece == "moe" and ep > 1:
            k = model.num_experts_per_tok * (1 - 1 / ep)
            if ep > hardware.domain or not hardware.fast_gb_per_second:
                link = hardware.slow_gb_per_second * SMALL_MESSAGES
            else:
                link = hardware.fast_gb_per_second * SMALL_MESSAGES
            exchange += batch * k * model.hidden_size * 3 / (link * 1e9)  # there in FP8, back in BF16
    computing /= stack.efficiency
    return (computing, "computing and memory") if computing >= exchange else (exchange, "all-to-all")


def _spread(model: ModelConfig, gpus: int) -> int:
    """Over how many devices the experts count as spread. Where they do not go up evenly, each device holds a whole
    number all the same, and copies of busy ones fill the places that are left (`parallel.placement`)."""
    return model.n_routed_experts // places(model.n_routed_experts, gpus)


def _weights_per_device(model: ModelConfig, hardware: Hardware, gpus: int) -> float:
    count = parameters(model)
    width = 1.03 if hardware.fp8_tflops else 2.0
    experts = count.routed_experts / _spread(model, gpus) * width
    whole = count.total - count.routed_experts - count.embedding - count.head
    return experts + whole * width + 2.0 * (count.embedding + count.head)
