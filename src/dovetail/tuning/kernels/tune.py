"""`dovetail kernels tune`: measure kernels for the rungs of a GPU plan, and put winners into it.

Seconds are split over the rungs by their share of the workload's predicted time; what one leaves
goes to those after it. The database decides: the same rows give the same plan everywhere.
"""

import argparse
import itertools
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dovetail.ir.errors import InputError, ModelError, PlanError
from dovetail.ir.plan import Plan, load_plan, save_plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_duration, parse_duration
from dovetail.kernels.bench import Bench, KernelFailure
from dovetail.kernels.planned import save_kernels
from dovetail.plans.check import GRAPH_FILE, load_graph
from dovetail.plans.commands import written
from dovetail.tuning.clock import Clock
from dovetail.tuning.kernels.key import Mode, gpu_environment, host_environment, rung_key
from dovetail.tuning.kernels.replay import replay
from dovetail.tuning.kernels.rows import Ledger
from dovetail.tuning.kernels.rungs import (
    Decided,
    Rung,
    decide_rung,
    plan_arch,
    rungs_of,
    shares_of,
    with_decided,
)
from dovetail.tuning.kernels.search import KernelSearch
from dovetail.tuning.kernels.table import rungs_table, trial_text
from dovetail.tuning.samplers import make_sampler
from dovetail.tuning_db.database import Database, default_path
from dovetail.tuning_db.facts import Key, Stop, Trial, Tuning
from dovetail.tuning_db.trials import Trials

_BESIDE = (GRAPH_FILE, "constants.safetensors")
"""What lies beside a plan and is the same for every plan of the model."""
DRY = (1, 4)
"""Batches and tokens where kernels are interpreted."""
Make = Callable[[Rung, Path], Bench]


@dataclass(frozen=True, slots=True)
class Job:
    """What a call tunes, where it is timed, and for how long."""

    rungs: Sequence[Rung]
    environment: tuple[dict[str, str], dict[str, str]]
    mode: Mode
    make: Make
    sampler: str
    seed: int
    seconds: float

    def key(self, rung: Rung) -> Key:
        """The name of a rung's trials."""
        return rung_key(rung.space.layer, rung.space.chosen, self.mode, self.environment)


def tune(options: argparse.Namespace) -> int:
    """The whole command. Raises DovetailError."""
    _check_out(options.out)
    plan = load_plan(options.plan)
    graph = load_graph(options.plan, plan)
    plan_arch(plan)
    if options.replay is not None:
        decided = replay(options.replay, rungs_of(plan, graph), _note)
    else:
        decided = _measured(options, plan, graph)
    dry = options.replay is None and options.target == "host"
    tuned = plan if dry else with_decided(plan, decided)
    with written(options.out):
        save_kernels(tuned, options.out.parent)
        save_plan(tuned, options.out)
        for name in _BESIDE:
            there = options.plan.parent / name
            if options.out.parent.resolve() != there.parent.resolve() and there.exists():
                shutil.copyfile(there, options.out.parent / name)
    print(rungs_table(decided, dry=dry, as_json=options.json, plan=options.out))
    return 0


def _measured(options: argparse.Namespace, plan: Plan, graph: TaskGraph) -> list[Decided]:
    seconds, host = parse_duration(options.time), options.target == "host"
    if host:
        _interpret()
    job = Job(
        rungs_of(plan, graph),
        host_environment() if host else gpu_environment(),
        "interpreted" if host else "graphs",
        host_bench if host else gpu_bench,
        options.sampler,
        options.seed,
        seconds,
    )
    if not host:
        _check_gpu(plan)
    with Database.open(options.db or default_path()) as database:
        return tune_rungs(job, Trials(database), _note)


def tune_rungs(job: Job, trials: Trials, note: Callable[[str], None]) -> list[Decided]:
    """Search the rungs one after another, the one with the largest share first; what the rows say
    of each, in the plan's order. Raises ModelError where the GPU is lost."""
    silicon, software = job.environment
    begun = Tuning(silicon, software, shlex.join(sys.argv), job.sampler, job.seed, job.seconds)
    tuning, clock = trials.begin(begun).uid, Clock(job.seconds)
    stops, troubles = set[Stop](), dict[int, str]()
    stop: Stop = "failed"
    try:
        with tempfile.TemporaryDirectory(prefix="dovetail-kernels-") as scratch:
            numbers = itertools.count()
            for at, seconds in split(job.rungs, clock):
                rung = job.rungs[at]
                ledger = Ledger(trials, tuning, job.key(rung), numbers)
                try:
                    stops.add(_one(job, rung, ledger, seconds, Path(scratch), note))
                except KernelFailure as failure:
                    if failure.lost:
                        raise _lost(failure) from failure
                    troubles[at] = str(failure)
                    note(f"{rung.name}: not tuned: {failure}")
        stop = "budget" if "budget" in stops or not stops else min(stops)
    except KeyboardInterrupt:
        stop = "interrupted"
        note("interrupted: the same command goes on from the rows that are stored")
    finally:
        trials.end(tuning, clock.spent, stop)
    return [
        _decided(rung, trials, job.key(rung), troubles.get(at, ""))
        for at, rung in enumerate(job.rungs)
    ]


def split(rungs: Sequence[Rung], clock: Clock) -> Iterator[tuple[int, float]]:
    """The places of rungs that the workload's steps run, the largest share of its time first, each
    with its seconds of what is left of the clock when its turn comes."""
    shares = shares_of(rungs)
    left = sum(shares)
    for at in sorted(range(len(rungs)), key=lambda at: (-shares[at], at)):
        if shares[at] > 0 and clock.left > 0:
            yield at, clock.left * min(1.0, shares[at] / left)
            left -= shares[at]


def _one(
    job: Job, rung: Rung, ledger: Ledger, seconds: float, scratch: Path, note: Callable[[str], None]
) -> Stop:
    """Search one rung and hold its gate."""
    name = rung.name
    sampler = make_sampler(job.sampler, rung.space, job.seed)

    def show(trial: Trial) -> None:
        note(f"{name}: {trial_text(trial, rung.space.base)}")

    search = KernelSearch(
        rung.space, sampler, lambda: job.make(rung, scratch), ledger, Clock(seconds), show
    )
    rows = search.resume()
    note(
        f"{name}: {format_duration(seconds)}" + (f", {rows} rows are there already" if rows else "")
    )
    stop = search.run()
    search.gate()
    return stop


def _decided(rung: Rung, trials: Trials, key: Key, trouble: str) -> Decided:
    if trouble:
        return Decided(rung, rung.space.chosen, f"not tuned: {trouble}")
    if not rung.seconds:
        return Decided(rung, rung.space.chosen, "no step of the workload runs it")
    return decide_rung(rung, trials.of(key), key)


def gpu_bench(rung: Rung, scratch: Path) -> Bench:
    """What times a rung's kernels on the current GPU."""
    import torch

    from dovetail.kernels.rung_bench import RungBench
    from dovetail.kernels.timing import CudaTimer

    cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
    return RungBench(rung.space.layer, rung.space.chosen, CudaTimer(), scratch, cache)


def host_bench(rung: Rung, scratch: Path) -> Bench:
    """What tries them where Triton interprets: a few tokens, and seconds that mean nothing."""
    from dovetail.kernels.rung_bench import RungBench
    from dovetail.kernels.timing import HostTimer

    return RungBench(rung.space.layer, rung.space.chosen, HostTimer(), scratch, 0, DRY)


def _interpret() -> None:
    """Have Triton interpret kernels: it is asked when it is first imported."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise ModelError(
            "--target host: Triton is at work in this process already and compiles; expected a "
            "process of its own: use the command line"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    from dovetail.codegen.gate.interpret import decode_bfloat16

    decode_bfloat16()


def _check_gpu(plan: Plan) -> None:
    """The plan's architecture is this GPU's. Raises PlanError."""
    from dovetail.kernels.binaries import here

    found, arch = here()[0].arch, plan_arch(plan)
    if found != arch.name:
        raise PlanError(
            f"the plan's kernels are for {arch.name}, this GPU is {found}: tune on the plan's "
            "machine, or plan again for this one"
        )


def _lost(failure: KernelFailure) -> ModelError:
    return ModelError(
        f"the GPU gave up on a kernel ({failure}) and does no more work for this process; its row "
        "is stored: run the same command again, which goes on without it"
    )


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise InputError(f"-o {out}: found a folder, expected a file; give {out / 'plan.json'}")
    with written(out):
        out.parent.mkdir(parents=True, exist_ok=True)


def _note(text: str) -> None:
    print(f"dovetail: {text}", file=sys.stderr, flush=True)
