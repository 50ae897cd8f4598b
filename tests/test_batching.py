"""The batcher: every sequence once, never beyond its limits, rows never shared."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dovetail.ir.batching import (
    Admission,
    Batcher,
    Request,
    Step,
    expert_shares,
    group_shares,
    row_tokens,
)

requests = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=30)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Request], Admission]:
    made = [Request(i, n, new) for i, (n, new) in enumerate(draw(requests))]
    longest = max(row_tokens(r.length, r.new_tokens) for r in made)
    admission = Admission(
        seqs=draw(st.integers(1, 12)),
        kv_tokens=draw(st.integers(longest, 6 * longest)),
        rows=draw(st.integers(1, 6)),
        attn_tokens=draw(st.integers(1, 120)),
        prefill_tokens=draw(st.integers(1, 200)),
        refill=draw(st.booleans()),
        chunk_tokens=draw(st.sampled_from([0, 0, 1, 5, 16])),
    )
    return made, admission


def check_rows(step: Step, by_index: dict[int, Request], kv_tokens: int) -> None:
    """Rows of sequences in flight lie in the store and do not overlap."""
    ends = 0
    members = sorted((m for g in step.groups for m in g.members), key=lambda m: m.offset)
    for member in members:
        request = by_index[member.index]
        assert member.offset >= ends
        ends = member.offset + row_tokens(request.length, request.new_tokens)
        assert member.held < ends - member.offset or request.new_tokens == 1
    assert ends <= kv_tokens


@given(cases(), st.data())
def test_every_sequence_runs_to_its_end_once(
    case: tuple[list[Request], Admission], data: st.DataObject
) -> None:
    made, admission = case
    by_index = {r.index: r for r in made}
    batcher = Batcher(made, admission)
    tokens, held = dict.fromkeys(by_index, 0), dict.fromkeys(by_index, 0)
    left: list[int] = []
    while (step := batcher.next_step()) is not None:
        indices = [m.index for g in step.groups for m in g.members]
        assert len(indices) == len(set(indices)) <= admission.seqs
        assert not set(indices) & set(left)
        check_rows(step, by_index, admission.kv_tokens)
        for group in step.groups:
            assert len(group.members) <= admission.rows
            assert group.q_len == max(group.lengths)
            if group.prefill and len(group.members) > 1:
                assert group.tokens <= admission.attn_tokens
            for row, (member, length) in enumerate(zip(group.members, group.lengths, strict=True)):
                rest = by_index[member.index].length - held[member.index]
                assert length == (admission.piece(rest) if group.prefill else 1)
                assert member.held == held[member.index] and (rest > 0) == group.prefill
                assert (row in group.unfinished) == (rest > length)
                held[member.index] += length
        for index in step.receivers:
            tokens[index] += 1
        stopped = [i for i in step.receivers if data.draw(st.integers(0, 9)) == 0]
        gone = batcher.advance(step, stopped)
        assert set(stopped) <= set(gone)
        left += gone
    assert sorted(left) == sorted(by_index)
    assert all(1 <= tokens[i] <= by_index[i].new_tokens for i in by_index)


@given(cases())
def test_without_early_stops_every_token_is_generated(
    case: tuple[list[Request], Admission],
) -> None:
    made, admission = case
    batcher = Batcher(made, admission)
    total = 0
    while (step := batcher.next_step()) is not None:
        total += step.seqs
        batcher.advance(step)
    assert total == sum(r.new_tokens for r in made)


@given(cases())
def test_prompt_tokens_of_a_step_are_bounded(case: tuple[list[Request], Admission]) -> None:
    made, admission = case
    batcher = Batcher(made, admission)
    while (step := batcher.next_step()) is not None:
        pieces = [n for g in step.groups if g.prefill for n in g.lengths]
        assert max(pieces, default=0) <= (admission.chunk_tokens or 40)
        assert len(pieces) <= 1 or sum(pieces) <= admission.prefill_tokens
        batcher.advance(step)


@given(cases())
def test_prompts_in_one_piece_are_whole_prompts(case: tuple[list[Request], Admission]) -> None:
    made, admission = case
    longest = max(request.length for request in made)
    whole, one = (_steps(made, replace(admission, chunk_tokens=tokens)) for tokens in (0, longest))
    assert whole == one


def _steps(made: list[Request], admission: Admission) -> list[Step]:
    batcher, steps = Batcher(made, admission), []
    while (step := batcher.next_step()) is not None:
        steps.append(step)
        batcher.advance(step)
    return steps


def test_pieces_of_a_prompt_run_beside_decode() -> None:
    made = [Request(0, 20, 4), Request(1, 19, 4), Request(2, 2, 4)]
    admission = Admission(3, 100, 4, 8, 8, refill=True, chunk_tokens=8)
    steps = _steps(made, admission)
    lengths = [[(g.prefill, g.members[0].index, g.lengths[0]) for g in s.groups] for s in steps]
    assert lengths[:3] == [[(True, 0, 8)], [(True, 0, 8)], [(True, 0, 4)]]
    assert [step.receivers for step in steps[:4]] == [(), (), (0,), (0,)]
    assert lengths[3] == [(False, 0, 1), (True, 1, 8)]
    # The rows of a cohort are neighbours, though its prompts began one after the other.
    offsets = {m.index: m.offset for s in steps for g in s.groups for m in g.members}
    assert [offsets[i] for i in range(3)] == [0, 23, 46]


@given(cases(), st.integers(1, 4))
def test_groups_are_shared_out_completely(
    case: tuple[list[Request], Admission], workers: int
) -> None:
    made, admission = case
    step = Batcher(made, admission).next_step()
    assert step is not None
    shares = group_shares(step, workers)
    assert sorted(i for share in shares for i in share) == list(range(len(step.groups)))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=64), st.integers(1, 4))
def test_experts_with_tokens_have_one_worker_each(counts: list[int], workers: int) -> None:
    owner = expert_shares(counts, range(len(counts)), workers)
    assert all((o == -1) == (n == 0) for o, n in zip(owner, counts, strict=True))
    load = [sum(n for n, o in zip(counts, owner, strict=True) if o == w) for w in range(workers)]
    assert max(load) - min(load) <= max(counts)
