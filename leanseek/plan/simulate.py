"""Past these machines: a run over thousands of devices as discrete events, with stragglers, failures and checkpoints.

A failure anywhere stops all: what was done since the last checkpoint is lost, a spare takes over, everybody loads the
checkpoint and goes on. Goodput is the share of the time that brought the run forward. No torch; draws from a seed.
"""

import math
import random
from dataclasses import dataclass
from statistics import NormalDist

# Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (Grattafiori et al., 2024, §3.3.4).
DEVICE_MTBF_HOURS = 16384 * 54 * 24 / 419
RESTART_SECONDS = 600.0  # to notice, to replace, to start all processes and load; an assumption
STORE_GB_PER_SECOND = 500.0  # a cluster's file system takes so much; 3FS reads 6,600 (published), writing is dearer
JITTER = 0.01  # standard deviation of one device's time for a step, of that time; an assumption


@dataclass(frozen=True)
class Cluster:
    devices: int
    step_seconds: float  # as estimated, where every device is alike
    checkpoint_seconds: float
    restart_seconds: float = RESTART_SECONDS
    device_mtbf_hours: float = DEVICE_MTBF_HOURS
    jitter: float = JITTER

    @property
    def mtbf_seconds(self) -> float:
        """Mean time between failures of the whole cluster."""
        return self.device_mtbf_hours * 3600 / self.devices

    @property
    def straggling(self) -> float:
        """A step lasts as long as its slowest device: by how much longer than the mean, on average (Blom's formula)."""
        if self.devices == 1:
            return 1.0
        return 1 + self.jitter * NormalDist().inv_cdf((self.devices - 0.375) / (self.devices + 0.25))


@dataclass(frozen=True)
class Simulated:
    goodput: float  # useful seconds, at the speed without stragglers, ÷ all
    failures: int
    lost_seconds: float  # work done twice
    seconds: float


def checkpoint_seconds(state_bytes: float, store_gb_per_second: float = STORE_GB_PER_SECOND) -> float:
    """To write weights and optimizer states, all devices together."""
    return state_bytes / (store_gb_per_second * 1e9)


def run(cluster: Cluster, steps: int, interval_steps: int, seed: int = 0) -> Simulated:
    """Trains so many steps, with a checkpoint after every `interval_steps`, from failure to failure."""
    dice = random.Random(seed)
    step = cluster.step_seconds * cluster.straggling
    now = lost = 0.0
    done = failures = 0  # `done` is in the last checkpoint
    fails_at = dice.expovariate(1 / cluster.mtbf_seconds)
    while done < steps:
        block = min(interval_steps, steps - done)
        takes = block * step + cluster.checkpoint_seconds
        if now + takes <= fails_at:
            now, done = now + takes, done + block
            continue
        lost += fails_at - now
        failures += 1
        now = fails_at + cluster.restart_seconds
        fails_at = now + dice.expovariate(1 / cluster.mtbf_seconds)
        if failures > 1_000_000:
            break  # at this rate it never ends
    return Simulated(done * cluster.step_seconds / now, failures, lost, now)


def young(cluster: Cluster) -> float:
    """Young's interval in seconds, √(2 · checkpoint · MTBF): where nothing else is known, close to the best."""
    return math.sqrt(2 * cluster.checkpoint_seconds * cluster.mtbf_seconds)


def best_interval(cluster: Cluster, days: float = 30.0, seed: int = 0) -> tuple[int, Simulated]:
    """The interval, in steps, of the best goodput over a run of about so many days; tried around Young's."""
    step = cluster.step_seconds * cluster.straggling
    guess = max(1.0, young(cluster) / step)
    steps = max(1, round(days * 86400 / step))
    tries = sorted({max(1, round(guess * 2 ** (i / 2))) for i in range(-5, 6)})
    runs = {each: run(cluster, steps, each, seed) for each in tries}
    best = max(runs, key=lambda each: runs[each].goodput)
    return best, runs[best]


def table(
    step_seconds: float, state_bytes: float, devices: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
) -> list[tuple[Cluster, int, Simulated]]:
    """From 2,048 devices up, each with its best interval; a step lasts equally long, on more data."""
    rows = []
    for count in devices:
        cluster = Cluster(count, step_seconds, checkpoint_seconds(state_bytes))
        rows.append((cluster, *best_interval(cluster)))
    return rows
