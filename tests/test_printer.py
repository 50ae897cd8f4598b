"""The printer's texts, and that they stay narrow and complete."""

from collections.abc import Callable

import pytest
from tests.ir_cases import captured, program_of, schedule

from dovetail.ir.machine import Curve, Machine
from dovetail.ir.moves import (
    Accumulate,
    Dispatch,
    Fuse,
    Move,
    Overlap,
    Place,
    Prefetch,
    Reorder,
    Split,
)
from dovetail.ir.notation import move_text, ranges, short_bytes
from dovetail.ir.plan import VERSION, Bound, Candidate, Plan, Prediction
from dovetail.ir.printer import WIDTH, print_graph, print_moves, print_plan, print_program
from dovetail.ir.workload import Workload
from dovetail.passes.op_cost import task_flops

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
KNOBS = {"seqs": 512, "rows": 32, "attn_tokens": 4096, "prefill_tokens": 16384, "chunk": 4,
         "slots": 3, "workers": 2, "embed": True}  # fmt: skip


def _plan(moves: tuple[Move, ...]) -> Plan:
    return Plan(
        version=VERSION,
        model={"model_type": "olmoe", "architecture": "OlmoeForCausalLM", "num_layers": 16},
        graph="0123456789abcdef",
        checkpoint="",
        machine=MACHINE,
        budget={"ram": 4 << 30},
        workload=Workload.of([120, 80, 80, 7], 64),
        policy="module_batch",
        knobs=KNOBS,
        moves=moves,
        prediction=Prediction(
            seconds=81.25,
            setup_seconds=1.5,
            steps=64,
            tokens=4096,
            disk_bytes=700 << 30,
            bytes={"resident": 3 << 30, "rings": 300 << 20, "kv": 200 << 20, "tokens": 0},
            classes={"run:layer_0_before": 30.5, "load:experts": 60.25, "wait:experts": 0.004},
        ),
        bound=Bound(65.0, "disk", {"cpu": 20.0, "disk": 65.0}),
        candidates=(
            Candidate("eager", {}, None, "none of its 6 schedules fits 4.00 GiB of ram"),
            Candidate("model_batch", {"seqs": 64, "chunk": 8, "slots": 3}, 410.0),
            Candidate("module_batch", KNOBS, 81.25),
        ),
    )


def _narrow(text: str) -> str:
    assert all(len(line) <= WIDTH and line == line.rstrip() for line in text.split("\n"))
    return text + "\n"


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_graph(family: str, golden: Callable[[str], None]) -> None:
    golden(_narrow(print_graph(captured(family), task_flops)))


def test_graph_without_flops_has_no_column_for_them() -> None:
    text = print_graph(captured("olmoe"))
    assert "FLOPs" not in text
    assert "layer_0 x 4 (layers 0-3): hidden [seqs, q_len, 64]" in _narrow(text)


def test_plan(golden: Callable[[str], None]) -> None:
    moves = tuple(schedule(captured("olmoe"), embed=True, experts=4, dense=(0, 1, 2, 3)))
    plan = _plan(moves)
    text = print_plan(plan)
    assert text.startswith(f"plan      {plan.digest()[:12]}\n")
    # The digest is over every field of every record: any new one would change it.
    golden(_narrow(text.replace(plan.digest()[:12], "<digest>")))


def test_program_without_streams_says_so() -> None:
    program = program_of(
        captured("olmoe"), embed=True, dense=(0, 1, 2, 3), experts=8, head=True, workers=1
    )
    text = _narrow(print_program(program))
    assert "rings: none, nothing is streamed" in text
    assert "resident: embed; dense of layers 0-3; 8 experts of layers 0-3; head" in text
    assert text.startswith("cpu0:\n  run(prologue, ram)\n  for layer in 0..3:\n")


def test_moves_print_a_line_each() -> None:
    moves: list[Move] = [Place("embed", "ram"), Reorder("experts", "resident_first")]
    assert print_moves(moves) == "place(embed, ram)\nreorder(experts, resident_first)"
    assert print_moves([]) == ""


@pytest.mark.parametrize(
    ("move", "text"),
    [
        (
            Dispatch(seqs=8, kv_tokens=512, prefill_tokens=64, longest=32, refill=True),
            "dispatch(seqs=8, kv_tokens=512, prefill_tokens=64, longest=32, refill)",
        ),
        (
            Dispatch(seqs=8, kv_tokens=512, prefill_tokens=64, longest=32, refill=False),
            "dispatch(seqs=8, kv_tokens=512, prefill_tokens=64, longest=32, no refill)",
        ),
        (
            Dispatch(8, 512, 64, 32, refill=True, chunk_tokens=16),
            "dispatch(seqs=8, kv_tokens=512, prefill_tokens=64, longest=32, refill, "
            "chunk_tokens=16)",
        ),
        (Place("head", "disk"), "place(head, disk)"),
        (Place("dense", "ram", (0, 1, 2, 5)), "place(dense, ram, layers=[0-2, 5])"),
        (
            Place("experts", "ram", tuple(range(16)), 7),
            "place(experts, ram, layers=0-15, count=7)",
        ),
        (Split("attention", "seqs", 8), "split(attention, seqs, size=8)"),
        (Accumulate("experts", "tokens"), "accumulate(experts, tokens)"),
        (Prefetch("experts", 3, 8 << 20), "prefetch(experts, slots=3, block=8MiB)"),
        (Overlap(2, 1), "overlap(workers=2, threads=1)"),
        (Overlap(2, 1, 3), "overlap(workers=2, threads=1, readers=3)"),
        (Fuse("layer_0", ("norm_0", "attention_0", "kv_0")), "fuse(layer_0, norm_0..kv_0)"),
        (Fuse("layer_0", ("norm_0",)), "fuse(layer_0, norm_0)"),
    ],
)
def test_move_text(move: Move, text: str) -> None:
    assert move_text(move) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((3,), "3"),
        ((0, 1), "0-1"),
        ((0, 1, 2, 3), "0-3"),
        ((0, 2, 4, 6), "0-6 by 2"),
        ((1, 4), "[1, 4]"),
        ((0, 3, 4, 5, 9), "[0, 3-5, 9]"),
        ((0, 1, 2, 4, 6, 8), "[0-2, 4-8 by 2]"),
        ((), "none"),
    ],
)
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(8 << 20, "8MiB"), (1536, "1.50KiB"), ((8 << 20) + 1, "8388609"), (0, "0B")],
)
def test_short_bytes_are_exact(size: int, text: str) -> None:
    assert short_bytes(size) == text
