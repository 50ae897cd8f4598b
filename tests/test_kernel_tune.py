"""The search over kernels, its rows and its plans, on kernels whose time is a formula."""

import dataclasses
import random
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import kernel_tune_cases as cases

from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.emit import emit_kernel
from dovetail.ir import codec
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.kernels.bench import KernelFailure
from dovetail.tuning.gate import CONFIRM, DEFAULT, GATE, SEARCH
from dovetail.tuning.kernels.attempts import Attempts
from dovetail.tuning.kernels.key import rung_key, rung_task
from dovetail.tuning.kernels.rows import GAIN, kernel_winner, kernels_of
from dovetail.tuning.kernels.space import KernelSpace
from dovetail.tuning_db.winners import pooled


def best_possible() -> float:
    """The least time of all kernels that differ from the default in warps, stages and outputs."""
    space, found = cases.space(), []
    points = [dict(space.base)]
    for knob in ("warps", "stages", "outputs"):
        for name in (f"up_{knob}", f"down_{knob}"):
            points = [{**point, name: v} for point in points for v in space.ladders[name]]
    for point in points:
        if (kernels := space.build(point).kernels) is not None:
            found.append(cases.seconds(kernels))
    return min(found)


def test_the_search_finds_the_best_kernels(tmp_path: Path) -> None:
    bench = cases.FakeBench()
    search = cases.run(tmp_path / "t.db", bench)
    found = kernel_winner(search.rows)
    assert found is not None
    trial, interval = found
    assert cases.seconds(kernels_of(trial)) <= 1.02 * best_possible()
    default = cases.seconds(cases.space().chosen)
    assert interval.median == pytest.approx(cases.seconds(kernels_of(trial)) / default)
    assert bench.now < 130 and trial.max_error == 1e-3
    assert len(search.rows) == len(cases.rows(tmp_path / "t.db"))


def test_refused_points_are_constraints_and_never_loaded(tmp_path: Path) -> None:
    bench = cases.FakeBench()
    search = cases.run(tmp_path / "t.db", bench, 30.0)
    refused = [row for row in search.rows if row.state == "invalid"]
    assert refused and all(row.note and "point" in row.parameters for row in refused)
    loaded = set(bench.loads)
    for row in refused:
        assert cases.space().build({k: int(v) for k, v in row.knobs.items()}).kernels is None
    named = {codec.digest(row.parameters["kernels"]) for row in search.rows if row not in refused}
    assert loaded == named


@pytest.mark.parametrize("state", ["wrong_result", "compile_error", "out_of_memory"])
def test_kernels_that_fail_are_stored_and_never_win(tmp_path: Path, state: str) -> None:
    def broken(kernels: LayerKernels) -> KernelFailure | None:
        # The fastest kernels are the broken ones.
        if kernels.up.tile.warps == 8:
            return KernelFailure(state, "it broke", 0.5)  # type: ignore[arg-type]
        return None

    bench = cases.FakeBench(broken=broken)
    search = cases.run(tmp_path / "t.db", bench)
    failed = [row for row in search.rows if row.state == state]
    assert failed and all(row.note == "it broke" and not row.samples for row in failed)
    assert all(kernels_of(row).up.tile.warps == 8 for row in failed)
    found = kernel_winner(search.rows)
    assert found is not None and kernels_of(found[0]).up.tile.warps == 4
    assert kernels_of(found[0]).down.tile.warps == 8


def test_kernels_that_fail_in_the_gate_do_not_win(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def broken(kernels: LayerKernels) -> KernelFailure | None:
        seen[codec.digest(kernels)] += 1
        again = kernels != cases.space().chosen and seen[codec.digest(kernels)] > 1
        return KernelFailure("wrong_result", "a race", 0.5) if again else None

    search = cases.run(tmp_path / "t.db", cases.FakeBench(broken=broken))
    assert kernel_winner(search.rows) is None
    assert any(row.note == "a race" for row in search.rows)


def test_a_lost_gpu_ends_the_search_and_the_next_call_goes_on_without_the_kernels(
    tmp_path: Path,
) -> None:
    def broken(kernels: LayerKernels) -> KernelFailure | None:
        if kernels.up.tile.warps == 8 and kernels.down.tile.warps == 8:
            return KernelFailure("wrong_result", "illegal access", lost=True)
        return None

    ends, path = 0, tmp_path / "t.db"
    while True:
        try:
            search = cases.run(path, cases.FakeBench(broken=broken), 60.0)
            break
        except KernelFailure as failure:
            assert failure.lost
            ends += 1
    lost = [row for row in search.rows if row.state == "wrong_result"]
    assert 0 < ends == len(lost) == len({row.digest for row in lost})
    found = kernel_winner(search.rows)
    assert found is not None and "wrong_result" not in found[0].state


def test_cut_anywhere_it_goes_on_and_times_nothing_twice(tmp_path: Path) -> None:
    draw, cuts, path = random.Random(0), 0, tmp_path / "t.db"
    for _ in range(40):
        try:
            cases.run(path, cases.FakeBench(cut=draw.randint(0, 6)))
        except cases.Cut:
            cuts += 1
    cases.run(path, cases.FakeBench())
    rows = cases.rows(path)
    looks = Counter(row.digest for row in rows if row.note == SEARCH and row.state != "invalid")
    refused = Counter(codec.digest(row.knobs) for row in rows if row.state == "invalid")
    assert cuts > 3 and set(looks.values()) == {1} and set(refused.values()) == {1}
    assert sum(row.note == DEFAULT for row in rows) == 1
    found = kernel_winner(rows)
    assert found is not None
    assert cases.seconds(kernels_of(found[0])) <= 1.02 * best_possible()
    # All is decided: another call loads nothing.
    last = cases.FakeBench()
    cases.run(path, last)
    assert last.loads == []


def test_kernels_that_end_the_process_twice_are_not_loaded_again(tmp_path: Path) -> None:
    place = tmp_path / "[t].db"
    ends = textwrap.dedent(f"""
        import os
        from pathlib import Path
        from dovetail.tuning.kernels.attempts import Attempts
        with Attempts(Path({str(place)!r})).at("abc"):
            os._exit(3)
    """)
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", ends], check=False).returncode == 3
    with (
        pytest.raises(KernelFailure, match="ended the process 2 times"),
        Attempts(place).at("abc"),
    ):
        raise AssertionError("it is tried again")
    with Attempts(place).at("other"):
        # It is this process's own, and so not one that has ended.
        assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="it fails"), Attempts(place).at("other"):
        raise ValueError("it fails")
    assert list(tmp_path.iterdir()) == []


def test_noise_alone_gives_no_winner(tmp_path: Path) -> None:
    draw = random.Random(1)
    for number in range(3):
        bench = cases.FakeBench(lambda kernels: 1e-4, noise=lambda n: draw.lognormvariate(0, 0.02))
        search = cases.run(tmp_path / f"{number}.db", bench, 60.0)
        assert kernel_winner(search.rows) is None
    assert GAIN < 1


def test_a_gain_too_small_to_matter_is_a_tie(tmp_path: Path) -> None:
    def formula(kernels: LayerKernels) -> float:
        return 1e-4 if kernels == cases.space().chosen else 0.995e-4

    assert kernel_winner(cases.run(tmp_path / "t.db", cases.FakeBench(formula)).rows) is None


def test_what_is_hopeless_after_a_pair_gets_no_more(tmp_path: Path) -> None:
    def formula(kernels: LayerKernels) -> float:
        return 1e-4 if kernels == cases.space().chosen else 2e-4

    search = cases.run(tmp_path / "t.db", cases.FakeBench(formula), 30.0)
    stopped = [row for row in search.rows if row.state == "timeout"]
    assert stopped and all(len(row.samples) == 1 for row in stopped)
    assert not [row for row in search.rows if row.note in (CONFIRM, GATE)]


def test_throttled_pairs_do_not_count(tmp_path: Path) -> None:
    def noise(number: int) -> float:
        return 3.0 if 40 < number < 60 else 1.0

    search = cases.run(tmp_path / "t.db", cases.FakeBench(noise=noise))
    used = [s for row in search.rows for s in row.default_samples if row.note != DEFAULT]
    assert max(used) == min(used)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_other_samplers_search_the_same_space(tmp_path: Path, sampler: str) -> None:
    search = cases.run(tmp_path / "t.db", cases.FakeBench(), 40.0, sampler)
    ran = [row for row in pooled(search.rows) if row.state == "ok" and row.note != DEFAULT]
    assert ran and all(cases.space().holds(row.knobs) for row in ran)


LAYERS = st.builds(
    lambda experts, hidden, inter, top_k, x, name: dataclasses.replace(
        cases.LAYER, experts=experts, hidden=64 * hidden, inter=64 * inter, top_k=top_k, x=x,
        name=name,
    ),
    st.sampled_from((8, 16)), st.sampled_from((16, 32)), st.sampled_from((8, 12)),
    st.sampled_from((2, 4)), st.sampled_from(("bf16", "fp16")), st.sampled_from(("a", "b")),
)  # fmt: skip
RUNGS = st.tuples(
    LAYERS, st.sampled_from(("sm_80", "sm_90")), st.sampled_from(((1, 1), (1, 16), (17, 64)))
)


@settings(max_examples=25, deadline=None)
@given(RUNGS, RUNGS)
def test_a_key_holds_all_that_the_kernels_depend_on(
    one: tuple[LayerSpec, str, tuple[int, int]], other: tuple[LayerSpec, str, tuple[int, int]]
) -> None:
    def named(rung: tuple[LayerSpec, str, tuple[int, int]]) -> tuple[str, str, str]:
        layer, arch, bucket = rung
        space = KernelSpace.of(layer, ARCHS[arch], bucket)
        built = space.build({"up_stages": 2, "down_stages": 2}).kernels
        assert built is not None
        key = rung_key(layer, space.chosen, "graphs", cases.ENVIRONMENT)
        text = "".join(emit_kernel(spec) for spec in built.specs())
        return codec.digest(key), codec.digest(built), text

    (key, kernels, text), (key_, kernels_, text_) = named(one), named(other)
    plain, plain_ = (dataclasses.replace(rung[0], name="") for rung in (one, other))
    same = (plain, *one[1:]) == (plain_, *other[1:])
    assert (key == key_) == same
    if key == key_ or kernels == kernels_:
        assert text == text_


def test_a_key_differs_by_what_it_is_timed_on_and_against() -> None:
    space = cases.space()
    silicon, software = cases.ENVIRONMENT
    key = rung_key(cases.LAYER, space.chosen, "graphs", (silicon, software))
    other = space.build({"down_stages": 3}).kernels
    assert other is not None
    keys = [
        rung_key(cases.LAYER, other, "graphs", (silicon, software)),
        rung_key(cases.LAYER, space.chosen, "interpreted", (silicon, software)),
        rung_key(cases.LAYER, space.chosen, "graphs", ({**silicon, "cc": "8.0"}, software)),
        rung_key(cases.LAYER, space.chosen, "graphs", (silicon, {**software, "triton": "4"})),
    ]
    assert len({codec.digest(each) for each in (key, *keys)}) == 5
    assert rung_task(cases.LAYER, "sm_90", (1, 16)) != rung_task(cases.LAYER, "sm_90", (1, 17))
