"""`dovetail place`: which device holds which expert, from traces and loads; and why."""

import argparse
import json
import sys
from collections.abc import Sequence

from dovetail.doors.load_files import LoadFile, read_loads
from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import PlacementProblem, StepModel, load_placement
from dovetail.ir.units import parse_bytes
from dovetail.place.files import check_format, losses, read_slots, write_placement
from dovetail.place.report import report


def make(options: argparse.Namespace) -> int:
    """Place the experts that the files' loads are of; write the placement and say what it gives.

    Raises DovetailError.
    """
    from dovetail.passes.place import place

    check_format(options.format)
    files = scenarios([read_loads(path) for path in options.traces], options.split)
    slots = _slots(options, files[0].loads.shape[1])
    current = None
    if options.current is not None:
        current = read_slots(options.current, options.devices, files[0].layers)
    elif options.max_moves is not None:
        raise InputError("--max-moves counts from a placement: give it with --current FILE")
    problem = PlacementProblem(
        loads=tuple(tuple(map(tuple, file.loads.tolist())) for file in files),
        slots=slots,
        scenarios=tuple(file.name for file in files),
        nodes=options.nodes,
        expert_groups=options.expert_groups,
        transitions=_transitions(options, files),
        node_cost=options.node_cost,
        link_cost=options.link_cost,
        current=current,
        max_copies=options.max_moves,
        expert_bytes=parse_bytes(options.expert_bytes) if options.expert_bytes else None,
        memory=(parse_bytes(options.memory),) * options.devices if options.memory else None,
        step=_step(options, files),
    )
    placement = place(problem, options.policy, _knobs(options.knob))
    first = files[0]
    write_placement(placement, options.out, options.format, first.layers, first.model_layers)
    found = report(placement, files, current)
    if lost := losses(placement, options.format):
        print(f"dovetail: {lost}", file=sys.stderr)
    if options.json:
        print(json.dumps(found.as_dict() | {"out": str(options.out)}, indent=1))
    else:
        print(f"{found.text()}\nplacement     {options.out}")
    return 0


def explain(options: argparse.Namespace) -> int:
    """Say what a placement does to loads and what keeps it from doing better, and draw it.

    Raises DovetailError.
    """
    from dovetail.place.picture import check_picture, draw

    placement = load_placement(options.placement)
    if options.out is not None:
        check_picture(options.out)
        if not options.traces:
            raise InputError(
                f"-o {options.out}: a picture needs loads, which a placement does not hold; give "
                "the trace or load file after it"
            )
    files = scenarios([read_loads(path) for path in options.traces], options.split)
    current = None
    if options.current is not None:
        layers = files[0].layers if files else range(len(placement.layers))
        current = read_slots(options.current, placement.devices, layers)
        if [len(layer) for layer in current] != [placement.devices] * len(placement.layers):
            raise InputError(
                f"{options.current} has {len(current)} layers, the placement "
                f"{len(placement.layers)}; give a placement of the same model and devices"
            )
    found = report(placement, files, current)
    print(json.dumps(found.as_dict(), indent=1) if options.json else found.text())
    if options.out is not None:
        draw(found, options.out)
        if not options.json:
            print(f"picture       {options.out}")
    return 0


def scenarios(files: Sequence[LoadFile], split: str) -> list[LoadFile]:
    """The scenarios to place for: each file, or its parts. ``split`` is ``files``, ``phase`` or a
    number of parts of the prompts. Raises InputError if they are of different models."""
    if split != "files":
        files = [part for file in files for part in _parts(file, split)]
    shapes = {file.loads.shape: file.name for file in files}
    if len(shapes) > 1:
        (a, first), (b, second), *_ = shapes.items()
        raise InputError(
            f"{first} has loads of {a[0]} layers and {a[1]} experts, {second} of {b[0]} and "
            f"{b[1]}; place for one model at a time"
        )
    return list(files)


def _parts(file: LoadFile, split: str) -> list[LoadFile]:
    if file.trace is None:
        raise InputError(
            f"--split {split}: {file.name} has loads only; a routing trace (.npz) can be split"
        )
    if split == "phase":
        parts = file.trace.by_phase()
    elif split.isdecimal():
        cut = file.trace.by_prompts(int(split))
        parts = {f"part {i + 1}": part for i, part in enumerate(cut)}
    else:
        raise InputError(f"--split {split!r}: expected files, phase or a number of parts")
    return [LoadFile.of(part, f"{file.name}, {name}") for name, part in parts.items()]


def _slots(options: argparse.Namespace, experts: int) -> tuple[int, ...]:
    """Slots of each device: as many on every one."""
    devices: int = options.devices
    total: int = experts if options.slots is None else options.slots
    if devices < 1:
        raise InputError(f"--devices {devices}: expected at least 1")
    if total % devices:
        raise InputError(
            f"--slots {total}: found slots of a layer that do not divide over --devices "
            f"{devices}; expected as many on each device: give a multiple of it"
        )
    return (total // devices,) * devices


def _transitions(
    options: argparse.Namespace, files: Sequence[LoadFile]
) -> tuple[tuple[tuple[float, ...], ...], ...] | None:
    if not options.affinity:
        return None
    traces = [file.trace for file in files if file.trace is not None]
    if not traces:
        raise InputError(
            "--affinity: found loads only, expected a routing trace (.npz), which says what each "
            "token chose in one layer after the other"
        )
    total = sum(trace.transitions() for trace in traces[1:]) + traces[0].transitions()
    return tuple(tuple(tuple(map(float, row)) for row in layer) for layer in total.tolist())


def _step(options: argparse.Namespace, files: Sequence[LoadFile]) -> StepModel | None:
    """The time model, if a batch is given."""
    given = (options.batch_tokens, options.read_seconds, options.token_seconds)
    if all(value is None for value in given):
        return None
    if any(value is None for value in given):
        raise InputError(
            "--batch-tokens, --read-seconds and --token-seconds go together: tokens of a step, "
            "seconds to read one expert's weights, seconds of one token in one expert"
        )
    known = [file.trace.top_k for file in files if file.trace is not None]
    if options.top_k is None and not known:
        raise InputError("--batch-tokens needs --top-k where no file is a routing trace")
    return StepModel(options.batch_tokens, options.top_k or known[0], *given[1:])


def _knobs(given: Sequence[str]) -> dict[str, bool | int | float | str]:
    """``NAME=VALUE`` pairs; a value is JSON or text."""
    found: dict[str, bool | int | float | str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--knob {text!r}: expected NAME=VALUE")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        if not isinstance(parsed, bool | int | float | str):
            raise InputError(f"--knob {text!r}: expected a number, true, false or text")
        found[name] = parsed
    return found
