"""`dovetail.compile` and `torch.compile(backend="dovetail")` against the model as it is, in memory.

    python bench/compile.py [--size 400MB] [--checkpoint FOLDER] [--out FILE.json]

Every case is a call of the same model in one process, compiled and not in turns, after both have
run once more than it takes to decide. What is claimed is the median of the pairs' ratios (below 1
is faster); `other cores` says how quiet the machine was. Exit code 1 if a median is above 1.05.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from host import Window, describe_machine

import dovetail
from dovetail.demo import write_demo
from dovetail.demo_random import RANDOM_SPECS

SLOWER = 1.05
"""A median ratio above this is a failure: eager is one of the candidates."""
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """A case: seconds of both sides pair by pair, and the share of others' CPU meanwhile."""

    door: str
    case: str
    eager: tuple[float, ...]
    compiled: tuple[float, ...]
    other_cores: float
    used: str

    @property
    def ratios(self) -> list[float]:
        """Compiled over eager, pair by pair."""
        return [c / e for c, e in zip(self.compiled, self.eager, strict=True)]

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)


def main() -> int:
    """Measure, print a Markdown table, and write every sample."""
    options = _options()
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = _model(options, Path(scratch))
        for door, case, eager, compiled, used in _cases(model, options):
            rows.append(_row(door, case, eager, compiled, used, options.pairs))
            print(f"{door} {case}: {rows[-1].ratio:.3f}", file=sys.stderr, flush=True)
    print(_table(rows))
    worst = max(rows, key=lambda row: row.ratio)
    print(f"\nslowest: {worst.door}, {worst.case}: {worst.ratio:.3f} of eager's time")
    if options.out:
        facts = describe_machine() | {"threads": options.threads, "model": options.size}
        data = {"machine": facts, "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return int(worst.ratio > SLOWER)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(RANDOM_SPECS), default="400MB")
    parser.add_argument("--checkpoint", type=Path, help="a model folder, instead of --size")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--prompts", default="8,64", help="prompts of the generate cases")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--forward", default="1x1,1x128,16x32", help="SEQSxTOKENS,..")
    parser.add_argument("--doors", default="forward,generate,torch.compile")
    parser.add_argument("--target", default="", help="a machine file; this machine without one")
    parser.add_argument("--out", type=Path, help="a JSON file for every sample")
    return parser.parse_args()


def _model(options: argparse.Namespace, scratch: Path) -> Any:
    from transformers import AutoModelForCausalLM

    folder = options.checkpoint
    if folder is None:
        folder = write_demo(scratch / "checkpoint", size=options.size)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # Every sequence gets all its new tokens.
    model.generation_config.eos_token_id = None
    return model


def _cases(
    model: Any, options: argparse.Namespace
) -> Iterator[tuple[str, str, Call, Call, Callable[[], str]]]:
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def ids(seqs: int, tokens: int) -> torch.Tensor:
        return torch.randint(3, vocab, (seqs, tokens), generator=generator)

    compiled: Any = dovetail.compile(model, target=options.target)
    doors = options.doors.split(",")
    for shape in options.forward.split(",") if "forward" in doors else ():
        inputs = ids(*map(int, shape.split("x")))
        yield "compile", f"forward {shape}", *_calls(model, compiled, inputs), _used(compiled)
    for count in map(int, options.prompts.split(",")) if "generate" in doors else ():
        inputs, mask = _ragged(ids(count, 32), generator)
        wanted = {
            "input_ids": inputs,
            "attention_mask": mask,
            "max_new_tokens": options.new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        case = f"generate {count} prompts of 8-32, {options.new_tokens} new"
        yield (
            "compile",
            case,
            _bound(model.generate, wanted),
            _bound(compiled.generate, wanted),
            _used(compiled),
        )
    if "torch.compile" in doors:
        traced = torch.compile(model, backend="dovetail", dynamic=True)
        plain = torch.compile(model, backend="eager", dynamic=True)
        for shape in options.forward.split(","):
            inputs = ids(*map(int, shape.split("x")))
            calls = _calls(plain, traced, inputs)
            yield "torch.compile", f"forward {shape}, against backend eager", *calls, lambda: ""


def _calls(eager: Any, compiled: Any, inputs: torch.Tensor) -> tuple[Call, Call]:
    def run(module: Any) -> Call:
        def call() -> object:
            with torch.inference_mode():
                return module(inputs, use_cache=False)

        return call

    return run(eager), run(compiled)


def _bound(generate: Callable[..., object], wanted: dict[str, Any]) -> Call:
    return lambda: generate(**wanted)


def _ragged(inputs: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 8 tokens to all, padded on the left with zeros."""
    seqs, width = inputs.shape
    lengths = torch.randint(8, width + 1, (seqs, 1), generator=generator)
    mask = (torch.arange(width) >= width - lengths).long()
    return inputs * mask, mask


def _used(compiled: Any) -> Callable[[], str]:
    def used() -> str:
        if compiled.generation_plan is not None and compiled.timeline().spans[0].engine != "module":
            engines = {span.engine for span in compiled.timeline().spans}
            if "cpu0" in engines:
                return f"executor, {compiled.generation_plan.policy}"
        choices = sorted({choice.winner for choice in compiled.plan.choices})
        return "experts by " + " or ".join(choices)

    return used


def _row(
    door: str, case: str, eager: Call, compiled: Call, used: Callable[[], str], pairs: int
) -> Row:
    """Both sides in turns, the first of a pair changing with every pair."""
    for _ in range(2):
        compiled()
        eager()
    samples: dict[str, list[float]] = {"eager": [], "compiled": []}
    with Window() as window:
        for number in range(pairs):
            order: Sequence[tuple[str, Call]] = [("eager", eager), ("compiled", compiled)]
            for name, call in order if number % 2 else reversed(order):
                begin = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - begin)
    both = tuple(samples["eager"]), tuple(samples["compiled"])
    compiled()
    return Row(door, case, *both, window.other_cores, used())


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| door | case | eager, ms | compiled / eager: median (range) | other cores | used |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        span = f"{row.ratio:.3f} ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
        eager = statistics.median(row.eager) * 1e3
        cells = (row.door, row.case, f"{eager:.1f}", span, f"{row.other_cores:.2f}", row.used)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
