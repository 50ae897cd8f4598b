"""What the sections of `bench/placement.py` share: checked placements, their balance, tables."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from placement_cases import Floats

from dovetail.ir.expert_placement import ExpertPlacement
from dovetail.ir.expert_slots import balance
from dovetail.ir.verify_expert_placement import verify_placement
from dovetail.passes.place import place

REPEATS = 5
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


def spread(values: list[float]) -> str:
    """Mean / worst."""
    return f"{np.mean(values):.4f} / {min(values):.4f}"
