"""The checker of expert placements: what an answer must satisfy, recomputed from the problem.

It shares no code with the solvers; bounds that need a solver are only held against the value.
"""

import math
from itertools import pairwise

from dovetail.ir.errors import VerifyError
from dovetail.ir.expert_placement import (
    ExpertPlacement,
    LayerPlacement,
    PlacementCertificate,
    PlacementProblem,
)
from dovetail.ir.expert_slots import count_copies

_SLACK = 1e-6


def verify_placement(placement: ExpertPlacement, problem: PlacementProblem) -> None:
    """Raise VerifyError with everything that is wrong with ``placement`` as an answer to
    ``problem``; shapes, shares and slots within it are checked when it is made."""
    found = _shape_faults(placement, problem)
    if not found:
        found += _limit_faults(placement, problem)
        for certificate in placement.certificates:
            found += _certificate_faults(certificate, placement, problem)
    if found:
        raise VerifyError("placement does not answer the problem: " + "; ".join(found))


def _shape_faults(placement: ExpertPlacement, problem: PlacementProblem) -> list[str]:
    found = []
    for what, has, wants in (
        ("layers", len(placement.layers), problem.layers),
        ("experts", placement.experts, problem.experts),
        ("slots per device", placement.slots, problem.slots),
        ("nodes", placement.nodes, problem.nodes),
        ("token groups", len(placement.group_devices), _groups(placement, problem)),
    ):
        if has != wants:
            found.append(f"{what}: found {has}, expected {wants}")
    if placement.problem != problem.digest():
        found.append(
            f"it answers problem {placement.problem[:12]}, this is {problem.digest()[:12]}"
        )
    if any(not 0 <= d < problem.devices for d in placement.group_devices):
        found.append(f"a token group is on a device that is not one of {problem.devices}")
    return found


def _groups(placement: ExpertPlacement, problem: PlacementProblem) -> int:
    if problem.token_groups is None or not placement.group_devices:
        return 0
    return len(problem.token_groups[0])


def _limit_faults(placement: ExpertPlacement, problem: PlacementProblem) -> list[str]:
    if problem.current is None or problem.max_copies is None or placement.policy != "min_move":
        return []
    pairs = zip(problem.current, placement.layers, strict=True)
    copies = sum(count_copies(old, new.experts) for old, new in pairs)
    if copies > problem.max_copies:
        return [f"{copies} copies, the limit is {problem.max_copies}"]
    return []


def _certificate_faults(
    certificate: PlacementCertificate, placement: ExpertPlacement, problem: PlacementProblem
) -> list[str]:
    name, layer = certificate.objective, certificate.layer
    where = name if layer is None else f"{name} of layer {layer}"
    if layer is not None and not 0 <= layer < problem.layers:
        return [f"{where}: there is no such layer"]
    if not all(map(math.isfinite, (certificate.value, certificate.bound))):
        return [f"{where}: value {certificate.value} or bound {certificate.bound} is not finite"]
    value, found = _value(certificate, placement, problem), []
    slack = _SLACK * max(abs(value), abs(certificate.value), 1e-300)
    if abs(value - certificate.value) > slack:
        found.append(f"{where} is {value:.6g}, the certificate says {certificate.value:.6g}")
    if certificate.bound > certificate.value + slack:
        found.append(f"{where}: bound {certificate.bound:.6g} is above {certificate.value:.6g}")
    if certificate.status == "optimal" and certificate.value - certificate.bound > 2 * slack:
        found.append(f"{where}: called optimal with a gap of {certificate.gap:.2%}")
    return found


def _value(
    certificate: PlacementCertificate, placement: ExpertPlacement, problem: PlacementProblem
) -> float:
    if certificate.objective == "crossing_cost":
        return crossing_cost(placement, problem)
    layers = range(problem.layers) if certificate.layer is None else [certificate.layer]
    values = [_layer_value(certificate, placement.layers[n], n, problem) for n in layers]
    return math.fsum(values) if certificate.objective == "copies" else max(values)


def _layer_value(
    certificate: PlacementCertificate, layer: LayerPlacement, number: int, problem: PlacementProblem
) -> float:
    match certificate.objective:
        case "copies":
            return count_copies(problem.current[number], layer.experts) if problem.current else 0
        case "worst_ratio":
            return max(_ratio(layer, scenario[number]) for scenario in problem.loads)
        case "seconds":
            return step_seconds(layer, number, problem)
        case _:
            return max(layer.device_loads(mixed(problem, number)))


def _ratio(layer: LayerPlacement, loads: tuple[float, ...]) -> float:
    total = math.fsum(loads)
    return max(layer.device_loads(loads)) * len(layer.experts) / total if total else 0.0


def mixed(problem: PlacementProblem, layer: int) -> tuple[float, ...]:
    """One load for all scenarios of a layer: each scenario counts the same, whatever its total."""
    rows = [scenario[layer] for scenario in problem.loads]
    if len(rows) == 1:
        return rows[0]
    totals = [math.fsum(row) for row in rows]
    scale = math.fsum(totals) / len(rows) / len(rows)
    return tuple(
        scale * math.fsum(row[e] / total for row, total in zip(rows, totals, strict=True) if total)
        for e in range(problem.experts)
    )


def step_seconds(layer: LayerPlacement, number: int, problem: PlacementProblem) -> float:
    """Expected seconds of the slowest device in one step of ``problem.step`` (0 without one)."""
    step, loads = problem.step, mixed(problem, number)
    total = math.fsum(loads)
    if step is None or not total:
        return 0.0
    slowest = 0.0
    for row, shares in zip(layer.experts, layer.shares, strict=True):
        tokens = [
            loads[e] / total * step.tokens * step.top_k * f
            for e, f in zip(row, shares, strict=True)
        ]
        times = (max(step.read_seconds * -math.expm1(-t), step.token_seconds * t) for t in tokens)
        slowest = max(slowest, math.fsum(times))
    return slowest


def crossing_cost(placement: ExpertPlacement, problem: PlacementProblem) -> float:
    """Cost of the problem's transitions and token groups under a placement; the tokens of an expert
    with replicas take their shares, whichever device they come from."""
    spread = [_by_device(layer, placement.experts) for layer in placement.layers]
    total = 0.0
    if problem.transitions is not None:
        for matrix, pair in zip(problem.transitions, pairwise(spread), strict=True):
            total += _flow_cost(matrix, *pair, problem)
    if problem.token_groups is not None and placement.group_devices:
        groups = [{device: 1.0} for device in placement.group_devices]
        for matrix, experts in zip(problem.token_groups, spread, strict=True):
            total += _flow_cost(matrix, groups, experts, problem)
    return total


def _by_device(layer: LayerPlacement, experts: int) -> list[dict[int, float]]:
    found: list[dict[int, float]] = [{} for _ in range(experts)]
    for device, (row, shares) in enumerate(zip(layer.experts, layer.shares, strict=True)):
        for expert, share in zip(row, shares, strict=True):
            if share:
                found[expert][device] = found[expert].get(device, 0.0) + share
    return found


def _flow_cost(
    matrix: tuple[tuple[float, ...], ...],
    first: list[dict[int, float]],
    second: list[dict[int, float]],
    problem: PlacementProblem,
) -> float:
    per_node = problem.devices // problem.nodes
    total = 0.0
    for row, here in zip(matrix, first, strict=True):
        for flow, there in zip(row, second, strict=True):
            if flow:
                for g, p in here.items():
                    for h, q in there.items():
                        if g != h:
                            near = g // per_node == h // per_node
                            total += (
                                flow * p * q * (problem.node_cost if near else problem.link_cost)
                            )
    return total
