"""When a tuning stops: a gate that is decided, a run that is hopeless; and what it expects."""

import math
from pathlib import Path

import numpy
import pytest
from tests import tune_cases as cases
from tests.plan_cases import WORKLOAD

from dovetail.ir.moves import Move
from dovetail.tuning.gate import FEWEST, MOST_PAIRS, decided
from dovetail.tuning.measure import EARLIEST, HOPELESS, Measurer, Terms
from dovetail.tuning.rank import Ranker
from dovetail.tuning.residuals import NOISE, Residuals
from dovetail.tuning.worker import Answer, Ask, Job
from dovetail.tuning_db.winners import _outside, deciding_interval, gate_confidence


def test_gate_lets_luck_through_as_rarely_as_one_look_at_95_percent() -> None:
    """Of many walks of a schedule that is no faster, by the ranks that the interval counts."""
    walks = numpy.random.default_rng(0).standard_normal((20_000, MOST_PAIRS))
    passed = numpy.zeros(len(walks), dtype=bool)
    for pairs in range(1, MOST_PAIRS + 1):
        seen = walks[:, :pairs]
        ranks = numpy.abs(seen).argsort(1).argsort(1) + 1
        passed |= (ranks * (seen > 0)).sum(1) < _outside(pairs, (1 - gate_confidence(pairs)) / 2)
    assert 0.02 < passed.mean() < 0.028
    one = numpy.exp(walks[passed][0])
    looks = [deciding_interval(one[:n].tolist()) for n in range(1, MOST_PAIRS + 1)]
    assert any(look.faster for look in looks), "the interval says what the ranks say"


def test_gate_ends_as_soon_as_more_pairs_cannot_change_it() -> None:
    assert not decided([0.9] * (FEWEST - 1)) and decided([0.9] * FEWEST)
    assert decided([1.1] * FEWEST), "slower"
    assert not decided([0.9, 0.9, 0.9, 0.9, 0.9, 1.05]), "one loss of six"
    assert decided([0.9, 1.2] * 4), "no better after enough pairs"
    assert not decided([0.9] * 5 + [1.1] + [0.9] * 2), "may still be faster"
    assert decided([0.9] * 3 + [1.1] * 16), "too many losses for what is left"


class Scripted(Measurer):
    """A measurer whose worker answers at once: a run takes ``took[moves]`` seconds, evenly spread
    over ten steps."""

    def __init__(self, took: dict[tuple[Move, ...], float], folder: Path) -> None:
        super().__init__(folder, cases.untuned(), Job("", (), ()), 0.0)
        self.took = took
        self.asked: list[tuple[Move, ...]] = []

    def _run(self, ask: Ask) -> Answer:
        self.asked.append(ask.moves)
        seconds = self.took[ask.moves]
        ends = [seconds * (step + 1) / 10 for step in range(10)]
        for step, deadline in enumerate(ask.deadlines):
            if ends[step] > deadline and step + 1 < len(ends):
                return Answer("timeout", "stopped", steps=tuple(ends[: step + 1]))
        return Answer("ok", seconds=seconds, steps=tuple(ends))


def scripted(folder: Path, seconds: float) -> tuple[Scripted, tuple[Move, ...]]:
    """A measurer whose default takes a second, and a candidate that takes ``seconds``."""
    other = cases.untuned()[::-1]
    found = Scripted({cases.untuned(): 1.0, other: seconds}, folder)
    found.start_reference()
    found.default()
    found.default_done = tuple((step + 1) / 10 for step in range(10))
    found.asked.clear()
    return found, other


def test_hopeless_candidate_is_stopped_early_and_needs_no_default(tmp_path: Path) -> None:
    measurer, moves = scripted(tmp_path, 1.6)
    terms = Terms(2, worth=1.08, shared=True, done=measurer.default_done)
    measurer._last = None
    found = measurer.pairs(moves, terms)
    assert found.state == "timeout" and not found.samples
    assert measurer.asked == [moves]
    deadlines = measurer._deadlines(terms, 1.0)
    assert deadlines[0] == math.inf and measurer.default_done[0] < EARLIEST
    assert list(deadlines[2:]) == sorted(deadlines[2:]) and deadlines[-1] < HOPELESS


def test_good_candidate_shares_the_default_that_ran_before_it(tmp_path: Path) -> None:
    measurer, moves = scripted(tmp_path, 0.9)
    terms = Terms(2, worth=1.08, shared=True, done=measurer.default_done)
    found = measurer.pairs(moves, terms)
    default = cases.untuned()
    assert found.ratios == pytest.approx([0.9, 0.9])
    assert measurer.asked == [moves, moves, default]
    measurer.asked.clear()
    assert measurer.pairs(moves, Terms(2)).state == "ok"
    assert measurer.asked == [default, moves, moves, default], "the gate shares none"


def test_residuals_learn_of_a_knob_and_of_values_beyond() -> None:
    space = cases.space()
    residuals = Residuals(space, {})
    values = space.ladders["slots"]
    base = values.index(space.base["slots"])
    near, far = ({**space.base, "slots": values[base + step]} for step in (1, 2))
    before = residuals.expect(near)
    assert before[0] == 0.0 and before[1] > 0.0
    assert residuals.expect(space.base) == (0.0, 0.0)
    residuals.learn([(near, 0.8), (near, 0.8)])
    mean, spread = residuals.expect(near)
    assert math.log(0.8) < mean < 0.5 * math.log(0.8) and spread < before[1]
    beyond = residuals.expect(far)
    assert beyond[0] == pytest.approx(mean) and beyond[1] > spread
    residuals.learn([(near, 1e9)] * 50)
    assert residuals.expect(near)[0] <= 1.0 + NOISE, "something else was at work"


def ranker() -> Ranker:
    """A ranker that has seen nothing."""
    space = cases.space()
    return Ranker(cases.setting(), WORKLOAD, cases.untuned(), Residuals(space, {}))


def test_work_done_is_a_share_that_rises_to_one() -> None:
    done = ranker().done(cases.untuned())
    assert list(done) == sorted(done) and 0 < done[0] < done[-1] == 1.0


def test_corrected_ranker_predicts_longer() -> None:
    found = ranker()
    before = found.seconds(cases.untuned())
    found.correct({"step": 2.0})
    assert found.seconds(cases.untuned()) > 1.5 * before
    assert found.ratio(cases.untuned()) == 1.0
