"""The tuner's search, gate and space, on candidates whose time is a formula."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tune_cases as cases
from tests.plan_cases import MACHINE

from dovetail.codegen.executor import emit_executor
from dovetail.ir import codec
from dovetail.ir.moves import Move
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.lower import lower
from dovetail.passes.memory import ram_bytes
from dovetail.planning import corrected
from dovetail.runtime import calibrate_host as host
from dovetail.tuning.clock import Tick
from dovetail.tuning.correct import MOST, correct, factors
from dovetail.tuning.gate import CONFIRM, DEFAULT, GATE
from dovetail.tuning.known import moves_of
from dovetail.tuning.plan import decide
from dovetail.tuning.sample import Prompts, sample_of
from dovetail.tuning.samplers import SAMPLERS, make_sampler, rebuild
from dovetail.tuning.space import knob_shares, moves_digest, point_of
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Correction, Trial
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import ranked


def best_possible() -> float:
    """The least time of all schedules of the space that differ in the formula's knobs."""
    space, found = cases.space(), []
    names = ("readers", "workers", "slots", "rows")
    points = [dict(space.base)]
    for name in names:
        values = space.ladders.get(name, (space.base[name],))
        points = [{**point, name: value} for point in points for value in values]
    for point in points:
        built = space.build(point)
        if built.moves:
            found.append(cases.seconds(built.moves))
    return min(found)


def test_space_begins_at_the_untuned_schedule() -> None:
    space = cases.space()
    built = space.build(space.base)
    assert point_of(apply_moves(cases.graph(), built.moves)) == space.base
    assert cases.seconds(built.moves) == cases.seconds(cases.untuned())
    assert all(space.base[name] in values for name, values in space.ladders.items())


@settings(max_examples=60)
@given(st.data())
def test_points_fit_or_say_by_how_much_they_do_not(data: st.DataObject) -> None:
    space, setting = cases.space(), cases.setting()
    point = space.complete({n: data.draw(st.sampled_from(v)) for n, v in space.ladders.items()})
    built = space.build(point)
    if built.moves:
        used = sum(ram_bytes(apply_moves(setting.graph, built.moves)).values())
        assert used <= setting.budget
    else:
        assert built.over > 0 and built.why


@settings(max_examples=40)
@given(st.data())
def test_key_of_a_record_holds_all_that_influences_the_code(data: st.DataObject) -> None:
    """Same signature and parameters, same source: whatever machine planned, and through the JSON
    that the database keeps; another source, another name."""
    space, setting = cases.space(), cases.setting()
    points = [
        space.complete({n: data.draw(st.sampled_from(v)) for n, v in space.ladders.items()})
        for _ in range(2)
    ]
    budgets = [setting.budget, setting.budget]
    found = []
    for point, budget in zip(points, budgets, strict=True):
        built = space.build(point)
        if not built.moves:
            return
        stored = json.loads(codec.canonical([codec.encode(move) for move in built.moves]))
        moves = codec.decode(stored, tuple[Move, ...])
        found.append((moves_digest(moves), _source(moves, budget)))
        slower = replace(MACHINE, memory_bandwidth=1e6, op_seconds=1.0, process_bytes=7)
        elsewhere = replace(space, setting=replace(setting, machine=slower)).build(point)
        assert _source(elsewhere.moves, budget) == found[-1][1]
    (first, text), (second, other) = found
    assert first != second or text == other
    assert text == other or first != second


def _source(moves: tuple[Move, ...], budget: int) -> str:
    graph = cases.graph()
    return emit_executor(graph, lower(apply_moves(graph, moves), {"ram": budget}), {})


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_finds_something_better(sampler: str, tmp_path: Path) -> None:
    search, _, database = cases.search(tmp_path / "a.db", 70.0, sampler)
    with database:
        search.run()
        assert search.best < 0.96
        if sampler == "coordinate":
            assert search.best <= 1.03 * best_possible()


def test_winner_of_the_gate_is_decided_by_rows_alone(tmp_path: Path) -> None:
    search, measurer, database = cases.search(tmp_path / "a.db", 100.0)
    with database:
        assert search.run() in ("budget", "converged")
        search.gate()
        rows = Trials(database).of(cases.key())
        assert measurer.now <= 110.0
    chosen, reason = decide(rows)
    assert chosen is not None and "pairs" in reason
    assert min(chosen.ratios) == max(chosen.ratios) == pytest.approx(search.best)
    assert decide(rows[::-1])[0] == chosen
    notes = Counter(row.note for row in rows if row.state == "ok")
    assert notes[DEFAULT] == notes[GATE] == 1 and notes[CONFIRM]


def test_gate_exports_the_untuned_plan_where_nothing_is_faster(tmp_path: Path) -> None:
    flat = cases.FakeMeasurer(formula=lambda moves: 1.0)
    search, _, database = cases.search(tmp_path / "a.db", 60.0, measurer=flat)
    with database:
        search.run()
        search.gate()
        chosen, reason = decide(Trials(database).of(cases.key()))
    assert chosen is None and "was faster than the untuned plan" in reason


def test_gate_does_not_believe_luck(tmp_path: Path) -> None:
    """Noise of 20 % makes winners of a search, and the gate's fresh pairs undo them."""
    noise = cases.FakeMeasurer(
        formula=lambda m: 1.0, noise=lambda n: 1 + 0.2 * ((n * 7919) % 5 - 2) / 2
    )
    search, _, database = cases.search(tmp_path / "a.db", 120.0, "random", measurer=noise)
    with database:
        search.run()
        search.gate()
        rows = Trials(database).of(cases.key())
    searched = [row for row in rows if row.note != GATE]
    assert min(search_ratio(row) for row in searched if row.ratios) < 1.0
    assert decide(rows)[0] is None and "does not exclude 1" in decide(rows)[1]


def search_ratio(row: Trial) -> float:
    """The lowest ratio of a row."""
    return min(row.ratios)


def test_resumed_search_times_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    first, before, database = cases.search(path, 40.0)
    with database:
        first.run()
    second, after, database = cases.search(path, 40.0)
    with database:
        assert second.resume() > 0 and second.best == first.best
        second.run()
        rows = Trials(database).of(cases.key())
    assert not set(before.ran) & set(after.ran)
    searched = Counter(row.digest for row in rows if row.note == "")
    assert set(searched.values()) == {1} and sum(row.note == DEFAULT for row in rows) == 1


def test_two_searches_on_one_file_share_what_they_find(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    one, first, database = cases.search(path, 60.0, seed=1)
    two, second, other = cases.search(path, 60.0, seed=1)
    with database, other:
        one.run()
        two.run()
        rows = Trials(database).of(cases.key())
    assert not set(first.ran) & set(second.ran) and two.best <= one.best
    assert set(Counter(row.digest for row in rows if row.note == "").values()) == {1}


def test_failures_are_kept_and_not_tried_again(tmp_path: Path) -> None:
    def broken(moves: object) -> str:
        return "wrong_result" if "readers=2" in str(moves) else ""

    path = tmp_path / "a.db"
    for _ in range(2):
        measurer = cases.FakeMeasurer(broken=broken)
        search, _, database = cases.search(path, 40.0, measurer=measurer)
        with database:
            search.run()
            rows = Trials(database).of(cases.key())
    states = Counter(row.state for row in rows if row.note == "broken")
    assert set(states) == {"wrong_result"} and states["wrong_result"] == len(
        {row.digest for row in rows if row.state == "wrong_result"}
    )
    assert all("readers=2" not in str(moves_of(row)) for row in ranked(rows))


def test_every_stored_trial_is_shown_after_it_is_stored(tmp_path: Path) -> None:
    shown: list[int] = []

    def show(tick: Tick) -> None:
        rows = Trials(database).of(cases.key())
        assert rows[-1].number == tick.trial and tick.best <= 1.0
        shown.append(tick.trial)

    search, _, database = cases.search(tmp_path / "a.db", 30.0, show=lambda tick: None)
    search._show = show
    with database:
        search.run()
    assert shown == sorted(set(shown)) and shown


def test_coordinate_descent_uses_a_space_up(tmp_path: Path) -> None:
    space = cases.space()
    small = replace(space, ladders={"readers": (1, 2), "slots": (2, 3)})
    sampler = make_sampler("coordinate", small, 0)
    seen = set()
    while points := sampler.propose(1):
        assert points[0]["rows"] == space.base["rows"]
        seen.add((points[0]["readers"], points[0]["slots"]))
        sampler.tell(points[0], 2.0)
    assert seen == {(1, 3), (2, 2), (2, 3)}


def test_samplers_are_rebuilt_from_rows_of_todays_space() -> None:
    space = cases.space()
    for name in SAMPLERS:
        sampler = make_sampler(name, space, 0)
        rows = [(dict(space.base), 1.0), ({**space.base, "readers": 2}, float("inf"))]
        assert rebuild(sampler, space, [*rows, ({"readers": 99}, 0.5)]) == 2
        assert sampler.propose(3)


def test_sample_keeps_what_is_in_flight_together() -> None:
    prompts = Prompts(tuple((1,) * (5 + i % 7) for i in range(100)), (16,) * 100, 16, "x")

    def predicted(workload: object) -> float:
        return workload.prompts * workload.new_tokens / 100  # type: ignore[attr-defined, no-any-return]

    assert sample_of(prompts, 8, 100.0, predicted) is prompts
    part = sample_of(prompts, 8, 4.0, predicted)
    assert (part.workload.prompts, part.most_new) == (25, 16)
    assert {len(ids) for ids in part.ids} == set(range(5, 12)), "of every length alike"
    least = sample_of(prompts, 40, 0.1, predicted)
    assert (least.workload.prompts, least.most_new) == (40, 4)


def test_corrections_are_medians_kept_between_one_and_most() -> None:
    work = [{"run:experts": (1.3, 1.0), "load:experts": (0.5, 1.0), "run:seqs": (1e-6, 1.0)}] * 3
    found, evidence = factors([*work, {"run:experts": (99.0, 1.0)}])
    assert found == {"run:experts": 1.3, "load:experts": 1.0}
    assert evidence["run:experts"] == (1.3, 1.3, 1.3, 99.0)
    layout, sample = cases.layout(), cases.setting().workload
    slow = correct(MACHINE, {}, {}, "g", sample, work, [(layout, 1e6)])
    assert slow.factors["step"] == MOST


def test_corrected_machine_predicts_longer_and_never_below_the_bound() -> None:
    from dovetail.passes.bound import bound
    from dovetail.passes.predict import predict

    setting = cases.setting()
    plain = predict(cases.layout(), MACHINE, setting.workload)
    better = replace(MACHINE, corrections={"load:experts": 2.0, "step": 1.5})
    slower = predict(cases.layout(), better, setting.workload)
    assert slower.seconds > 1.4 * plain.seconds
    least = bound(setting.graph, better, setting.budget, setting.workload)
    assert least == bound(setting.graph, MACHINE, setting.budget, setting.workload)
    assert codec.encode(MACHINE) == codec.encode(replace(better, corrections={}))


def test_effort_goes_where_the_time_goes() -> None:
    shares = knob_shares({"wait:experts": 6.0, "run:layer_0_experts_0": 3.0, "run:prologue": 1.0})
    assert shares["readers"] == 0.6 and shares["expert_rows"] == 0.3 and shares["rows"] == 0.1
    assert knob_shares({})["readers"] == 0.0


def test_plans_of_the_model_use_its_correction_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE_DIR", str(tmp_path))
    graph = cases.graph()
    with Database.open() as database:
        for name, factor in ((codec.digest(graph), 1.7), ("another", 3.0)):
            found = Correction(host.silicon(), host.software(), name, {"step": factor})
            Trials(database).add_correction(found)
    model = SimpleNamespace(graph=graph)
    better = corrected(MACHINE, model)  # type: ignore[arg-type]
    assert better == replace(MACHINE, corrections={"step": 1.7})
    other = SimpleNamespace(graph=replace(graph, context=7))
    assert corrected(MACHINE, other) is MACHINE  # type: ignore[arg-type]
