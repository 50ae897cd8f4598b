"""A compiled function: itself or its traced form, whichever was measured to be faster."""

import functools
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dovetail.doors.region_choice import (
    EAGER,
    VERSION,
    Choice,
    ModulePlan,
    bucket_of,
    measure,
)
from dovetail.doors.regions import agrees
from dovetail.ir.errors import ModelError
from dovetail.ir.timeline import Span, Timeline
from dovetail.tuning.staleness import environment_here

log = logging.getLogger(__name__)
TRACED = "traced"
KEPT_CALLS = 8


class CompiledFunction:
    """Calls ``function``; for every bucket of its inputs' sizes either as it is, or traced with
    ``torch.compile(backend="dovetail")``, which schedules the routed experts it recognises.

    A function that writes to its arguments is always called as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._name = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._traced = torch.compile(function, backend="dovetail", dynamic=True)
        self._choices: dict[tuple[object, ...], Choice] = {}
        self._notes: list[str] = []
        self._spans: list[Span] = []
        self._calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The function's result."""
        key = _key(arguments, options)
        choice = self._choices.get(key)
        if choice is None:
            choice = self._decide(key, arguments, options)
            self._choices[key] = choice
        run = self._function if choice.winner == EAGER else self._traced
        begin = time.perf_counter()
        result = run(*arguments, **options)
        span = Span("function", "run", choice.winner, -1, begin, time.perf_counter(), self._calls)
        self._spans = [*self._spans[1 - KEPT_CALLS :], span]
        self._calls += 1
        return result

    def __get__(self, owner: object, kind: type | None = None) -> Any:
        # On a class the function is a method.
        return self if owner is None else functools.partial(self, owner)

    def _decide(self, key: tuple[object, ...], arguments: Any, options: Any) -> Choice:
        kind, tokens = self._name, int(str(key[0]))
        tensors = [leaf for leaf in pytree.tree_leaves((arguments, options)) if _is_plain(leaf)]
        with torch.no_grad():
            before = [t._version for t in tensors]
            expected = self._function(*arguments, **options)
            if [t._version for t in tensors] != before:
                return self._as_it_is(kind, tokens, "it writes to its arguments")
            try:
                found = self._traced(*arguments, **options)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                first = str(error).strip().splitlines()[0][:200]
                return self._as_it_is(kind, tokens, f"it cannot be traced: {first}")
            why = _differs(found, expected)
            if why is not None:
                return self._as_it_is(kind, tokens, f"its traced form {why}")
            runs = {
                EAGER: lambda: self._function(*arguments, **options),
                TRACED: lambda: self._traced(*arguments, **options),
            }
            return measure(kind, tokens, runs, {})

    def _as_it_is(self, kind: str, tokens: int, why: str) -> Choice:
        note = f"{kind}: {why}"
        if note not in self._notes:
            self._notes.append(note)
            log.warning("%s; it runs as it is", note)
        return Choice(kind, tokens, EAGER, {EAGER: (0.0,)}, {TRACED: why})

    @property
    def plan(self) -> ModulePlan:
        """What was decided so far."""
        choices = tuple(self._choices.values())
        notes = tuple(self._notes)
        return ModulePlan(VERSION, self._name, environment_here(), {}, choices, notes)

    def explain(self) -> str:
        """Every bucket with what was measured, and why the function runs as it is, if it does."""
        lines = [f"{self._name}{inspect.signature(self._function)}"]
        for choice in self._choices.values():
            ratio = f"{choice.ratio(TRACED):.2f}" if TRACED in choice.samples else "not measured"
            lines.append(
                f"  inputs of up to {choice.tokens} numbers: {choice.winner} "
                f"(traced takes {ratio} of eager's time)"
            )
        return "\n".join([*lines, *(f"  runs as it is: {note}" for note in self._notes)])

    def timeline(self) -> Timeline:
        """The latest calls."""
        return Timeline("measured", tuple(self._spans))

    def __repr__(self) -> str:
        traced = sum(choice.winner == TRACED for choice in self._choices.values())
        measured = f"{len(self._choices)} input sizes measured, traced in {traced}"
        if not self._choices:
            measured = "nothing has run yet: the first call of every input size measures"
        return (
            f"{self._name}(function compiled by dovetail\n"
            f"  plan {self.plan.digest()[:12]}: as it is, or traced with its experts scheduled\n"
            f"  {measured})"
        )

    def __reduce__(self) -> NoReturn:
        raise ModelError(
            f"a compiled {self._name} cannot be pickled or copied: its plan holds measurements "
            "and code of this process; pickle the function and compile it where it is used"
        )


def _is_plain(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_inference()


def _key(arguments: Any, options: Any) -> tuple[object, ...]:
    """What inputs of one bucket share: their numbers rounded up, kinds and devices."""
    leaves = pytree.tree_leaves((arguments, options))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    size = bucket_of(sum(t.numel() for t in tensors)) if tensors else 0
    return size, tuple((t.dtype, t.device, t.dim()) for t in tensors)


def _differs(found: object, expected: object) -> str | None:
    left, form = pytree.tree_flatten(found)
    right, other = pytree.tree_flatten(expected)
    if form != other:
        return f"returns {form}, not {other}"
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point():
            why = agrees(a, b)
            if why is not None:
                return why
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            if not torch.equal(a, b):
                return "gives other whole numbers"
        elif a != b:
            return f"returns {a!r}, not {b!r}"
    return None
