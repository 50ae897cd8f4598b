"""A GPU whose kernels take the seconds that a formula says, for tests of the search."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.ir_cases import captured
from tests.plan_cases import save_beside
from tests.test_kernel_plans import planned

from dovetail.codegen.gate.suite import QWEN3_30B
from dovetail.codegen.kernels.arch import ARCHS
from dovetail.ir import codec
from dovetail.ir.kernel_layer import LayerKernels
from dovetail.ir.kernel_parts import Place
from dovetail.ir.plan import Plan
from dovetail.kernels.bench import KernelFailure, Loaded
from dovetail.kernels.planned import save_kernels
from dovetail.tuning.clock import Clock
from dovetail.tuning.kernels.key import rung_key
from dovetail.tuning.kernels.rows import Ledger
from dovetail.tuning.kernels.rungs import Rung, rungs_of
from dovetail.tuning.kernels.search import KernelSearch
from dovetail.tuning.kernels.space import KernelSpace
from dovetail.tuning.kernels.tune import Job
from dovetail.tuning.samplers import make_sampler
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Trial, Tuning
from dovetail.tuning_db.trials import Trials

ENVIRONMENT = (
    {"device_name": "paper gpu", "cc": "9.0", "sm_count": "132"},
    {"triton": "3", "torch": "2", "dovetail": "d"},
)
MATRIX = QWEN3_30B.inter * QWEN3_30B.hidden
LAYER = replace(
    QWEN3_30B, experts=16, route=None, up_place=Place((0, MATRIX)), down_place=Place((2 * MATRIX,))
)
BUCKET = (17, 64)


@functools.cache
def space() -> KernelSpace:
    """A layer of Qwen3's sizes with fewer experts, at addresses."""
    return KernelSpace.of(LAYER, ARCHS["sm_90"], BUCKET)


def seconds(kernels: LayerKernels) -> float:
    """A time that four knobs act on, each in its own way: 8 warps and 5 stages are best in both
    products."""
    found = 1e-4
    for spec in (kernels.up, kernels.down):
        found *= {4: 1.0, 8: 0.93}[spec.tile.warps] * (1.0 - 0.02 * spec.tile.stages)
        found *= 1.0 + 0.05 * abs(spec.tile.n - 128) / 128 + 0.1 * (spec.tile.split_k - 1)
    return found


def never(kernels: LayerKernels) -> KernelFailure | None:
    """No kernels fail."""
    return None


class Cut(BaseException):
    """The process ends here."""


@dataclass
class FakeBench:
    """Takes a second to load kernels and the formula's time to run them, on a clock of its own.

    ``broken`` may have kernels fail, and the process ends at load number ``cut``."""

    formula: Callable[[LayerKernels], float] = seconds
    broken: Callable[[LayerKernels], KernelFailure | None] = never
    noise: Callable[[int], float] = lambda number: 1.0
    cut: int = -1
    now: float = 0.0
    samples: int = 0
    loads: list[str] = field(default_factory=list)

    def clock(self) -> float:
        """Seconds since it began."""
        return self.now

    def load(self, kernels: LayerKernels) -> Loaded:
        """See ``Bench``."""
        if len(self.loads) == self.cut:
            raise Cut
        self.loads.append(codec.digest(kernels))
        self.now += 1.0
        failure = self.broken(kernels)
        if failure is not None:
            raise failure
        return Loaded(1e-3, functools.partial(self._sample, self.formula(kernels)))

    def _sample(self, took: float) -> float:
        self.samples += 1
        self.now += 0.01
        return took * self.noise(self.samples)


def run(
    path: Path, bench: FakeBench, budget: float = 100.0, sampler: str = "coordinate"
) -> KernelSearch:
    """One call of the tuner on the rung of ``space``, which goes on from the rows of ``path``."""
    key = rung_key(LAYER, space().chosen, "graphs", ENVIRONMENT)
    with Database.open(path) as database:
        trials = Trials(database)
        uid = trials.begin(Tuning(*ENVIRONMENT, "", sampler, 0, budget)).uid
        ledger = Ledger(trials, uid, key, itertools.count())
        made = make_sampler(sampler, space(), 0)
        clock = Clock(budget, bench.clock)
        search = KernelSearch(space(), made, lambda: bench, ledger, clock)
        search.resume()
        search.run()
        search.gate()
        return search


def rows(path: Path) -> list[Trial]:
    """The rung's rows."""
    key = rung_key(LAYER, space().chosen, "graphs", ENVIRONMENT)
    with Database.open(path) as database:
        return Trials(database).of(key)


@functools.cache
def plan_rungs() -> list[Rung]:
    """The rungs of a small GPU plan."""
    return rungs_of(planned(), captured("olmoe"))


def job(bench: FakeBench, seconds: float = 40.0) -> Job:
    """A job on them."""
    return Job(
        plan_rungs(), ENVIRONMENT, "graphs", lambda rung, scratch: bench, "coordinate", 0, seconds
    )  # fmt: skip


def saved(folder: Path, plan: Plan | None = None) -> Path:
    """A plan in a file with all that belongs to it."""
    plan = plan or planned()
    folder.mkdir(exist_ok=True)
    path = save_beside(captured("olmoe"), plan, folder)
    save_kernels(plan, folder)
    return path
