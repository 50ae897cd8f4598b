"""`dovetail place run`: generate under a placement, one process a device, and hold the bytes that
moved against the prediction."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.checkpoint import ModelFolder
from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import load_placement
from dovetail.ir.units import format_bytes, format_duration
from dovetail.ir.workload import Workload
from dovetail.passes.expert_traffic import ExpertTraffic, RowSizes, expert_traffic
from dovetail.place.expert_parallel import Job, RankResult, expert_program, run_ranks
from dovetail.place.rank_routing import merged
from dovetail.planning import captured_model
from dovetail.run import load_prompts
from dovetail.runtime.rank_weights import expert_columns

WAYS = ("two", "one")


def run(options: argparse.Namespace) -> int:
    """The whole command. Raises DovetailError; returns 1 if other bytes moved than predicted."""
    if options.way not in WAYS:
        raise InputError(f"--way {options.way!r}: expected one of {', '.join(WAYS)}")
    placement = load_placement(options.placement)
    folder = ModelFolder.open(options.checkpoint)
    prompts = load_prompts(folder, options).prompts
    captured = captured_model(folder, lambda text: print(f"dovetail: {text}", file=sys.stderr))
    expert_columns(captured.graph, placement, placement.devices)
    ids = tuple(tuple(prompt.input_ids) for prompt in prompts)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        captured.save(Path(scratch))
        routing = Path(scratch) / "routing"
        stop = () if options.ignore_eos else tuple(folder.stop_tokens)
        job = Job(
            str(folder.path),
            scratch,
            str(options.placement),
            ids,
            options.max_new_tokens,
            options.way,
            stop=stop,
            routing=str(routing),
        )
        results = run_ranks([job], placement.devices)[0]
        parts = [Path(f"{routing}.{rank}.npz") for rank in range(placement.devices)]
        trace = merged(parts, captured.graph)
    seconds = time.perf_counter() - begin
    workload = Workload.of([len(prompt) for prompt in ids], options.max_new_tokens)
    program = expert_program(captured.graph, workload, len(ids))
    sizes = RowSizes.of(captured.graph, program.segments)
    predicted = expert_traffic(trace, placement, sizes, options.way)
    if options.out is not None:
        _write(options.out, folder, results[0], [prompt.id for prompt in prompts])
    found = _summary(results, predicted, seconds)
    print(json.dumps(found, indent=1) if options.json else _text(found, options.way))
    return 0 if found["as_predicted"] else 1


def _write(out: Path, folder: ModelFolder, result: RankResult, names: list[str | int]) -> None:
    """One line a prompt, in the order of the input."""
    lines = [
        json.dumps(
            {"index": i, "id": name, "tokens": list(tokens), "text": folder.decode(tokens)},
            ensure_ascii=False,
        )
        for i, (name, tokens) in enumerate(zip(names, result.tokens, strict=True))
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _summary(results: list[RankResult], predicted: ExpertTraffic, seconds: float) -> dict[str, Any]:
    kinds = list(predicted.sent)
    moved = {kind: [result.sent.get(kind, 0) for result in results] for kind in kinds}
    return {
        "prompts": len(results[0].tokens),
        "tokens": sum(map(len, results[0].tokens)),
        "steps": results[0].steps,
        "seconds": seconds,
        "exchanges": dict(results[0].exchanges),
        "moved": moved,
        "predicted": {kind: list(each) for kind, each in predicted.sent.items()},
        "as_predicted": moved == {kind: list(each) for kind, each in predicted.sent.items()},
        "crossed": predicted.crossed,
    }


def _text(found: Mapping[str, Any], way: str) -> str:
    devices = len(next(iter(found["moved"].values())))
    how = "two all-to-alls a layer" if way == "two" else "tokens stay with their experts (ExFlow)"
    lines = [
        f"prompts       {found['prompts']} on {devices} devices, {how}",
        f"tokens        {found['tokens']} in {format_duration(found['seconds'])} "
        f"({found['steps']} steps)",
    ]
    for kind, each in found["moved"].items():
        total, expected = sum(each), sum(found["predicted"][kind])
        same = "as predicted" if each == found["predicted"][kind] else f"predicted {expected}"
        lines.append(f"{kind:<13} {format_bytes(total)} ({total} bytes), {same}")
    lines.append(f"crossing      {found['crossed']:.1%} of choices left their device")
    return "\n".join(lines)
