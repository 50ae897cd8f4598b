"""What segments write and read in an abstract execution: every task once in a step, its weights in
place, and its inputs made before it by every worker that it takes them from."""

from collections.abc import Sequence

from dovetail.ir.notation import unit_text
from dovetail.ir.program import Program, Run, Segment
from dovetail.ir.task_graph import Body, TaskGraph
from dovetail.ir.verify_engine import Engine, Unit, text_of
from dovetail.ir.verify_graph import EXTERNAL

_ORDERED_BY = {"experts": "tokens", "seqs": "hidden", "groups": "experts"}
"""The phase between a segment over these and what it reads of other workers."""
_OUTSIDE = -1
"""The layer of runs of prologue and epilogue."""


class Values:
    """Checks the runs of all workers; raises VerifyError."""

    def __init__(self, program: Program, graph: TaskGraph, workers: Sequence[Engine]) -> None:
        self._program, self._graph, self._workers = program, graph, workers
        bodies = (graph.prologue, *graph.bodies, graph.epilogue)
        self._bodies = {body.name: body for body in bodies}
        self._segments = {segment.name: segment for segment in program.segments}
        self._makers = {(s.body, name): s for s in program.segments for name in s.writes}
        self._resident = {(kind, layer) for kind, layer, _ in program.resident}
        self._streamed = {ring.name for ring in program.rings}
        self._weighted = {s.name for s in program.segments if self._has_weights(s)}
        self._written: dict[tuple[int, int, str], dict[int, int]] = {}
        self._ran: dict[tuple[int, int, str, int], set[int]] = {}

    def run(self, engine: Engine, run: Run) -> None:
        """Check a run at the engine's place, and note what it writes."""
        segment = self._segments[run.segment]
        place = self._place(engine, segment, run.layer)
        self._check_weights(engine, run, segment)
        if self._check_once(engine, run, segment, place):
            for name in segment.reads:
                self._check_read(engine, segment, place, name)
        for name in segment.writes:
            written = self._written.setdefault((engine.step, place, name), {})
            written[engine.number] = engine.clock[engine.number]

    def check_complete(self, engine: Engine) -> None:
        """At the end of a step every segment has run in every layer that it belongs to."""
        layers = range(len(self._graph.layers))
        for segment in self._segments.values():
            body = self._bodies[segment.body]
            outside = body in (self._graph.prologue, self._graph.epilogue)
            in_layers = [i for i in layers if self._graph.body(i) is body]
            for place in [self._outside(body)] if outside else in_layers:
                missing = self._missing(engine, engine.step, segment, place)
                if missing:
                    where = "" if outside else f" of layer {place}"
                    raise engine.error(
                        f"{missing[0]}{where} was not run in this step, expected it once before "
                        "its end"
                    )

    def _missing(self, engine: Engine, step: int, segment: Segment, place: int) -> list[str]:
        """What of a segment the engine has not run in a step."""
        ran = self._ran.get((step, engine.number, segment.name, place), set())
        if segment.over != "experts":
            return [] if ran else [segment.name]
        task = self._bodies[segment.body].experts
        assert task is not None and task.experts is not None
        left = sorted(set(range(task.experts.count)) - ran)
        return [f"expert {expert}" for expert in left]

    def _has_weights(self, segment: Segment) -> bool:
        tasks = (t for t in self._bodies[segment.body].tasks if t.name in segment.tasks)
        return any(task.weights or task.experts for task in tasks)

    def _outside(self, body: Body) -> int:
        return _OUTSIDE if body is self._graph.prologue else len(self._graph.layers)

    def _place(self, engine: Engine, segment: Segment, layer: int) -> int:
        """A segment's place among the bodies in order: -1, the layers, their number."""
        graph, body = self._graph, self._bodies[segment.body]
        if body in (graph.prologue, graph.epilogue):
            if layer == _OUTSIDE:
                return self._outside(body)
            raise engine.error(f"layer {layer} of {body.name}, expected layer -1")
        if not 0 <= layer < len(graph.layers):
            last = len(graph.layers) - 1
            raise engine.error(f"layer {layer} of {body.name}, expected a layer of 0..{last}")
        if graph.body(layer) is not body:
            name = graph.body(layer).name
            raise engine.error(f"a segment of {body.name}, but layer {layer} runs {name}")
        return layer

    def _check_weights(self, engine: Engine, run: Run, segment: Segment) -> None:
        wanted = self._wanted(run, segment)
        kind, layer, _ = wanted
        if run.unit in self._streamed:
            held = engine.held.get(run.unit)
            if held == wanted:
                return
            found = f"holds {text_of(held)}" if held else f"holds no load of ring {run.unit}"
            raise engine.error(
                f"reads {text_of(wanted)} but {found}: expected wait(ready, {kind}) for it before, "
                "and its free after"
            )
        if kind == "experts" and run.chunk >= 0:
            raise engine.error(f"streamed chunk {run.chunk} read from {run.unit}, expected experts")
        if segment.name not in self._weighted:
            return
        if run.unit != "ram":
            if (run.unit, kind) != ("disk rows", "embed"):
                found = run.unit or "nowhere"
                raise engine.error(f"reads {kind} from {found}, expected ram or ring {kind}")
        elif (kind, layer) not in self._resident:
            name = unit_text(kind, layer, "resident")
            raise engine.error(f"reads {name} in ram, expected it among the resident units")

    def _wanted(self, run: Run, segment: Segment) -> Unit:
        body = self._bodies[segment.body]
        if segment.over == "experts":
            return ("experts", run.layer, run.chunk)
        if body in (self._graph.prologue, self._graph.epilogue):
            return ("embed" if body is self._graph.prologue else "head", _OUTSIDE, 0)
        return ("dense", run.layer, 0)

    def _check_once(self, engine: Engine, run: Run, segment: Segment, place: int) -> bool:
        """A segment runs once in a step, each of its experts if it has some. Returns whether this
        is the worker's first run of it; what orders this one orders the next ones too."""
        ran = self._ran.setdefault((engine.step, engine.number, segment.name, place), set())
        now = {0}
        if segment.over == "experts":
            now = set(self._program.settings.chunk_experts(run.layer, run.chunk))
        if ran & now:
            what = f"expert {min(ran & now)}" if segment.over == "experts" else segment.name
            raise engine.error(f"{what} has run in this step already, expected it once")
        first = not ran
        ran |= now
        return first

    def _check_read(self, engine: Engine, segment: Segment, place: int, name: str) -> None:
        source = self._source(segment, place, name)
        if source is None:
            return
        at, body, made = source
        maker = self._makers[body.name, made]
        written = self._written.get((engine.step, at, made), {})
        where = f"{maker.name}[{at}]" if 0 <= at < len(self._graph.layers) else maker.name
        if maker.over == segment.over:
            # A worker's groups, and its sequences, are its own for the whole step.
            if engine.number not in written:
                raise engine.error(f"reads {made} before {where} made it, expected that run before")
            return
        phase = _ORDERED_BY[segment.over]
        met = engine.met.get(phase, [0] * len(engine.clock))
        for worker in self._workers:
            event = written.get(worker.number)
            if event is None or met[worker.number] < event:
                raise engine.error(
                    f"reads {made} of all workers, and nothing orders it after {where} of "
                    f"{worker.name}: expected wait(phase, {phase}) between, signalled by "
                    f"{worker.name} after it"
                )
            missing = self._missing(worker, engine.step, maker, at)
            if missing:
                raise engine.error(
                    f"reads {made} of all workers, and {worker.name} need not have run "
                    f"{missing[0]} yet: expected all experts before it signals {phase}"
                )

    def _source(self, segment: Segment, place: int, name: str) -> tuple[int, Body, str] | None:
        """Where a value that a segment reads is made (place, body, name there), or None if it
        comes from outside of the model."""
        graph, body = self._graph, self._bodies[segment.body]
        if (body.name, name) in self._makers:
            return place, body, name
        if name in body.inputs[: len(graph.prologue.outputs)] and body is not graph.prologue:
            before = graph.body(place - 1) if place > 0 else graph.prologue
            return place - 1, before, before.outputs[body.inputs.index(name)]
        if name in graph.shared and body is not graph.prologue:
            return _OUTSIDE, graph.prologue, name
        assert name in EXTERNAL, f"{name} of {body.name} has no source; is the graph verified?"
        return None
