"""`dovetail tune`: measure schedules near the planner's optimum and export the best, or the plan
that there was.

The clock starts when the untuned plan is made and the worker is ready. What is measured goes to the
tuning database at once, so that the same command goes on after any interruption.
"""

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from dovetail.capture.captured import Captured
from dovetail.checkpoint import ModelFolder
from dovetail.ir import codec
from dovetail.ir.errors import InputError
from dovetail.ir.plan import Plan, save_plan
from dovetail.ir.units import format_duration, parse_duration
from dovetail.planning import PLAN_FILE
from dovetail.plans.commands import written
from dovetail.precision.of_plan import check_converted
from dovetail.runtime import calibrate_host as host
from dovetail.tuning.clock import Clock
from dovetail.tuning.correct import correct
from dovetail.tuning.job import TuneJob, make_job, note
from dovetail.tuning.known import point_of_trial
from dovetail.tuning.measure import Measurer
from dovetail.tuning.plan import decide, evidence_of, plan_of, summary
from dovetail.tuning.progress import TuneProgress
from dovetail.tuning.quiet import LOUD, Others
from dovetail.tuning.rank import Ranker
from dovetail.tuning.residuals import Residuals
from dovetail.tuning.sample import LONG, NEARLY, read_workload
from dovetail.tuning.samplers import make_sampler
from dovetail.tuning.search import Search
from dovetail.tuning.space import Space, knob_shares
from dovetail.tuning.staleness import TOP, Grade, compare
from dovetail.tuning.worker import Answer, Job
from dovetail.tuning_db.database import Database, default_path
from dovetail.tuning_db.facts import Stop, Tuning
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import ranked

SEEDS = TOP
"""So many of the best of another environment are timed first, of a near one its winner."""


def tune(options: argparse.Namespace) -> int:
    """The whole command. Raises DovetailError."""
    check_out(options.out)
    if options.replay is not None:
        from dovetail.tuning.replay import replay

        return replay(options)
    if options.target:
        from dovetail.tuning.simulated import tune_simulated

        return tune_simulated(options)
    if options.ray is not None:
        from dovetail.tuning.ray_fleet import tune_on_ray

        return tune_on_ray(options)
    plan = tune_here(options)
    report(plan, options.out, as_json=options.json)
    return 0


def tune_here(options: argparse.Namespace) -> Plan:
    """Tune on this machine, write the plan with its graph and return it."""
    seconds = parse_duration(options.time)
    database = options.db or default_path()
    folder = ModelFolder.open(options.checkpoint)
    check_converted(folder, options.allow)
    prompts = read_workload(
        folder, options.workload, options.max_new_tokens, options.skip_bad, options.seed
    )
    with tempfile.TemporaryDirectory(prefix="dovetail-tune-") as scratch:
        cut_for = parse_duration(options.sample_for) if options.sample_for else seconds
        job = make_job(options, folder, prompts, Path(scratch), cut_for)
        seed = options.seed if options.search_seed is None else options.search_seed
        with Database.open(database) as opened:
            fixed = options.sample_for is not None
            tuner = Tuner(job, Trials(opened), options.sampler, seed, seconds, fixed=fixed)
            plan = tuner.run()
        save(plan, job.captured, options.out)
    return plan


class Tuner:
    """One tuning on this machine, from the first run of the default to the plan.

    The sample is cut again where the default takes much longer than predicted, unless it is
    ``fixed``, as for tuners whose rows are to be merged.
    """

    def __init__(
        self,
        job: TuneJob,
        trials: Trials,
        sampler: str,
        seed: int,
        seconds: float,
        *,
        fixed: bool = False,
    ) -> None:
        self._job, self._trials, self._fixed = job, trials, fixed
        self._clock = Clock(seconds)
        self._space = Space.around(job.setting, job.layout, job.allow)
        self._sampler = make_sampler(sampler, self._space, seed)
        argv = shlex.join(sys.argv)
        begun = Tuning(job.key.silicon, job.key.software, argv, sampler, seed, seconds)
        self._tuning = trials.begin(begun)

    def run(self) -> Plan:
        """Search, hold the gate, and keep what was learnt of the cost model."""
        job = self._job
        stop: Stop = "failed"
        try:
            with Measurer(job.scratch, job.untuned.moves, _runs(job), job.share) as measurer:
                # The clock runs once the worker does.
                self._clock = Clock(self._clock.budget)
                reference = self._reference(measurer)
                stop = self._search(measurer)
        except KeyboardInterrupt:
            stop = "interrupted"
            raise
        finally:
            self._trials.end(self._tuning.uid, self._clock.spent, stop)
        rows = self._trials.of(self._job.key)
        chosen, reason = decide(rows)
        spent = replace(self._tuning, spent_seconds=self._clock.spent)
        evidence = evidence_of(chosen, reason, rows, self._job.key, spent, reference.skew)
        return plan_of(job.untuned, job.graph, chosen, evidence)

    def _reference(self, measurer: Measurer) -> Answer:
        """The default's first run, of a sample that takes about as long as it should."""
        reference, job = measurer.start_reference(), self._job
        off = measurer.seconds(reference) / max(job.predicted(job.sample.workload), 1e-9)
        better = self._earlier(off) or self._job
        if better is job and not self._fixed and measurer.seconds(reference) > LONG * job.seconds:
            better = job.slower(off)
        if better.key != job.key:
            self._job = better
            measurer.change(_runs(better), better.share)
            reference = measurer.start_reference()
        return reference

    def _earlier(self, off: float) -> TuneJob | None:
        """The job with the sample of an earlier call, if one has rows and is about as long."""
        job, found = self._job, []
        for key in self._trials.keys_of(job.key.task, job.key.workload, job.key.source):
            part = job.prompts.part(key.protocol.sample.prompts, key.protocol.sample.new_tokens)
            seconds = off * job.predicted(part.workload)
            if job.on(part).key == key and job.seconds < NEARLY * seconds < NEARLY**2 * job.seconds:
                found.append((len(self._trials.of(key)), part.tokens, part))
        return job.on(max(found)[2]) if found else None

    def _search(self, measurer: Measurer) -> Stop:
        job, plan = self._job, self._job.untuned
        others = Others(lambda: measurer.worker)
        samples = [measurer.default()]
        bound = plan.bound.seconds / plan.prediction.seconds
        show = TuneProgress(self._clock.budget, bound)
        residuals = Residuals(self._space, knob_shares(measurer.classes))
        ranker = Ranker(job.setting, job.sample.workload, plan.moves, residuals)
        search = Search(
            self._space,
            self._sampler,
            ranker,
            measurer,
            self._trials,
            self._tuning.uid,
            job.key,
            self._clock,
            show,
        )
        assert measurer.reference is not None
        search.correct(measurer.reference.work)
        rows = search.resume()
        if rows:
            note(f"{rows} trials of earlier calls are taken over")
        search.store_default(samples)
        try:
            search.seed(self._seeds())
            stop = search.run()
            search.gate()
        finally:
            show.close()
        if others.cores <= LOUD:
            self._correct(search, measurer)
        else:
            note(
                f"others kept {others.cores:.1f} cores busy meanwhile: what was measured is not "
                "held against the cost model; tune on a quiet machine to correct it"
            )
        return stop

    def _seeds(self) -> list[dict[str, int]]:
        """The best points of other environments that today's space has too."""
        key = self._job.key
        here = {**key.silicon, **key.software}
        found: list[dict[str, int]] = []
        for other in self._trials.keys_of(key.task, key.workload, key.source):
            staleness = compare({**other.silicon, **other.software}, here)
            if other == key or staleness.grade is Grade.FOREIGN:
                continue
            trials = self._trials.of(other)
            count = 1 if staleness.grade is Grade.NEAR else SEEDS
            best = [t for t in ranked(trials) if self._space.holds(t.knobs)][:count]
            if best:
                note(staleness.message(f"{len(trials)} trials in the database"))
            found += [self._space.complete(point_of_trial(t)) for t in best]
        return found[: 2 * SEEDS]

    def _correct(self, search: Search, measurer: Measurer) -> None:
        """Keep by how much the cost model was off: here, and where the next plan looks for it,
        unless the machine is described by a file, whose curves are not this machine's."""
        assert measurer.reference is not None
        seconds = measurer.typical - self._job.share * measurer.reference.setup_seconds
        timed = [(self._job.layout, max(seconds, 1e-9))]
        plan, sample = self._job.untuned, self._job.sample.workload
        here = (host.silicon(), host.software())
        found = correct(plan.machine, *here, plan.graph, sample, search.work, timed)
        own = self._trials.database.path != default_path()
        if own:
            self._trials.add_correction(found)
        if not self._job.described:
            with Database.open() as cache:
                Trials(cache).add_correction(found)


def _runs(job: TuneJob) -> Job:
    return Job(str(job.checkpoint), job.sample.ids, job.sample.new_tokens)


def check_out(out: Path) -> None:
    """Refuse a place for the plan before anything is measured."""
    if out.is_dir():
        raise InputError(f"-o {out}: found a folder, expected a file; give {out / PLAN_FILE}")
    with written(out):
        out.parent.mkdir(parents=True, exist_ok=True)


def save(plan: Plan, captured: Captured, out: Path) -> None:
    """Write a plan with its graph beside it."""
    from dovetail.kernels.planned import save_kernels

    with written(out):
        captured.save(out.parent)
        save_kernels(plan, out.parent)
        save_plan(plan, out)


def report(plan: Plan, out: Path, *, as_json: bool) -> None:
    """Print what came of a tuning."""
    found = plan.tuning
    assert found is not None
    if as_json:
        data = {"plan": str(out), "digest": plan.digest(), "tuning": codec.encode(found)}
        print(json.dumps(data, indent=1))
        return
    print(summary(plan))
    print(f"  {found.trials} schedules timed in {format_duration(found.seconds)}")
    print(f"plan: {out}")
