"""The overlap solver against brute force, its checker against broken schedules, known loops."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.solvers.list_schedule import best_listed, list_schedule
from dovetail.solvers.loop_bounds import lowest_period, period_bounds, pools_too_small
from dovetail.solvers.loop_problem import (
    Hold,
    LoopProblem,
    ModuloSchedule,
    Op,
    check,
    check_problem,
    peaks,
)
from dovetail.solvers.loop_replay import (
    LoopOrder,
    Run,
    compact,
    expand,
    makespan,
    order_of,
    replay,
    written_order,
)
from dovetail.solvers.modulo_schedule import pareto, solve
from dovetail.solvers.retime import retime

# Ticks of 0.1 ms, by roofline. Mixtral-8x7B in bfloat16 on an L4, 500 tokens a micro-batch.
MIXTRAL_L4 = {
    "fetch": 176, "qkv": 6, "d2h": 3, "cpuattn": 175, "h2d": 2, "post": 4, "gemm": 14, "comb": 1,
}  # fmt: skip
# A DeepSeek-V3 layer in 32 chunks of 8 experts on an H100, some of them on disk.
DSV3_H100 = {
    "fetch": 39, "disk": 164, "qkv": 3, "d2h": 4, "cpuattn": 121, "h2d": 3, "post": 2, "gemm": 3,
    "comb": 1,
}  # fmt: skip


def moe_body(
    ticks: Mapping[str, int],
    batches: int,
    experts: int,
    fetched: int,
    slots: int,
    on_disk: int = 0,
) -> LoopProblem:
    """A decode layer with attention on the CPU: each micro-batch runs qkv, d2h, cpuattn, h2d, post,
    then one GEMM per expert, then comb; the last ``fetched`` experts are copied into ``slots``, and
    the last ``on_disk`` of these come from disk through two host buffers."""
    ops: list[Op] = []
    holds: list[Hold] = []
    chains: list[tuple[str, ...]] = []
    away = range(experts - fetched, experts)
    slow = range(experts - on_disk, experts)
    quick = [e for e in away if e not in slow]
    for e in away:
        before = ((f"disk{e}", 0),) if e in slow else ()
        if e in slow:
            ops.append(Op(f"disk{e}", "disk", ticks["disk"]))
            holds.append(Hold("host", 1, f"disk{e}", ((f"fetch{e}", 0),)))
        ops.append(Op(f"fetch{e}", "h2d", ticks["fetch"], before))
        last = tuple((f"g{k}_{e}", 0) for k in range(batches))
        holds.append(Hold("slots", 1, f"fetch{e}", last))
    stages = [("qkv", "gpu"), ("d2h", "d2h"), ("cpuattn", "cpu"), ("h2d", "h2d"), ("post", "gpu")]
    for k in range(batches):
        before = ((f"comb{k}", 1),)
        for stage, engine in stages:
            ops.append(Op(f"{stage}{k}", engine, ticks[stage], before))
            before = ((f"{stage}{k}", 0),)
        for e in range(experts):
            copied = ((f"fetch{e}", 0),) if e in away else ()
            ops.append(Op(f"g{k}_{e}", "gpu", ticks["gemm"], (*before, *copied)))
        done = tuple((f"g{k}_{e}", 0) for e in range(experts))
        ops.append(Op(f"comb{k}", "gpu", ticks["comb"], done))
        near = [e for e in range(experts) if e not in away]
        chains += [tuple(f"g{k}_{e}" for e in group) for group in (near, quick)]
    families = [*(stage for stage, _ in stages), "comb"]
    chains += [tuple(f"{family}{k}" for k in range(batches)) for family in families]
    chains += [tuple(f"g{k}_{e}" for k in range(batches)) for e in range(experts)]
    chains += [tuple(f"{what}{e}" for e in group) for what, group in
               (("fetch", quick), ("fetch", slow), ("disk", slow))]  # fmt: skip
    pools = {"slots": slots, "host": 2}
    return LoopProblem(tuple(ops), tuple(holds), pools, tuple(c for c in chains if len(c) > 1))


def mixtral(slots: int) -> LoopProblem:
    return moe_body(MIXTRAL_L4, batches=4, experts=8, fetched=8, slots=slots)


def buffered(buffers: int, load: int = 5, work: int = 3) -> LoopProblem:
    """A copy and the op that reads it, through a ring of buffers."""
    ops = (Op("load", "copy", load), Op("run", "compute", work, (("load", 0),)))
    return LoopProblem(ops, (Hold("ring", 1, "load", (("run", 0),)),), {"ring": buffers})


@st.composite
def problems(draw: st.DrawFn, most: int = 6, least_ticks: int = 0) -> LoopProblem:
    """Small loops with dependences and holds over 0 to 2 iterations."""
    names = [f"o{i}" for i in range(draw(st.integers(1, most)))]
    ops, edges = [], [(name, name, 0) for name in names]
    for place, name in enumerate(names):
        earlier = [(u, draw(st.integers(0, 1))) for u in names[:place] if draw(st.booleans())]
        later = [
            (u, draw(st.integers(1, 2))) for u in names[place:] if draw(st.integers(0, 4)) == 0
        ]
        ticks, engine = draw(st.integers(least_ticks, 4)), draw(st.sampled_from("ab"))
        ops.append(Op(name, engine, ticks, tuple(earlier + later)))
        edges += [(u, name, distance) for u, distance in earlier + later]
    holds = []
    for _ in range(draw(st.integers(0, 3))):
        first, last, distance = draw(st.sampled_from(edges))
        more = draw(st.sampled_from([0, 0, 0, 1]))
        pool, units = draw(st.sampled_from("pq")), draw(st.sampled_from([1, 1, 1, 2]))
        holds.append(Hold(pool, units, first, ((last, distance + more),)))
    pools = {pool: draw(st.integers(1, 4)) for pool in "pq"}
    return LoopProblem(tuple(ops), tuple(holds), pools)


def brute_period(problem: LoopProblem, longest: int = 2) -> int | None:
    """The shortest period with ops at most ``longest`` periods apart, by trying all; ops must take
    time. By another reasoning than the checker's: ticks are counted one by one."""
    table, names = problem.table, [op.name for op in problem.ops]
    engines = {op.engine for op in problem.ops}
    first = max(sum(op.duration for op in problem.ops if op.engine == e) for e in engines)

    def fits(starts: dict[str, int], period: int) -> bool:
        for pool, capacity in problem.pools.items():
            for tick in range(period):
                held = 0
                for hold in problem.holds:
                    if hold.pool == pool:
                        ends = [starts[x] + d * period + table[x].duration for x, d in hold.last]
                        begin = starts[hold.first]
                        alive = (tick - begin) // period - (tick - max(ends)) // period
                        held += hold.units * alive
                if held > capacity:
                    return False
        return True

    def ticks(name: str, start: int, period: int) -> set[int]:
        return {(start + t) % period for t in range(table[name].duration)}

    def place(starts: dict[str, int], period: int) -> bool:
        if len(starts) == len(names):
            return fits(starts, period)
        name = names[len(starts)]
        near = range(-longest * period, longest * period + 1) if starts else (0,)
        for start in near:
            here = starts | {name: start}
            apart = all(
                ticks(name, start, period).isdisjoint(ticks(x, starts[x], period))
                for x in starts
                if table[x].engine == table[name].engine
            )
            ordered = all(
                here[v] + d * period >= here[u] + table[u].duration
                for v in here
                for u, d in table[v].after
                if u in here and name in (u, v)
            )
            if apart and ordered and place(here, period):
                return True
        return False

    most = sum(op.duration for op in problem.ops)
    return next((period for period in range(first, most + 1) if place({}, period)), None)


def faults(problem: LoopProblem, runs: Iterable[Run]) -> list[str]:
    """What is wrong with a finite run."""
    runs = list(runs)
    table, found = problem.table, []
    ends = {(run.op, run.iteration): run.end for run in runs}
    for run in runs:
        for u, d in table[run.op].after:
            if ends.get((u, run.iteration - d), 0) > run.start:
                found.append(f"{run} before {u}")
    for engine in {op.engine for op in problem.ops}:
        line = sorted((r.start, r.end) for r in runs if table[r.op].engine == engine)
        found += [f"{a} {b}" for a, b in pairwise(line) if a[1] > b[0]]
    for pool, capacity in problem.pools.items():
        events = []
        for hold in problem.holds:
            for run in runs:
                if hold.pool == pool and run.op == hold.first:
                    last = [(x, run.iteration + d) for x, d in hold.last]
                    end = max([run.end, *(ends.get(key, 0) for key in last)])
                    events += [(run.start, hold.units), (end, -hold.units)]
        level = 0
        for _, change in sorted(events):
            level += change
            if level > capacity:
                found.append(f"{pool} {level}")
    return found


@settings(max_examples=60, deadline=None)
@given(problems(most=4, least_ticks=1))
def test_the_optimum_is_that_of_brute_force(problem: LoopProblem) -> None:
    solved = solve(problem, work=2.0)
    best = brute_period(problem)
    if solved.status == "infeasible":
        assert best is None and set(solved.value.blocked) <= set(problem.pools)
        return
    assert best is not None and solved.bound is not None
    assert solved.bound <= best == solved.objective == solved.value.period
    assert (solved.status == "optimal") == (solved.bound == best)


@pytest.mark.parametrize(
    ("problem", "best"),
    [
        (
            LoopProblem(
                (
                    Op("o0", "b", 2, (("o0", 1), ("o1", 1), ("o2", 1))),
                    Op("o1", "a", 2, (("o0", 1), ("o1", 1), ("o2", 1))),
                    Op("o2", "b", 4, (("o0", 0),)),
                ),
                (Hold("p", 1, "o2", (("o0", 1),)), Hold("p", 1, "o0", (("o1", 1),))),
                {"p": 2},
            ),
            8,
        ),
        (
            LoopProblem(
                (
                    Op("o0", "b", 4),
                    Op("o1", "a", 1, (("o0", 1), ("o1", 1))),
                    Op("o2", "a", 1, (("o0", 0), ("o1", 0))),
                ),
                (Hold("p", 1, "o0", (("o1", 1),)), Hold("p", 1, "o1", (("o1", 1),))),
                {"p": 3},
            ),
            5,
        ),
    ],
)
def test_an_optimum_above_every_simple_bound_is_proved(problem: LoopProblem, best: int) -> None:
    assert lowest_period(problem) == best - 1 and brute_period(problem) == best
    solved = solve(problem)
    assert (solved.status, solved.objective, solved.bound) == ("optimal", best, best)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_schedule_is_legal_and_no_bound_is_beaten(problem: LoopProblem) -> None:
    low = lowest_period(problem)
    listed = best_listed(problem, low)
    solved = solve(problem, work=1.0)
    if solved.status == "infeasible":
        assert listed is None
        return
    assert check(problem, solved.value) == []
    assert solved.bound is not None and low <= solved.bound <= solved.objective
    assert (solved.status == "optimal") == (solved.bound == solved.objective)
    if listed is not None:
        assert check(problem, listed) == [] and solved.objective <= listed.period


@settings(max_examples=60, deadline=None)
@given(problems(least_ticks=1), st.integers(1, 5))
def test_a_run_in_order_is_never_later_than_the_schedule(
    problem: LoopProblem, iterations: int
) -> None:
    schedule = best_listed(problem, lowest_period(problem))
    if schedule is None:
        return
    runs = expand(problem, schedule, iterations)
    assert faults(problem, runs) == [] and len(runs) == iterations * len(problem.ops)
    order = order_of(problem, schedule)
    for shorter in (compact(problem, runs), replay(problem, order, iterations)):
        assert faults(problem, shorter) == []
        planned = {run[:2]: run.start for run in runs}
        assert all(run.start <= planned[run[:2]] for run in shorter)
    slower = compact(problem, runs, lambda op, i: 1 + (i + len(op) + iterations) % 4)
    ticks = {run[:2]: run.end - run.start for run in slower}
    assert all(ticks[op, i] == 1 + (i + len(op) + iterations) % 4 for op, i in ticks)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_retiming_a_legal_schedule_never_makes_it_longer(problem: LoopProblem) -> None:
    schedule = best_listed(problem, lowest_period(problem))
    if schedule is None:
        return
    slack = replace(schedule, period=3 * schedule.period)
    slack = replace(slack, starts={x: 3 * start for x, start in schedule.starts.items()})
    assert check(problem, slack) == []
    timed = retime(problem, slack)
    assert timed is not None and check(problem, timed) == []
    assert timed.period <= slack.period


@pytest.mark.parametrize(("buffers", "period"), [(1, 8), (2, 5), (3, 5)])
def test_a_second_buffer_overlaps_a_copy_with_its_reader(buffers: int, period: int) -> None:
    solved = solve(buffered(buffers))
    assert (solved.status, solved.objective) == ("optimal", period)
    assert check(buffered(buffers), solved.value) == []


def test_a_chain_of_engines_runs_at_the_pace_of_the_slowest() -> None:
    ops = [Op("o0", "e0", 4)]
    ops += [Op(f"o{i}", f"e{i}", 4 + i % 3, ((f"o{i - 1}", 0),)) for i in range(1, 8)]
    solved = solve(LoopProblem(tuple(ops)))
    assert (solved.status, solved.objective) == ("optimal", 6)


def test_expert_offloading_reaches_the_refill_bound() -> None:
    problem = mixtral(slots=3)
    bounds = period_bounds(problem)
    # 4 CPU attentions one by one, what comes before and after them, and 5 of 8 fetches.
    assert bounds["refill:slots"] == (1 + 9 + 4 * 175 + 6) + 2 * 14 + 5 * 176 == 1624
    assert bounds["engine:h2d"] == 1416
    solved = solve(problem)
    assert (solved.status, solved.objective, solved.bound) == ("optimal", 1624, 1624)
    assert check(problem, solved.value) == [] and peaks(problem, solved.value)["slots"] == 3
    runs = expand(problem, solved.value, 6)
    tight = compact(problem, runs)
    assert faults(problem, tight) == [] and 6 * 1416 <= makespan(tight) <= makespan(runs)


def test_six_slots_give_what_sixteen_give() -> None:
    found = pareto(mixtral(slots=1), "slots", [6, 16, 3])
    assert {slots: solved.objective for slots, solved in found.items()} == {
        3: 1624,
        6: 1416,
        16: 1416,
    }
    assert all(solved.status == "optimal" for solved in found.values())


def test_experts_on_disk() -> None:
    problem = moe_body(DSV3_H100, batches=2, experts=32, fetched=24, slots=6, on_disk=4)
    assert len(problem.ops) == 104
    solved = solve(problem)
    assert (solved.status, solved.objective) == ("optimal", 963)


@settings(max_examples=20, deadline=None)
@given(problems(most=5))
def test_more_room_is_never_worse(problem: LoopProblem) -> None:
    found = list(pareto(problem, "p", [1, 2, 3, 4], work=1.0).values())
    assert all(a.objective >= b.objective for a, b in pairwise(found))
    assert all((a.bound or 1e9) >= (b.bound or 1e9) for a, b in pairwise(found))


def test_the_same_problem_gives_the_same_schedule() -> None:
    problem = mixtral(slots=4)
    assert solve(problem, work=0.2).value == solve(problem, work=0.2).value


def test_pools_that_fit_nothing_are_named() -> None:
    small = replace(buffered(1), pools={"ring": 0})
    assert pools_too_small(small) == ("ring",)
    assert solve(small).value.blocked == ("ring",)
    # Two ops take a unit each, and both are let go only when both have run.
    ops = (Op("a", "x", 1), Op("b", "x", 1), Op("end", "x", 1, (("a", 0), ("b", 0))))
    holds = tuple(Hold("pair", 1, x, (("end", 0),)) for x in "ab")
    solved = solve(LoopProblem(ops, holds, {"pair": 1}))
    assert solved.status == "infeasible" and solved.value.blocked == ("pair",)
    # A unit that is held for two iterations is held by two of them at once.
    held = LoopProblem((Op("a", "x", 1),), (Hold("old", 1, "a", (("a", 2),)),), {"old": 2})
    assert solve(held).value.blocked == ("old",)
    assert solve(replace(held, pools={"old": 3})).status == "optimal"


def test_the_checker_refuses_each_kind_of_fault() -> None:
    problem = mixtral(slots=3)
    legal = list_schedule(problem).value

    def broken(**starts: int) -> str:
        return "; ".join(check(problem, replace(legal, starts={**legal.starts, **starts})))

    assert check(problem, legal) == []
    end = legal.starts["qkv0"] + MIXTRAL_L4["qkv"]
    assert f"op 'd2h0' starts at {end - 1}, before 'qkv0' of 0 iterations" in broken(d2h0=end - 1)
    late = legal.starts["comb0"] + legal.period
    assert "op 'qkv0' starts at" in broken(comb0=late)
    assert "engine 'h2d': 'fetch" in broken(fetch1=legal.starts["fetch0"] + 1)
    early = legal.starts["fetch0"] - legal.period
    assert "pool 'slots': " in broken(fetch0=early) and "capacity 3" in broken(fetch0=early)
    fewer = replace(problem, pools={**problem.pools, "slots": 2})
    assert check(fewer, legal) == ["pool 'slots': 3 units held at once, capacity 2"]
    assert check(problem, replace(legal, period=0)) == ["period 0 is under 1"]
    assert check(problem, ModuloSchedule(5, {})) == [f"no start for {[*problem.table]}"]
    assert any("engine 'h2d'" in line for line in check(problem, replace(legal, period=175)))
    instant = LoopProblem((Op("long", "x", 4), Op("none", "x", 0)))
    assert check(instant, ModuloSchedule(4, {"long": 0, "none": 2})) != []
    assert check(instant, ModuloSchedule(4, {"long": 0, "none": 4})) == []


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (LoopProblem(()), "it has no ops"),
        (LoopProblem((Op("a", "x", 1), Op("a", "x", 1))), "two ops are named 'a'"),
        (LoopProblem((Op("a", "x", 1, (("b", 0),)),)), "op 'a' comes after 'b', which is no op"),
        (LoopProblem((Op("a", "x", -1),)), "op 'a' takes -1 ticks"),
        (LoopProblem((Op("a", "x", 1, (("a", -1),)),)), "at distance -1"),
        (
            LoopProblem((Op("a", "x", 1, (("b", 0),)), Op("b", "x", 1, (("a", 0),)))),
            "each of a -> b -> a waits for the one before it",
        ),
        (LoopProblem((Op("a", "x", 1),), (), {}, (("a", "c"),)), "a chain names 'c'"),
        (
            LoopProblem((Op("a", "x", 1),), (Hold("p", 1, "a", ()),)),
            "op 'a' holds pool 'p', which has no capacity",
        ),
        (
            LoopProblem((Op("a", "x", 1),), (Hold("p", 0, "a", (("a", -1),)),), {"p": 1}),
            "holds 0 units of 'p'; expected >= 1; the hold of pool 'p' by 'a' has a negative",
        ),
        (
            LoopProblem(
                (Op("a", "x", 1), Op("b", "x", 1)), (Hold("p", 1, "a", (("b", 1),)),), {"p": 1}
            ),
            "ends with 'b' of 1 iterations later, which does not depend on it",
        ),
    ],
)
def test_check_problem_refuses(problem: LoopProblem, text: str) -> None:
    with pytest.raises(ValueError, match="this loop cannot be scheduled") as caught:
        check_problem(problem)
    assert text in str(caught.value)


def test_replay_refuses_an_order_that_never_ends() -> None:
    problem = buffered(1)
    assert makespan(replay(problem, written_order(problem), 3)) == 24
    late = LoopOrder({"copy": (("load", 0),), "compute": (("run", -1),)}, {"ring": (("load", 0),)})
    assert makespan(replay(problem, late, 3)) == 24
    crossed = LoopProblem(
        (Op("a", "x", 1), Op("b", "x", 1, (("c", 0),)), Op("c", "y", 1, (("a", 0),))),
    )
    order = LoopOrder({"x": (("b", 0), ("a", 0)), "y": (("c", 0),)}, {})
    with pytest.raises(ValueError, match="'b' of iteration 0 waits for an op before it"):
        replay(crossed, order, 2)
