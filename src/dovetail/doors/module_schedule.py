"""The schedule of a compiled module in memory: its view, its regions, and what they chose."""

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.doors.region_choice import (
    EAGER,
    VERSION,
    Choice,
    ChoiceStore,
    ModulePlan,
    Run,
    bucket_of,
    load_module_plan,
    measure,
)
from dovetail.doors.region_switch import Forward, install, scheduled_by
from dovetail.doors.regions import (
    Implementation,
    Region,
    agrees,
    circumstances,
    find_regions,
    tokens_of,
)
from dovetail.ir.errors import PlanError
from dovetail.ir.timeline import Span, Timeline
from dovetail.tuning.staleness import Grade, compare, environment_here

log = logging.getLogger(__name__)
KEPT_CALLS = 8
"""Calls whose spans a timeline shows: the latest ones."""


class ModuleSchedule:
    """Runs ``module`` with its own ``forward``, and each region by the implementation that was
    measured to be fastest for its bucket of tokens.

    ``plan`` is a plan file to follow; ``on_stale`` says what becomes of one made elsewhere.
    """

    def __init__(
        self, module: nn.Module, forward: Forward, plan: Path | None, on_stale: str
    ) -> None:
        self._module, self._forward = module, forward
        self._found = False
        self._by_module: dict[int, Region] = {}
        self._store = ChoiceStore()
        self._choices: dict[tuple[str, int], Choice] = {}
        self.regions: dict[str, Region] = {}
        self.notes: list[str] = []
        self._spans: deque[tuple[Span, ...]] = deque(maxlen=KEPT_CALLS)
        self._open: list[Span] = []
        self._calls = 0
        if plan is not None:
            self._adopt(plan, on_stale)

    # Running.

    def run(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """The module's result."""
        self.find()
        begin = time.perf_counter()
        self._open = []
        with scheduled_by(self):
            # A block may be a region as a whole.
            run = self.run_region if "" in self.regions else _plain
            result = run(self._module, self._forward, arguments, dict(options))
        span = _span("module", -1, begin, time.perf_counter(), self._calls)
        self._spans.append((*self._open, span))
        self._calls += 1
        return result

    def find(self) -> None:
        """Find the module's regions, once."""
        if self._found:
            return
        self._found = True
        found, notes = find_regions(self._module)
        for note in notes:
            log.warning("%s", note)
        self.notes = notes
        for region in found:
            self.regions[region.path] = region
            self._by_module[id(region.module)] = region
            if region.path:
                install(region.module)
        # Looking for regions runs blocks, which are no calls of the user's.
        self._spans.clear()
        self._calls = 0

    def run_region(
        self, module: nn.Module, own: Forward, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """A region's result, by the way that was chosen for its bucket."""
        region = self._by_module.get(id(module))
        if region is None or not region.accepts(arguments, options):
            return own(module, *arguments, **options)
        begin = time.perf_counter()
        way = self._chosen(region, own, arguments, options)
        result = way(module, *arguments, **options)
        name, number = region.path.rsplit(".", 1)[-1] or "block", region.layer
        self._open.append(_span(name, number, begin, time.perf_counter(), self._calls))
        return result

    # Choosing.

    def _chosen(
        self,
        region: Region,
        own: Implementation,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
    ) -> Implementation:
        tokens = bucket_of(tokens_of(arguments, options))
        kind = f"{region.kind}, {circumstances(arguments, options)}"
        found = self._choices.get((kind, tokens))
        ways = region.implementations(tokens)
        if found is None:
            found = self._decide(region, own, arguments, options, (kind, tokens), ways)
            self._choices[kind, tokens] = found
        return own if found.winner == EAGER else ways.get(found.winner, own)

    def _decide(
        self,
        region: Region,
        own: Implementation,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        key: tuple[str, int],
        ways: Mapping[str, Implementation],
    ) -> Choice:
        stored = self._store.get(*key)
        if stored is not None and stored[1] is Grade.SAME:
            return stored[0]
        if stored is not None:
            # Made in a near environment: its winner has to win once more.
            ways = {name: way for name, way in ways.items() if name == stored[0].winner}
        module = region.module
        with torch.no_grad():
            versions = _versions(module)
            expected = own(module, *arguments, **options)
            if _versions(module) != versions:
                return _refused(region, key, "its forward changes its own buffers")
            runs: dict[str, Run] = {EAGER: lambda: own(module, *arguments, **options)}
            refused = {}
            for name, way in ways.items():
                why = _objection(way, module, arguments, options, expected)
                if why is None:
                    runs[name] = _bound(way, module, arguments, options)
                else:
                    refused[name] = why
            choice = measure(*key, runs, refused)
        self._store.put(choice)
        return choice

    def _adopt(self, path: Path, on_stale: str) -> None:
        plan = load_module_plan(path)
        name = type(self._module).__name__
        if plan.module != name:
            raise PlanError(
                f"{path}: the plan is for a {plan.module}, found a {name}; save the plan of this "
                "module, or leave plan= out"
            )
        found = compare(plan.environment, environment_here())
        if found.grade.distance > Grade.NEAR.distance:
            message = found.message(str(path))
            if on_stale == "error":
                raise PlanError(f"{message}; compile without plan=, or pass on_stale='verify'")
            log.warning("%s; regions are measured anew", message)
            return
        for choice in plan.choices:
            given = Choice(
                choice.region, choice.tokens, choice.winner, choice.samples, choice.refused, "given"
            )
            self._choices[choice.region, choice.tokens] = given

    # What is known.

    def plan(self) -> ModulePlan:
        """What was decided so far."""
        self.find()
        kinds = {path: region.kind for path, region in self.regions.items()}
        choices = sorted(self._choices.values(), key=lambda c: (c.region, c.tokens))
        return ModulePlan(
            VERSION,
            type(self._module).__name__,
            environment_here(),
            kinds,
            tuple(choices),
            tuple(self.notes),
        )

    def timeline(self) -> Timeline:
        """The latest calls: every region's spans, and the whole module's."""
        spans = [span for call in self._spans for span in call]
        first = min((span.start for span in spans), default=0.0)
        moved = (
            Span(s.engine, s.kind, s.name, s.layer, s.start - first, s.end - first, s.step)
            for s in spans
        )
        return Timeline("measured", tuple(moved))


def _plain(
    module: nn.Module, own: Forward, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    return own(module, *arguments, **options)


def _span(name: str, layer: int, begin: float, end: float, step: int) -> Span:
    return Span("regions" if name != "module" else "module", "run", name, layer, begin, end, step)


def _versions(module: nn.Module) -> list[int]:
    """How often each parameter and buffer was written in place."""
    tensors = [*module.parameters(), *module.buffers()]
    return [t._version for t in tensors if not t.is_inference()]


def _refused(region: Region, key: tuple[str, int], why: str) -> Choice:
    log.warning("%s: %s; it runs as it is", region.path, why)
    return Choice(*key, EAGER, {EAGER: (0.0,)}, {"all": why})


def _bound(
    way: Implementation,
    module: nn.Module,
    arguments: Sequence[Any],
    options: Mapping[str, Any],
) -> Run:
    return lambda: way(module, *arguments, **options)


def _objection(
    way: Implementation,
    module: nn.Module,
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    expected: Tensor,
) -> str | None:
    """Why this way cannot be used here, or None."""
    try:
        found = way(module, *arguments, **options)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return f"raises {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return agrees(found, expected)
