"""Estimate: `layout, workload -> seconds`, without simulating every step.

Steps are taken as equal. Within a step compute and disk overlap as far as the buffers reach: while
attention runs, the reader can run ahead by no more than the rings hold. Good enough to rank
schedules.
"""

from dataclasses import dataclass

from dovetail.ir.batching import Group, Member, Step
from dovetail.ir.machine import Machine
from dovetail.ir.program import Load, Program, Run, tally
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.cost import Costs
from dovetail.passes.durations import Durations
from dovetail.passes.lower import lower
from dovetail.passes.memory import resident_bytes
from dovetail.passes.simulate import decode_step


def estimate(layout: Layout, machine: Machine, workload: Workload, costs: Costs) -> float:
    """Seconds for the whole workload."""
    model = _StepModel(layout, machine, costs)
    seqs = min(layout.dispatch.seqs, workload.prompts)
    held = workload.prompt_tokens // workload.prompts + workload.new_tokens // 2
    decode = model.parts(decode_step(seqs, layout.admission.rows, held))
    prefill, prefills = model.prefill(workload)
    decodes = workload.prompts * (workload.new_tokens - 1) / seqs
    setup = resident_bytes(layout) / machine.disk.peak
    admitted = workload.prompts / prefills
    if layout.dispatch.layer_groups > 1 and 2 * admitted <= seqs:
        prefill = prefill.scaled(1 / layout.dispatch.layer_groups)
        prefills *= layout.dispatch.layer_groups
    if not layout.dispatch.refill or 2 * admitted > seqs:
        # All in flight begin, and so end, together: prefill and decode steps alternate in waves.
        return setup + prefills * model.seconds(prefill) + decodes * model.seconds(decode)
    steps = max(prefills, decodes + workload.prompts / seqs) + min(prefills, workload.new_tokens)
    shared = decode.scaled(decodes / steps).plus(prefill.scaled(prefills / steps))
    return setup + steps * model.seconds(shared)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Compute seconds of one worker in a step: over groups of sequences, and in experts."""

    groups: float
    experts: float

    def scaled(self, factor: float) -> "_Parts":
        return _Parts(self.groups * factor, self.experts * factor)

    def plus(self, other: "_Parts") -> "_Parts":
        return _Parts(self.groups + other.groups, self.experts + other.experts)


class _StepModel:
    """A step's time from its parts, for one layout."""

    def __init__(self, layout: Layout, machine: Machine, costs: Costs) -> None:
        self._layout = layout
        self._slower = machine.corrected("step")
        self._program: Program = lower(layout, {})
        self._durations = Durations(layout, self._program, machine, costs)
        self._cpu = [
            (item, count)
            for item, count in tally(self._program.engines["cpu0"])
            if isinstance(item, Run)
        ]
        self._disk, self._ahead = self._loads(machine)

    def _loads(self, machine: Machine) -> tuple[float, float]:
        """Seconds of a step's loads, and for how many of them the rings can run ahead of compute
        in a step: once per layer, by the ring's whole length at most."""
        engines = [i for name, i in self._program.engines.items() if name.startswith("disk")]
        if not engines:
            return 0.0, 0.0
        step = Step(())
        self._durations.contend(1.0, 1.0)
        lists = [
            [
                (item, count, self._durations.of(item, 0, step))
                for item, count in tally(items)
                if isinstance(item, Load)
            ]
            for items in engines
        ]
        longest = max(sum(count * seconds for _, count, seconds in loads) for loads in lists)
        ahead = 0.0
        for ring in self._program.rings:
            mine = [load for loads in lists for load in loads if load[0].ring == ring.name]
            layers = len({item.layer for item, _, _ in mine})
            total = sum(count * seconds for _, count, seconds in mine)
            ahead += min(total, layers * ring.slots * max(seconds for _, _, seconds in mine))
        return longest, ahead / len(lists)

    def parts(self, step: Step) -> _Parts:
        """Compute seconds of a step."""
        groups = experts = 0.0
        over = {segment.name: segment.over for segment in self._program.segments}
        for item, count in self._cpu:
            seconds = count * self._durations.of(item, 0, step)
            if over[item.segment] == "experts":
                experts += seconds
            else:
                groups += seconds
        return _Parts(groups, experts)

    def seconds(self, parts: _Parts) -> float:
        """Seconds of a step: the disk works under attention only as far as the rings reach."""
        hidden = min(self._ahead, parts.groups)
        return self._slower * max(
            parts.groups + parts.experts,
            self._disk,
            parts.groups + self._disk - hidden,
        )

    def prefill(self, workload: Workload) -> tuple[_Parts, float]:
        """Parts of a full prefill step, and how many of them the workload takes."""
        layout = self._layout
        mean = max(1, workload.prompt_tokens // workload.prompts)
        piece = layout.admission.piece(mean)
        fits = max(1, layout.dispatch.prefill_tokens // piece)
        in_step = min(workload.prompts, layout.dispatch.seqs, fits)
        rows = max(1, min(layout.admission.rows, layout.attn_tokens // piece, in_step))
        # Half of a prompt lies before a piece of it, on average over the pieces.
        held = (mean - piece) // 2
        groups = []
        for start in range(0, in_step, rows):
            members = tuple(Member(i, 0, held) for i in range(start, min(start + rows, in_step)))
            groups.append(Group(True, members, (piece,) * len(members), piece, mean))
        return self.parts(Step(tuple(groups))), workload.prompts / in_step * -(-mean // piece)
