"""Programs for a GPU: every policy's is legal, its executor has no hazard on a fake device, and
each thing that keeps it so is noticed when it is missing."""

import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ir_cases import captured
from tests.plan_cases import save_beside
from tests.test_gpu_choose import MACHINE, WORKLOAD, plan, sizes
from transformers import AutoConfig

from dovetail.capture.capture import capture_config
from dovetail.cli import main
from dovetail.codegen.gpu_executor import emit_gpu_executor
from dovetail.ir.errors import BudgetError, ModelError, VerifyError
from dovetail.ir.gpu_program import Do, GpuFlat, GpuProgram, Layers, Record, Take, Wait
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.verify_gpu_program import verify_gpu_program
from dovetail.ir.workload import Workload
from dovetail.machine_files import load_machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.lower import lower_gpu
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.loop.work import StepWork
from dovetail.passes.policies.common import Knobs
from dovetail.passes.policies.gpu import GPU_POLICIES, GpuSetting, moves, starts
from dovetail.runtime.gpu.device import Buffer, CudaDevice, Event, Launch
from dovetail.runtime.gpu.executor import GpuExecutor
from dovetail.runtime.gpu.fake_device import FakeDevice

CONFIGS = Path(__file__).parents[1] / "bench" / "configs"
SIZES = ((0.3, 3.0, 30), (0.3, 0.5, 30), (1.5, 3.0, 100))
"""hbm and ram as shares of the weights, and percent of what fits into hbm that is kept there: much
streamed, from disk too, and everything there."""


def predictor_of(
    family: str, share: float, knobs: Knobs, ram: float = 3.0
) -> tuple[GpuPredictor, dict[str, int]] | None:
    budget = sizes(family, share, ram)
    graph = captured(family)
    setting = GpuSetting(graph, MACHINE, budget["hbm"], budget["ram"], WORKLOAD)
    made = moves(setting, knobs)
    if made is None:
        return None
    return GpuPredictor(apply_moves(graph, made), GpuCosts(MACHINE, graph.dtype)), budget


def works(predictor: GpuPredictor) -> list[StepWork]:
    """A step of each kind."""
    return list({p.work.kind: p.work for p in predictor.phases(WORKLOAD)}.values())


def run_on_fake(program: GpuProgram, steps: int = 2) -> FakeDevice:
    functions: dict[str, Any] = {}
    exec(emit_gpu_executor(program, {"policy": "test"}), functions)
    device = FakeDevice(program.capacity)
    executor = GpuExecutor(program, device, functions)
    for _ in range(steps):
        executor.run_step()
    return device


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("policy", GPU_POLICIES)
def test_every_policy_has_a_program_without_hazards(policy: str, family: str) -> None:
    graph = captured(family)
    seen = 0
    for share, ram, resident in SIZES:
        budget = sizes(family, share, ram)
        setting = GpuSetting(graph, MACHINE, budget["hbm"], budget["ram"], WORKLOAD)
        for knobs in starts(setting, GPU_POLICIES[policy]):
            if knobs["seqs"] not in (1, WORKLOAD.prompts):
                continue
            given = {**knobs, "rows": 2} | ({"resident": resident} if resident < 100 else {})
            found = predictor_of(family, share, given, ram)
            if found is None:
                continue
            for work in works(found[0]):
                program = lower_gpu(found[0], work, found[1])
                verify_gpu_program(program)
                device = run_on_fake(program)
                assert len(device.launches) == 2 * len(program.ops())
                seen += 1
    assert seen


@pytest.fixture(scope="module")
def mixtral() -> TaskGraph:
    return capture_config(AutoConfig.from_pretrained(CONFIGS / "Mixtral-8x7B")).graph


@pytest.mark.parametrize("policy", GPU_POLICIES)
def test_every_policy_has_one_for_a_model_of_full_size(policy: str, mixtral: TaskGraph) -> None:
    workload = Workload(((512, 4096),), 256)
    # A single GPU does not hold all of it, as eager wants.
    machine = load_machine("8xh100" if policy == "eager" else "rtx4090-64gb")
    budget = {tier: machine.tiers[tier] * 9 // 10 for tier in ("hbm", "ram")}
    setting = GpuSetting(mixtral, machine, budget["hbm"], budget["ram"], workload)
    made = [m for k in starts(setting, GPU_POLICIES[policy]) if (m := moves(setting, k))]
    layout = apply_moves(mixtral, made[-1])
    predictor = GpuPredictor(layout, GpuCosts(machine, mixtral.dtype))
    for work in {p.work.kind: p.work for p in predictor.phases(workload)}.values():
        program = lower_gpu(predictor, work, budget)
        verify_gpu_program(program)
        assert len(run_on_fake(program, steps=1).launches) == len(program.ops())


def test_copies_are_what_is_predicted() -> None:
    for policy in ("weight_stream", "zigzag", "cgopipe", "module_batch", "hybrid_cpu_gpu"):
        knobs = {**GPU_POLICIES[policy].fixed, "seqs": 4, "prefill_tokens": 64, "rows": 2}
        found = predictor_of("deepseek_v2", 0.3, knobs)
        assert found is not None
        for work in works(found[0]):
            program = lower_gpu(found[0], work, found[1])
            layers = range(len(captured("deepseek_v2").layers))
            predicted = found[0].step(work)[2]
            for engine in ("h2d", "d2h", "disk"):
                moved = sum(
                    op.nbytes for i in layers for op in program.body(i) if op.engine == engine
                )
                assert moved == pytest.approx(predicted.get(engine, 0.0), rel=1e-3, abs=64)


# Negative controls.


@functools.cache
def program_of(policy: str, ram: float = 3.0) -> GpuProgram:
    """A decode step that streams most of its weights."""
    knobs = {**GPU_POLICIES[policy].fixed, "seqs": 6, "prefill_tokens": 64, "rows": 2}
    knobs |= {"resident": 0}
    if "attention_cpu" in GPU_POLICIES[policy].free:
        knobs |= {"attention_cpu": 50, "kv_hbm": 0}
    found = predictor_of("deepseek_v2", 0.3, knobs, ram)
    assert found is not None
    work = next(work for work in works(found[0]) if work.decode)
    return lower_gpu(found[0], work, found[1])


def edited(
    program: GpuProgram, edit: Callable[[str, Sequence[GpuFlat]], Sequence[GpuFlat]]
) -> GpuProgram:
    """The program, its loops expanded, with every engine's list edited."""
    lists = {engine: tuple(edit(engine, items)) for engine, items in program.flat().items()}
    return replace(program, engines=lists)


def without(program: GpuProgram, engine: str, place: int) -> GpuProgram:
    return edited(
        program,
        lambda name, items: [i for n, i in enumerate(items) if (name, n) != (engine, place)],
    )


STREAMING = ["weight_stream", "zigzag", "cgopipe", "module_batch", "nano_overlap"]


@pytest.mark.parametrize("policy", STREAMING)
@pytest.mark.parametrize("ram", [3.0, 0.8])
def test_a_missing_wait_is_noticed_whichever_it_is(policy: str, ram: float) -> None:
    program = program_of(policy, ram)
    places = [
        (engine, n, item)
        for engine, items in program.flat().items()
        for n, item in enumerate(items)
        if isinstance(item, Wait)
    ]
    assert len(places) > 20
    for engine, n, _ in places:
        with pytest.raises(VerifyError, match="expected"):
            verify_gpu_program(without(program, engine, n))
    # Barriers order what shares no bytes, so a device cannot see that they are missing.
    data = [p for p in places if "barrier" not in program.flat()[p[0]][p[1] + 1].op + p[2].op]
    for engine, n, _ in data[:: max(1, len(data) // 12)] if policy != "zigzag" else ():
        with pytest.raises(VerifyError, match=r"ended|holds|written|has no buffer"):
            run_on_fake(without(program, engine, n), steps=1)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Record, "its event is never recorded"),
        (Take, "has taken no buffer of pool|has no buffer of pool"),
        (Do, "is never begun"),
    ],
)
def test_programs_that_lack_an_instruction_are_refused(kind: type, text: str) -> None:
    program = program_of("module_batch")
    for engine, items in program.flat().items():
        place = next((n for n, item in enumerate(items) if isinstance(item, kind)), None)
        if place is not None:
            with pytest.raises(VerifyError, match=text):
                verify_gpu_program(without(program, engine, place))


def test_an_executor_whose_event_is_never_recorded_stops() -> None:
    program = program_of("module_batch")
    place = next(n for n, i in enumerate(program.flat()["h2d"]) if isinstance(i, Record))
    with pytest.raises(VerifyError, match="every engine waits for an event that is not recorded"):
        run_on_fake(without(program, "h2d", place))


def test_buffers_that_are_taken_from_the_wrong_one_are_refused() -> None:
    def wrong(engine: str, items: Sequence[GpuFlat]) -> Sequence[GpuFlat]:
        return [replace(i, of="", slot=0) if isinstance(i, Take) else i for i in items]

    program = edited(program_of("module_batch"), wrong)
    with pytest.raises(VerifyError, match=r"writes over the buffer|holds"):
        verify_gpu_program(program)
    with pytest.raises(VerifyError, match=r"ended|holds"):
        run_on_fake(program, steps=1)


def test_programs_above_a_budget_are_refused() -> None:
    program = program_of("module_batch")
    used = sum(p.nbytes for p in program.pools if p.tier == "hbm")
    used += sum(program.reserved["hbm"].values())
    verify_gpu_program(replace(program, capacity={**program.capacity, "hbm": used}))
    small = replace(program, capacity={**program.capacity, "hbm": used - 1})
    with pytest.raises(VerifyError, match=f"hbm holds {used} bytes"):
        verify_gpu_program(small)
    with pytest.raises(BudgetError, match=f"hbm={used}"):
        run_on_fake(small)
    thin = tuple(replace(pool, slot_bytes=pool.slot_bytes // 2) for pool in program.pools)
    with pytest.raises(VerifyError, match=r"expected at most the .* of one buffer of pool"):
        verify_gpu_program(replace(program, pools=thin))
    few = tuple(replace(pool, slots=1) for pool in program.pools)
    with pytest.raises(VerifyError, match="has 1 buffers, expected one of them"):
        verify_gpu_program(replace(program, pools=few))


def test_engines_that_wait_for_each_other_are_refused() -> None:
    program = program_of("cgopipe")
    up = next(i for i in program.flat()["gpu0"] if isinstance(i, Wait) and i.op.startswith("up"))

    def early(engine: str, items: Sequence[GpuFlat]) -> Sequence[GpuFlat]:
        # What comes up was computed from what goes down.
        return [up, *items] if engine == "d2h" else items

    with pytest.raises(VerifyError, match=r"wait for each other in a cycle: .*d2h at wait"):
        verify_gpu_program(edited(program, early))
    with pytest.raises(VerifyError, match="every engine waits for an event"):
        run_on_fake(edited(program, early), steps=1)


# The fake device by itself.


def launch(op: str, reads: Sequence[tuple[int, str]] = (), writes: int = 0) -> Launch:
    buffers = tuple(Buffer("pool", 8 * start, 8) for start, _ in reads)
    sources = tuple(source for _, source in reads)
    return Launch(op, 0, "run:test", buffers, sources, Buffer("pool", 8 * writes, 8))


def test_the_fake_device_finds_each_hazard() -> None:
    def device() -> FakeDevice:
        made = FakeDevice({"hbm": 64})
        made.allocate("hbm", 32, "pool")
        return made

    with pytest.raises(VerifyError, match="takes hbm to 96 bytes, expected at most 64"):
        device().allocate("hbm", 64, "more")
    with pytest.raises(VerifyError, match="which nothing has written"):
        device().launch("gpu0", launch("gemm", [(1, "copy[0]")]))
    with pytest.raises(VerifyError, match="never recorded"):
        device().wait("gpu0", Event("copy[0]"))
    with pytest.raises(VerifyError, match="ends at byte 40, the allocation has 32"):
        device().launch("gpu0", launch("gemm", writes=4))
    early = device()
    early.launch("h2d", launch("copy", writes=1))
    with pytest.raises(VerifyError, match="may not have ended, expected a wait"):
        early.launch("gpu0", launch("gemm", [(1, "copy[0]")]))
    reused = device()
    event = Event("copy[0]")
    reused.launch("h2d", launch("copy", writes=1))
    reused.record("h2d", event)
    reused.wait("gpu0", event)
    reused.launch("gpu0", launch("gemm", [(1, "copy[0]")], writes=2))
    with pytest.raises(VerifyError, match=r"which is read by gemm\[0\] on gpu0"):
        reused.launch("h2d", launch("next", writes=1))
    stale = device()
    stale.launch("gpu0", launch("other", writes=1))
    with pytest.raises(VerifyError, match=r"which holds other\[0\]: the buffer was reused"):
        stale.launch("gpu0", launch("gemm", [(1, "copy[0]")]))


# What is emitted, and where it can run.


def test_the_same_program_has_the_same_text_with_loops() -> None:
    program = program_of("module_batch")
    text = emit_gpu_executor(program, {"policy": "module_batch"})
    assert text == emit_gpu_executor(program, {"policy": "module_batch"})
    compile(text, "executor", "exec")
    assert "for layer in range(" in text and "# hbm: pool experts" in text
    assert any(isinstance(i, Layers) for items in program.engines.values() for i in items)
    assert 'e.wait(f"copy_experts{n}", layer)' in text
    assert len(text.splitlines()) < len(program.ops()) * 2


def test_plan_show_prints_the_executor_of_every_kind_of_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan("deepseek_v2", 0.6, "module_batch")
    assert made is not None
    path = save_beside(captured("deepseek_v2"), made, tmp_path)
    assert main(["plan", "show", "--program", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "step: prefill" in shown and "step: decode" in shown
    assert shown.count("def gpu0(e):") == 2
    assert main(["plan", "check", str(path)]) == 0
    assert "programs of prefill, decode have no hazard" in capsys.readouterr().out


def test_prompts_pass_one_group_of_layers_in_layered_prefill() -> None:
    knobs = {**GPU_POLICIES["layered_prefill"].fixed, "seqs": 4, "layer_groups": 2}
    found = predictor_of("olmoe", 1.5, {**knobs, "prefill_tokens": 64})
    assert found is not None
    work = next(w for w in works(found[0]) if w.kind == "mixed")
    for group, layers in ((0, [0, 1]), (1, [2, 3])):
        program = lower_gpu(found[0], work, found[1], group)
        verify_gpu_program(program)
        run_on_fake(program)
        passed = [i for i in range(4) if any("prefill" in op.name for op in program.body(i))]
        assert passed == layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, so it is not refused")
def test_a_cuda_device_is_refused_without_a_gpu() -> None:
    with pytest.raises(ModelError, match=r"torch finds none here .* plan again for this machine"):
        CudaDevice(lambda launch, device: None)


def test_programs_are_made_and_checked_without_torch() -> None:
    code = (
        "import sys; import dovetail.ir.verify_gpu_program, dovetail.passes.gpu.lower, "
        "dovetail.codegen.gpu_executor; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
