"""What a placement does to loads: `placement, loads, where experts were -> numbers and words`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.doors.load_files import LoadFile
from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import ExpertPlacement, LayerPlacement, Objective
from dovetail.ir.expert_rows import ExpertRows
from dovetail.ir.expert_slots import Slots, contiguous, count_copies
from dovetail.passes.expert_traffic import RowSizes, expert_traffic

Floats = NDArray[np.float64]
EVEN = 1.005
"""A layer whose heaviest device is within this many times the mean counts as even."""
OBJECTIVES: Mapping[Objective, str] = {
    "max_load": "the heaviest device's load",
    "worst_ratio": "the heaviest device's load in the worst scenario",
    "crossing_cost": "tokens that change devices",
    "copies": "copies of experts",
    "seconds": "the seconds of a step, not the load",
}
LISTED = 5
"""Layers that are named one by one in the text."""


@dataclass(frozen=True, slots=True, eq=False)
class Balance:
    """Device loads of a scenario before and after, ``[layers, devices]`` in units of the mean."""

    scenario: str
    before: Floats
    after: Floats

    def as_dict(self) -> dict[str, Any]:
        """Balancedness (mean over heaviest device), mean and worst of the layers."""
        pairs = (("before", self.before), ("after", self.after))
        return {"scenario": self.scenario} | {
            name: {"mean": float((1 / loads.max(1)).mean()), "worst": float(1 / loads.max())}
            for name, loads in pairs
        }


@dataclass(frozen=True, slots=True)
class Binds:
    """What keeps a layer's heaviest device above the mean: ``load`` times the mean, its bound where
    proved, and the expert that weighs most there with its share of one device's mean load."""

    layer: int
    scenario: str
    device: int
    load: float
    bound: float | None
    expert: int
    expert_load: float
    replicas: int

    def text(self) -> str:
        """One sentence."""
        where = f"layer {self.layer}: device {self.device} carries {self.load:.3f} times the mean"
        if self.scenario:
            where += f" in scenario {self.scenario}"
        if self.bound is not None and self.load <= self.bound * (1 + 1e-6):
            return f"{where}, and no placement in these slots is below that (proved)"
        most = f"expert {self.expert} alone is {self.expert_load:.2f} devices' worth"
        held = "one device" if self.replicas == 1 else f"{self.replicas} slots"
        if self.expert_load > 1:
            return f"{where}; {most} and is in {held}: more slots would let it be replicated"
        return f"{where}; {most}, in {held}"


@dataclass(frozen=True, slots=True, eq=False)
class PlacementReport:
    """Everything that `dovetail place` says of a placement."""

    placement: ExpertPlacement
    balances: tuple[Balance, ...]
    copies: tuple[int, ...]
    before: str
    crossed: Mapping[str, tuple[float, float]]
    binds: tuple[Binds, ...]
    layers: tuple[int, ...]
    """The layers' numbers in the model."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        proved = [c.status == "optimal" for c in self.placement.certificates]
        return {
            "policy": self.placement.policy,
            "objectives": sorted({c.objective for c in self.placement.certificates}),
            "devices": self.placement.devices,
            "slots": sum(self.placement.slots),
            "experts": self.placement.experts,
            "layers": len(self.placement.layers),
            "before": self.before,
            "balance": [balance.as_dict() for balance in self.balances],
            "copies": sum(self.copies),
            "copies_by_layer": list(self.copies),
            "crossed": {k: {"before": b, "after": a} for k, (b, a) in self.crossed.items()},
            "certificates": {
                "proved": sum(proved),
                "of": len(proved),
                "largest_gap": max((c.gap for c in self.placement.certificates), default=None),
            },
            "binds": [each.text() for each in self.binds],
            "notes": list(self.placement.notes),
        }

    def text(self) -> str:
        """Lines for a person."""
        data = self.as_dict()
        lines = [
            f"policy        {data['policy']}, minimises "
            f"{' and '.join(OBJECTIVES[name] for name in data['objectives']) or 'nothing proved'}",
            f"placed        {data['layers']} layers of {data['experts']} experts in "
            f"{data['slots']} slots on {data['devices']} devices",
        ]
        for balance in data["balance"]:
            was, now = balance["before"], balance["after"]
            name = f" in {balance['scenario']}" if len(self.balances) > 1 else ""
            lines.append(
                f"balance       {now['mean']:.4f} mean, {now['worst']:.4f} worst layer{name} "
                f"({self.before}: {was['mean']:.3f}, {was['worst']:.3f})"
            )
        lines.append(f"copies        {data['copies']} expert weights differ from {self.before}")
        for way, (was, now) in self.crossed.items():
            lines.append(
                f"crossing      {now:.1%} of choices leave their device with {way} ({was:.1%})"
            )
        lines += _certificate_lines(data["certificates"])
        lines += [f"binds         {text}" for text in data["binds"]]
        return "\n".join([*lines, *(f"note          {note}" for note in data["notes"])])


def _certificate_lines(found: Mapping[str, Any]) -> list[str]:
    if not found["of"]:
        return []
    gap = found["largest_gap"]
    return [f"certificates  {found['proved']} of {found['of']} proved best, largest gap {gap:.2%}"]


def report(
    placement: ExpertPlacement, files: Sequence[LoadFile], current: tuple[Slots, ...] | None
) -> PlacementReport:
    """Hold a placement against loads. ``current`` is where experts were, without it in order.

    Raises InputError if the loads are of another model.
    """
    before = _before(placement, current)
    balances = tuple(_balance(placement, before, each) for each in files)
    slots = tuple(layer.experts for layer in before.layers)
    after = tuple(layer.experts for layer in placement.layers)
    return PlacementReport(
        placement,
        balances,
        tuple(count_copies(was, now) for was, now in zip(slots, after, strict=True)),
        "in order" if current is None else "before, replicas split evenly",
        _crossed(placement, before, files),
        _binding(placement, files, balances),
        files[0].layers if files else tuple(range(len(placement.layers))),
    )


def _before(placement: ExpertPlacement, current: tuple[Slots, ...] | None) -> ExpertPlacement:
    """Where experts were, their tokens split evenly over replicas."""
    trivial = contiguous(placement.experts, placement.slots)
    slots = current or (trivial,) * len(placement.layers)
    layers = []
    for rows in slots:
        counts = np.bincount([e for row in rows for e in row], minlength=placement.experts)
        shares = tuple(tuple(1 / int(counts[e]) for e in row) for row in rows)
        layers.append(LayerPlacement(rows, shares))
    found = tuple(layers)
    return ExpertPlacement(
        placement.version, "", "before", {}, placement.experts, placement.nodes, found, ()
    )


def check_loads(placement: ExpertPlacement, file: LoadFile) -> None:
    """Raise InputError unless the loads are of the placement's layers and experts."""
    found, expected = file.loads.shape, (len(placement.layers), placement.experts)
    if found != expected:
        raise InputError(
            f"{file.name} has loads of {found[0]} layers and {found[1]} experts, the placement is "
            f"for {expected[0]} and {expected[1]}; give loads of the same model"
        )


def _balance(placement: ExpertPlacement, before: ExpertPlacement, file: LoadFile) -> Balance:
    check_loads(placement, file)
    loads = [
        np.array(
            [la.device_loads(row) for la, row in zip(p.layers, file.loads.tolist(), strict=True)]
        )
        for p in (before, placement)
    ]
    mean = np.maximum(loads[0].mean(axis=1, keepdims=True), 1e-300)
    return Balance(file.name, loads[0] / mean, loads[1] / mean)


def _crossed(
    placement: ExpertPlacement, before: ExpertPlacement, files: Sequence[LoadFile]
) -> dict[str, tuple[float, float]]:
    """The share of choices served by another device than the token is on, by way."""
    traces = [file.trace for file in files if file.trace is not None]
    found = {}
    for way, name in (("two", "two all-to-alls"), ("one", "one (ExFlow)")):
        pairs = [
            [
                expert_traffic(t, p, _counts_only(t.layers), "one" if way == "one" else "two")
                for p in (before, placement)
            ]
            for t in traces
        ]
        if pairs:
            means = np.mean([[one.crossed for one in pair] for pair in pairs], axis=0)
            found[name] = (float(means[0]), float(means[1]))
    return found


def _counts_only(layers: Sequence[int]) -> RowSizes:
    return RowSizes({layer: ExpertRows(1, 1, 1) for layer in layers}, (0,) * (layers[-1] + 1), 0)


def _binding(
    placement: ExpertPlacement, files: Sequence[LoadFile], balances: Sequence[Balance]
) -> tuple[Binds, ...]:
    """The layers that are not even, heaviest first."""
    bounds = {
        certificate.layer: certificate.bound / certificate.value
        for certificate in placement.certificates
        if certificate.objective in ("max_load", "worst_ratio") and certificate.value > 0
    }
    found = []
    for number, layer in enumerate(placement.layers if files else ()):
        worst = max(range(len(files)), key=lambda s: float(balances[s].after[number].max()))
        loads = balances[worst].after[number]
        device, load = int(loads.argmax()), float(loads.max())
        if load <= EVEN:
            continue
        tokens = files[worst].loads[number] / files[worst].loads[number].sum() * len(loads)
        expert = max(layer.experts[device], key=lambda e: float(tokens[e]))
        name = files[worst].name if len(files) > 1 else ""
        bound = load * bounds[number] if number in bounds else None
        replicas = len(layer.homes(expert))
        found.append(
            Binds(
                files[worst].layers[number],
                name,
                device,
                load,
                bound,
                expert,
                float(tokens[expert]),
                replicas,
            )
        )
    return tuple(sorted(found, key=lambda each: -each.load)[:LISTED])
