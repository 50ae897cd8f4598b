"""Kernels in plans for a GPU: chosen by the steps' tokens, saved beside the plan, checked."""

import dataclasses
import functools
import math
from pathlib import Path

import pytest
from tests.ir_cases import captured
from tests.plan_cases import save_beside
from tests.test_gpu_choose import GPU, MACHINE, WORKLOAD, sizes

from dovetail.cli import main
from dovetail.codegen.gate.suite import QWEN3_30B
from dovetail.codegen.kernels.arch import ARCHS, arch_of
from dovetail.codegen.kernels.choose import choose_layer
from dovetail.codegen.kernels.cost import predicted_seconds
from dovetail.codegen.kernels.emit import source_digest
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Plan, load_plan, save_plan
from dovetail.kernels.planned import (
    check_plan_kernels,
    ladder_kernels,
    save_kernels,
    token_rungs,
    with_kernels,
    with_rung,
)
from dovetail.machine_files import load_machine, shipped_machines
from dovetail.passes.choose import choose
from dovetail.tuning.kernels.space import KernelSpace
from dovetail.tuning.samplers import make_sampler

SPACE_LAYER = dataclasses.replace(QWEN3_30B, experts=16)


def machine(arch: str) -> Machine:
    return dataclasses.replace(MACHINE, accelerator=dataclasses.replace(GPU, arch=arch))


@functools.cache
def planned(arch: str = "sm_90", family: str = "olmoe") -> Plan:
    """A plan with half of the experts on the way, and its kernels."""
    graph = captured(family)
    plan = choose(graph, machine(arch), sizes(family, 0.6), WORKLOAD, "zigzag")
    return with_kernels(plan, graph)


def test_a_gpu_plan_has_the_kernels_of_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned()
    (ladder,) = plan.ladders
    assert ladder.arch == "sm_90" and ladder.layer.up_place is not None and not plan.no_kernels
    kernels = ladder_kernels(plan, ladder)
    assert [k.bucket for k in kernels] == [rung.bucket for rung in ladder.rungs]
    again = with_kernels(dataclasses.replace(plan, kernels=(), ladders=()), captured("olmoe"))
    assert again == plan == with_kernels(plan, captured("olmoe"))
    path = save_beside(captured("olmoe"), plan, tmp_path)
    save_kernels(plan, tmp_path)
    assert load_plan(path) == plan
    assert main(["plan", "check", str(path)]) == 0
    assert f"{len(plan.kernels)} sources are what their specs give" in capsys.readouterr().out
    assert main(["plan", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "kernels for sm_90: " in shown and ladder.bodies[0] in shown
    assert plan.kernels[1].source_digest[:10] in shown
    assert main(["plan", "explain", str(path)]) == 0
    explained = capsys.readouterr().out
    assert "Tiles of the experts' kernels are the cost model's fastest" in explained


def test_missing_and_altered_sources_are_refused(tmp_path: Path) -> None:
    plan = planned()
    save_kernels(plan, tmp_path)
    first = tmp_path / plan.kernels[0].file
    text = first.read_text(encoding="utf-8")
    first.write_text(text.replace("BLOCK", "BLOCKS", 1), encoding="utf-8")
    with pytest.raises(PlanError, match=r"not what this version of dovetail emits.*; plan again"):
        check_plan_kernels(plan, tmp_path)
    first.unlink()
    with pytest.raises(PlanError, match="No such file or directory; plan again, or restore"):
        check_plan_kernels(plan, tmp_path)
    save_kernels(plan, tmp_path)
    (ladder,) = plan.ladders
    rung = dataclasses.replace(
        ladder.rungs[0], files={**ladder.rungs[0].files, "up": "kernels/x.py"}
    )
    other = dataclasses.replace(plan, ladders=(dataclasses.replace(ladder, rungs=(rung,)),))
    with pytest.raises(PlanError, match=r"found kernels/x\.py for up, expected a GemmSpec among"):
        check_plan_kernels(other, tmp_path)
    outside = dataclasses.replace(plan.kernels[0], file="../x.py")
    with pytest.raises(PlanError, match="its spec belongs in"):
        check_plan_kernels(dataclasses.replace(plan, kernels=(outside,)), tmp_path)


def test_a_kernels_name_is_no_code(tmp_path: Path) -> None:
    spec = planned().kernels[0].spec
    with pytest.raises(InputError, match="expected letters, digits and underscores"):
        dataclasses.replace(spec, name="x(): import os\ndef y")
    path = tmp_path / "plan.json"
    save_plan(planned(), path)
    path.write_text(path.read_text().replace('"moe_sort"', '"../moe_sort"'), encoding="utf-8")
    with pytest.raises(PlanError):
        load_plan(path)


@pytest.mark.parametrize(
    ("arch", "text"),
    [("sm_75", "paper gpu is sm_75; kernels are emitted for sm_80"), ("", "says no arch of paper")],
)
def test_a_gpu_without_kernels_says_so(
    arch: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(arch)
    assert not plan.kernels and text in plan.no_kernels
    path = save_beside(captured("olmoe"), plan, tmp_path)
    assert main(["plan", "show", str(path)]) == 0
    assert "no kernels, torch's products instead: " in capsys.readouterr().out
    assert main(["plan", "check", str(path)]) == 0
    assert f"none: {plan.no_kernels}" in capsys.readouterr().out


def test_a_plan_for_the_processor_has_no_kernels() -> None:
    plan = choose(captured("olmoe"), MACHINE, {"ram": 1 << 28}, WORKLOAD, "model_batch")
    assert with_kernels(plan, captured("olmoe")) == plan and not plan.no_kernels


def test_rungs_are_the_most_tokens_of_each_bucket() -> None:
    assert token_rungs([1, 3, 9, 60, 61, 5000]) == (1, 9, 61, 5000)
    assert token_rungs([20000, 30000, 64]) == (64, 30000)


def test_rates_come_from_the_machine() -> None:
    for name in shipped_machines():
        gpu = load_machine(name).accelerator
        if gpu is None:
            continue
        arch = arch_of(gpu)
        assert (arch is None) == (gpu.arch == "sm_75")
        if arch is not None:
            usual = ARCHS[gpu.arch]
            assert (arch.processors, arch.bandwidth) == (gpu.processors, gpu.hbm_bandwidth)
            assert 0.3 * usual.flops < arch.flops < 3 * usual.flops


def test_the_space_of_kernels_is_pruned_and_begins_at_the_models_choice() -> None:
    arch, bucket = ARCHS["sm_90"], (17, 64)
    space = KernelSpace.of(SPACE_LAYER, arch, bucket)
    chosen = choose_layer(SPACE_LAYER, arch, bucket)
    assert space.build({}).kernels == chosen
    expected = sum(predicted_seconds(spec, arch, 64) for spec in (chosen.up, chosen.down))
    assert space.seconds({}) == expected
    assert "up_split" not in space.ladders and space.size > 900_000
    large = {"rows": 128, "up_outputs": 256, "up_depth": 128, "up_stages": 5, "up_swap": 0}
    refused = space.build(large)
    assert refused.kernels is None and "up: " in refused.why and "shared memory" in refused.why
    assert math.isinf(space.seconds(large))
    slots = KernelSpace.of(dataclasses.replace(planned().ladders[0].layer), arch, bucket)
    assert not {"up_tma", "down_tma"} & set(slots.ladders)


def test_a_search_by_the_model_stays_in_what_can_be_built() -> None:
    space = KernelSpace.of(SPACE_LAYER, ARCHS["sm_80"], (1, 16))
    search = make_sampler("random", space, 0)
    built = refused = 0
    for _ in range(60):
        (point,) = search.propose(1)
        seconds = space.seconds(point)
        if math.isinf(seconds):
            refused += 1
            assert space.build(point).why
            search.tell_over(point, 1.0)
        else:
            built += 1
            kernels = space.build(point).kernels
            assert kernels is not None and kernels.sort.tile_m == kernels.down.tile.m
            search.tell(point, seconds / space.seconds({}))
    assert built and refused


def test_measured_kernels_take_the_models_place_in_a_plan(tmp_path: Path) -> None:
    plan = planned()
    (ladder,) = plan.ladders
    arch = ARCHS["sm_90"]
    space = KernelSpace.of(ladder.layer, arch, ladder.rungs[-1].bucket)
    other = next(
        kernels
        for _, point in space.neighbours({**space.base})
        if (kernels := space.build(point).kernels) is not None
    )
    tuned = with_rung(plan, ladder.bodies, other)
    assert ladder_kernels(tuned, tuned.ladders[0])[-1] == other
    assert source_digest("") not in {reference.source_digest for reference in tuned.kernels}
    save_kernels(tuned, tmp_path)
    check_plan_kernels(tuned, tmp_path)
    with pytest.raises(PlanError, match="the plan has no kernels of elsewhere for"):
        with_rung(plan, ("elsewhere",), other)
