"""`dovetail tune --replay`: the plan that the rows of a database speak for, with nothing timed.

The winner is a function of rows and rule alone, so it is the same on every machine. Where the rows
are of another machine or other software, the plan says so by its staleness.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dovetail.checkpoint import ModelFolder
from dovetail.ir.errors import InputError
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.chosen import Chosen
from dovetail.passes.predict import least_time, predict
from dovetail.planning import captured_model, find_machine
from dovetail.run import ram_budget
from dovetail.tuning.job import note, task_of
from dovetail.tuning.known import moves_of
from dovetail.tuning.plan import POLICY, decide, evidence_of, plan_of, untuned_moves
from dovetail.tuning.sample import Prompts, read_workload
from dovetail.tuning.staleness import compare, environment_here
from dovetail.tuning.tune import report, save
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Key, Trial, Tuning
from dovetail.tuning_db.trials import Trials


def replay(options: argparse.Namespace) -> int:
    """The whole command. Raises DovetailError."""
    path: Path = options.replay
    if not path.is_file():
        raise InputError(f"{path}: no such tuning database; name one that `dovetail tune` wrote")
    folder = ModelFolder.open(options.checkpoint)
    prompts = read_workload(
        folder, options.workload, options.max_new_tokens, options.skip_bad, options.seed
    )
    captured = captured_model(folder, note)
    budget = ram_budget(options.budget)
    with Database.open(path) as database:
        trials = Trials(database)
        task = task_of(captured.graph, folder.index.digest(), budget, options.allow)
        keys = trials.keys_of(task, prompts.workload, prompts.source)
        here = environment_here([folder.index.shards[0].file])
        key = _nearest(trials, keys, here, path)
        rows = trials.of(key)
        (tuning, *_) = [t for t in reversed(trials.tunings()) if t.silicon == key.silicon]
    plan = _plan(folder, captured.graph, prompts, budget, key, rows, tuning, options.machine)
    save(plan, captured, options.out)
    note(compare({**key.silicon, **key.software}, here).message(str(options.out)))
    report(plan, options.out, as_json=options.json)
    return 0


def _nearest(trials: Trials, keys: Sequence[Key], here: dict[str, str], path: Path) -> Key:
    """The rows of the environment nearest to here, of these those with the latest trial."""
    if not keys:
        raise InputError(
            f"{path} has no trials of this model, budget and workload; give those that were tuned "
            "(see `dovetail db export`), or tune"
        )

    def latest(key: Key) -> str:
        return max(trial.created_at for trial in trials.of(key))

    found = {compare({**k.silicon, **k.software}, here).grade.distance for k in keys}
    near = [
        k for k in keys if compare({**k.silicon, **k.software}, here).grade.distance == min(found)
    ]
    return max(near, key=latest)


def _plan(
    folder: ModelFolder,
    graph: TaskGraph,
    prompts: Prompts,
    budget: dict[str, int],
    key: Key,
    rows: Sequence[Trial],
    tuning: Tuning,
    machine_name: str,
) -> Plan:
    default = untuned_moves(rows)
    if default is None:
        raise InputError("the rows lack the untuned plan's: the tuning was cut before its first")
    files = [shard.file for shard in folder.index.shards]
    machine = find_machine(machine_name, files, note)
    moves, workload = moves_of(default), prompts.workload
    layout = apply_moves(graph, moves)
    prediction = predict(layout, machine, workload)
    knobs = {name: int(value) for name, value in default.knobs.items()}
    bound = least_time(layout.graph, machine, budget, workload)
    untuned = Chosen(POLICY, knobs, moves, prediction).plan(
        graph, machine, budget, workload, folder.index.digest(), bound, ()
    )
    chosen, reason = decide(rows)
    return plan_of(untuned, graph, chosen, evidence_of(chosen, reason, rows, key, tuning, 0.0))
