"""Which model families dovetail captures and runs: writes docs/support.md from what it measures.

    python bench/families.py [--families olmoe,mixtral] [--parts capture,execute,models]

Every family is captured at its real size without weights, and a tiny random model of it generates
in a quarter of its weights' bytes; each in a process of its own with a time limit, so that none
can hide another. Results go to bench/results/families.json; families that are not asked for keep
theirs.
"""

import argparse
import json
import logging
import multiprocessing
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "families.json"
MODEL_RESULTS = ROOT / "bench" / "results" / "family_models.json"
PAGE = ROOT / "docs" / "support.md"
LIMIT = 300
"""Seconds for one part of one family."""
PARTS = ("capture", "execute", "models")
Record = dict[str, Any]


def main() -> None:
    """Run what was asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="", help="some of them, with commas; all by default")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.families import DENSE, MODELS, RUNNABLE, moe_model_types

    parts = asked.parts.split(",")
    if "models" in parts:
        models = {name: _run("capture", name) for name in MODELS}
        MODEL_RESULTS.write_text(json.dumps(models, indent=1) + "\n", encoding="utf-8")
    everything = [*moe_model_types(), *DENSE]
    results: dict[str, Record] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = asked.families.split(",") if asked.families else everything
    for family in wanted:
        record = results.setdefault(family, {})
        for part in (part for part in parts if part != "models"):
            if part == "execute" and family not in RUNNABLE:
                record[part] = {"failure": "no tiny config: not tried"}
                continue
            record[part] = _run(part, family)
            print(family, part, json.dumps(record[part]), flush=True)
        kept = {name: results[name] for name in everything if name in results}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(*read_results()), encoding="utf-8")


def read_results() -> tuple[dict[str, Record], dict[str, Record]]:
    """What was measured last, by family and by published model."""
    return json.loads(RESULTS.read_text()), json.loads(MODEL_RESULTS.read_text())


def _run(part: str, family: str) -> Record:
    """One part of one family, in a process of its own that is forked after the imports."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(part, family, sender))
    child.start()
    sender.close()
    try:
        found: Record = receiver.recv() if receiver.poll(LIMIT) else {}
    except EOFError:
        found = {}
    if not found and child.is_alive():
        child.kill()
        found = {"failure": f"took more than {LIMIT} s"}
    child.join()
    return found or {"failure": f"the process ended with {child.exitcode}"}


def _measure(part: str, family: str, sender: Connection) -> None:
    import torch
    from tests import families

    torch.set_num_threads(1)
    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dovetail").addHandler(handler)
    try:
        figures: Any = (
            families.check_capture(family)
            if part == "capture"
            else families.check_execution(family)
        )
        sender.send(asdict(figures) | {"notes": notes})
    except Exception as error:  # whatever stops a family is its entry in the table
        sender.send({"failure": f"{type(error).__name__}: {error}".partition("\n")[0][:300]})


def page(results: dict[str, Record], models: dict[str, Record]) -> str:
    """The tables as Markdown."""
    from tests.families import DENSE, REAL

    captured = sum("failure" not in r["capture"] for r in results.values())
    equal = sum(r["execute"].get("differing") == 0 for r in results.values())
    lines = [
        "# Model families",
        "",
        f"Written by `bench/families.py` from a run; {len(results)} families of transformers "
        f"{_version()}: {captured} are captured at their real size, {equal} give the tokens of "
        "transformers' `generate`.",
        "",
        "- **captured**: a config of real size (the family's default; with ° completed with "
        "published figures) becomes a task graph on the meta device. *kinds* are the different "
        "layers that were traced, of so many. CPU seconds, and the most memory of the whole "
        "process, imports included.",
        "- **equal**: a tiny random float32 model of the family generates greedily for prompts of "
        "1 to 40 tokens in this share of its weights' bytes, and all tokens, of prefill and "
        "decode, are those of transformers.",
        "",
        "| family | captured | kinds of layers | weights GB | s | MB | equal | budget |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for family, record in results.items():
        name = family + ("°" if family in REAL else "") + (" (dense)" if family in DENSE else "")
        lines.append(f"| {name} | {_capture_cells(record)} | {_execute_cells(record)} |")
        notes += _notes(family, record)
    return "\n".join([*lines, "", *notes, "", *_models(models), ""])


def _models(models: dict[str, Record]) -> list[str]:
    lines = [
        "## Published models",
        "",
        "| model | captured | kinds of layers | weights GB | s | MB |",
        "|---|---|---|---|---|---|",
    ]
    cells = ({"capture": record} for record in models.values())
    return lines + [
        f"| {name} | {_capture_cells(cell)} |" for name, cell in zip(models, cells, strict=True)
    ]


def _capture_cells(record: Record) -> str:
    found = record["capture"]
    if "failure" in found:
        return "no | | | |"
    return (
        f"yes | {found['kinds']} of {found['layers']} | {found['gigabytes']:.0f} | "
        f"{found['seconds']:.1f} | {found['megabytes']}"
    )


def _execute_cells(record: Record) -> str:
    found = record["execute"]
    if "failure" in found:
        return "no |"
    verdict = "yes" if not found["differing"] else f"{found['differing']} prompts differ"
    return f"{verdict} | {found['share']:.2f}"


def _notes(family: str, record: Record) -> list[str]:
    """What was not captured or run and why, and what runs in another way."""
    found = []
    for part, word in (("capture", "not captured"), ("execute", "not run")):
        if "failure" in record[part]:
            found.append(f"- `{family}` {word}: {record[part]['failure']}")
    found += [f"- `{family}`: {note}" for note in record["capture"].get("notes", [])]
    return found


def _version() -> str:
    import transformers

    return transformers.__version__


if __name__ == "__main__":
    main()
