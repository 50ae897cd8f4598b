"""`dovetail run --ray N`: a file of prompts in N shards, each finished by a run of its own.

Every shard has its own output and journal beside the output, so that after any interruption the
same command continues; at the end the outputs are put together in the order of the prompts. The
machines of the cluster read the model and the shards at the same paths, as from a shared disk.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dovetail.checkpoint import ModelFolder
from dovetail.ir.errors import InputError
from dovetail.ir.record_file import write_whole
from dovetail.prompts import Prompt
from dovetail.run import load_prompts
from dovetail.tuning.ray_fleet import run_command, run_on_ray

PASSED = ("budget", "policy", "machine", "plan", "temperature", "top_k", "top_p", "seed")
"""Options that every shard's run gets as they are, where they are given."""

_INDEX = re.compile(r'^\{"index": [0-9]+')


def run_on_cluster(options: argparse.Namespace) -> int:
    """The whole command. Raises DovetailError."""
    if options.ray < 1:
        raise InputError(f"--ray {options.ray}: expected at least 1 shard")
    if options.target != "cpu":
        raise InputError(
            f"--ray with --target {options.target}: shards run on processors only; leave one out"
        )
    if options.record_routing is not None:
        raise InputError("--record-routing goes with a run on one machine: leave --ray out")
    if options.temperature > 0:
        raise InputError(
            "--ray with --temperature above 0: what a prompt draws depends on its place in the "
            "file, which a shard does not know; run without --ray, or greedily"
        )
    prompts = load_prompts(ModelFolder.open(options.checkpoint), options).prompts
    folder = Path(f"{options.out}.ray")
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(prompts, options.ray))
    jobs = [
        _job(options, shard, folder / f"{n}-of-{len(shards)}") for n, shard in enumerate(shards)
    ]
    run_on_ray(run_command, [(job,) for job in jobs])
    _join([Path(job[job.index("--out") + 1]) for job in jobs], prompts, options.out)
    print(f"{options.out} is complete: {len(prompts)} prompts from {len(shards)} shards")
    return 0


def _shards(prompts: Sequence[Prompt], count: int) -> Iterator[Sequence[Prompt]]:
    """Up to ``count`` shards; prompts of like length are dealt in turn, so that each has equal
    work, and stay in their order."""
    by_length = sorted(prompts, key=lambda p: (-len(p.input_ids), p.index))
    for number in range(min(count, len(prompts))):
        yield sorted(by_length[number::count], key=lambda p: p.index)


def _job(options: argparse.Namespace, shard: Sequence[Prompt], base: Path) -> list[str]:
    """The command of a shard, whose prompts are written out."""
    source = base.with_suffix(".prompts.jsonl")
    lines = [json.dumps({"id": p.id, "input_ids": list(p.input_ids)}) + "\n" for p in shard]
    text = "".join(lines)
    if not source.exists() or source.read_text("utf-8") != text:
        source.write_text(text, "utf-8")
    words = ["run", str(options.checkpoint.resolve()), "--prompts", str(source.resolve())]
    words += ["--out", str(base.with_suffix(".jsonl").resolve())]
    words += ["--max-new-tokens", str(options.max_new_tokens)]
    for name in PASSED:
        value = getattr(options, name)
        if value:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += [word for form in options.allow for word in ("--allow", form)]
    for name in ("ignore_eos", "restart"):
        words += [f"--{name.replace('_', '-')}"] if getattr(options, name) else []
    return words


def _join(files: Sequence[Path], prompts: Sequence[Prompt], out: Path) -> None:
    """Write the shards' results in the order of the prompts; a crash leaves no half file."""
    found: dict[str, str] = {}
    for file in files:
        for line in file.read_text("utf-8").splitlines(keepends=True):
            found[json.dumps(json.loads(line)["id"])] = line
    missing = [p.id for p in prompts if json.dumps(p.id) not in found]
    assert not missing, f"shards ended without {missing[:3]}"
    # A shard counts its own prompts.
    lines = (
        _INDEX.sub(f'{{"index": {prompt.index}', found[json.dumps(prompt.id)], count=1)
        for prompt in prompts
    )
    write_whole("".join(lines), out)
