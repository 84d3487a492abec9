"""Which expert lies on which device when some are busier than others (report §3.4, redundant experts; DeepSeek's EPLB).

Busy experts are copied until the busiest copy is as light as can be, and the copies are packed onto devices so that
these carry alike. Where the nodes divide the router's groups, a group stays on one node, so that group-limited routing
keeps tokens there: the hierarchical policy, for prefill on few devices. Otherwise experts may lie anywhere: the global
policy, for decoding on many.

One layer at a time, in plain numbers and without torch. The planner takes from here how many experts a device holds.
No engine of this package moves experts while it serves: it is for the tools that serve across machines, and training
needs none of it, as the router's bias keeps loads even.

E experts · P physical ones, copies counted · experts on a device are P ÷ devices neighbours.
"""

from collections.abc import Sequence

from leanseek.config import BadInput


def place(
    loads: Sequence[float], physical: int, groups: int, nodes: int, devices: int, current: Sequence[int] | None = None
) -> list[int]:
    """loads [E] → the expert of each physical one, [P], device by device and node by node.

    `current`, the placement in force, is kept where it serves these loads as well and keeps groups on nodes as the new
    one would: moving experts costs. The same arguments give the same result. Raises BadInput.
    """
    _check(loads, physical, groups, nodes, devices)
    hierarchical = groups % nodes == 0
    placed = _place(loads, physical, *((groups, nodes) if hierarchical else (1, 1)), devices)
    if current is None:
        return placed
    fits = len(current) == physical and set(current) == set(range(len(loads)))
    if fits and hierarchical:
        fits = groups_per_node(current, len(loads), groups, nodes) <= groups // nodes
    keeps = fits and max(device_loads(current, loads, devices)) <= max(device_loads(placed, loads, devices))
    return list(current) if keeps else placed


def places(experts: int, devices: int) -> int:
    """How many experts each device must hold at least, so that every one lies somewhere."""
    return -(-experts // devices)


def copies(placed: Sequence[int], experts: int) -> list[list[int]]:
    """For each expert the physical ones that are its copies, in order: what a dispatcher chooses among."""
    found: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(placed):
        found[expert].append(slot)
    return found


def device_loads(placed: Sequence[int], loads: Sequence[float], devices: int) -> list[float]:
    """What each device carries when an expert's copies share its load evenly."""
    shares = [load / max(len(slots), 1) for load, slots in zip(loads, copies(placed, len(loads)), strict=True)]
    held = len(placed) // devices
    return [sum(shares[expert] for expert in placed[d * held : (d + 1) * held]) for d in range(devices)]


def unevenness(placed: Sequence[int], loads: Sequence[float], devices: int) -> float:
    """The busiest device's load over the mean, 1 when even: by how much the others wait for it."""
    carried = device_loads(placed, loads, devices)
    return max(carried) * devices / sum(carried) if sum(carried) else 1.0


def groups_per_node(placed: Sequence[int], experts: int, groups: int, nodes: int) -> int:
    """The largest number of groups with an expert on one node."""
    held = len(placed) // nodes
    of_node = (placed[n * held : (n + 1) * held] for n in range(nodes))
    return max(len({expert * groups // experts for expert in node}) for node in of_node)


def _place(loads: Sequence[float], physical: int, groups: int, nodes: int, devices: int) -> list[int]:
    size = len(loads) // groups
    by_group = [sum(loads[g * size : (g + 1) * size]) for g in range(groups)]
    placed = []
    for node in _pack(by_group, nodes):
        experts = [group * size + i for group in node for i in range(size)]
        slots = _replicate([loads[expert] for expert in experts], physical // nodes)
        shares = [loads[experts[local]] / slots.count(local) for local in slots]
        placed += [experts[slots[slot]] for device in _pack(shares, devices // nodes) for slot in device]
    return placed


def _pack(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Equally many items for each pack: from the heaviest on, to the lightest pack that has room."""
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    held: list[list[int]] = [[] for _ in range(packs)]
    carried = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(packs) if len(held[p]) < room), key=lambda p: carried[p])
        held[pack].append(item)
        carried[pack] += weights[item]
    return held


def _replicate(loads: Sequence[float], physical: int) -> list[int]:
    """Each expert once and then, copy by copy, the one whose copies carry most: the busiest copy becomes lightest."""
    slots, count = list(range(len(loads))), [1] * len(loads)
    while len(slots) < physical:
        busiest = max(range(len(loads)), key=lambda i: loads[i] / count[i])
        slots.append(busiest)
        count[busiest] += 1
    return slots


def _check(loads: Sequence[float], physical: int, groups: int, nodes: int, devices: int) -> None:
    experts = len(loads)
    if not all(0 <= load < float("inf") for load in loads):
        raise BadInput("placement: a load is negative or no number")
    for a, b, what in (
        (experts, groups, f"{groups} groups do not divide {experts} experts"),
        (devices, nodes, f"{nodes} nodes do not divide {devices} devices"),
        (physical, devices, f"{devices} devices do not divide {physical} physical experts"),
    ):
        if b < 1 or a % b:
            raise BadInput(f"placement: {what}")
    if physical < experts:
        raise BadInput(f"placement: {physical} physical experts are fewer than the {experts} experts")
