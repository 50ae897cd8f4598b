"""The sections of `bench/placement.py` on routes, copies, scenarios and step time."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from placement_cases import (
    Floats,
    expert_counts,
    lognormal_loads,
    markov_trace,
    problem,
    transition_counts,
    zipf_loads,
)
from placement_measure import Rows, balances, checked, spread, table

from dovetail.ir.expert_placement import ExpertPlacement, StepModel
from dovetail.ir.expert_slots import contiguous, count_copies
from dovetail.passes.place import place
from dovetail.passes.policies.expert_latency import layer_seconds, step_tokens

LAYERS, EXPERTS = 58, 256
# DeepSeek-V3 in FP8 on an H100 by its data sheet: an expert is 44 MB, 3.35 TB/s, 600 TFLOP/s.
STEP_SECONDS = {"read_seconds": 13.1e-6, "token_seconds": 0.147e-6}


def affinity_section() -> Iterator[str]:
    """Share of transitions that change device: 32 layers, 64 experts, 8 devices."""
    rows: Rows = []
    for noise in (0.4, 1.0):
        routes = markov_trace(32, 64, 8, 40_000, noise)
        train, test = routes[:20_000], routes[20_000:]
        flows, loads = transition_counts(train, 64), expert_counts(train, 64)
        fields: dict[str, Any] = {"transitions": _flows(flows)}
        asked = problem(loads, slots=64, devices=8, **fields)
        even = place(problem(loads, slots=64, devices=8), "balance")
        answer, seconds = checked(asked, "expert_placement_ilp")
        held_out = transition_counts(test, 64)
        homes, rival = _homes(answer), _homes(even)
        linear = np.tile(np.arange(64) // 8, (32, 1))
        limit = balance_excess(answer, loads)
        certificate = answer.certificates[0]
        rows.append(
            (
                "planted, noise 0.4" if noise < 1 else "none (control)",
                f"{_crossing(held_out, linear):.3f}",
                f"{_crossing(held_out, rival):.3f}",
                f"{_crossing(flows, homes):.3f}",
                f"{_crossing(held_out, homes):.3f}",
                f"{certificate.bound / flows.sum():.3f}",
                f"{limit:.3f}",
                f"{seconds:.1f}",
            )
        )
    yield table(
        (
            "affinity",
            "contiguous, held out",
            "balance only, held out",
            "ours, trained on",
            "ours, held out",
            "no placement below",
            "heaviest / mean",
            "CPU s",
        ),
        rows,
    )


def balance_excess(answer: ExpertPlacement, loads: Floats) -> float:
    """Heaviest over mean device, of the worst layer."""
    return 1 / min(balances(answer, loads))


def _flows(flows: Floats) -> Any:
    return tuple(tuple(map(tuple, matrix)) for matrix in flows.tolist())


def _homes(answer: ExpertPlacement) -> Any:
    return np.array(
        [[layer.homes(e)[0][0] for e in range(answer.experts)] for layer in answer.layers]
    )


def _crossing(flows: Floats, homes: Any) -> float:
    crossed = sum(
        flow[here[:, None] != there[None, :]].sum()
        for flow, (here, there) in zip(flows, pairwise(homes), strict=True)
    )
    return float(crossed / flows.sum())


def migration_section(domains: dict[str, Floats]) -> Iterator[str]:
    """Copies that a switch of domain needs for a balance of 0.98: 72 slots on 8 devices."""
    rows: Rows = []
    names = list(domains)
    for before, after in zip(names, names[1:] + names[:1], strict=True):
        start = place(problem(domains[before], slots=72, devices=8), "eplb")
        loads = domains[after]
        current = tuple(layer.experts for layer in start.layers)
        asked = problem(loads, slots=72, devices=8, current=current)
        moved, seconds = checked(asked, "min_move", work=60.0)
        again = place(asked, "eplb")
        stay = balances(start, loads)
        for number, certificate in enumerate(moved.certificates):
            ours, theirs = balances(moved, loads)[number], balances(again, loads)[number]
            copies = count_copies(current[number], again.layers[number].experts)
            rows.append(
                (
                    f"{before} to {after}, layer {number}",
                    f"{stay[number]:.3f}",
                    f"{theirs:.3f} / {copies}",
                    f"{ours:.3f} / {certificate.value:.0f}",
                    f"{certificate.bound:.0f}",
                    certificate.status,
                    f"{seconds / len(moved.layers):.1f}",
                )
            )
    header = ("switch", "stay", "EPLB: balance / copies", "ours", "at least", "status", "CPU s")
    yield table(header, rows)


def drift_section() -> Iterator[str]:
    """Copies after loads drift, 256 experts in 288 slots on 32 devices, four layers."""
    before = zipf_loads(1.0, 4, EXPERTS, 0)
    after = before * np.random.default_rng(3).lognormal(0, 0.3, before.shape)
    start = place(problem(before, slots=288, devices=32), "eplb")
    current = tuple(layer.experts for layer in start.layers)
    asked = problem(after, slots=288, devices=32, current=current)
    again = place(asked, "eplb")
    layers = [layer.experts for layer in again.layers]
    copies = [count_copies(old, new) for old, new in zip(current, layers, strict=True)]
    rows: Rows = [
        ("stay", spread(balances(start, after)), "0", "-"),
        ("EPLB again", spread(balances(again, after)), ", ".join(map(str, copies)), "-"),
    ]
    for target in (0.93, 0.98):
        moved, seconds = checked(asked, "min_move", balance=target, work=0.0)
        counts = ", ".join(f"{c.value:.0f}" for c in moved.certificates)
        title = f"min_move to {target}, greedy"
        rows.append((title, spread(balances(moved, after)), counts, f"{seconds:.1f}"))
    yield table(("plan", "balance: mean / worst", "copies by layer", "CPU s"), rows)


def scenario_section(domains: dict[str, Floats]) -> Iterator[str]:
    """Plans for several domains at once, in the mix and on a domain left out."""
    rows: Rows = []
    names = list(domains)
    for slots, devices in ((72, 8), (80, 16), (128, 8)):
        for policy in ("contiguous", "eplb", "balance", "robust"):
            inside = _worst_of(policy, [domains[n] for n in names], None, slots, devices)
            outside = [
                value
                for out in names
                for value in _worst_of(
                    policy,
                    [domains[n] for n in names if n != out],
                    [domains[out]],
                    slots,
                    devices,
                )
            ]
            title = {"eplb": "EPLB on the mean", "balance": "weighted, on the mean"}
            rows.append(
                (f"{slots}/{devices}", title.get(policy, policy), spread(inside), spread(outside))
            )
    header = ("slots/devices", "plan", "in the mix: mean / worst", "domain left out: mean / worst")
    yield table(header, rows)


def _worst_of(
    policy: str, train: list[Floats], test: list[Floats] | None, slots: int, devices: int
) -> list[float]:
    asked = problem(*train, slots=slots, devices=devices)
    if policy == "contiguous":
        layout = contiguous(asked.experts, asked.slots)
        stay = problem(*train, slots=slots, devices=devices, current=(layout,) * asked.layers)
        answer = place(stay, "min_move", {"balance": 0.01, "work": 0.0})
    else:
        answer = place(asked, policy)
    return [value for loads in test or train for value in balances(answer, loads)]


def step_section() -> Iterator[str]:
    """Microseconds of the slowest device in a layer's step, as modelled."""
    rows: Rows = []
    for name, loads in (
        ("lognormal 0.5", lognormal_loads(0.5, LAYERS, EXPERTS, 0)),
        ("lognormal 1", lognormal_loads(1.0, LAYERS, EXPERTS, 0)),
        ("Zipf 1.0", zipf_loads(1.0, LAYERS, EXPERTS, 0)),
    ):
        for tokens in (64, 512, 1024, 4096, 32768):
            step = StepModel(tokens, 8, **STEP_SECONDS)
            asked = problem(loads, slots=288, devices=32, step=step)
            load = step_tokens(loads, step)
            answer, seconds = checked(asked, "latency")
            cells = []
            for other in (None, "eplb", "balance"):
                plan = _linear(loads) if other is None else place(asked, other)
                cells.append(_step_us(plan, load, step))
            ours = _step_us(answer, load, step)
            bound = float(np.mean([c.bound for c in answer.certificates])) * 1e6
            rows.append(
                (
                    name,
                    str(tokens),
                    *(f"{c:.0f}" for c in (*cells, ours, bound)),
                    answer.notes[0].removeprefix("replicas in use: "),
                    f"{seconds:.1f}",
                )
            )
    header = ("loads", "tokens", "contiguous", "EPLB", "weighted", "latency", "bound")
    yield table((*header, "replicas in use", "CPU s"), rows)


def _linear(loads: Floats) -> ExpertPlacement:
    asked = problem(loads, slots=EXPERTS, devices=32)
    current = (contiguous(EXPERTS, asked.slots),) * LAYERS
    stay = problem(loads, slots=EXPERTS, devices=32, current=current)
    return place(stay, "min_move", {"balance": 0.01, "work": 0.0})


def _step_us(answer: ExpertPlacement, load: Floats, step: StepModel) -> float:
    pairs = zip(answer.layers, load, strict=True)
    return float(np.mean([layer_seconds(layer, row, step) for layer, row in pairs])) * 1e6
