"""Runs with experts in fewer bits beside those with experts as they are, in turns.

    python bench/precision.py CHECKPOINT --size 1GB --out bench/results/NAME-precision.json
    python bench/precision.py CHECKPOINT --budgets 0.25 --prompts 512x20+8 --rounds 1 …

For every budget, given as shares of the checkpoint's bytes, the planner's own plan runs the same
prompts with no permission, with ``--allow int8`` and with ``--allow int4``; formats take turns.
Conversion is not in the times: its seconds are given apart. Prompts are random tokens, and so may
weights be: how alike answers are then says how far outputs are off, not what a user would lose.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dovetail_run import Run, Task, run
from host import describe_machine
from workloads import agreement, random_prompts

from dovetail.checkpoint import ModelFolder
from dovetail.cli import main as dovetail
from dovetail.ir.moves import FORMATS, precision_of
from dovetail.ir.plan import load_plan
from dovetail.machine_files import save_machine
from dovetail.planning import find_machine
from dovetail.precision.folder import converted_folder, read_record
from dovetail.workloads import load_workload

PLAIN = "as they are"


@dataclass(slots=True)
class Kind:
    """What a permission gave under one budget: the format that was chosen, and each round's run."""

    allowed: str
    chosen: str
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    predicted_seconds: float = 0.0
    rss_bytes: int = 0
    read_bytes: int = 0
    others_cores: float = 0.0
    alike: dict[str, float | int] = field(default_factory=dict)

    def add(self, one: Run) -> None:
        """Account for a round."""
        self.seconds.append(one.seconds)
        self.tokens_per_second.append(one.tokens_per_second)
        self.predicted_seconds = float(one.report["predicted_seconds"])
        self.rss_bytes = max(self.rss_bytes, one.peak_bytes)
        self.read_bytes = one.read_bytes
        self.others_cores = max(self.others_cores, one.other_cores)


def measure(options: argparse.Namespace, share: float, machine: Path) -> dict[str, Any]:
    """All permissions under one budget."""
    folder = ModelFolder.open(options.checkpoint)
    weights = sum(shard.file.stat().st_size for shard in folder.index.shards)
    budget = int(share * weights)
    workload = load_workload(options.prompts)
    (length, count), *_ = workload.lengths
    prompts = random_prompts(count, length, length, folder.vocab)
    kinds: dict[str, Kind] = {}
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.checkpoint.parent) as scratch:
        for number in range(options.rounds):
            for form in ("", *options.formats):
                place = Path(scratch) / f"{number}-{form or 'plain'}"
                allow = (form,) if form else ()
                task = Task(
                    options.checkpoint, prompts, workload.new_tokens, budget, place,
                    machine=str(machine), allow=allow,
                )  # fmt: skip
                print(f"{share:g}: round {number + 1}, {form or PLAIN}", file=sys.stderr)
                one = run(task)
                plan = load_plan(place / "out.jsonl.dovetail" / "plan.json")
                kind = kinds.setdefault(form, Kind(form, precision_of(plan.moves) or PLAIN))
                kind.add(one)
                answers[form] = one.answers
                kind.alike = agreement(answers[""], one.answers)
    found = [asdict(kind) for kind in kinds.values()]
    return {"share": share, "budget": budget, "workload": options.prompts, "kinds": found}


def table(data: dict[str, Any]) -> str:
    """All as Markdown."""
    lines = [
        "| budget | allowed | chosen | tok/s | ÷ as they are | predicted ÷ measured | read, GB |"
        " peak, GB | first token equal | others' cores |",
        "|" + "---|" * 10,
    ]
    for cell in data["cells"]:
        plain = statistics.median(cell["kinds"][0]["seconds"])
        for kind in cell["kinds"]:
            seconds = statistics.median(kind["seconds"])
            lines.append(
                f"| {cell['budget'] / 1e9:.2f} GB | {kind['allowed'] or '-'} | {kind['chosen']} | "
                f"{statistics.median(kind['tokens_per_second']):.1f} | {plain / seconds:.2f} | "
                f"{kind['predicted_seconds'] / seconds:.2f} | {kind['read_bytes'] / 1e9:.2f} | "
                f"{kind['rss_bytes'] / 1e9:.2f} | {kind['alike']['first_token']:.0%} | "
                f"{kind['others_cores']:.2f} |"
            )
    lines += [
        f"\n{form}: {one['bytes'] / 1e9:.2f} GB of experts instead of {one['before'] / 1e9:.2f}, "
        f"weights off by {one['error']:.2%}; converting took {one['seconds']:.0f} s"
        for form, one in data["converted"].items()
    ]
    return "\n".join(lines)


def convert(checkpoint: Path, forms: Sequence[str]) -> dict[str, Any]:
    """Convert the experts where that was not done before."""
    found = {}
    for form in forms:
        place = converted_folder(checkpoint, "int4" if form == "int4" else "int8")
        begin, there = time.perf_counter(), place.exists()
        assert dovetail(["convert", str(checkpoint), "--experts", form]) == 0
        seconds = 0.0 if there else time.perf_counter() - begin
        record = read_record(place, "dovetail convert")
        found[form] = {
            "seconds": seconds, "bytes": record.nbytes, "before": record.source_bytes,
            "error": record.mean,
        }  # fmt: skip
    return found


def main() -> int:
    """The whole bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", default="1GB", help="of random weights, where it is missing")
    parser.add_argument("--budgets", default="0.3,0.5,1.4", help="shares of the checkpoint")
    parser.add_argument("--prompts", default="128x20+12", help="PROMPTSxLENGTH+NEW")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not (options.checkpoint / "config.json").exists():
        assert dovetail(["demo", str(options.checkpoint), "--size", options.size]) == 0
    data: dict[str, Any] = {"machine": describe_machine(), "checkpoint": options.size}
    data["converted"] = convert(options.checkpoint, options.formats)
    with tempfile.TemporaryDirectory() as scratch:
        machine = Path(scratch) / "machine.json"
        shards = ModelFolder.open(options.checkpoint).index.shards
        save_machine(find_machine("", [shards[0].file], print), machine)
        shares = map(float, options.budgets.split(","))
        data["cells"] = [measure(options, share, machine) for share in shares]
    print(table(data))
    if options.out:
        options.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
