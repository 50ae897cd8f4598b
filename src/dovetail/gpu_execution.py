"""Execute on a GPU: `GPU plan, captured model -> steps`, a program for each kind of step.

The executor's text of every program, and that of the segments that all share, are written beside
the plan.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.capture.captured import Captured
from dovetail.codegen.gpu_executor import emit_gpu_executor
from dovetail.codegen.gpu_segments import emit_gpu_segments
from dovetail.ir.batching import Batcher, Request, Step
from dovetail.ir.gpu_settings import GpuGroup, GpuSettings, gpu_groups
from dovetail.ir.verify_gpu_program import verify_gpu_program
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.lower import lower_gpu
from dovetail.passes.gpu.memory import tier_bytes
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.gpu.settings import gpu_settings, step_work
from dovetail.runtime.generate import Choose, Generation
from dovetail.runtime.gpu.device import ComputeDevice
from dovetail.runtime.gpu.experts import Experts
from dovetail.runtime.gpu.runtime import Emitted, GpuRuntime
from dovetail.runtime.gpu.work import GpuWork
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.sampling import Sampling

MakeDevice = Callable[[GpuWork], ComputeDevice]


class GpuPrograms:
    """Lowers, verifies and emits the program of a step once for all steps like it.

    Steps are alike with the same groups in the same layers, their sizes within a factor of two:
    sizes change durations, and with them at most the order in which buffers are taken over.
    """

    def __init__(
        self,
        layout: Layout,
        costs: GpuCosts,
        workload: Workload,
        capacity: Mapping[str, int],
        title: Mapping[str, str],
        folder: Path | None,
    ) -> None:
        self.settings: GpuSettings = gpu_settings(layout, costs, workload)
        self._predictor = GpuPredictor(layout, costs)
        self._workload, self._capacity = workload, dict(capacity)
        self._title, self.folder = dict(title), folder
        self._known: dict[Key, Emitted] = {}
        self._seconds: dict[Key, float] = {}

    def __call__(self, groups: tuple[GpuGroup, ...]) -> Emitted:
        """The program of a step with these groups. Raises VerifyError."""
        key = _key(groups)
        if key not in self._known:
            self._known[key] = self._made(groups)
        return self._known[key]

    def predicted(self, steps: Iterable[Step]) -> float:
        """Seconds of these steps as planned, one of each kind standing for all."""
        total = 0.0
        for step in steps:
            groups = gpu_groups(step, self.settings)
            key = _key(groups)
            if key not in self._seconds:
                self._seconds[key] = self._predictor.step(step_work(groups))[0]
            total += self._seconds[key]
        return total

    def first(self) -> list[Emitted]:
        """The programs of the first steps of the workload: they have every pool."""
        lengths = [n for n, count in self._workload.lengths for _ in range(count)]
        requests = [
            Request(i, length, self._workload.new_tokens) for i, length in enumerate(lengths)
        ]
        batcher, found = Batcher(requests, self.settings.admission), []
        for _ in range(2):
            if (step := batcher.next_step()) is not None:
                found.append(self(gpu_groups(step, self.settings)))
                batcher.advance(step)
        return found

    def _made(self, groups: tuple[GpuGroup, ...]) -> Emitted:
        work = step_work(groups)
        longest = self._workload.longest + self._workload.new_tokens - 1
        program = lower_gpu(self._predictor, work, self._capacity, longest=longest)
        verify_gpu_program(program)
        source = emit_gpu_executor(program, self._title)
        name = f"executor_{len(self._known)}_{work.kind}.py"
        return program, _namespace(source, name, self.folder)


Key = tuple[tuple[object, ...], ...]
"""What steps have in common that share a program."""


def _key(groups: Iterable[GpuGroup]) -> Key:
    return tuple(
        (
            each.kind,
            len(each.group.members).bit_length(),
            each.group.q_len.bit_length(),
            each.group.past.bit_length(),
            each.group.layers,
        )
        for each in groups
    )


def _namespace(source: str, name: str, folder: Path | None) -> dict[str, Any]:
    """What an emitted source defines; with a folder it is kept there, for tracebacks too."""
    place = name
    if folder is not None:
        (folder / name).write_text(source, encoding="utf-8")
        place = str(folder / name)
    functions: dict[str, Any] = {}
    exec(compile(source, place, "exec"), functions)
    return functions


def gpu_generation(
    programs: GpuPrograms,
    layout: Layout,
    captured: Captured,
    source: CheckpointIndex | MemoryWeights,
    make_device: MakeDevice,
    sampling: Sampling,
    stop_tokens: Sequence[int],
    experts: Experts | None = None,
    graphs: bool = False,
) -> Generation[GpuRuntime]:
    """Generation under a layout for a GPU, whose ``programs`` these are; with ``graphs`` steps are
    captured where that is possible.

    Raises VerifyError for what the executor does not do; entering it raises BudgetError.
    """
    segments = _namespace(emit_gpu_segments(layout.graph), "segments.py", programs.folder)
    activations = tier_bytes(layout, 1)["hbm"]["activations"]

    def runtime(choose: Choose) -> GpuRuntime:
        return GpuRuntime(
            layout.graph,
            programs.settings,
            captured.constants,
            source,
            segments,
            choose,
            make_device,
            programs,
            programs.first(),
            activations,
            experts,
            graphs,
        )

    return Generation(programs.settings.admission, runtime, sampling, stop_tokens)
