"""The rungs of a GPU plan as a tuning takes them, and what its rows say of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dovetail.codegen.kernels.arch import Arch, arch_of
from dovetail.codegen.kernels.cost import predicted_seconds
from dovetail.ir.errors import PlanError
from dovetail.ir.kernel_layer import LayerKernels, RungEvidence
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.kernels.planned import ladder_kernels, with_rung
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.tuning.gate import DEFAULT, GATE
from dovetail.tuning.kernels.rows import kernel_winner, kernels_of
from dovetail.tuning.kernels.space import KernelSpace
from dovetail.tuning_db.facts import Key, Trial
from dovetail.tuning_db.winners import Interval, deciding_interval, pooled, ranked


@dataclass(frozen=True, slots=True)
class Rung:
    """Kernels of ``bodies`` for one bucket, the space around the cost model's choice, and their
    predicted ``seconds`` in the plan's whole workload."""

    bodies: tuple[str, ...]
    space: KernelSpace
    seconds: float

    @property
    def name(self) -> str:
        """Whose experts, and for how many tokens."""
        return f"{', '.join(self.bodies)} for {self.space.bucket[1]} tokens"


@dataclass(frozen=True, slots=True)
class Decided:
    """What the rows say of a rung: its ``kernels``, the default's where nothing was surely faster,
    with ``measured`` where something was. ``reason`` tells why; ``interval`` is that of the best
    kernels of the gate, if any came to it. Seconds are medians, of the best, 0 where not known."""

    rung: Rung
    kernels: LayerKernels
    reason: str
    measured: RungEvidence | None = None
    interval: Interval | None = None
    default_seconds: float = 0.0
    timed: int = 0
    refused: int = 0
    failed: int = 0


def plan_arch(plan: Plan) -> Arch:
    """The architecture of the plan's GPU with its rates. Raises PlanError for a plan without
    kernels."""
    gpu = plan.machine.accelerator
    arch = arch_of(gpu) if gpu is not None else None
    if arch is None or not plan.ladders:
        why = plan.no_kernels or f"it is for {plan.machine.name}, without a GPU"
        raise PlanError(
            f"the plan has no kernels to tune: {why}; make one for a GPU with `dovetail plan make "
            "--machine`"
        )
    return arch


def rungs_of(plan: Plan, graph: TaskGraph) -> list[Rung]:
    """Every rung with the seconds that the workload's steps should spend in it: a layer's launches
    times layers times steps. Raises PlanError for a plan without kernels."""
    arch = plan_arch(plan)
    layout = apply_moves(graph, plan.moves)
    predictor = GpuPredictor(layout, GpuCosts(plan.machine, graph.dtype, plan.workload.routing))
    steps: dict[int, float] = {}
    for phase in predictor.phases(plan.workload):
        steps[phase.work.tokens] = steps.get(phase.work.tokens, 0.0) + phase.steps
    names = [graph.body(layer).name for layer in range(len(graph.layers))]
    found = []
    for ladder in plan.ladders:
        layers = sum(name in ladder.bodies for name in names)
        for kernels in ladder_kernels(plan, ladder):
            space = KernelSpace.of(ladder.layer, arch, kernels.bucket)
            first, last = kernels.bucket
            seconds = sum(
                layers * count * _seconds(space.chosen, arch, tokens)
                for tokens, count in steps.items()
                if first <= tokens <= last
            )
            found.append(Rung(ladder.bodies, space, seconds))
    return found


def shares_of(rungs: Sequence[Rung]) -> list[float]:
    """Each rung's share of the predicted seconds of all."""
    total = sum(rung.seconds for rung in rungs)
    return [rung.seconds / total if total else 0.0 for rung in rungs]


def decide_rung(rung: Rung, rows: Sequence[Trial], key: Key) -> Decided:
    """What the rows speak for: a function of them alone."""
    ran = [t for t in pooled(rows) if t.note != DEFAULT]
    defaults = sorted(sample for row in rows for sample in row.default_samples)
    found = Decided(
        rung,
        rung.space.chosen,
        "nothing else was timed",
        default_seconds=defaults[len(defaults) // 2] if defaults else 0.0,
        timed=sum(t.state in ("ok", "timeout") for t in ran),
        refused=sum(t.state == "invalid" for t in ran),
        failed=sum(t.state in ("compile_error", "out_of_memory", "wrong_result") for t in ran),
    )
    best = kernel_winner(rows)
    if best is None:
        gated = ranked([row for row in rows if row.note == GATE])
        if not gated:
            why = f"none of {found.timed} was faster" if found.timed else found.reason
            return replace(found, reason=why)
        interval = deciding_interval(gated[0].ratios)
        return replace(found, reason="not surely faster", interval=interval)
    trial, interval = best
    samples = sorted(trial.samples)
    evidence = RungEvidence(
        ratio=interval.median,
        low=interval.low,
        high=interval.high,
        pairs=interval.samples,
        seconds=samples[len(samples) // 2],
        default_seconds=sorted(trial.default_samples)[len(samples) // 2],
        max_error=trial.max_error or 0.0,
        trials=found.timed,
        refused=found.refused,
        environment={**key.silicon, **key.software},
    )
    return replace(
        found, kernels=kernels_of(trial), reason="faster", measured=evidence, interval=interval
    )


def with_decided(plan: Plan, decided: Sequence[Decided]) -> Plan:
    """The plan with the kernels that were decided for each rung."""
    for one in decided:
        plan = with_rung(plan, one.rung.bodies, one.kernels, one.measured)
    return plan


def _seconds(kernels: LayerKernels, arch: Arch, tokens: int) -> float:
    return sum(predicted_seconds(spec, arch, tokens) for spec in (kernels.up, kernels.down))
