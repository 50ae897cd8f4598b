"""`dovetail tune` on checkpoints and budgets: what it gains, how soon, and by which sampler.

    python bench/tuning.py --folder SCRATCH --out bench/results/NAME.json
    python bench/tuning.py --folder SCRATCH --out … --checkpoints demo --shares 0.45
    python bench/tuning.py --folder SCRATCH --out … --errors
    python bench/tuning.py --folder SCRATCH --kills 50

For every cell (a checkpoint under a budget) each sampler tunes for the same seconds from an empty
database. Then the untuned plan, what every sampler exported and the best it found run in turns,
round by round; the lowest median is the best known. Cells are added to those that the file has
already, so that a bench may be run in pieces; ``--errors`` predicts each cell by what the
checkpoint's other budgets taught. The last form kills a tuning at random moments and resumes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from host import describe_machine
from tuning_cell import Bench
from tuning_kills import kills
from tuning_table import Cell, Sampled, table

from dovetail.tuning.samplers import SAMPLERS

HEAD = """# `dovetail tune`: cells

Written by `bench/tuning.py`; the machine is in the JSON file of the same name.

"""
SHARES = "0.45,0.75"
"""Budgets, as shares of a checkpoint's bytes beside what the process itself takes."""


def main() -> int:
    """The whole bench."""
    options = _parser().parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    samplers = tuple(options.samplers.split(","))
    bench = Bench(options.folder, options.seconds, options.rounds, samplers)
    if options.kills:
        checkpoint = bench.checkpoint("demo")
        db = Path(tempfile.mkdtemp(prefix="kills-", dir=bench.folder)) / "tuning.db"
        print(kills(bench.words(checkpoint, 24 << 20, "12x40+4", db), db, options.kills))
        return 0
    cells = _read(options.out)
    if options.errors:
        cells = [bench.held_out(cell, _others(cell, cells)) for cell in cells]
        _write(options.out, cells)
    else:
        for size in options.checkpoints.split(","):
            for share in map(float, options.shares.split(",")):
                cell = bench.cell(size, share)
                cells = [c for c in cells if (c.checkpoint, c.share) != (size, share)]
                cells = sorted([*cells, cell], key=lambda c: (c.budget, c.checkpoint))
                _write(options.out, cells)
    print(table(cells))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and databases")
    parser.add_argument("--out", type=Path, help="add to this JSON file, and write a table")
    parser.add_argument("--checkpoints", default="demo,400MB,1GB")
    parser.add_argument("--shares", default=SHARES, help="budgets, of the checkpoint's bytes")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each tuning")
    parser.add_argument("--rounds", type=int, default=7, help="of the race at the end of a cell")
    parser.add_argument("--errors", action="store_true", help="hold the cells' corrections out")
    parser.add_argument("--kills", type=int, help="kill a tuning so often instead")
    return parser


def _others(cell: Cell, cells: Sequence[Cell]) -> list[dict[str, float]]:
    """Corrections are a model's own: those of the checkpoint's other budgets."""
    return [
        dict(c.factors)
        for c in cells
        if c.checkpoint == cell.checkpoint and c.share != cell.share and c.factors
    ]


def _read(out: Path | None) -> list[Cell]:
    if out is None or not out.exists():
        return []
    return [_cell(data) for data in json.loads(out.read_text())["cells"]]


def _cell(data: dict[str, Any]) -> Cell:
    samplers = tuple(Sampled(**each) for each in data.pop("samplers"))
    cell = Cell(**data, samplers=samplers)
    return replace(cell, sample=(data["sample"][0], data["sample"][1]))


def _write(out: Path | None, cells: Sequence[Cell]) -> None:
    if out is not None:
        data = {"machine": describe_machine(), "cells": [asdict(cell) for cell in cells]}
        out.write_text(json.dumps(data, indent=1) + "\n")
        out.with_suffix(".md").write_text(HEAD + table(cells) + "\n")


if __name__ == "__main__":
    sys.exit(main())
