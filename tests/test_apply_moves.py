"""Replaying moves: what they decide, and what they refuse."""

import pytest
from tests.ir_cases import captured, layout_of, schedule

from dovetail.ir.errors import VerifyError
from dovetail.ir.moves import (
    Accumulate,
    Dispatch,
    Fuse,
    Move,
    Overlap,
    Place,
    Prefetch,
    Split,
)
from dovetail.passes.apply_moves import apply_moves

MOE_LAYERS = (1, 2, 3)


def test_moves_decide_the_layout() -> None:
    layout = layout_of(
        captured("deepseek_v2"), embed=True, dense=(0, 2), experts=4, slots=3, workers=2
    )
    assert (layout.embed_resident, layout.head_resident) == (True, False)
    assert layout.dense_resident == (True, False, True, False)
    assert layout.experts_resident == (0, 4, 4, 4)
    assert [layout.chunks(layer) for layer in range(4)] == [0, 2, 2, 2]
    assert (layout.workers, layout.threads, layout.resident_first) == (2, 1, True)
    assert layout.prefetch["experts"] == Prefetch("experts", 3, 8 << 20)
    assert layout.fused["layer_1"][-2:] == (("experts_0",), ("other_0",))


def test_settings_stay_within_what_is_in_flight() -> None:
    settings = layout_of(captured("olmoe")).settings
    assert settings.admission.rows == 4
    assert settings.admission.kv_tokens == 256
    assert settings.step_tokens == 64 + 8
    assert settings.expert_rows == 64 + 8
    assert settings.head_rows == 8
    assert list(settings.chunk_experts(0, 1)) == [2, 3]


def test_later_places_replace_earlier_ones() -> None:
    graph = captured("deepseek_v2")
    moves = [
        *schedule(graph, experts=8, dense=(0, 1, 2, 3), head=True),
        Place("experts", "disk", (2,)),
        Place("experts", "ram", (3,), 2),
        Place("dense", "disk", (1,)),
        Place("head", "disk"),
    ]
    layout = apply_moves(graph, moves)
    assert layout.experts_resident == (0, 8, 0, 2)
    assert layout.dense_resident == (True, False, True, True)
    assert not layout.head_resident


def _without(kind: type[Move]) -> list[Move]:
    return [move for move in schedule(captured("deepseek_v2")) if not isinstance(move, kind)]


def _with(*moves: Move) -> list[Move]:
    return [*schedule(captured("deepseek_v2")), *moves]


def _without_prefetch(unit: str) -> list[Move]:
    moves = schedule(captured("deepseek_v2"))
    return [move for move in moves if not (isinstance(move, Prefetch) and move.unit == unit)]


REFUSED: dict[str, tuple[list[Move], str]] = {
    "no dispatch": (_without(Dispatch), "exactly one dispatch move, found 0"),
    "two dispatches": (
        _with(Dispatch(1, 1, 1, longest=1, refill=True)),
        "exactly one dispatch move, found 2",
    ),
    "nothing in flight": (
        [*_without(Dispatch), Dispatch(0, 1, 1, longest=1, refill=True)],
        "dispatch: seqs must be >= 1, found 0",
    ),
    "a role along a wrong axis": (
        _with(Split("attention", "experts", 2)),
        "split attention along experts: wrong axis; a role may be split as attention/seqs, "
        "attention/tokens, experts/experts",
    ),
    "a role that is not split": (
        _with(Split("norm", "tokens", 2)),
        "split norm along tokens: wrong axis",
    ),
    "pieces of nothing": (_with(Split("head", "seqs", 0)), "split: size must be >= 1, found 0"),
    "a split that does not divide": (
        _with(Split("experts", "experts", 3)),
        "split experts along experts by 3: layer 1 streams 8 experts, which 3 does not divide",
    ),
    "a split that does not divide the rest": (
        _with(Place("experts", "ram", MOE_LAYERS, 3)),
        "by 2: layer 1 streams 5 experts, which 2 does not divide",
    ),
    "a layer that is not there": (
        _with(Place("dense", "ram", (0, 4))),
        r"place dense: layer 4 is not in 0\.\.3",
    ),
    "experts of a layer that is not there": (
        _with(Place("experts", "ram", (-1,), 2)),
        r"place experts: layer -1 is not in 0\.\.3",
    ),
    "experts of a dense layer": (
        _with(Place("experts", "ram", (0,), 2)),
        "place experts: layer 0 has 0, found count 2",
    ),
    "more experts than there are": (
        _with(Place("experts", "ram", (1,), 9)),
        "place experts: layer 1 has 8, found count 9",
    ),
    "streamed experts without a buffer": (
        _without_prefetch("experts"),
        r"experts of layer 1 is on disk but no prefetch move gives it a buffer: place it in ram or "
        r"add prefetch\(experts, slots, block\)",
    ),
    "streamed layers without a buffer": (
        _without_prefetch("dense"),
        "dense of layer 0 is on disk but no prefetch move",
    ),
    "a streamed head without a buffer": (
        _without_prefetch("head"),
        "head is on disk but no prefetch move",
    ),
    "a prefetch without slots": (
        _with(Prefetch("dense", 0, 1)),
        "prefetch: slots must be >= 1, found 0",
    ),
    "no workers": (_with(Overlap(0, 1)), "overlap: workers must be >= 1, found 0"),
    "no readers": (_with(Overlap(1, 1, 0)), "overlap: readers must be >= 1, found 0"),
    "negative pieces": (
        [*_without(Dispatch), Dispatch(1, 1, 1, longest=1, refill=True, chunk_tokens=-1)],
        "dispatch: chunk_tokens must be >= 0, found -1; 0 leaves prompts whole",
    ),
    "groups without accumulation": (
        _without(Accumulate),
        r"experts are not accumulated over them: add accumulate\(experts, tokens\)",
    ),
    "accumulation of another role": (
        _with(Accumulate("attention", "seqs")),
        "accumulate attention along seqs: only experts gain from it",
    ),
    "a body that is not there": (
        _with(Fuse("layer_2", ("norm_0",))),
        "fuse: no body 'layer_2'; found prologue, layer_0, layer_1, epilogue",
    ),
    "tasks that do not follow each other": (
        _with(Fuse("layer_1", ("norm_0", "kv_0"))),
        "fuse in layer_1: .* are not consecutive tasks",
    ),
    "experts with others": (
        _with(Fuse("layer_1", ("experts_0", "other_0"))),
        "fuse in layer_1: experts run over all groups and stay on their own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_apply_moves_refuses(case: str) -> None:
    moves, text = REFUSED[case]
    with pytest.raises(VerifyError, match=text):
        apply_moves(captured("deepseek_v2"), moves)
