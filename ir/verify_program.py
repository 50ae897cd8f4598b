"""Legal programs: parts that fit the task graph and the capacity, and engines that a step-by-step
abstract execution finds neither racing nor waiting for each other."""

from collections import Counter
from collections.abc import Iterable, Mapping

from dovetail.ir.errors import VerifyError
from dovetail.ir.notation import instruction_text, unit_text
from dovetail.ir.placement import (
    dense_weights,
    embed_weights,
    expert_bytes,
    experts_of,
    head_weights,
    weights_bytes,
)
from dovetail.ir.program import Flat, Free, Load, Program, Run, Segment, Signal, Wait, unroll
from dovetail.ir.task_graph import Body, TaskGraph
from dovetail.ir.units import format_bytes
from dovetail.ir.verify_execution import Execution

STREAMED = ("dense", "experts", "head")
"""Units that rings stream; a ring is named after them."""


def verify_program(program: Program, graph: TaskGraph, steps: int = 2) -> None:
    """Raise VerifyError unless the program computes ``graph`` within its capacity.

    All engines' lists are executed abstractly, ``steps`` times one after the other, with vector
    clocks: what one engine reads of another must be ordered by waits, whatever the engines' speeds.
    """
    if not program.workers:
        raise VerifyError("the program has no compute engine, expected at least cpu0")
    _check_settings(program, graph)
    _check_rings(program)
    _check_segments(program, graph)
    _check_resident(program, graph)
    _check_capacity(program, graph)
    flat = {name: tuple(unroll(items)) for name, items in program.engines.items()}
    _check_engines(program, flat)
    _check_units(program, graph, flat)
    _check_phases(program, graph, flat)
    Execution(program, graph, flat, steps).run()


def _check_settings(program: Program, graph: TaskGraph) -> None:
    settings = program.settings
    if len(settings.experts_resident) != len(graph.layers) or settings.chunk < 1:
        raise VerifyError(
            f"settings: resident experts of {len(settings.experts_resident)} layers in chunks of "
            f"{settings.chunk}, expected all {len(graph.layers)} layers and chunks of at least 1"
        )
    for layer, resident in enumerate(settings.experts_resident):
        experts = experts_of(graph, layer)
        count = experts.count if experts else 0
        if not 0 <= resident <= count or (count - resident) % settings.chunk:
            raise VerifyError(
                f"settings: {resident} resident experts of layer {layer} leave "
                f"{count - resident} to stream, expected 0 or a multiple of the chunk of "
                f"{settings.chunk}"
            )


def _check_rings(program: Program) -> None:
    _unique((ring.name for ring in program.rings), "ring")
    for ring in program.rings:
        if ring.name not in STREAMED:
            raise VerifyError(
                f"ring {ring.name} streams no unit, expected a ring named {' or '.join(STREAMED)}"
            )
        for name in ("slots", "slot_bytes", "consumers"):
            if getattr(ring, name) < 1:
                found = getattr(ring, name)
                raise VerifyError(f"ring {ring.name}: {name} {found}, expected at least 1")
        if ring.consumers > len(program.workers):
            raise VerifyError(
                f"ring {ring.name}: room after {ring.consumers} frees of a load, expected at most "
                f"the {len(program.workers)} of the workers"
            )


def _check_segments(program: Program, graph: TaskGraph) -> None:
    bodies = {body.name: body for body in (graph.prologue, *graph.bodies, graph.epilogue)}
    _unique((segment.name for segment in program.segments), "segment")
    for segment in program.segments:
        if segment.body not in bodies:
            raise VerifyError(
                f"segment {segment.name}: body {segment.body}, expected one of {', '.join(bodies)}"
            )
        _check_segment(segment, bodies[segment.body], graph)
    for body in bodies.values():
        found = [t for s in program.segments if s.body == body.name for t in s.tasks]
        expected = [task.name for task in body.tasks]
        if found != expected:
            raise VerifyError(
                f"segments of {body.name} hold the tasks {', '.join(found)}; expected each task of "
                f"the body once, in its order: {', '.join(expected)}"
            )


def _check_segment(segment: Segment, body: Body, graph: TaskGraph) -> None:
    tasks = {task.name: task for task in body.tasks}
    unknown = [name for name in segment.tasks if name not in tasks]
    if unknown or not segment.tasks:
        raise VerifyError(
            f"segment {segment.name}: task {unknown[0] if unknown else 'list is empty'}, expected "
            f"tasks of {body.name}: {', '.join(tasks)}"
        )
    inside = [tasks[name] for name in segment.tasks]
    over = "groups" if body is not graph.epilogue else "seqs"
    if any(task.experts for task in inside):
        over = "experts" if len(inside) == 1 else "experts alone"
    if segment.over != over:
        raise VerifyError(f"segment {segment.name} runs over {segment.over}, expected over {over}")
    written = {name for task in inside for name in task.writes}
    later = set(body.outputs) | (set(graph.shared) if body is graph.prologue else set())
    later |= {name for task in body.tasks if task not in inside for name in task.reads}
    read = {name for task in inside for name in task.reads} - written
    for what, names, expected in (
        ("reads", segment.reads, read),
        ("writes", segment.writes, written & later),
    ):
        if set(names) != expected:
            raise VerifyError(
                f"segment {segment.name} {what} {', '.join(names) or 'nothing'}, expected "
                f"{', '.join(sorted(expected)) or 'nothing'} from its tasks"
            )


def _check_resident(program: Program, graph: TaskGraph) -> None:
    _unique((unit_text(kind, layer) for kind, layer, _ in program.resident), "resident unit")
    layers = len(graph.layers)
    for kind, layer, count in program.resident:
        if kind not in ("embed", *STREAMED):
            raise VerifyError(
                f"resident: unknown unit {kind}, expected embed, dense, experts, head"
            )
        in_layer = kind in ("dense", "experts")
        if in_layer != (0 <= layer < layers) or (not in_layer and layer != -1):
            expected = f"0..{layers - 1}" if in_layer else "-1"
            raise VerifyError(f"resident: {kind} of layer {layer}, expected layer {expected}")
        if kind == "experts" and count != program.settings.experts_resident[layer]:
            raise VerifyError(
                f"resident: {count} experts of layer {layer}, expected the "
                f"{program.settings.experts_resident[layer]} of the settings"
            )


def _check_capacity(program: Program, graph: TaskGraph) -> None:
    held = sum(_unit_bytes(graph, kind, layer, count) for kind, layer, count in program.resident)
    if held > program.reserved.get("resident", 0):
        raise VerifyError(
            f"the resident units take {held} bytes, expected at most the "
            f"{program.reserved.get('resident', 0)} reserved for them"
        )
    if "ram" not in program.capacity:
        return
    parts = {f"ring {ring.name}": ring.slots * ring.slot_bytes for ring in program.rings}
    parts |= program.reserved
    total, capacity = sum(parts.values()), program.capacity["ram"]
    if total > capacity:
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        raise VerifyError(
            f"the program takes {total} bytes of ram ({listed}), expected at most the {capacity} "
            "of its capacity: give rings fewer slots, place less in ram, or raise the budget"
        )


def _unit_bytes(graph: TaskGraph, kind: str, layer: int, experts: int) -> int:
    """Buffer bytes of a unit; of ``experts`` experts of a layer."""
    if kind == "embed":
        return weights_bytes(embed_weights(graph))
    if kind == "head":
        return weights_bytes(head_weights(graph))
    if kind == "dense":
        return weights_bytes(dense_weights(graph.body(layer)))
    spec = experts_of(graph, layer)
    return experts * expert_bytes(spec) if spec else 0


def _check_engines(program: Program, flat: Mapping[str, tuple[Flat, ...]]) -> None:
    """Compute engines run and free, disk engines load."""
    for engine, items in flat.items():
        compute = engine in program.workers
        if not compute and not engine.startswith("disk"):
            raise VerifyError(f"engine {engine}, expected cpu0, cpu1, … or disk0, disk1, …")
        for item in items:
            if _loads(item) == compute:
                kind = "disk" if compute else "compute"
                raise VerifyError(
                    f"{engine}: {instruction_text(item)}, expected on a {kind} engine"
                )


def _loads(item: Flat) -> bool:
    """Whether an instruction is part of a load."""
    match item:
        case Load() | Wait("room", _) | Signal("ready", _):
            return True
    return False


def _check_units(program: Program, graph: TaskGraph, flat: Mapping[str, tuple[Flat, ...]]) -> None:
    """Every ring, segment and unit that an instruction names exists, and fits its buffer."""
    rings = {ring.name: ring for ring in program.rings}
    segments = {segment.name for segment in program.segments}
    first: dict[Flat, str] = {}
    for engine, items in flat.items():
        first |= {item: engine for item in items if item not in first}
    for item, engine in first.items():
        at = f"{engine}: {instruction_text(item)}"
        match item:
            case Run(segment, _, unit):
                _known(at, "segment", segment, segments)
                _known(at, "unit", unit or "ram", {"ram", "disk rows", *rings})
            case Load(ring, layer, chunk) | Free(ring, layer, chunk):
                _known(at, "ring", ring, rings)
                size = _check_streamed(at, program, graph, ring, layer, chunk)
                if isinstance(item, Load) and size > rings[ring].slot_bytes:
                    raise VerifyError(
                        f"{at}: the unit takes {size} bytes, expected at most the "
                        f"{rings[ring].slot_bytes} of one buffer of the ring"
                    )
            case Wait("room" | "ready", ring) | Signal("ready", ring):
                _known(at, "ring", ring, rings)


def _check_streamed(
    at: str, program: Program, graph: TaskGraph, kind: str, layer: int, chunk: int
) -> int:
    """Bytes of a streamed unit, which must exist."""
    if kind == "head":
        return _unit_bytes(graph, kind, -1, 0)
    if not 0 <= layer < len(graph.layers):
        raise VerifyError(f"{at}: unknown unit, expected a layer of 0..{len(graph.layers) - 1}")
    if kind == "dense":
        return _unit_bytes(graph, kind, layer, 0)
    experts, settings = experts_of(graph, layer), program.settings
    count = experts.count if experts else 0
    chunks = (count - settings.experts_resident[layer]) // settings.chunk
    if not 0 <= chunk < chunks:
        raise VerifyError(f"{at}: unknown unit, layer {layer} streams {chunks} chunks of experts")
    return _unit_bytes(graph, kind, layer, settings.chunk)


def _known(at: str, what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        listed = ", ".join(sorted(names)) or "none, as there is none"
        raise VerifyError(f"{at}: unknown {what} {name}, expected one of {listed}")


def _check_phases(program: Program, graph: TaskGraph, flat: Mapping[str, tuple[Flat, ...]]) -> None:
    """Every worker signals, and waits for, every phase as often as a step has it."""
    routed = sum(graph.body(layer).experts is not None for layer in range(len(graph.layers)))
    expected = {"tokens": routed, "experts": routed, "hidden": 1, "step": 1}
    for engine in program.workers:
        items = [i for i in flat[engine] if isinstance(i, Wait | Signal) and i.what == "phase"]
        for item in items:
            _known(f"{engine}: {instruction_text(item)}", "phase", item.name, expected)
        signals = Counter(item.name for item in items if isinstance(item, Signal))
        waits = Counter(item.name for item in items if isinstance(item, Wait))
        for name, times in expected.items():
            # Whoever asked for the step waits for its end; no engine does.
            awaited = 0 if name == "step" else times
            if (signals[name], waits[name]) != (times, awaited):
                raise VerifyError(
                    f"{engine} signals phase {name} {signals[name]} times a step and waits for it "
                    f"{waits[name]} times, expected {times} and {awaited}: every worker takes part "
                    "in tokens and experts once for each layer with experts, and in hidden once"
                )


def _unique(names: Iterable[str], what: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise VerifyError(f"{what} {twice[0]} occurs twice, expected it once")
