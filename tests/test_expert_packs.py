"""Which experts run together."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import tune_cases as cases
from tests.plan_cases import MACHINE

from dovetail.ir.errors import VerifyError
from dovetail.ir.gemm_tiles import LADDERS, tiles
from dovetail.ir.moves import Pack
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.simulate import Simulator
from dovetail.runtime.expert_packs import packs


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.sampled_from([0, 16, 64, 256]),
    st.sampled_from([(), *LADDERS]),
)
def test_packs_hold_every_expert_with_rows_once(
    counts: list[int], most: int, sizes: tuple[int, ...]
) -> None:
    offsets = [0, *accumulate(counts)]
    found = packs(range(len(counts)), offsets, most, sizes)
    assert [expert for pack in found for expert in pack] == [i for i, n in enumerate(counts) if n]
    for pack in found:
        own = [tiles(counts[expert], sizes) if sizes else [counts[expert]] for expert in pack]
        if len(pack) > 1:
            assert sum(map(sum, own)) <= most and all(len(each) == 1 for each in own)
    for pack, after in pairwise(found):
        rows = [counts[expert] for expert in (*pack, after[0])]
        if not sizes and most:
            assert sum(rows) > most, "a pack is as large as it may be"


def test_packs_are_bounded_by_the_rows_of_a_product() -> None:
    moves = (*cases.untuned(), Pack("experts", 1 << 20))
    layout = apply_moves(cases.graph(), moves)
    assert layout.settings.pack == layout.expert_rows
    assert apply_moves(cases.graph(), cases.untuned()).settings.pack == 0


def test_pack_refuses_no_rows() -> None:
    with pytest.raises(VerifyError, match="rows"):
        apply_moves(cases.graph(), (*cases.untuned(), Pack("experts", 0)))


def test_packs_are_predicted_to_save_operators() -> None:
    apart, packed = (
        Simulator(apply_moves(cases.graph(), moves), MACHINE, Costs(MACHINE))
        .predict(cases.setting().workload)
        .seconds
        for moves in (cases.untuned(), (*cases.untuned(), Pack("experts", 256)))
    )
    assert packed < apart
