"""The bill, stage by stage: pre-training, long context, instruction, LoRA, GRPO (report table 1, §4.3, §5).

Every stage is a rate (tokens per second and device, from `estimate` or `serving`) and a number of tokens; hours, days,
energy and money follow. A cluster is billed whole, whatever share of it works.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from leanseek.config import BadInput, Config, ModelConfig
from leanseek.plan.estimate import RANGE, Estimate, Stack, estimate
from leanseek.plan.hardware import Hardware
from leanseek.plan.layout import Layout, wrong_with
from leanseek.plan.serving import decode

# A data centre draws this much for each watt of its devices: hosts, network, cooling (an assumption; a DGX H100 draws
# 10.2 kW for eight devices of 700 W, and cooling a tenth more).
OVERHEAD = 1.9


@dataclass(frozen=True)
class Stage:
    name: str
    tokens: float
    tokens_per_second: float  # per device
    gpus: int
    hardware: Hardware
    note: str = ""

    @property
    def device_hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600

    @property
    def days(self) -> float:
        return self.device_hours / self.gpus / 24

    @property
    def usd(self) -> float:
        return self.device_hours * self.hardware.usd_per_hour

    @property
    def kwh(self) -> float:
        return self.device_hours * self.hardware.watts * OVERHEAD / 1000

    def range_usd(self) -> tuple[float, float]:
        """Low and high, with the spread of the validation rows."""
        return self.usd * (1 - RANGE), self.usd * (1 + RANGE)

    def row(self) -> dict[str, object]:
        return {
            "stage": self.name,
            "tokens": self.tokens,
            "tokens_per_second_per_device": self.tokens_per_second,
            "gpu_hours": self.device_hours,
            "days": self.days,
            "cost_usd": self.usd,
            "cost_usd_range": list(self.range_usd()),
            "kwh": self.kwh,
            "note": self.note,
        }


def pretraining(got: Estimate, tokens: float) -> Stage:
    return Stage("pre-training", tokens, got.tokens_per_second, got.layout.gpus, got.hardware)


def extension(model: ModelConfig, got: Estimate, stack: Stack, lengths: Mapping[int, float]) -> list[Stage]:
    """A stage for each longer length, with its tokens; context-parallel ranks keep each rank's share of a sequence."""
    stages = []
    for length, tokens in lengths.items():
        layout = lengthened(got.layout, length)
        longer = model.model_copy(update={"max_position_embeddings": max(length, model.max_position_embeddings)})
        if wrong_with(layout, longer):
            raise BadInput(f"length {length}: mesh {layout.named()}: {wrong_with(layout, longer)}")
        rate = estimate(longer, layout, got.hardware, stack).tokens_per_second
        note = f"cp {layout.cp}"
        stages.append(Stage(f"extension to {length // 1024}K", tokens, rate, layout.gpus, got.hardware, note))
    return stages


def lengthened(layout: Layout, length: int) -> Layout:
    """The same step's tokens in longer sequences: cp grows with the length, the batch shrinks with it."""
    times = length // layout.length
    return replace(layout, length=length, cp=layout.cp * times, batch=layout.batch // times)


def instruction(got: Estimate, samples: float, mean_length: float, epochs: float = 2) -> Stage:
    """SFT over packed samples, at the pre-training rate."""
    tokens = samples * mean_length * epochs
    return Stage("instruction (SFT)", tokens, got.tokens_per_second, got.layout.gpus, got.hardware)


def lora(model: ModelConfig, got: Estimate, stack: Stack, tokens: float) -> Stage:
    """The same tokens with frozen weights: no gradients of theirs are computed, shared or kept."""
    rate = estimate(model, replace(got.layout, adapters=True), got.hardware, stack).tokens_per_second
    return Stage("LoRA", tokens, rate, got.layout.gpus, got.hardware)


def grpo(
    model: ModelConfig,
    got: Estimate,
    stack: Stack,
    prompts: float,
    group: int = 16,
    prompt: int = 512,
    answer: int = 1024,
) -> list[Stage]:
    """Reinforcement learning: answers are rolled out, then learnt from, prompts included. Raises BadInput.

    Training takes a forward and a backward pass with the policy, and a forward pass with the reference: 4/3 of a
    training step for each token.
    """
    unit = min(got.layout.gpus, 144)
    rate = decode(model, got.hardware, stack, unit, prompt + answer // 2).tokens_per_second
    texts = prompts * group
    gpus, hardware = got.layout.gpus, got.hardware
    return [
        Stage("GRPO, rollout", texts * answer, rate, gpus, hardware, f"groups of {group}, units of {unit} devices"),
        Stage("GRPO, training", texts * (prompt + answer), got.tokens_per_second / (4 / 3), gpus, hardware),
    ]


def per_billion(model: ModelConfig, got: Estimate, stack: Stack) -> list[Stage]:
    """Every other stage on the same cluster, for a billion tokens each, where the cluster can do it."""
    billion = 1e9
    stages = [
        Stage("SFT", billion, got.tokens_per_second, got.layout.gpus, got.hardware),
        lora(model, got, stack, billion),
    ]
    try:
        rollout, training = grpo(model, got, stack, prompts=billion / 16 / 1024)
    except BadInput:  # its answers do not fit into the cluster
        return stages
    return [*stages, rollout, training]


# The report gives the lengths, batches and steps of its extension (§4.3) and the number of its instructions (§5.1);
# their length, and everything about the size of its RL, are our assumptions.
V3_EXTENSION = {32768: 1920 * 32768 * 1000, 131072: 480 * 131072 * 1000}
V3_INSTRUCTIONS, ASSUMED_LENGTH = 1.5e6, 2048
ASSUMED_PROMPTS = 200e3


def v3_stages(config: Config, got: Estimate, stack: Stack) -> list[Stage]:
    """All of DeepSeek-V3: 14.8T tokens, 32K and 128K, instruction and RL."""
    model = config.model
    return [
        pretraining(got, config.train.tokens),
        *extension(model, got, stack, V3_EXTENSION),
        instruction(got, V3_INSTRUCTIONS, ASSUMED_LENGTH),
        *grpo(model, got, stack, ASSUMED_PROMPTS),
    ]
