"""The kernels of a GPU plan: chosen by the cost model, written beside the plan, held against it.

Nothing here imports torch or Triton: choosing and emitting is arithmetic and text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dovetail.codegen.kernels.arch import ARCHS, Arch, arch_of
from dovetail.codegen.kernels.choose import LADDER, choose_ladder
from dovetail.codegen.kernels.cost import predicted_seconds
from dovetail.codegen.kernels.emit import emit_kernel, file_name, source_digest
from dovetail.codegen.kernels.of_experts import layer_of_experts
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.kernel_layer import (
    KernelLadder,
    KernelReference,
    KernelRung,
    LayerKernels,
    LayerSpec,
    RungEvidence,
)
from dovetail.ir.kernel_spec import GemmSpec, KernelSpec, ReduceSpec, SortSpec, spec_digest
from dovetail.ir.plan import Plan
from dovetail.ir.record_file import write_whole
from dovetail.ir.task_graph import TaskGraph
from dovetail.kernels.files import check_reference
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.predict import GpuPredictor

FOLDER = "kernels"
"""The folder beside a plan that holds its kernels' sources."""
_ROLES = {"sort": SortSpec, "up": GemmSpec, "down": GemmSpec, "reduce": ReduceSpec}


def with_kernels(plan: Plan, graph: TaskGraph) -> Plan:
    """The plan with the kernels that its GPU's experts run on, or with why it has none; a plan for
    the processor as it is."""
    layout = apply_moves(graph, plan.moves)
    gpu = plan.machine.accelerator
    if layout.device is None or gpu is None:
        return plan
    arch = arch_of(gpu)
    if arch is not None and {ladder.arch for ladder in plan.ladders} == {arch.name}:
        return plan  # a plan that was given brings its own
    if arch is None:
        said = (
            f"{gpu.name} is {gpu.arch}" if gpu.arch else f"the machine says no arch of {gpu.name}"
        )
        known = ", ".join(ARCHS)
        return _without(plan, f"{said}; kernels are emitted for {known}")
    costs = GpuCosts(plan.machine, graph.dtype, plan.workload.routing)
    phases = GpuPredictor(layout, costs).phases(plan.workload)
    rungs = token_rungs([layout.dispatch.step_tokens, *(phase.work.tokens for phase in phases)])
    layers, refused = _layers(graph)
    if not layers:
        return _without(plan, "; ".join(refused) or "the model has no routed experts of its own")
    ladders, specs = [], dict[KernelSpec, None]()
    for layer, bodies in layers.items():
        try:
            chosen = choose_ladder(layer, arch, rungs)
        except InputError as error:
            refused.append(f"{', '.join(bodies)}: {error}")
            continue
        specs |= dict.fromkeys(spec for kernels in chosen for spec in kernels.specs())
        ladders.append(KernelLadder(layer, bodies, arch.name, tuple(map(_rung, chosen))))
    return replace(
        plan,
        kernels=tuple(_reference(spec, arch) for spec in specs),
        ladders=tuple(ladders),
        no_kernels="; ".join(refused),
    )


def token_rungs(counts: Sequence[int]) -> tuple[int, ...]:
    """The token counts to choose kernels for: in each bucket of the usual ladder the most tokens
    that a step has, so that a plan's kernels are those of its own steps."""
    found: dict[int, int] = {}
    for count in counts:
        bucket = next((i for i, last in enumerate(LADDER) if count <= last), len(LADDER))
        found[bucket] = max(found.get(bucket, 0), count)
    return tuple(found[bucket] for bucket in sorted(found))


def ladder_kernels(plan: Plan, ladder: KernelLadder) -> tuple[LayerKernels, ...]:
    """The kernels of a ladder as runners take them. Raises PlanError where the plan does not have
    one that the ladder names, or another kind of it."""
    known = {reference.file: reference.spec for reference in plan.kernels}
    found = []
    for rung in ladder.rungs:
        named: dict[str, Any] = {role: known.get(rung.files.get(role, "")) for role in _ROLES}
        for role, kind in _ROLES.items():
            if not isinstance(named[role], kind):
                raise PlanError(
                    f"the kernels of {', '.join(ladder.bodies)} for {rung.bucket[1]} tokens: found "
                    f"{rung.files.get(role, 'nothing')} for {role}, expected a {kind.__name__} "
                    "among the plan's kernels; plan again"
                )
        found.append(LayerKernels(ladder.arch, rung.bucket, None, activate=None, **named))
    return tuple(found)


def kernel_seconds(plan: Plan) -> Iterator[tuple[str, int, float, float]]:
    """(bodies, tokens, seconds of up, of down) of every rung, as the cost model predicts one
    layer's launches under uniform routing."""
    gpu = plan.machine.accelerator
    arch = arch_of(gpu) if gpu is not None else None
    for ladder in plan.ladders:
        for kernels in ladder_kernels(plan, ladder):
            tokens, on = kernels.bucket[1], arch or ARCHS[ladder.arch]
            up, down = (predicted_seconds(one, on, tokens) for one in (kernels.up, kernels.down))
            yield ", ".join(ladder.bodies), tokens, up, down


def with_rung(
    plan: Plan,
    bodies: tuple[str, ...],
    kernels: LayerKernels,
    measured: RungEvidence | None = None,
) -> Plan:
    """The plan with other kernels for one bucket of these bodies, and what a measurement found of
    them. Raises PlanError where it has no such bucket."""
    arch, ladders, specs = ARCHS[kernels.arch], [], dict[KernelSpec, None]()
    found = False
    for ladder in plan.ladders:
        rungs = []
        for rung, now in zip(ladder.rungs, ladder_kernels(plan, ladder), strict=True):
            here = ladder.bodies == bodies and rung.bucket == kernels.bucket
            found = found or here
            specs |= dict.fromkeys((kernels if here else now).specs())
            rungs.append(replace(_rung(kernels), measured=measured) if here else rung)
        ladders.append(replace(ladder, rungs=tuple(rungs)))
    if not found:
        raise PlanError(
            f"the plan has no kernels of {', '.join(bodies)} for {kernels.bucket[0]} to "
            f"{kernels.bucket[1]} tokens; plan again"
        )
    known = {reference.spec: reference for reference in plan.kernels}
    references = tuple(known.get(spec) or _reference(spec, arch) for spec in specs)
    return replace(plan, kernels=references, ladders=tuple(ladders))


def save_kernels(plan: Plan, folder: Path) -> None:
    """Write the sources of a plan's kernels beside it; each is whole or not there."""
    for reference in plan.kernels:
        path = folder / reference.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(emit_kernel(reference.spec), path)


def check_plan_kernels(plan: Plan, folder: Path) -> str:
    """Hold a plan's kernels against their specs and their sources in ``folder``, and say what they
    are. Raises PlanError with the first that is missing, altered or another version's."""
    for reference in plan.kernels:
        check_reference(reference, folder, f"{FOLDER}/", "plan again, or restore the file")
    for ladder in plan.ladders:
        ladder_kernels(plan, ladder)
    if plan.kernels:
        said = f"{len(plan.kernels)} sources are what their specs give, for {plan.ladders[0].arch}"
        rungs = [rung.measured for ladder in plan.ladders for rung in ladder.rungs]
        on = {found.environment.get("device_name", "an unnamed GPU") for found in rungs if found}
        where = f"; some of {len(rungs)} token counts measured on {', '.join(sorted(on))}"
        return said + where if on else said
    return f"none: {plan.no_kernels}" if plan.no_kernels else "none"


def _layers(graph: TaskGraph) -> tuple[dict[LayerSpec, tuple[str, ...]], list[str]]:
    """The kinds of experts with the bodies that have them, and why others run without kernels."""
    layers: dict[LayerSpec, tuple[str, ...]] = {}
    refused: list[str] = []
    name = str(graph.model.get("model_type", "experts"))
    for body in graph.bodies:
        if body.experts is None or body.experts.experts is None:
            continue
        try:
            layer = layer_of_experts(name, body.experts.experts)
        except InputError as error:
            refused.append(f"{body.name}: {error}")
            continue
        layers[layer] = (*layers.get(layer, ()), body.name)
    modules = [b.name for b in graph.bodies if any(
        op.target == "dovetail.module" for task in b.tasks for op in task.ops)]  # fmt: skip
    if modules and not layers and not refused:
        refused.append(
            f"{', '.join(modules)}: run whole modules of the model (dovetail.module), whatever "
            "experts are in them"
        )
    return layers, refused


def _without(plan: Plan, reason: str) -> Plan:
    return replace(plan, kernels=(), ladders=(), no_kernels=reason)


def _rung(kernels: LayerKernels) -> KernelRung:
    files = {role: f"{FOLDER}/{file_name(getattr(kernels, role))}" for role in _ROLES}
    return KernelRung(kernels.bucket, files)


def _reference(spec: KernelSpec, arch: Arch) -> KernelReference:
    text = emit_kernel(spec)
    name = f"{FOLDER}/{file_name(spec)}"
    return KernelReference(name, arch.name, spec, spec_digest(spec), source_digest(text))
