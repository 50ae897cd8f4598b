"""Execute: `plan, captured model, prompts -> finished sequences`, and what it took."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from dovetail.capture.captured import Captured
from dovetail.codegen.executor import emit_executor
from dovetail.executing import Executing
from dovetail.ir.machine import LARGE_BLOCK
from dovetail.ir.plan import Plan
from dovetail.ir.program import Program
from dovetail.ir.units import format_bytes
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.lower import lower
from dovetail.runtime import memory
from dovetail.runtime.executor import Runtime
from dovetail.runtime.generate import Generator
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.routing_sink import RoutingSink
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.sampling import Sampling

LEAST_KEPT, KEPT_SHARE = 64 << 10, 256
"""malloc keeps free memory of up to a 64th of the budget, between these bytes and ``LARGE_BLOCK``;
more goes back to the system, so that what is held is what is counted. Keeping more would be
faster: writing to memory that is new to the process costs several times a write."""


class Execution(Executing[Runtime]):
    """A plan at work on a checkpoint; a context manager.

    ``source`` is the emitted executor; it is written to ``executor_file`` and compiled from there,
    so that a traceback shows its lines. ``routing_sink`` is told which experts tokens choose.
    """

    def __init__(
        self,
        plan: Plan,
        captured: Captured,
        index: CheckpointIndex | MemoryWeights,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        executor_file: Path,
        routing_sink: RoutingSink | None = None,
    ) -> None:
        if not isinstance(index, MemoryWeights):
            # Beside a model in memory the process is not ours, and the budget not that tight.
            kept = min(LARGE_BLOCK, max(LEAST_KEPT, plan.budget["ram"] // KEPT_SHARE))
            memory.trim_allocator(kept, kept, arenas=1)
        self.layout = apply_moves(captured.graph, plan.moves)
        graph = self.layout.graph
        self.program: Program = lower(self.layout, plan.budget)
        self.source = emit_executor(graph, self.program, plan_title(plan))
        executor_file.write_text(self.source, encoding="utf-8")
        functions: dict[str, Any] = {}
        exec(compile(self.source, str(executor_file), "exec"), functions)
        generator = Generator(
            graph, self.program, captured.constants, index, functions, sampling, stop_tokens
        )
        generator.runtime.routing_sink = routing_sink
        super().__init__(generator)

    def __enter__(self) -> Self:
        memory.malloc_trim()
        return super().__enter__()

    @property
    def pool_bytes(self) -> int:
        """Most bytes of ram that the pools ever held."""
        return self._generator.runtime.budget.peak


def plan_title(plan: Plan) -> dict[str, str]:
    """What an emitted executor says that it was emitted for."""
    budget = ", ".join(f"{tier}={format_bytes(size)}" for tier, size in plan.budget.items())
    knobs = ", ".join(f"{name}={value}" for name, value in plan.knobs.items())
    return {
        "model": f"{plan.model['model_type']}, {plan.model['num_layers']} layers",
        "plan": plan.digest()[:16],
        "policy": f"{plan.policy} ({knobs})",
        "budget": budget,
    }
