"""Estimate: `layout, workload -> seconds`, without simulating every step.

Engines are taken as perfectly overlapped and steps as equal: good enough to rank schedules.
"""

from dovetail.ir.batching import Group, Member, Step
from dovetail.ir.machine import Machine
from dovetail.ir.program import Load, Run, unroll
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.cost import Costs
from dovetail.passes.lower import lower
from dovetail.passes.memory import resident_bytes
from dovetail.passes.simulate import Durations, decode_step


def estimate(layout: Layout, machine: Machine, workload: Workload, costs: Costs) -> float:
    """Seconds for the whole workload."""
    program = lower(layout, {})
    durations = Durations(layout, program, machine, costs)
    seqs = min(layout.dispatch.seqs, workload.prompts)
    held = workload.prompt_tokens // workload.prompts + workload.new_tokens // 2
    decode = decode_step(seqs, layout.admission.rows, held)
    items = [list(unroll(program.engines[name])) for name in program.engines]
    cpu = sum(durations.of(i, 0, decode) for i in items[0] if isinstance(i, Run))
    disk = 0.0
    if "disk0" in program.engines:
        disk = sum(durations.of(i, 0, decode) for i in items[-1] if isinstance(i, Load))
    prefill_cpu, prefill_steps = _prefill(layout, workload, durations, items[0])
    decodes = workload.prompts * (workload.new_tokens - 1) / seqs
    setup = resident_bytes(layout) / machine.disk.peak
    if layout.dispatch.refill:
        steps = max(decodes + 1, prefill_steps)
        return setup + max(steps * disk, decodes * cpu + prefill_cpu)
    return setup + max(prefill_steps * disk, prefill_cpu) + decodes * max(disk, cpu)


def _prefill(
    layout: Layout, workload: Workload, durations: Durations, items: list[object]
) -> tuple[float, float]:
    """Compute seconds of all prefills together, and the least number of steps they take."""
    mean = max(1, workload.prompt_tokens // workload.prompts)
    in_step = min(workload.prompts, layout.dispatch.seqs, max(1, layout.dispatch.prefill_tokens // mean))
    rows = max(1, min(layout.admission.rows, layout.attn_tokens // mean, in_step))
    groups = []
    for start in range(0, in_step, rows):
        members = tuple(Member(i, 0, 0) for i in range(start, min(start + rows, in_step)))
        groups.append(Group(True, members, (mean,) * len(members), mean, mean))
    step = Step(tuple(groups))
    seconds = sum(durations.of(i, 0, step) for i in items if isinstance(i, Run))
    steps = workload.prompts / in_step
    return seconds * steps, steps
