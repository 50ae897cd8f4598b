"""Which sequences take part in which step: admission, refill and leaving, as a state machine.

The simulator and the runtime drive the same ``Batcher``, so the planner's steps are the executor's
steps whenever no sequence stops early. Longest prompts go first: a row that becomes free then fits
every prompt still waiting. A prompt may go through the model in pieces, one a step, beside the
sequences that decode (chunked prefill, Sarathi-Serve, arXiv 2403.02310), or through one group of
layers a step (layered prefill, arXiv 2510.08055): then no other prompt is admitted until it is
through, and where nothing decodes, and so nothing waits, it takes all layers at once.

A **cohort** is a block of ``rows`` rows of the KV store with one capacity, laid out back to back,
so that the rows of a decode group can be read as one strided view. A **group** is what one
attention task runs over: sequences of one cohort, all in prefill or all in decode.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from dovetail.ir.token_space import TokenSpace


@dataclass(frozen=True, slots=True)
class Admission:
    """How sequences enter. ``seqs`` bounds those in flight, ``kv_tokens`` the KV store, ``rows``
    the sequences of a group, ``attn_tokens`` the padded tokens of a prefill group and
    ``prefill_tokens`` those of a step (a single sequence may exceed both). Without ``refill`` a
    wave is finished before the next one starts. ``chunk_tokens`` bounds the piece of a prompt that
    one step takes (0: the whole prompt). ``cuts`` are the layers at which layered prefill cuts the
    model, from 0 to the number of layers (empty: it does not). No row of the KV store crosses
    ``wall``, the token at which it goes on in another tier (0: it is all in one)."""

    seqs: int
    kv_tokens: int
    rows: int
    attn_tokens: int
    prefill_tokens: int
    refill: bool = True
    chunk_tokens: int = 0
    cuts: tuple[int, ...] = ()
    wall: int = 0

    def piece(self, tokens: int) -> int:
        """How many of the ``tokens`` that are left of a prompt its next step takes."""
        return min(tokens, self.chunk_tokens or tokens)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt: its place in the input, its length in tokens and how many may be generated."""

    index: int
    length: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Member:
    """A sequence in a group: where its row of the KV store starts (in tokens) and how many tokens
    the row holds before this step."""

    index: int
    offset: int
    held: int


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that one attention task runs over.

    In prefill row i has ``lengths[i]`` new tokens, padded on the right to ``q_len``, and holds the
    pieces of its prompt that went before; in decode every row has one new token. ``stride`` is the
    distance of neighbouring rows. Rows in ``unfinished`` get no token: more of their prompt follows
    in a later step. ``layers`` are the first layer that the group takes and that at which it stops
    (None: all, from the embedding to the head).
    """

    prefill: bool
    members: tuple[Member, ...]
    lengths: tuple[int, ...]
    q_len: int
    stride: int
    unfinished: tuple[int, ...] = ()
    layers: tuple[int, int] | None = None

    def takes(self, layer: int) -> bool:
        """Whether the group goes through ``layer`` in this step; -1 is the embedding."""
        if self.layers is None:
            return True
        first, stop = self.layers
        return first == 0 if layer < 0 else first <= layer < stop

    @property
    def receivers(self) -> tuple[int, ...]:
        """The rows that get a token in this step."""
        return tuple(row for row in range(len(self.members)) if row not in self.unfinished)

    @property
    def past(self) -> int:
        """KV tokens before this step, the longest row's."""
        return max(member.held for member in self.members)

    @property
    def tokens(self) -> int:
        """New tokens with padding."""
        return len(self.members) * self.q_len


@dataclass(frozen=True, slots=True)
class Step:
    """One pass over the model's layers."""

    groups: tuple[Group, ...]

    @property
    def tokens(self) -> int:
        """New tokens of the step with padding."""
        return sum(group.tokens for group in self.groups)

    @property
    def seqs(self) -> int:
        """Sequences that get a token in this step."""
        return sum(len(group.members) - len(group.unfinished) for group in self.groups)

    @property
    def receivers(self) -> tuple[int, ...]:
        """The indices of the sequences that get a token, group by group."""
        return tuple(g.members[row].index for g in self.groups for row in g.receivers)


@dataclass(slots=True)
class _Live:
    request: Request
    row: int
    held: int = 0
    made: int = 0

    @property
    def left(self) -> int:
        """Tokens of its prompt that no step has taken yet."""
        return max(0, self.request.length - self.held)


@dataclass(slots=True)
class _Cohort:
    offset: int
    rows: int
    stride: int
    live: dict[int, _Live] = field(default_factory=dict)

    def free_rows(self) -> list[int]:
        return [row for row in range(self.rows) if row not in self.live]


def row_tokens(length: int, new_tokens: int) -> int:
    """KV tokens that a sequence needs: the last generated token is never read back."""
    return length + new_tokens - 1


class Batcher:
    """Forms the steps of a workload. Call ``next_step``, run it, then ``advance`` with the
    sequences that stopped early; ``next_step`` returns None when all are done."""

    def __init__(self, requests: Iterable[Request], admission: Admission) -> None:
        self._waiting = deque(sorted(requests, key=lambda r: (-r.length - r.new_tokens, r.index)))
        self._admission = admission
        self._space = TokenSpace(admission.kv_tokens, admission.wall)
        self._cohorts: list[_Cohort] = []
        self._stage = 0
        for request in self._waiting:
            need = row_tokens(request.length, request.new_tokens)
            most = max(admission.wall, admission.kv_tokens - admission.wall)
            assert need <= most, f"a row of {need} tokens exceeds the KV store"

    @property
    def in_flight(self) -> int:
        """Sequences that hold a row now."""
        return sum(len(cohort.live) for cohort in self._cohorts)

    def next_step(self) -> Step | None:
        """The groups of the next pass, or None when every sequence has left."""
        if not self._stage and (self._admission.refill or not self.in_flight):
            self._admit()
        layers = self._layers()
        groups: list[Group] = []
        for cohort in self._cohorts:
            groups += self._groups_of(cohort, layers)
        return Step(tuple(groups)) if groups else None

    def _layers(self) -> tuple[int, int] | None:
        """The layers that prompts take in the next step: a group of them if others decode, all
        that are left if none does."""
        cuts = self._admission.cuts
        live = [seq for cohort in self._cohorts for seq in cohort.live.values()]
        decoding = any(seq.made for seq in live)
        if not cuts or not (self._stage or decoding) or all(seq.made for seq in live):
            return None
        return cuts[self._stage], cuts[self._stage + 1 if decoding else -1]

    def advance(self, step: Step, stopped: Iterable[int] = ()) -> tuple[int, ...]:
        """Account for a finished step; returns the indices that leave, ``stopped`` or at their
        length."""
        ended = set(stopped)
        new = {
            m.index: n
            for g in step.groups
            if not self._goes_on(g)
            for m, n in zip(g.members, g.lengths, strict=True)
        }
        self._stage = self._stage + 1 if any(map(self._goes_on, step.groups)) else 0
        received = set(step.receivers)
        left = []
        for cohort in self._cohorts:
            for row, seq in list(cohort.live.items()):
                seq.held += new.get(seq.request.index, 0)
                seq.made += seq.request.index in received
                if seq.request.index in ended or seq.made >= seq.request.new_tokens:
                    del cohort.live[row]
                    left.append(seq.request.index)
        for cohort in [c for c in self._cohorts if not c.live]:
            self._space.give(cohort.offset, cohort.rows * cohort.stride)
            self._cohorts.remove(cohort)
        return tuple(left)

    def _goes_on(self, group: Group) -> bool:
        """Whether layers are left for the group after this step."""
        return group.layers is not None and group.layers[1] < self._admission.cuts[-1]

    def _admit(self) -> None:
        live = (seq for cohort in self._cohorts for seq in cohort.live.values())
        pieces = sum(self._admission.piece(seq.left) for seq in live)
        tokens = self._admission.prefill_tokens - pieces
        for cohort in self._cohorts:
            for row in cohort.free_rows():
                if not self._waiting or self.in_flight >= self._admission.seqs:
                    return
                piece = self._admission.piece(self._waiting[0].length)
                if piece > tokens and self.in_flight:
                    return
                tokens -= piece
                cohort.live[row] = _Live(self._waiting.popleft(), row)
        while self._waiting:
            rows, filled = self._cohort_rows(tokens)
            if not filled:
                return
            tokens -= self._open_cohort(rows, filled)

    def _cohort_rows(self, tokens: int) -> tuple[int, int]:
        """How many rows the next cohort can have, and how many get a prompt at once.

        Prompts that come in pieces begin a few at a time; the rows of those that follow are kept
        beside them, since decoding is fastest over many neighbouring rows."""
        first = self._waiting[0]
        rows = min(
            self._admission.rows,
            len(self._waiting),
            self._admission.seqs - self.in_flight,
            self._space.largest() // row_tokens(first.length, first.new_tokens),
        )
        # The first needs the largest row; a longer prompt may follow where fewer tokens are wanted.
        longest = max((r.length for r in islice(self._waiting, rows)), default=1)
        piece = self._admission.piece(longest)
        by_tokens = max(0, tokens) // piece
        if not self.in_flight:
            by_tokens = max(1, by_tokens)
        filled = min(rows, by_tokens)
        return rows if piece < longest else filled, filled

    def _open_cohort(self, rows: int, filled: int) -> int:
        """Open a cohort with prompts in the first ``filled`` rows; returns their tokens."""
        first = self._waiting[0]
        stride = row_tokens(first.length, first.new_tokens)
        offset = self._space.take(rows * stride)
        assert offset is not None
        cohort = _Cohort(offset, rows, stride)
        for row in range(filled):
            cohort.live[row] = _Live(self._waiting.popleft(), row)
        self._cohorts.append(cohort)
        return filled * max(self._admission.piece(seq.left) for seq in cohort.live.values())

    def _groups_of(self, cohort: _Cohort, layers: tuple[int, int] | None) -> list[Group]:
        rows = [cohort.live[row] for row in sorted(cohort.live)]
        piece = self._admission.piece
        decode = [seq for seq in rows if seq.made]
        ones = [1] * len(decode)
        groups = [_group(cohort, decode, ones, prefill=False)] if decode else []
        fresh = sorted((s for s in rows if not s.made), key=lambda s: (-piece(s.left), s.row))
        while fresh:
            take = max(1, self._admission.attn_tokens // piece(fresh[0].left))
            lengths = [piece(seq.left) for seq in fresh[:take]]
            group = _group(cohort, fresh[:take], lengths, prefill=True)
            if layers is not None:
                group = replace(group, layers=layers)
                if self._goes_on(group):
                    group = replace(group, unfinished=tuple(range(len(lengths))))
            groups.append(group)
            fresh = fresh[take:]
        return groups


def _group(
    cohort: _Cohort, seqs: Sequence[_Live], lengths: Sequence[int], *, prefill: bool
) -> Group:
    members = tuple(
        Member(s.request.index, cohort.offset + s.row * cohort.stride, s.held) for s in seqs
    )
    unfinished = tuple(i for i, n in enumerate(lengths) if n < seqs[i].left)
    return Group(prefill, members, tuple(lengths), max(lengths), cohort.stride, unfinished)


def group_shares(step: Step, workers: int) -> tuple[tuple[int, ...], ...]:
    """Which groups each worker runs: heaviest first, each to the worker with the least so far.

    The weight counts a token's projections as 1 and its attention as KV length / 2048, the order
    of magnitude for heads as wide as the hidden state.
    """

    def weight(group: Group) -> float:
        return group.tokens * (1 + (group.past + group.q_len) / 2048)

    order = sorted(range(len(step.groups)), key=lambda i: (-weight(step.groups[i]), i))
    load = [0.0] * workers
    shares: list[list[int]] = [[] for _ in range(workers)]
    for index in order:
        worker = load.index(min(load))
        load[worker] += weight(step.groups[index])
        shares[worker].append(index)
    return tuple(tuple(sorted(share)) for share in shares)


def expert_shares(counts: Sequence[int], order: Sequence[int], workers: int) -> tuple[int, ...]:
    """The worker of every expert: in the order in which their weights arrive, each to the worker
    with the fewest tokens so far. ``counts`` are tokens by expert; an unused expert gets -1."""
    load = [0] * workers
    owner = [-1] * len(counts)
    for expert in order:
        if counts[expert]:
            worker = load.index(min(load))
            load[worker] += counts[expert]
            owner[expert] = worker
    return tuple(owner)
