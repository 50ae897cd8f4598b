"""Expert placement: balance, time, affinity, migration, scenarios and step time, against EPLB.

    python bench/placement.py --out bench/results/placement.md [--counts routing_counts.json]

Everything is computed here from seeds; ``--counts`` gives real routing counts by domain for the
sections on migration and scenarios. Times are CPU time of one thread, least of five.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from host import describe_machine
from placement_cases import (
    Floats,
    drifting_domains,
    expert_counts,
    lognormal_loads,
    markov_trace,
    problem,
    read_domains,
    transition_counts,
    zipf_loads,
)

from dovetail.ir.expert_placement import ExpertPlacement, StepModel
from dovetail.ir.expert_slots import balance, contiguous, count_copies
from dovetail.ir.verify_expert_placement import verify_placement
from dovetail.passes.place import place
from dovetail.passes.policies.expert_latency import layer_seconds, step_tokens
from dovetail.solvers.expert_eplb import eplb
from dovetail.solvers.expert_fill import fill

LAYERS, EXPERTS, SEEDS, REPEATS = 58, 256, 3, 5
CELLS = ((288, 32), (320, 64))
LOADS: dict[str, Callable[[int], Floats]] = {
    "Zipf 1.0": lambda seed: zipf_loads(1.0, LAYERS, EXPERTS, seed),
    "Zipf 1.2": lambda seed: zipf_loads(1.2, LAYERS, EXPERTS, seed),
    "Zipf 1.5": lambda seed: zipf_loads(1.5, LAYERS, EXPERTS, seed),
    "lognormal 0.5": lambda seed: lognormal_loads(0.5, LAYERS, EXPERTS, seed),
    "lognormal 1": lambda seed: lognormal_loads(1.0, LAYERS, EXPERTS, seed),
}
# DeepSeek-V3 in FP8 on an H100 by its data sheet: an expert is 44 MB, 3.35 TB/s, 600 TFLOP/s.
STEP_SECONDS = {"read_seconds": 13.1e-6, "token_seconds": 0.147e-6}
Rows = list[Sequence[str]]


def table(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cpu_ms(work: Callable[[], object]) -> float:
    """CPU milliseconds of ``work``, least of several."""
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times) * 1e3


def balances(answer: ExpertPlacement, loads: Floats) -> list[float]:
    """Mean over heaviest device, by layer."""
    pairs = zip(answer.layers, loads.tolist(), strict=True)
    return [balance(layer.device_loads(row)) for layer, row in pairs]


def checked(asked: Any, policy: str, **knobs: Any) -> tuple[ExpertPlacement, float]:
    """A placement that the checker accepts, and the CPU seconds that planning took."""
    begin = time.process_time()
    answer = place(asked, policy, knobs)
    seconds = time.process_time() - begin
    verify_placement(answer, asked)
    return answer, seconds


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} / {min(values):.4f}"


def balance_section() -> Iterator[str]:
    """Balance and planning time of EPLB and ours, cell by cell."""
    policies: tuple[tuple[str, str, dict[str, Any], dict[str, int]], ...] = (
        ("EPLB global", "eplb", {}, {}),
        ("EPLB hierarchical (8 groups, 4 nodes)", "eplb", {}, {"nodes": 4, "expert_groups": 8}),
        ("ours, weighted", "balance", {}, {}),
        ("ours, weighted, hierarchical", "balance", {}, {"nodes": 4, "expert_groups": 8}),
        ("ours, even shares", "balance", {"split": "even"}, {}),
        ("ours, even shares, 20 restarts", "balance", {"split": "even", "rounds": 20}, {}),
    )
    for slots, devices in CELLS:
        rows: Rows = []
        for title, policy, knobs, fields in policies:
            cells = []
            for make in LOADS.values():
                found, seconds = [], []
                for seed in range(SEEDS):
                    loads = make(seed)
                    asked = problem(loads, slots=slots, devices=devices, **fields)
                    answer, spent = checked(asked, policy, **knobs)
                    found += balances(answer, loads)
                    seconds.append(spent)
                cells.append(f"{_spread(found)} ({min(seconds) * 1e3:.0f} ms)")
            rows.append((title, *cells))
        yield f"\n{slots} slots on {devices} devices:\n"
        yield table(("policy", *LOADS), rows)


def planner_section() -> Iterator[str]:
    """The two planners alone, array to array."""
    rows: Rows = []
    for slots, devices in CELLS:
        for name, make in LOADS.items():
            loads = make(0)
            capacity = np.full(devices, slots // devices)
            theirs = cpu_ms(lambda w=loads, g=devices, p=slots: eplb(w, p, 1, 1, g))  # type: ignore[misc]
            ours = cpu_ms(lambda w=loads, c=capacity: fill(w, c))  # type: ignore[misc]
            cell = f"{slots}/{devices}"
            rows.append((cell, name, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}x"))
    yield table(("cell", "loads", "EPLB, CPU ms", "weighted fill, CPU ms", "ratio"), rows)


def example_section() -> Iterator[str]:
    """The published README's example: what EPLB gets, what is best, and what is proved."""
    loads = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        float,
    )
    asked = problem(loads, slots=16, devices=8)
    rows: Rows = []
    for title, policy, knobs in (
        ("EPLB global", "eplb", {}),
        ("ours, even shares", "balance", {"split": "even", "work": 8.0}),
        ("ours, weighted", "balance", {"work": 8.0}),
    ):
        answer, seconds = checked(asked, policy, **knobs)
        found = [f"{b:.4f}" for b in balances(answer, loads)]
        bound = [
            f"{w.sum() / 8 / c.bound:.4f}" for w, c in zip(loads, answer.certificates, strict=True)
        ]
        status = ", ".join(c.status for c in answer.certificates)
        rows.append((title, " / ".join(found), " / ".join(bound), status, f"{seconds:.1f}"))
    yield table(("policy", "balance by layer", "none above", "status", "CPU s"), rows)


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
        for flow, here, there in zip(flows, homes, homes[1:], strict=False)
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
        ("stay", _spread(balances(start, after)), "0", "-"),
        ("EPLB again", _spread(balances(again, after)), ", ".join(map(str, copies)), "-"),
    ]
    for target in (0.93, 0.98):
        moved, seconds = checked(asked, "min_move", balance=target, work=0.0)
        counts = ", ".join(f"{c.value:.0f}" for c in moved.certificates)
        title = f"min_move to {target}, greedy"
        rows.append((title, _spread(balances(moved, after)), counts, f"{seconds:.1f}"))
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
                (f"{slots}/{devices}", title.get(policy, policy), _spread(inside), _spread(outside))
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
    for name in ("lognormal 0.5", "lognormal 1", "Zipf 1.0"):
        loads = LOADS[name](0)
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


def report(counts: Path | None) -> Iterator[str]:
    """All sections as Markdown."""
    facts = describe_machine()
    domains = read_domains(counts) if counts else drifting_domains(3, 64, 3, 0)
    source = f"`{counts.name}`" if counts else "synthetic domains"
    yield "# Expert placement"
    where = f"{str(facts['date'])[:10]}, on {facts['cores']} cores of {facts['cpu']}"
    yield f"\nMade by `python bench/placement.py`, {where}."
    yield "Times are CPU time of one thread. Every answer passed `verify_placement`."
    for title, text, lines in (
        (
            "Balance",
            f"Mean over heaviest device, mean / worst over {LAYERS} layers and {SEEDS} seeds; in "
            "brackets the CPU time of `place` for all layers, certificates included.",
            balance_section(),
        ),
        ("Planners alone", f"{LAYERS} layers of {EXPERTS} experts, numpy both.", planner_section()),
        ("The published example", "12 experts, 16 slots, 8 devices.", example_section()),
        (
            "Affinity",
            "32 layers, 64 experts, 8 devices; load limit 1.10 of the mean, or 1.02 of what is "
            "found without affinity.",
            affinity_section(),
        ),
        ("Migration", f"From {source}; balance 0.98 asked.", migration_section(domains)),
        ("Drift", "Zipf 1.0, then every load times lognormal 0.3.", drift_section()),
        ("Scenarios", f"From {source}, by layer and domain.", scenario_section(domains)),
        (
            "Step time",
            "Microseconds, mean over layers, modelled and not measured: DeepSeek-V3's experts in "
            "FP8 by an H100's data sheet, 256 experts in 288 slots on 32 devices.",
            step_section(),
        ),
    ):
        yield f"\n## {title}\n\n{text}\n"
        yield from lines


def main() -> None:
    """Print the report, and write it to ``--out``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--counts", type=Path, help="routing counts by domain (JSON)")
    arguments = parser.parse_args()
    lines = []
    for line in report(arguments.counts):
        print(line, flush=True)
        lines.append(line)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
