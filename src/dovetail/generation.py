"""Generation under plans: `prompts -> tokens`, a plan per workload bucket, one executor kept open.

The executor of the last bucket stays open between calls, with its resident weights in memory, so
that only the first call of a bucket pays for planning and loading.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dovetail.checkpoint import ModelFolder
from dovetail.doors.generate_arguments import Wanted
from dovetail.doors.plan_cache import Bucket, PlanCache, Planned, plan_for
from dovetail.execute import Execution
from dovetail.ir.batching import Request
from dovetail.ir.errors import ModelError
from dovetail.ir.plan import Plan
from dovetail.ir.timeline import Timeline
from dovetail.precision.of_plan import plan_index
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.safetensors_index import CheckpointIndex

if TYPE_CHECKING:
    from dovetail.gpu_run import GpuExecution

OnToken = Callable[[int, int], None]
"""Called with a sequence's number and its new token."""


@dataclass(slots=True)
class _Open:
    """An executor at work, and what it is for."""

    bucket: Bucket
    planned: Planned
    execution: "Execution | GpuExecution"


class GenerationEngine:
    """Generates under the plans of ``cache`` from the weights of ``index``; one call at a time.

    ``target`` is as in ``GpuExecution`` for plans of a GPU, else ``cpu``. Plans whose experts are
    in fewer bits find them beside ``folder``.
    """

    def __init__(
        self,
        cache: PlanCache,
        index: CheckpointIndex | MemoryWeights,
        context: int,
        target: str = "cpu",
        folder: ModelFolder | None = None,
    ) -> None:
        self._cache, self._index, self._context = cache, index, context
        self._target, self._folder = target, folder
        self._open: _Open | None = None
        self._plans: dict[Bucket, Planned] = {}
        self._lock = threading.Lock()
        self._timeline: Timeline | None = None

    def prepare(self, bucket: Bucket) -> Plan:
        """Plan for ``bucket`` now. Raises DovetailError."""
        self._plans[bucket] = self._cache.plan(bucket.workload)
        return self._plans[bucket][0]

    def cover(self, wanted: Wanted) -> None:
        """Plan for what ``wanted`` asks for, unless a plan holds it already. Raises
        DovetailError."""
        self._planned(wanted.lengths, wanted.new_tokens)

    def run(self, wanted: Wanted, on_token: OnToken | None = None) -> list[list[int]]:
        """The new tokens of every prompt, the end-of-sequence token included.

        Raises DovetailError; after any error the executor is closed.
        """
        if not self._lock.acquire(blocking=False):
            raise ModelError(
                "generate() was called while another call of this model is under way; call it "
                "with all prompts at once, which is also faster"
            )
        try:
            return self._run(wanted, on_token)
        except BaseException:
            self.close()
            raise
        finally:
            self._lock.release()

    def _run(self, wanted: Wanted, on_token: OnToken | None) -> list[list[int]]:
        # A prompt is one sequence: more new tokens than it may get belong to no sequence.
        execution = self._execution(wanted)
        execution.configure(wanted.sampling, wanted.stop)
        requests = [
            Request(i, length, new)
            for i, (length, new) in enumerate(zip(wanted.lengths, wanted.new_tokens, strict=True))
        ]
        made: list[list[int]] = [[] for _ in requests]
        for report in execution.steps(requests, wanted.prompts.__getitem__):
            for index, token in zip(report.step.receivers, report.chosen, strict=True):
                made[index].append(token)
                if on_token is not None:
                    on_token(index, token)
        return made

    def _execution(self, wanted: Wanted) -> "Execution | GpuExecution":
        if self._open and self._open.bucket.holds(wanted.lengths, wanted.new_tokens):
            return self._open.execution
        bucket, planned = self._planned(wanted.lengths, wanted.new_tokens)
        self.close()
        execution = self._made(planned, wanted)
        # The workers have set their own number, which is also that of threads to come: undo it.
        torch.set_num_threads(torch.get_num_threads())
        execution.__enter__()
        self._open = _Open(bucket, planned, execution)
        return execution

    def _made(self, planned: Planned, wanted: Wanted) -> "Execution | GpuExecution":
        plan, captured, place = planned
        if self._target == "cpu":
            index = self._index
            if self._folder is not None:
                index = plan_index(self._folder, captured.graph, plan.moves)
            return Execution(
                plan, captured, index, wanted.sampling, wanted.stop, place / "executor.py"
            )
        from dovetail.gpu_run import GpuExecution

        return GpuExecution(
            plan, captured, self._index, wanted.sampling, wanted.stop, place, self._target
        )

    def _planned(self, lengths: Sequence[int], new: Sequence[int]) -> tuple[Bucket, Planned]:
        for bucket, planned in self._plans.items():
            if bucket.holds(lengths, new):
                return bucket, planned
        bucket, planned = plan_for(self._cache, lengths, new, self._context)
        self._plans[bucket] = planned
        return bucket, planned

    @property
    def plan(self) -> Plan | None:
        """The plan at work, or else the one made last."""
        if self._open is not None:
            return self._open.planned[0]
        return next(reversed(self._plans.values()))[0] if self._plans else None

    @property
    def planned(self) -> Planned | None:
        """The plan at work, or else the one made last, with its model and its folder."""
        if self._open is not None:
            return self._open.planned
        return next(reversed(self._plans.values())) if self._plans else None

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """What there are plans for."""
        return tuple(self._plans)

    @property
    def source(self) -> str:
        """The executor at work, as Python; "" before the first call."""
        return self._open.execution.source if self._open is not None else ""

    def timeline(self) -> Timeline | None:
        """The latest steps that ran, or None before the first."""
        return self._open.execution.timeline() if self._open is not None else self._timeline

    def close(self) -> None:
        """End the executor and give its memory back. Safe to call twice."""
        if self._open is None:
            return
        opened, self._open = self._open, None
        self._timeline = opened.execution.timeline()
        opened.execution.__exit__(None, None, None)
