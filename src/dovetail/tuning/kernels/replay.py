"""`dovetail kernels tune --replay`: what the rows of a database say of a plan's rungs.

The winner is a function of rows and rule alone, so it is the same on every machine, with a GPU or
without.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dovetail.ir.errors import InputError
from dovetail.tuning.kernels.key import SOURCE, gpu_fields, rung_key, rung_task, rung_workload
from dovetail.tuning.kernels.rungs import Decided, Rung, decide_rung
from dovetail.tuning.staleness import compare
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Key
from dovetail.tuning_db.trials import Trials


def replay(path: Path, rungs: Sequence[Rung], note: Callable[[str], None]) -> list[Decided]:
    """What the rows of a database say of the rungs, with nothing timed: of each those of the
    environment nearest to here. Raises InputError where there are none."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such tuning database; name one that `dovetail kernels tune` wrote"
        )
    here, found, names = gpu_fields(), list[Decided](), set[str]()
    with Database.open(path) as database:
        trials = Trials(database)
        for rung in rungs:
            key = _nearest(trials, rung, here)
            if key is None:
                found.append(Decided(rung, rung.space.chosen, "no rows"))
                continue
            found.append(decide_rung(rung, trials.of(key), key))
            names.add(compare({**key.silicon, **key.software}, here).message(rung.name))
    for name in sorted(names):
        note(name)
    if not names:
        raise InputError(
            f"{path} has no trials of this plan's kernels; give those that were tuned for its "
            "layers, architecture and token counts (see `dovetail db export`), or tune"
        )
    return found


def _nearest(trials: Trials, rung: Rung, here: Mapping[str, str]) -> Key | None:
    """The key of the rung's rows whose environment is nearest to here, of these the latest."""
    space = rung.space
    task = rung_task(space.layer, space.chosen.arch, space.bucket)
    default = rung_key(space.layer, space.chosen, "graphs", ({}, {})).protocol.default
    keys = [
        key
        for key in trials.keys_of(task, rung_workload(space.bucket), SOURCE)
        if key.protocol.mode == "graphs" and key.protocol.default == default
    ]

    def far(key: Key) -> int:
        return compare({**key.silicon, **key.software}, here).grade.distance

    least = min((far(key) for key in keys), default=0)
    near = [key for key in keys if far(key) == least]
    return max(near, key=lambda key: max(t.created_at for t in trials.of(key)), default=None)
