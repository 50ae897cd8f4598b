"""`dovetail tune --ray N`: tuners on a Ray cluster, each with a database of its own, and one merge.

Each tuner runs the ordinary command for the search's part of the time, from a seed of its own. Its
file comes back as bytes, so the cluster shares no disk but the model's. This machine merges them,
goes on with what is known and holds the gate. Ray starts the tuners; there is no scheduler of ours.
Tuners on one machine slow each other and make each other's samples noisy: give each its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dovetail.ir.errors import DovetailError, InputError
from dovetail.ir.units import parse_duration
from dovetail.tuning.job import note
from dovetail.tuning.tune import report, tune_here
from dovetail.tuning_db.database import Database, default_path
from dovetail.tuning_db.maintain import merge

SEARCH_SHARE = 0.6
"""The share of the time that the tuners on the cluster get; the rest is for the gate."""


def tune_on_ray(options: argparse.Namespace) -> int:
    """The whole command. Raises DovetailError."""
    count, seconds = options.ray, parse_duration(options.time)
    if count < 1:
        raise InputError(f"--ray {count}: expected at least 1 tuner")
    with tempfile.TemporaryDirectory(prefix="dovetail-ray-") as scratch:
        jobs = [_arguments(options, seconds * SEARCH_SHARE, seed) for seed in range(count)]
        files = run_on_ray(tuned_database, [(job,) for job in jobs])
        with Database.open(options.db or default_path()) as database:
            for number, content in enumerate(files):
                path = Path(scratch) / f"{number}.db"
                path.write_bytes(content)
                added = merge(database, path)
                note(f"tuner {number}: {added['trial']} trials merged")
    options.sample_for, options.time = options.time, f"{seconds * (1 - SEARCH_SHARE)}s"
    report(tune_here(options), options.out, as_json=options.json)
    return 0


def _arguments(options: argparse.Namespace, seconds: float, number: int) -> list[str]:
    """The command of one tuner, without database and output."""
    words = ["tune", str(options.checkpoint.resolve()), "--workload", _absolute(options.workload)]
    words += ["--time", f"{seconds}s", "--sample-for", options.time, "--sampler", options.sampler]
    words += ["--seed", str(options.seed), "--search-seed", str(options.seed + number)]
    words += ["--policy", options.policy]
    for name in ("budget", "max_new_tokens", "machine"):
        value = getattr(options, name)
        if value:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += [word for form in options.allow for word in ("--allow", form)]
    return words + (["--skip-bad"] if options.skip_bad else [])


def _absolute(workload: str) -> str:
    path = Path(workload)
    return str(path.resolve()) if path.is_file() else workload


def tuned_database(arguments: Sequence[str]) -> bytes:
    """Run one tuner where this is called; returns its database. Raises RuntimeError."""
    with tempfile.TemporaryDirectory(prefix="dovetail-tuner-") as folder:
        own = ["--db", str(Path(folder) / "own.db"), "-o", str(Path(folder) / "plan.json")]
        run_command([*arguments, *own])
        return (Path(folder) / "own.db").read_bytes()


def run_command(arguments: Sequence[str]) -> str:
    """Run a dovetail command in a process of its own; raises RuntimeError with what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "dovetail.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"dovetail {arguments[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def run_on_ray(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The function's results for every job, each on one processor of the cluster; of a local one
    with as many if there is none. Raises InputError without ray, DovetailError if a job fails."""
    ray = _ray()
    begun = not ray.is_initialized()
    if begun:
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"num_cpus": max(len(jobs), 1), "include_dashboard": False}
        ray.init(logging_level="error", log_to_driver=False, **local)
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(function)
        return list(ray.get([remote.remote(*job) for job in jobs]))
    except ray.exceptions.RayTaskError as error:
        raise DovetailError(f"on the Ray cluster: {error.cause}") from error
    finally:
        if begun:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise InputError(
            "--ray needs Ray, which is not installed: pip install 'dovetail[ray]'"
        ) from None
    return ray
