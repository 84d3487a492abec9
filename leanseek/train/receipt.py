"""The bill of a run: what it took, what it cost here, and what the same FLOPs would cost where V3 was trained."""

from pathlib import Path
from typing import Any

from leanseek.checkpoint import write_json
from leanseek.config import Config
from leanseek.plan.count import h800_cost, parameters
from leanseek.train.log import MEASURES
from leanseek.train.loop import Ending, Progress


def write_receipt(
    run: Path, config: Config, progress: Progress, ending: Ending, devices: int = 1, measure: str = "bpb"
) -> dict[str, Any]:
    """Writes `receipt.json`; lost and skipped work is in flops, seconds and cost, not in tokens."""
    counted = parameters(config.model)
    hours = progress.seconds / 3600 * devices
    h800_hours, h800_usd = h800_cost(progress.flops)
    receipt = {
        "tokens": progress.tokens,
        "params_total": counted.total,
        "params_mtp": counted.mtp,
        "params_activated": counted.activated,
        "flops": progress.flops,
        "seconds": progress.seconds,
        "cpu_seconds": progress.cpu_seconds,
        "device_hours": hours,
        "cost_usd": hours * config.cost.usd_per_device_hour,
        "bpb": None,
        measure: progress.bpb,
        "device": config.cost.device,
        "usd_per_device_hour": config.cost.usd_per_device_hour,
        "h800_hours": h800_hours,
        "h800_usd": h800_usd,
        "steps": progress.step,
        "skipped_steps": progress.skipped_steps,
        "ended": ending,
    }
    write_json(run / "receipt.json", receipt)
    return receipt


def summed(receipts: list[dict[str, Any]]) -> dict[str, Any]:
    """The bill of several stages of one model: what was spent, added up; the bpb is the first one's, of plain text."""
    spent = ("tokens", "flops", "seconds", "cpu_seconds", "device_hours", "cost_usd", "h800_hours", "h800_usd")
    total = {key: sum(receipt[key] for receipt in receipts) for key in (*spent, "steps", "skipped_steps")}
    return receipts[-1] | total | {"bpb": receipts[0]["bpb"]}


def printed(receipt: dict[str, Any]) -> str:
    """The receipt as lines for people."""
    r = receipt
    rows = [
        ("tokens", f"{r['tokens']:,}"),
        (
            "parameters",
            f"{r['params_total']:,} and {r['params_mtp']:,} for MTP; {r['params_activated']:,} activated per token",
        ),
        ("compute", f"{r['flops']:.3g} FLOPs"),
        ("time", f"{r['seconds'] / 60:.1f} minutes, {r['cpu_seconds'] / 60:.1f} CPU-minutes"),
        ("cost", f"${r['cost_usd']:.4f} on {r['device']} at ${r['usd_per_device_hour']:g} per hour"),
        (
            "same on an H800",
            f"{r['h800_hours'] * 3600:.3g} seconds, ${r['h800_usd']:.3g} at V3's own rate and $2 per hour",
        ),
        ("validation", _validated(r)),
    ]
    if r["skipped_steps"]:
        rows.append(("skipped", f"{r['skipped_steps']} non-finite steps"))
    return "\n".join(f"  {name:<16} {value}" for name, value in rows)


def _validated(receipt: dict[str, Any]) -> str:
    told = [f"{receipt[key]:.4f} {words}" for key, words in MEASURES.items() if receipt.get(key) is not None]
    return " and ".join(told) or "none"
