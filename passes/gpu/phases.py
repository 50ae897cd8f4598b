"""GPU phases: `dispatch, workload -> the steps of a run, equal ones together`.

Without refill, sequences are taken longest first in waves of as many as are in flight (static
batching), each wave a few prefill steps and then its decode steps. With refill, prompts are
admitted at a steady rate beside what decodes: a run begins with nothing in flight and ends with
nothing left to admit, so its first and last steps decode less than those between.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dovetail.ir.moves import Dispatch
from dovetail.ir.workload import Workload
from dovetail.passes.gpu.cost import Shape
from dovetail.passes.loop.body import StepWork

CONTEXTS = 3
"""Context lengths at which a wave's decode steps are simulated."""


@dataclass(frozen=True, slots=True)
class Phase:
    """``steps`` steps that all do ``work``."""

    work: StepWork
    steps: float


def phases(dispatch: Dispatch, workload: Workload, contexts: int = CONTEXTS) -> Iterator[Phase]:
    """The steps of a workload; decode steps of a wave at so many ``contexts``."""
    if dispatch.refill:
        yield from _refilled(dispatch, workload)
        return
    for seqs, length, count in waves(workload, dispatch.seqs):
        for phase in _wave(dispatch, seqs, length, workload.new_tokens, contexts):
            yield Phase(phase.work, phase.steps * count)


def _wave(dispatch: Dispatch, seqs: int, length: int, new: int, contexts: int) -> Iterator[Phase]:
    in_step = max(1, min(seqs, dispatch.prefill_tokens // length))
    yield Phase(StepWork(None, Shape(in_step, length, 0)), seqs / in_step)
    parts = min(contexts, new - 1)
    for i in range(parts):
        # Contexts in the middle of equal parts of a generation.
        context = length + round((new - 1) * (i + 0.5) / parts)
        yield Phase(StepWork(Shape(seqs, 1, context), None), (new - 1) / parts)


def _refilled(dispatch: Dispatch, workload: Workload) -> Iterator[Phase]:
    """Continuous batching, all prompts at their mean length.

    ``rate`` prompts a step keep as many in flight as there are places (Little's law), or as many as
    admission allows. Of the steps in which prompts are taken in, those that fill up decode half of
    what is in flight later on the mean, and so do those in which what is left runs out.
    """
    decodes, prompts = workload.new_tokens - 1, workload.prompts
    seqs = min(dispatch.seqs, prompts)
    length = max(1, round(workload.prompt_tokens / prompts))
    most = max(1, min(seqs, dispatch.prefill_tokens // length))
    if not decodes:
        yield Phase(StepWork(None, Shape(most, length, 0)), prompts / most)
        return
    groups = max(1, dispatch.layer_groups)
    if prompts * decodes < groups * math.ceil(prompts / most):
        # Nothing decodes beside most prompts, so they need not wait for their layers.
        groups = 1
    rate = min(most / groups, seqs / decodes)
    admitted = max(1, min(most, math.ceil(rate * groups)))
    taking_in, past = prompts / rate, length + workload.new_tokens // 2
    flying = rate * min(decodes, taking_in)
    ends = min(decodes, taking_in)
    full = Shape(max(1, round(flying)), 1, past)
    half = Shape(max(1, round(flying / 2)), 1, past)
    share = min(1.0, rate * groups / admitted)
    for decode, steps in ((half, ends), (full, taking_in - ends)):
        yield Phase(StepWork(decode, Shape(admitted, length, 0), groups), share * steps)
        yield Phase(StepWork(decode, None), (1 - share) * steps)
    yield Phase(StepWork(full, None), decodes - ends)
    yield Phase(StepWork(half, None), ends)


def waves(workload: Workload, seqs: int) -> Iterator[tuple[int, int, int]]:
    """(sequences, mean prompt length, how many such waves), longest prompts first."""
    open_seqs = open_tokens = 0
    for length, count in workload.lengths:
        taken = min(count, seqs - open_seqs) if open_seqs else 0
        open_seqs, open_tokens, left = (
            open_seqs + taken,
            open_tokens + taken * length,
            count - taken,
        )
        if open_seqs == seqs:
            yield seqs, round(open_tokens / seqs), 1
            open_seqs = open_tokens = 0
        if left >= seqs:
            yield seqs, length, left // seqs
        if left % seqs:
            open_seqs, open_tokens = left % seqs, left % seqs * length
    if open_seqs:
        yield open_seqs, round(open_tokens / open_seqs), 1
