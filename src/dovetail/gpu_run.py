"""`dovetail run --target cuda`: the machine with its GPU, a plan for it at work, and its report.

``--target host`` does the same with memory and threads of the host in place of the GPU's: a plan's
programs, pools and order are those of a GPU, its speed is not. It is for checking a plan.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from dovetail.capture.captured import Captured
from dovetail.checkpoint import ModelFolder
from dovetail.execute import plan_title
from dovetail.executing import Executing
from dovetail.gpu_execution import GpuPrograms, MakeDevice, gpu_generation
from dovetail.ir.errors import InputError, ModelError
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Plan
from dovetail.machine_files import load_machine, machine_budget, save_machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.planning import find_machine
from dovetail.report import Report
from dovetail.runtime.gpu.device import CudaDevice, require_gpu
from dovetail.runtime.gpu.experts import Experts
from dovetail.runtime.gpu.host_device import HostDevice
from dovetail.runtime.gpu.runtime import GpuRuntime
from dovetail.runtime.gpu.steady import SteadySteps
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.sampling import Sampling

TARGETS = ("cpu", "cuda", "host")
MACHINE_FILE = "machine.json"


def check_target(options: argparse.Namespace) -> None:
    """Refuse what a target does not do, before anything is read. Raises ModelError, InputError."""
    if options.graphs and options.target != "cuda":
        raise InputError(
            f"--graphs with --target {options.target}: steps are captured on a GPU only; leave "
            "--graphs out, or run with --target cuda"
        )
    if options.target == "cpu":
        return
    if options.record_routing is not None:
        raise InputError(
            f"--record-routing with --target {options.target}: routing is recorded on the "
            "processor only; leave one of them out"
        )
    if options.target == "cuda":
        require_gpu()
    elif not options.machine:
        raise InputError(
            "--target host runs a plan for a machine with a GPU on this machine's processor: name "
            "that machine with --machine"
        )


def gpu_place(
    options: argparse.Namespace, folder: ModelFolder, place: Path
) -> tuple[str, dict[str, int]]:
    """The machine to plan for, as a name or a file in ``place``, and the budget on it."""
    if options.machine:
        machine, name = load_machine(options.machine), options.machine
    else:
        files = [shard.file for shard in folder.index.shards]
        machine = with_gpu(find_machine("", files, lambda text: None))
        place.mkdir(parents=True, exist_ok=True)
        name = str(place / MACHINE_FILE)
        save_machine(machine, Path(name))
    budget = machine_budget(options.budget, machine)
    if "hbm" not in budget:
        raise InputError(
            f"--target {options.target}: the budget leaves no hbm on {machine.name}, expected some "
            "of a GPU's memory: name a machine with a GPU, or give hbm=SIZE above 0"
        )
    return name, budget


def with_gpu(machine: Machine) -> Machine:
    """This machine with the GPU that torch finds in it, measured. Raises ModelError without."""
    from dovetail.runtime.gpu.calibrate import calibrate_gpu

    gpu, nbytes = calibrate_gpu()
    return replace(machine, tiers={**machine.tiers, "hbm": nbytes}, accelerator=gpu)


def _note(text: str) -> None:
    print(f"dovetail: {text}", file=sys.stderr)


def _captured_text(steady: SteadySteps | None) -> str:
    """What became of ``--graphs``."""
    if steady is None:
        return "no step was captured: not all experts are run by the plan's kernels"
    return f"{steady.captures} steps were captured, and {steady.replays} replayed"


class GpuExecution(Executing[GpuRuntime]):
    """A plan for a GPU at work on a checkpoint; a context manager, like ``Execution``.

    The emitted executors are written to ``folder``; ``graphs`` captures steps where it can. Raises
    ModelError without a GPU on the target ``cuda``, and VerifyError for a plan that no executor
    does.
    """

    def __init__(
        self,
        plan: Plan,
        captured: Captured,
        index: CheckpointIndex | MemoryWeights,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        folder: Path,
        target: str = "cuda",
        graphs: bool = False,
    ) -> None:
        self.plan, self.layout = plan, apply_moves(captured.graph, plan.moves)
        if self.layout.device is None:
            raise ModelError(
                f"the plan (policy {plan.policy}) is for a processor, expected one for a GPU with "
                f"--target {target}: plan again for a machine with a GPU"
            )
        costs = GpuCosts(plan.machine, captured.graph.dtype, plan.workload.routing)
        self._predictor = GpuPredictor(self.layout, costs)
        self.programs = GpuPrograms(
            self.layout, costs, plan.workload, plan.budget, plan_title(plan), folder
        )
        make: MakeDevice = CudaDevice if target == "cuda" else HostDevice
        experts = self._kernels(folder / "kernels") if target == "cuda" else None
        super().__init__(
            gpu_generation(
                self.programs,
                self.layout,
                captured,
                index,
                make,
                sampling,
                stop_tokens,
                experts,
                graphs,
            )
        )
        self._graphs = graphs
        self.captured = 0
        self.source = (folder / "segments.py").read_text(encoding="utf-8")
        self.peaks: dict[str, int] = {}

    def _kernels(self, folder: Path) -> Experts | None:
        """The plan's kernels for experts, their buffers within what it leaves to activations; None,
        with a note why, where it has none."""
        from dovetail.kernels.experts import plan_experts

        return plan_experts(self.plan, self.layout, folder, _note)

    @property
    def pool_bytes(self) -> int:
        """Most bytes of ram that the pools ever held."""
        return self._generator.runtime.memory.budgets["ram"].peak

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        runtime = self._generator.runtime
        self.peaks = {tier: budget.peak for tier, budget in runtime.memory.budgets.items()}
        super().__exit__(kind, error, trace)
        self.captured = runtime.steady.captures if runtime.steady is not None else 0
        if self._graphs:
            _note(_captured_text(runtime.steady))

    def held(self, tier: str) -> dict[str, int]:
        """The bytes that are set aside in a tier, by what they hold."""
        return self._generator.runtime.memory.budgets[tier].breakdown()

    def report(self) -> Report:
        """The run that has ended against what was planned."""
        plan, measured = self.plan, self.measured
        predicted = self.programs.predicted(self.steps_run)
        return Report(
            policy=plan.policy,
            plan=plan.digest(),
            budget=plan.budget["ram"],
            tokens=measured.tokens,
            steps=measured.steps,
            setup_seconds=measured.setup_seconds,
            seconds=measured.seconds,
            predicted_seconds=predicted + plan.prediction.setup_seconds,
            planned_seconds=plan.prediction.seconds,
            bound_seconds=plan.bound.seconds,
            bound_resource=plan.bound.resource,
            predicted_bytes=dict(plan.prediction.bytes),
            pool_bytes=measured.pool_bytes,
            rss_bytes=measured.rss_bytes,
            predicted_classes=dict(plan.prediction.classes),
            measured_classes=measured.classes,
            step_seconds=measured.step_seconds,
            predicted_timeline=self._predictor.steady(plan.workload),
            measured_timeline=measured.timeline,
            hbm={
                "measured": self.peaks["hbm"],
                "predicted": sum(plan.prediction.tiers.get("hbm", {}).values()),
                "budget": plan.budget["hbm"],
            },
        )
