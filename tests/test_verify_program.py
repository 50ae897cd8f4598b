"""Programs: those of every policy and placement are legal, and every rule refuses its breach."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.ir_cases import captured, edited, program_of

from dovetail.ir.errors import VerifyError
from dovetail.ir.machine import Curve, Machine
from dovetail.ir.program import (
    Free,
    Instruction,
    Load,
    Program,
    Run,
    Signal,
    Wait,
)
from dovetail.ir.verify import verify_program
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.lower import lower
from dovetail.passes.memory import ram_bytes
from dovetail.passes.policies import POLICIES
from dovetail.passes.policies.common import Setting

RATE = Curve((1.0, 1024.0), (1e10, 1e11))
MACHINE = Machine(
    name="of no one",
    tiers={"ram": 1 << 34},
    workers=2,
    gemm={"float32": RATE},
    attention={"float32": RATE},
    kv_bandwidth={"float32": RATE},
    memory_bandwidth=1e10,
    op_seconds=3e-6,
    disk=Curve((4096.0, 8e6), (1e8, 1.4e9)),
    slowdown={},
)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_programs_of_policies_are_legal(policy: str, family: str) -> None:
    graph = captured(family)
    workload = Workload.of([5, 17, 9, 30, 3, 22, 8, 8, 8, 1, 12], 12)
    verified = 0
    for share in (2, 8, 100):
        budget = share * graph.weight_bytes
        setting = Setting(graph, MACHINE, budget, workload)
        for knobs in POLICIES[policy].starts(setting):
            moves = POLICIES[policy].moves(setting, knobs)
            layout = apply_moves(graph, moves) if moves is not None else None
            if layout is not None and sum(ram_bytes(layout).values()) <= budget:
                verify_program(lower(layout, {"ram": budget}), graph)
                verified += 1
    assert verified >= 4


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("experts", [0, 2, 8])
def test_programs_of_placements_are_legal(workers: int, experts: int) -> None:
    graph = captured("deepseek_v2")
    for dense in ((), (0, 2), (0, 1, 2, 3)):
        program = program_of(graph, workers=workers, experts=experts, dense=dense)
        verify_program(program, graph)
        verify_program(replace(program, capacity={"ram": 1 << 30}), graph, steps=3)


@pytest.mark.parametrize("readers", [2, 3, 4, 7])
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_loads_may_be_dealt_to_several_readers(family: str, slots: int, readers: int) -> None:
    graph = captured(family)
    for experts, chunk in ((0, 1), (2, 3), (4, 4)):
        program = program_of(graph, slots=slots, readers=readers, experts=experts, chunk=chunk)
        verify_program(program, graph, steps=3)


Edit = Callable[[list[Instruction]], None]


def _drop(item: Instruction, nth: int = 0) -> Edit:
    def edit(items: list[Instruction]) -> None:
        del items[[i for i, found in enumerate(items) if found == item][nth]]

    return edit


def _of_experts(item: Instruction) -> bool:
    match item:
        case Load("experts") | Wait(_, "experts") | Signal(_, "experts"):
            return True
    return False


def _drop_all(which: Callable[[Instruction], bool]) -> Edit:
    def edit(items: list[Instruction]) -> None:
        items[:] = [item for item in items if not which(item)]

    return edit


def _move(item: Instruction, before: Instruction) -> Edit:
    def edit(items: list[Instruction]) -> None:
        items.remove(item)
        items.insert(items.index(before), item)

    return edit


def _put(item: Instruction, before: Instruction) -> Edit:
    def edit(items: list[Instruction]) -> None:
        items.insert(items.index(before), item)

    return edit


def _swap(first: Instruction, second: Instruction) -> Edit:
    def edit(items: list[Instruction]) -> None:
        a, b = items.index(first), items.index(second)
        items[a], items[b] = items[b], items[a]

    return edit


def _swap_after(item: Instruction) -> Edit:
    def edit(items: list[Instruction]) -> None:
        at = items.index(item)
        items[at], items[at + 1] = items[at + 1], items[at]

    return edit


def _replace(old: Instruction, new: Instruction) -> Edit:
    def edit(items: list[Instruction]) -> None:
        items[items.index(old)] = new

    return edit


BEFORE, AFTER, EXPERTS = "layer_1_before", "layer_1_other_0", "layer_1_experts_0"
RUN_0, RUN_1 = Run("layer_0", 0, "dense", -1), Run(BEFORE, 1, "dense", -1)
RUN_AFTER = Run(AFTER, 1, "dense", -1)
CHUNK_0, CHUNK_1 = Run(EXPERTS, 1, "experts", 0), Run(EXPERTS, 1, "experts", 1)
HEAD, EMBED = Run("epilogue", -1, "head", -1), Run("prologue", -1, "disk rows", -1)
READY = {name: Wait("ready", name) for name in ("dense", "experts", "head")}
ROOM = {name: Wait("room", name) for name in ("dense", "experts", "head")}
LOADED = {name: Signal("ready", name) for name in ("dense", "experts", "head")}
SIGNAL = {name: Signal("phase", name) for name in ("tokens", "experts", "hidden", "step")}
MET = {name: Wait("phase", name) for name in ("tokens", "experts", "hidden")}

# The program that these edit streams everything, in chunks of two of eight experts, on two workers.
BAD_LISTS: dict[str, tuple[str, Edit, str]] = {
    "dense read without a wait": (
        "cpu0",
        _drop(READY["dense"]),
        r"cpu0 at run\(layer_0\[0\], dense\[0\]\) \(step 0, instruction 1\): reads dense\[0\] but "
        r"holds no load of ring dense: expected wait\(ready, dense\)",
    ),
    "experts read without a wait": (
        "cpu1",
        _drop(READY["experts"]),
        r"cpu1 at run\(layer_1_experts_0\[1\], experts\[1, 0\]\) .*holds no load of ring experts",
    ),
    "load without room": (
        "disk",
        _drop(ROOM["dense"], 2),
        r"disk0 at load\(dense\[2\]\) .*no room was waited for: the 2 buffers of ring dense may "
        r"still hold .*dense\[1\]; expected wait\(room, dense\)",
    ),
    "signal of a load that is not made": (
        "disk",
        _drop(Load("dense", 1, 0)),
        r"disk0 at signal\(ready, dense\) .*nothing was loaded since the last signal",
    ),
    "room for the next load before the signal of this one": (
        "disk",
        _swap_after(LOADED["dense"]),
        r"disk0 at wait\(room, .*dense\[0\] is loaded and not signalled",
    ),
    "load that is never signalled": (
        "disk",
        _drop(LOADED["dense"]),
        r"disk0 at wait\(room, dense\) .*dense\[0\] is loaded and not signalled",
    ),
    "load before the one before is freed": (
        "cpu0",
        _drop(Free("dense", 0)),
        r"cpu0 at wait\(ready, dense\) .*dense\[0\] is still held, expected its free",
    ),
    "free before the use": (
        "cpu1",
        _move(Free("dense", 0), before=RUN_0),
        r"cpu1 at run\(layer_0\[0\], dense\[0\]\) .*reads dense\[0\] but holds no load",
    ),
    "free of what was not waited for": (
        "cpu0",
        _put(Free("head", 0), before=RUN_0),
        r"cpu0 at free\(head\) .*nothing is held, expected to free what was waited for",
    ),
    "free of another unit": (
        "cpu0",
        _replace(Free("dense", 1), Free("dense", 2)),
        r"cpu0 at free\(dense\[2\]\) .*dense\[1\] is held",
    ),
    "loads of a ring in another order": (
        "disk",
        _swap(Load("dense", 1), Load("dense", 2)),
        r"run\(layer_1_before\[1\], dense\[1\]\) .*reads dense\[1\] but holds dense\[2\]",
    ),
    "chunks in another order": (
        "cpu",
        _swap(CHUNK_0, CHUNK_1),
        r"cpu1 at .*reads experts\[1, 1\] but holds experts\[1, 0\]",
    ),
    "experts loaded ahead of what is needed first": (
        "disk",
        lambda items: items.sort(
            key=lambda i: "experts" not in (getattr(i, "ring", ""), getattr(i, "name", ""))
        ),
        r"engines wait for each other in a cycle: cpu0 at wait\(ready, dense\) \(step 0, "
        r"instruction 1\) waits for disk0; disk0 at wait\(room, experts\) \(step 0, instruction "
        r"6\) waits for cpu0, cpu1\. Expected loads in the order",
    ),
    "workers that wait before they signal": (
        "cpu",
        _swap(SIGNAL["hidden"], MET["hidden"]),
        r"in a cycle: cpu0 at wait\(phase, hidden\) .* waits for cpu0, cpu1",
    ),
    "experts that no one loads": (
        "disk",
        _drop_all(_of_experts),
        r"cpu0 at wait\(ready, experts\) .*: waits forever, expected a disk engine to end the wait",
    ),
    "load that no one takes": (
        "disk",
        lambda items: items.extend([ROOM["head"], Load("head", 0), LOADED["head"]]),
        "ring head: 2 loads in a step, but cpu0 waits for 1; expected as many waits as loads",
    ),
    "phase that one worker leaves out": (
        "cpu1",
        _drop(SIGNAL["tokens"]),
        "cpu1 signals phase tokens 2 times a step and waits for it 3 times, expected 3 and 3",
    ),
    "phase that one worker does not wait for": (
        "cpu0",
        _drop(MET["experts"]),
        "cpu0 signals phase experts 3 times a step and waits for it 2 times, expected 3 and 3",
    ),
    "wait for the end of the step": (
        "cpu0",
        lambda items: items.append(Wait("phase", "step")),
        "cpu0 signals phase step 1 times a step and waits for it 1 times, expected 1 and 0",
    ),
    "unknown phase": (
        "cpu0",
        _put(Signal("phase", "lunch"), before=HEAD),
        r"cpu0: signal\(phase, lunch\): unknown phase lunch, expected one of experts, hidden",
    ),
    "experts before all tokens are there": (
        "cpu0",
        _move(MET["tokens"], before=Free("experts", 1, 0)),
        r"cpu0 at run\(layer_1_experts_0\[1\].*reads x of all workers, and nothing orders it after "
        r"layer_1_before\[1\] of cpu0: expected wait\(phase, tokens\) between",
    ),
    "tokens announced before they are made": (
        "cpu1",
        _move(SIGNAL["tokens"], before=RUN_1),
        r"cpu0 at .*reads x of all workers, and nothing orders it after layer_1_before\[1\] of "
        r"cpu1: .* signalled by cpu1 after it",
    ),
    "experts' output before all of them have run": (
        "cpu0",
        _swap(MET["experts"], RUN_AFTER),
        r"cpu0 at run\(layer_1_other_0\[1\].*reads expert_out of all workers",
    ),
    "experts announced before they have run": (
        "cpu1",
        _move(SIGNAL["experts"], before=CHUNK_1),
        r"cpu0 at .*reads expert_out of all workers, and cpu1 need not have run expert 4 yet",
    ),
    "last experts announced before they have run": (
        "cpu1",
        _move(SIGNAL["experts"], before=Run(EXPERTS, 1, "experts", 3)),
        r"reads expert_out of all workers, and nothing orders it after layer_1_experts_0\[1\] of "
        "cpu1",
    ),
    "head before all hidden states are there": (
        "cpu0",
        _swap(MET["hidden"], HEAD),
        r"cpu0 at run\(epilogue, head\) .*reads head but holds no load|reads hidden_out of all",
    ),
    "value read before it is made": (
        "cpu0",
        _move(EMBED, before=Free("dense", 0)),
        r"cpu0 at run\(layer_0\[0\].*reads hidden before prologue made it",
    ),
    "segment that runs twice": (
        "cpu0",
        _put(RUN_0, before=RUN_0),
        "cpu0 at .*instruction 3.: layer_0 has run in this step already, expected it once",
    ),
    "experts that run twice": (
        "cpu0",
        _put(CHUNK_0, before=CHUNK_0),
        "cpu0 at .*: expert 0 has run in this step already",
    ),
    "expert that does not run": (
        "cpu1",
        _drop(CHUNK_1),
        r"reads expert_out of all workers, and cpu1 need not have run expert 2 yet: expected all",
    ),
    "head that does not run": (
        "cpu1",
        _drop(HEAD),
        r"cpu1 at signal\(phase, step\) .*epilogue was not run in this step",
    ),
    "head after the end of the step": (
        "cpu0",
        _move(SIGNAL["step"], before=READY["head"]),
        r"cpu0 at signal\(phase, step\) .*epilogue was not run in this step",
    ),
    "run after the end of the step": (
        "cpu0",
        lambda items: items.append(EMBED),
        r"cpu0 at run\(prologue, disk rows\) .*the end of the step is signalled already",
    ),
    "segment of another layer": (
        "cpu0",
        _replace(RUN_0, Run("layer_0", 1, "dense", -1)),
        "cpu0 at .*a segment of layer_0, but layer 1 runs layer_1",
    ),
    "segment of no layer": (
        "cpu0",
        _replace(RUN_0, Run("layer_0", 4, "dense", -1)),
        r"layer 4 of layer_0, expected a layer of 0\.\.3",
    ),
    "head of a layer": (
        "cpu0",
        _replace(HEAD, Run("epilogue", 3, "head", -1)),
        "layer 3 of epilogue, expected layer -1",
    ),
    "unknown segment": (
        "cpu0",
        _replace(HEAD, Run("tail", -1, "head", -1)),
        r"cpu0: run\(tail, head\): unknown segment tail, expected one of epilogue, layer_0",
    ),
    "unknown unit": (
        "cpu0",
        _replace(RUN_0, Run("layer_0", 0, "dens", -1)),
        "unknown unit dens, expected one of dense, disk rows, experts, head, ram",
    ),
    "unknown ring": (
        "disk",
        _replace(ROOM["head"], Wait("room", "heads")),
        r"disk0: wait\(room, heads\): unknown ring heads, expected one of dense, experts, head",
    ),
    "load of a layer that is not there": (
        "disk",
        _replace(Load("dense", 3), Load("dense", 4)),
        r"disk0: load\(dense\[4\]\): unknown unit, expected a layer of 0\.\.3",
    ),
    "load of a chunk that is not there": (
        "disk",
        _replace(Load("experts", 3, 3), Load("experts", 3, 4)),
        r"disk0: load\(experts\[3, 4\]\): unknown unit, layer 3 streams 4 chunks of experts",
    ),
    "unit that is not in ram": (
        "cpu0",
        _replace(RUN_0, Run("layer_0", 0, "ram", -1)),
        r"reads dense\[0\] in ram, expected it among the resident units",
    ),
    "experts that are not in ram": (
        "cpu0",
        _put(Run(EXPERTS, 1, "ram", -1), before=READY["experts"]),
        r"reads experts\[1, resident\] in ram, expected it among the resident units",
    ),
    "streamed chunk from ram": (
        "cpu0",
        _replace(CHUNK_0, Run(EXPERTS, 1, "ram", 0)),
        "streamed chunk 0 read from ram, expected experts",
    ),
    "weights from nowhere": (
        "cpu0",
        _replace(EMBED, Run("prologue", -1, "", -1)),
        "reads embed from nowhere, expected ram or ring embed",
    ),
    "layer read by rows": (
        "cpu0",
        _replace(RUN_0, Run("layer_0", 0, "disk rows", -1)),
        "reads dense from disk rows, expected ram or ring dense",
    ),
    "layer read from another ring": (
        "cpu0",
        _replace(RUN_0, Run("layer_0", 0, "head", -1)),
        r"reads dense\[0\] but holds no load of ring head",
    ),
    "load on a compute engine": (
        "cpu0",
        _put(Load("head", 0), before=HEAD),
        r"cpu0: load\(head\), expected on a disk engine",
    ),
    "run on a disk engine": (
        "disk",
        _put(HEAD, before=Load("head", 0)),
        r"disk0: run\(epilogue, head\), expected on a compute engine",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_verify_program_refuses_lists_with(case: str) -> None:
    engine, edit, text = BAD_LISTS[case]
    graph = captured("deepseek_v2")
    program = edited(program_of(graph), engine, edit)
    with pytest.raises(VerifyError, match=text):
        verify_program(program, graph)


DEALT: dict[str, tuple[str, Edit, str]] = {
    "a load in another reader's turn": (
        "disk1",
        _replace(Load("experts", 1, 1), Load("experts", 1, 0)),
        "ring experts is loaded by disk0 and disk1, expected one engine, or every load of a step",
    ),
    "a reader's loads in another order": (
        "disk1",
        _swap(Load("experts", 1, 1), Load("experts", 1, 3)),
        "ring experts is loaded by disk0 and disk1, .* in the order in which the workers take",
    ),
    "the signal of another reader's load": (
        "disk1",
        _put(LOADED["head"], before=Load("dense", 1)),
        r"disk1 at signal\(ready, head\) .*nothing was loaded since the last signal",
    ),
    "a load without room of its own": (
        "disk1",
        _drop(ROOM["dense"], 1),
        r"disk1 at load\(dense\[3\]\) .*no room was waited for",
    ),
}


@pytest.mark.parametrize("case", DEALT)
def test_verify_program_refuses_readers_with(case: str) -> None:
    engine, edit, text = DEALT[case]
    graph = captured("deepseek_v2")
    program = edited(program_of(graph, readers=2), engine, edit)
    with pytest.raises(VerifyError, match=text):
        verify_program(program, graph)


def _ring(program: Program, at: str, /, **changes: object) -> Program:
    rings = [
        replace(ring, **changes) if ring.name == at else ring  # type: ignore[arg-type]
        for ring in program.rings
    ]
    return replace(program, rings=tuple(rings))


def _segment(program: Program, at: str, /, **changes: object) -> Program:
    segments = [
        replace(s, **changes) if s.name == at else s  # type: ignore[arg-type]
        for s in program.segments
    ]
    return replace(program, segments=tuple(segments))


def _settings(program: Program, **changes: object) -> Program:
    return replace(program, settings=replace(program.settings, **changes))  # type: ignore[arg-type]


BAD_PARTS: dict[str, tuple[Callable[[Program], Program], str]] = {
    "no buffers": (
        lambda p: _ring(p, "dense", slots=0),
        "ring dense: slots 0, expected at least 1",
    ),
    "buffers that are too small": (
        lambda p: _ring(p, "experts", slot_bytes=4096),
        r"disk0: load\(experts\[\d, \d\]\): the unit takes \d+ bytes, expected at most the 4096 of",
    ),
    "buffers taken from a reader": (
        lambda p: _ring(p, "dense", consumers=1),
        r"disk0 at load\(dense\[1\]\) \(step 1, .*: the buffer still holds dense\[3\], which cpu0 "
        "may be reading: ring dense gives room after 1 frees, expected 2, one of each worker",
    ),
    "frees that never come": (
        lambda p: _ring(p, "dense", consumers=3),
        "ring dense: room after 3 frees of a load, expected at most the 2 of the workers",
    ),
    "ring of no unit": (
        lambda p: _ring(p, "dense", name="sparse"),
        "ring sparse streams no unit, expected a ring named dense or experts or head",
    ),
    "ring twice": (
        lambda p: replace(p, rings=(*p.rings, p.rings[0])),
        "ring dense occurs twice",
    ),
    "more than the capacity": (
        lambda p: replace(p, capacity={"ram": 1 << 20}),
        r"the program takes \d+ bytes of ram \(ring dense .*\), expected at most the 1048576 of "
        "its capacity: give rings fewer slots",
    ),
    "resident units that nothing is reserved for": (
        lambda p: replace(p, resident=(("head", -1, 0),)),
        "the resident units take 86016 bytes, expected at most the 0 reserved for them",
    ),
    "unknown resident unit": (
        lambda p: replace(p, resident=(("tail", -1, 0),)),
        "resident: unknown unit tail, expected embed, dense, experts, head",
    ),
    "resident unit of no layer": (
        lambda p: replace(p, resident=(("dense", 4, 0),)),
        r"resident: dense of layer 4, expected layer 0\.\.3",
    ),
    "resident experts beside the settings": (
        lambda p: replace(p, resident=(("experts", 1, 3),)),
        "resident: 3 experts of layer 1, expected the 0 of the settings",
    ),
    "chunk that does not divide": (
        lambda p: _settings(p, chunk=3),
        "settings: 0 resident experts of layer 1 leave 8 to stream, expected 0 or a multiple of "
        "the chunk of 3",
    ),
    "settings of other layers": (
        lambda p: _settings(p, experts_resident=(0, 0)),
        "settings: resident experts of 2 layers in chunks of 2, expected all 4 layers",
    ),
    "segment of no body": (
        lambda p: _segment(p, BEFORE, body="layer_2"),
        "segment layer_1_before: body layer_2, expected one of prologue, layer_0",
    ),
    "segment of unknown tasks": (
        lambda p: _segment(p, AFTER, tasks=("other_1",)),
        "segment layer_1_other_0: task other_1, expected tasks of layer_1: norm_0",
    ),
    "task in no segment": (
        lambda p: replace(p, segments=tuple(s for s in p.segments if s.name != AFTER)),
        "segments of layer_1 hold the tasks .*; expected each task of the body once, in its order",
    ),
    "experts over groups": (
        lambda p: _segment(p, EXPERTS, over="groups"),
        "segment layer_1_experts_0 runs over groups, expected over experts",
    ),
    "segment that says it reads something else": (
        lambda p: _segment(p, AFTER, reads=("expert_out",)),
        "segment layer_1_other_0 reads expert_out, expected add_3, down_proj, expert_out from its",
    ),
    "segment that hides what it writes": (
        lambda p: _segment(p, BEFORE, writes=("x",)),
        "segment layer_1_before writes x, expected add_3, down_proj, expert_idx, expert_w, x",
    ),
    "engine of no kind": (
        lambda p: replace(p, engines={**p.engines, "tape0": ()}),
        "engine tape0, expected cpu0, cpu1, … or disk0, disk1",
    ),
    "no workers": (
        lambda p: replace(p, engines={"disk0": p.engines["disk0"]}),
        "the program has no compute engine, expected at least cpu0",
    ),
    "two loaders of the same loads": (
        lambda p: replace(p, engines={**p.engines, "disk1": p.engines["disk0"]}),
        "ring dense is loaded by disk0 and disk1, expected one engine, or every load of a step by "
        "one of them, in the order in which the workers take them",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_verify_program_refuses(case: str) -> None:
    change, text = BAD_PARTS[case]
    graph = captured("deepseek_v2")
    with pytest.raises(VerifyError, match=text):
        verify_program(change(program_of(graph)), graph)
