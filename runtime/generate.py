"""The generation loop: steps from the batcher, through the executor, to finished sequences."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from dovetail.ir.batching import Admission, Batcher, Group, Request, Step
from dovetail.ir.program import Program
from dovetail.ir.task_graph import TaskGraph
from dovetail.runtime.executor import Runtime
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.recorder import Recorder
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.sampling import Sampling, choose


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence that has left: the generated tokens, the end-of-sequence token included, and why
    it ended (``stop`` or ``length``)."""

    index: int
    tokens: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step brought: sequences that left, how many tokens were generated, and the tokens
    themselves in the order of ``step.receivers``."""

    step: Step
    finished: tuple[Finished, ...]
    tokens: int
    chosen: tuple[int, ...] = ()


Observer = Callable[[Sequence[tuple[int, int]], Tensor], None]
"""Is shown the logits ``[n, vocab]``, only lent, of n (request, number of the new token)."""


class StepRunner(Protocol):
    """What runs steps: the CPU's runtime or a GPU's."""

    recorder: Recorder

    def start(self) -> None:
        """Set memory aside and load what stays resident."""

    def stop(self) -> None:
        """Give everything back."""

    def run_step(self, step: Step, inputs: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The next token of every sequence that gets one, in the order of ``step.receivers``."""

    def leave(self, indices: Sequence[int]) -> None:
        """Forget sequences that have ended."""


R = TypeVar("R", bound=StepRunner)
Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""Turns logits ``[n, vocab]`` of the step's receivers with these numbers into tokens ``[n]``."""


class Generation(Generic[R]):
    """Generates for many prompts on what ``make_runtime`` gives; ``admission`` says how they enter.

    ``prompts`` maps each request's index to its token ids. Use as a context manager; ``steps``
    yields a report per step. Raises what the executor raises. ``observer``, if set, is shown all
    logits by the threads that made them.
    """

    def __init__(
        self,
        admission: Admission,
        make_runtime: Callable[[Choose], R],
        sampling: Sampling,
        stop_tokens: Sequence[int],
    ) -> None:
        self._sampling, self._stop = sampling, frozenset(stop_tokens)
        self._admission = admission
        self._made: dict[int, list[int]] = {}
        self._order: list[int] = []
        self.observer: Observer | None = None
        self.runtime = make_runtime(self._choose)

    def configure(self, sampling: Sampling, stop_tokens: Sequence[int]) -> None:
        """Choose tokens like this from the next run of ``steps`` on."""
        self._sampling, self._stop = sampling, frozenset(stop_tokens)

    def __enter__(self) -> Self:
        self.runtime.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.runtime.stop()

    def steps(
        self, requests: Sequence[Request], prompt: Callable[[int], Sequence[int]]
    ) -> Iterator[StepReport]:
        """Run all requests to their end; ``prompt(index)`` gives a request's token ids."""
        limits = {request.index: request.new_tokens for request in requests}
        batcher = Batcher(requests, self._admission)
        while (step := batcher.next_step()) is not None:
            self._order = list(step.receivers)
            inputs = [self._inputs(group, prompt) for group in step.groups]
            tokens = self.runtime.run_step(step, inputs).tolist()
            stopped = []
            for index, token in zip(self._order, tokens, strict=True):
                self._made.setdefault(index, []).append(token)
                if token in self._stop:
                    stopped.append(index)
            left = batcher.advance(step, stopped)
            self.runtime.leave(left)
            gone = tuple(self._leave(i, stopped, limits) for i in left)
            yield StepReport(step, gone, len(tokens), tuple(tokens))

    def _leave(self, index: int, stopped: list[int], limits: Mapping[int, int]) -> Finished:
        tokens = tuple(self._made.pop(index))
        assert len(tokens) <= limits[index]
        return Finished(index, tokens, "stop" if index in stopped else "length")

    def _inputs(self, group: Group, prompt: Callable[[int], Sequence[int]]) -> dict[str, Tensor]:
        """Token ids and positions of a group, ``[seqs, q_len]``, zeros where padded."""
        if not group.prefill:
            ids = torch.tensor([[self._made[member.index][-1]] for member in group.members])
            held = torch.tensor([[member.held] for member in group.members])
            return {"input_ids": ids, "position_ids": held}
        padded = torch.zeros((len(group.members), group.q_len), dtype=torch.int64)
        for row, member, length in zip(padded, group.members, group.lengths, strict=True):
            piece = prompt(member.index)[member.held : member.held + length]
            row[:length] = torch.tensor(piece)
        held = torch.tensor([[member.held] for member in group.members])
        last = held + torch.tensor(group.lengths).unsqueeze(1) - 1
        # Padding repeats the last position, since the next ones may lie beyond the context.
        positions = torch.minimum(held + torch.arange(group.q_len), last)
        return {"input_ids": padded, "position_ids": positions}

    def _choose(self, logits: Tensor, places: Sequence[int]) -> Tensor:
        indices = [self._order[place] for place in places]
        who = [(index, len(self._made.get(index, []))) for index in indices]
        if self.observer is not None:
            self.observer(who, logits)
        if self._sampling.greedy:
            return choose(logits, self._sampling, [])
        # Drawn on the host, so that a seed gives the same text wherever the logits were made.
        return choose(logits.cpu(), self._sampling, who)


class Generator(Generation[Runtime]):
    """Generates under one program on this machine's processor."""

    def __init__(
        self,
        graph: TaskGraph,
        program: Program,
        constants: Mapping[str, Tensor],
        index: CheckpointIndex | MemoryWeights,
        functions: Mapping[str, Any],
        sampling: Sampling,
        stop_tokens: Sequence[int],
    ) -> None:
        def runtime(choose: Choose) -> Runtime:
            return Runtime(graph, program, constants, index, functions, choose)

        super().__init__(program.settings.admission, runtime, sampling, stop_tokens)
