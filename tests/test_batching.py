"""The batcher: every sequence once, never beyond its limits, rows never shared."""

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
    tokens = dict.fromkeys(by_index, 0)
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
            for member, length in zip(group.members, group.lengths, strict=True):
                expected = by_index[member.index].length if group.prefill else 1
                assert length == expected and (member.held == 0) == group.prefill
                tokens[member.index] += 1
        stopped = [i for i in indices if data.draw(st.integers(0, 9)) == 0]
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
