"""Which device holds which expert: the answer of `dovetail place`, as a file.

Shapes, per layer: ``experts[device][slot]`` and ``shares[device][slot]``. Devices are numbered
node by node.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dovetail.ir import codec
from dovetail.ir.expert_problem import PlacementProblem, StepModel
from dovetail.ir.expert_slots import Matrix, Slots, check_shares, check_slots, require
from dovetail.ir.record_file import fields, load_record, write_whole

__all__ = [
    "VERSION",
    "ExpertPlacement",
    "LayerPlacement",
    "Objective",
    "PlacementCertificate",
    "PlacementProblem",
    "StepModel",
    "load_placement",
    "save_placement",
]

VERSION = 1
Objective = Literal["max_load", "worst_ratio", "crossing_cost", "copies", "seconds"]


@dataclass(frozen=True, slots=True)
class PlacementCertificate:
    """What was proved of one ``layer`` (None: of the answer as a whole): the ``objective`` that was
    minimised reached ``value``, and no answer to the same question is below ``bound``."""

    objective: Objective
    layer: int | None
    value: float
    bound: float
    status: Literal["optimal", "feasible"]

    @property
    def gap(self) -> float:
        """How far the value may be above the best, as a share of the value (0: proved best)."""
        return max(0.0, (self.value - self.bound) / self.value) if self.value > 0 else 0.0


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """One layer: the expert in every slot of every device, and the share of that expert's tokens
    that the slot serves. Shares of one expert sum to 1; a slot of share 0 is a spare that the
    step does not read."""

    experts: Slots
    shares: Matrix

    def homes(self, expert: int) -> tuple[tuple[int, int, float], ...]:
        """``(device, slot, share)`` of every replica of ``expert``."""
        return tuple(
            (d, s, self.shares[d][s])
            for d, row in enumerate(self.experts)
            for s, e in enumerate(row)
            if e == expert
        )

    def device_loads(self, loads: Sequence[float]) -> tuple[float, ...]:
        """Load of every device when the experts carry ``loads[expert]``."""
        return tuple(
            math.fsum(loads[e] * share for e, share in zip(row, shares, strict=True))
            for row, shares in zip(self.experts, self.shares, strict=True)
        )


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """An answer: where every expert of every layer is, who serves what share of its tokens, and
    what was proved. ``problem`` is the digest of the problem it answers."""

    version: int
    problem: str
    policy: str
    knobs: Mapping[str, bool | int | float | str]
    experts: int
    nodes: int
    layers: tuple[LayerPlacement, ...]
    certificates: tuple[PlacementCertificate, ...]
    group_devices: tuple[int, ...] = ()
    """The device that each token group of the problem is sent to, if it had any."""
    notes: tuple[str, ...] = ()
    """What a reader should know: why a policy was chosen, what a solver could not do."""

    def __post_init__(self) -> None:
        for number, layer in enumerate(self.layers):
            require(bool(layer.experts), f"layer {number}: no devices")
            check_slots(layer.experts, self.experts, f"layer {number}")
            check_shares(layer.experts, layer.shares, self.experts, f"layer {number}")
        require(bool(self.layers), "a placement needs at least one layer")
        shapes = {tuple(len(row) for row in layer.experts) for layer in self.layers}
        require(len(shapes) == 1, "layers differ in devices or slots, expected one shape")
        require(
            self.nodes >= 1 and self.devices % self.nodes == 0,
            f"{self.devices} devices do not divide into {self.nodes} nodes",
        )

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return len(self.layers[0].experts)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of every device, per layer."""
        return tuple(len(row) for row in self.layers[0].experts)

    def digest(self) -> str:
        """Hex sha256 over all fields."""
        return codec.digest(self)


def save_placement(placement: ExpertPlacement, path: Path) -> None:
    """Write the placement, one line a field; a crash leaves either the old file or the new one."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in fields(placement).items()]
    write_whole("{\n" + ",\n".join(lines) + "\n}\n", path)


def load_placement(path: Path) -> ExpertPlacement:
    """Read a placement; raises PlanError on a file that is missing, malformed or altered."""
    return load_record(path, ExpertPlacement, VERSION, "placement", "dovetail place")
