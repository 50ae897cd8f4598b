"""What is to be placed on which devices: loads, slots, links, and what is known beside them.

Shapes: ``loads[scenario][layer][expert]``, ``slots[device]``. Devices are numbered node by node.
"""

import hashlib
import json
import math
from dataclasses import dataclass, fields

from dovetail.ir import codec
from dovetail.ir.errors import InputError
from dovetail.ir.expert_slots import (
    Matrix,
    Slots,
    check_counts,
    check_slots,
    require,
    slots_that_fit,
)


@dataclass(frozen=True, slots=True)
class StepModel:
    """What one expert-parallel step costs a device: ``tokens`` enter the layer over all devices
    and choose ``top_k`` experts each; a slot that is hit takes at least ``read_seconds`` (its
    weights are read once) and ``token_seconds`` per token (roofline of an expert's GEMMs)."""

    tokens: int
    top_k: int
    read_seconds: float
    token_seconds: float

    def __post_init__(self) -> None:
        require(self.tokens >= 1 and self.top_k >= 1, "tokens and top_k must be at least 1")
        for name in ("read_seconds", "token_seconds"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name} is {value}, expected >= 0")


@dataclass(frozen=True, slots=True)
class PlacementProblem:
    """What is to be placed and where. Raises InputError for anything that cannot be placed.

    ``loads`` are tokens (or any unit) per scenario, layer and expert. ``slots`` is how many
    experts of one layer each device holds. ``expert_groups`` are equal runs of experts that
    DeepSeek's hierarchical policy keeps on one node.
    """

    loads: tuple[Matrix, ...]
    slots: tuple[int, ...]
    scenarios: tuple[str, ...] = ()
    nodes: int = 1
    expert_groups: int = 1
    transitions: tuple[Matrix, ...] | None = None
    """``[layer][expert][next layer's expert]``: tokens that chose the one, then the other."""
    token_groups: tuple[Matrix, ...] | None = None
    """``[layer][group][expert]``: tokens of a group (known before the layers run: token ids,
    prompts) that chose the expert; groups are placed on devices too."""
    node_cost: float = 1.0
    """Cost of a token that goes to another device of its node, beside ``link_cost``."""
    link_cost: float = 1.0
    """Cost of a token that goes to another node."""
    current: tuple[Slots, ...] | None = None
    """``[layer][device][slot]``: where experts are now."""
    max_copies: int | None = None
    """Most expert weights that may be copied to get from ``current`` to the answer."""
    expert_bytes: int | None = None
    memory: tuple[int, ...] | None = None
    """Bytes that each device has for experts, all layers together."""
    step: StepModel | None = None

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_loads(self)
        _check_flows(self)
        if self.current is not None:
            _check_current(self, self.current)
        elif self.max_copies is not None:
            raise InputError("max_copies needs a current placement to count copies from")
        _check_memory(self)

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return len(self.slots)

    @property
    def layers(self) -> int:
        """How many layers are placed."""
        return len(self.loads[0])

    @property
    def experts(self) -> int:
        """Experts of one layer."""
        return len(self.loads[0][0])

    def digest(self) -> str:
        """Hex sha256 over all fields."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step"}
        data["step"] = codec.encode(self.step)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _check_sizes(problem: PlacementProblem) -> None:
    require(bool(problem.loads) and bool(problem.loads[0]), "loads are empty: no layer to place")
    require(bool(problem.slots), "no devices: expected at least one")
    require(
        min(problem.slots) >= 1, f"slots per device are {problem.slots}, expected at least 1 each"
    )
    experts, total = len(problem.loads[0][0]), sum(problem.slots)
    require(experts >= 1, "loads have no experts")
    require(
        experts <= total,
        f"{experts} experts do not fit in {total} slots ({len(problem.slots)} devices): "
        "each expert needs one; give more slots or devices",
    )
    for name, count, what in (
        ("nodes", len(problem.slots), "devices"),
        ("expert_groups", experts, "experts"),
    ):
        parts = getattr(problem, name)
        require(
            parts >= 1 and count % parts == 0,
            f"{count} {what} do not divide into {parts} {name}: give a divisor of {count}",
        )


def _check_loads(problem: PlacementProblem) -> None:
    names = problem.scenarios
    require(
        not names or len(names) == len(problem.loads),
        f"{len(names)} scenario names for {len(problem.loads)} scenarios of loads",
    )
    for s, scenario in enumerate(problem.loads):
        check_counts(scenario, problem.layers, problem.experts, f"loads of scenario {s}")


def _check_flows(problem: PlacementProblem) -> None:
    layers, experts = problem.layers, problem.experts
    if problem.transitions is not None:
        found = len(problem.transitions)
        require(found == layers - 1, f"{found} transitions for {layers} layers, expected one less")
        for number, matrix in enumerate(problem.transitions):
            check_counts(matrix, experts, experts, f"transitions after layer {number}")
    if problem.token_groups is not None:
        found = len(problem.token_groups)
        require(found == layers, f"token_groups of {found} layers, expected {layers}")
        groups = len(problem.token_groups[0])
        require(groups >= 1, "token_groups have no groups")
        for number, matrix in enumerate(problem.token_groups):
            check_counts(matrix, groups, experts, f"token_groups of layer {number}")
    for name in ("node_cost", "link_cost"):
        value = getattr(problem, name)
        require(math.isfinite(value) and value >= 0, f"{name} is {value}, expected >= 0")


def _check_current(problem: PlacementProblem, current: tuple[Slots, ...]) -> None:
    require(
        len(current) == problem.layers,
        f"current placement has {len(current)} layers, the loads have {problem.layers}",
    )
    for number, layer in enumerate(current):
        check_slots(layer, problem.experts, f"current placement, layer {number}")
        found = tuple(len(row) for row in layer)
        require(
            found == problem.slots,
            f"current placement, layer {number}: slots per device are {found}, "
            f"expected {problem.slots}",
        )
    limit = problem.max_copies
    require(limit is None or limit >= 0, f"max_copies is {limit}, expected >= 0")


def _check_memory(problem: PlacementProblem) -> None:
    if problem.memory is None or problem.expert_bytes is None:
        require(problem.memory is None, "memory is given without expert_bytes")
        return
    require(problem.expert_bytes > 0, f"expert_bytes is {problem.expert_bytes}, expected > 0")
    require(
        len(problem.memory) == problem.devices,
        f"memory of {len(problem.memory)} devices, expected {problem.devices}",
    )
    for device, (memory, slots) in enumerate(zip(problem.memory, problem.slots, strict=True)):
        fit = slots_that_fit(memory, problem.expert_bytes, problem.layers)
        require(
            slots <= fit,
            f"device {device}: {slots} slots in each of {problem.layers} layers need "
            f"{slots * problem.layers * problem.expert_bytes} bytes, it has {memory}; "
            f"at most {fit} slots fit",
        )
