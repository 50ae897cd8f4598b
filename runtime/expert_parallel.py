"""Expert-parallel execution of a captured model on torch.distributed, one rank of it.

Every rank holds all that is not a routed expert and the experts of its slots. A prompt's attention
runs on its owner. Two ways through a layer's experts:

``two`` all-to-alls: inputs go to the devices that serve the token's experts, sums come back.

``one`` all-to-all (ExFlow, arXiv 2401.08383): a decoding token moves to the device that serves most
of its experts and goes on from there, through the next layer's attention too; sums of the others
come to it, which for one expert a token are none. Every rank keeps the whole KV store for that;
what is new in it is passed around once a step. Prompts take two all-to-alls in either way.

"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dovetail.ir.batching import Group, Step
from dovetail.ir.expert_dispatch import ExpertDispatch, next_home
from dovetail.ir.expert_placement import ExpertPlacement
from dovetail.ir.expert_rows import (
    TOKEN_ROW,
    carried,
    kv_row,
    sum_dtype,
    value_shape,
)
from dovetail.ir.placement import experts_of
from dovetail.ir.program import Program
from dovetail.ir.task_graph import KvSpec, TaskGraph, Value
from dovetail.runtime.attention import attention
from dovetail.runtime.exchange import Exchange, packed, unpacked
from dovetail.runtime.expert_exchange import Chosen, ExpertExchange, add_up
from dovetail.runtime.group_state import GroupState
from dovetail.runtime.kv_store import KvStore
from dovetail.runtime.pools import torch_dtype
from dovetail.runtime.rank_weights import Function, RankWeights, layer_codes
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.step_tokens import Part, StepTokens, by_row, carried_rows, rows_of
from dovetail.runtime.weight_store import Tensors

Ints = NDArray[np.int64]
Way = Literal["two", "one"]


class ExpertParallel:
    """One rank; all of them call ``run_step`` with the same steps in the same order.

    ``choose`` turns logits ``[n, vocab]`` into tokens ``[n]``. ``on_chosen``, if set, is told the
    layer, prompts, positions ``[n]`` and experts ``[n, top_k]`` of the tokens that are here. Raises
    PlanError if the placement does not fit the model and the ranks.
    """

    constants: Mapping[str, Tensor]
    attention = staticmethod(attention)

    def __init__(
        self,
        graph: TaskGraph,
        program: Program,
        constants: Mapping[str, Tensor],
        index: CheckpointIndex,
        functions: Mapping[str, Any],
        placement: ExpertPlacement,
        exchange: Exchange,
        way: Way = "two",
        choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
    ) -> None:
        self.graph, self.program, self.constants = graph, program, constants
        self.exchange, self.way = exchange, way
        self.rank, self.ranks = exchange.rank, exchange.ranks
        self.weights = RankWeights(graph, index, placement, self.rank, self.ranks)
        self._codes = layer_codes(graph, program, functions)
        self._prologue, self._epilogue = functions[graph.prologue.name], functions["epilogue"]
        self._dispatch, self._choose = ExpertDispatch(placement), choose
        self._dtype = torch_dtype(graph.dtype)
        self._sums = torch_dtype(sum_dtype(graph.dtype))
        specs = [graph.body(layer).kv for layer in range(len(graph.layers))]
        self.kv = KvStore(specs, program.settings.admission.kv_tokens)
        settings = program.settings
        self._exchanges = ExpertExchange(
            exchange, self._sums, settings.expert_rows, settings.buckets
        )
        self.on_chosen: Callable[[int, Ints, Ints, Tensor], None] | None = None
        self._parts: list[Part] = []
        self._shared: dict[int, dict[str, Tensor]] = {}
        self._gathered: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._outputs: dict[int, Tensor] = {}

    # What emitted code calls.

    def embedding(self, weights: Tensors, name: str, ids: Tensor) -> Tensor:
        """Rows of the embedding table."""
        return torch.nn.functional.embedding(ids, weights[name])

    def gather(self, g: GroupState, layer: int, x: Tensor, index: Tensor, weight: Tensor) -> None:
        """Take a group's tokens (padding left out) to the experts."""
        x, index, weight = (t.reshape(-1, t.shape[-1]) for t in (x, index, weight))
        if g.valid is not None:
            x, index, weight = (t.index_select(0, g.valid) for t in (x, index, weight))
        self._gathered[id(g)] = (x, index, weight)

    def scatter(self, g: GroupState) -> Tensor:
        """The experts' output for a group, ``[seqs * q_len, hidden]``; zeros where padded."""
        y = self._outputs.pop(id(g))
        if g.valid is None:
            return y
        padded = torch.zeros((g.seqs * g.q_len, y.shape[1]), dtype=y.dtype)
        return padded.index_copy_(0, g.valid, y)

    # One step.

    def run_step(self, step: Step, inputs: Callable[[Group], Mapping[str, Tensor]]) -> list[int]:
        """Run one step; ``inputs`` gives ``input_ids`` and ``position_ids`` of a group. Returns the
        next token of every sequence that gets one, in the order of ``step.receivers``."""
        tokens = StepTokens.of(step)
        with torch.inference_mode():
            self._shared = self._shared_values(tokens, inputs)
            self._parts = self._own_parts(tokens, inputs)
            for part in self._parts:
                self._prologue(self, part.state, part.state.values, self.weights.embed, -1)
            written = []
            for layer, code in enumerate(self._codes):
                written.append([part.numbers for part in self._parts])
                self._run(code.before, layer)
                if code.expert is not None:
                    self._experts(layer, code.expert, tokens)
                    self._run(code.after, layer)
            found = self._next_tokens(tokens)
            if self.way == "one":
                self._share_kv(tokens, written)
        self._parts, self._shared = [], {}
        return found

    def _run(self, functions: Sequence[Function], layer: int) -> None:
        for part in self._parts:
            for function in functions:
                function(self, part.state, part.state.values, self.weights.dense[layer], layer)

    def _own_parts(
        self, tokens: StepTokens, inputs: Callable[[Group], Mapping[str, Tensor]]
    ) -> list[Part]:
        parts = []
        for number, group in enumerate(tokens.step.groups):
            rows = tokens.owned(number, self.rank, self.ranks)
            if rows:
                values = dict(inputs(rows_of(group, rows)))
                moving = self.way == "one" and not group.prefill
                parts.append(Part.of(tokens, number, rows, self.kv, values, moving=moving))
        return sorted(parts, key=lambda part: part.moving)

    def _shared_values(
        self, tokens: StepTokens, inputs: Callable[[Group], Mapping[str, Tensor]]
    ) -> dict[int, dict[str, Tensor]]:
        """What all layers read of decoding tokens (rotary tables), wherever they go: every rank
        makes it for all of them."""
        found: dict[int, dict[str, Tensor]] = {}
        for number in tokens.decode if self.way == "one" else ():
            group = tokens.step.groups[number]
            rows = range(len(group.members))
            part = Part.of(tokens, number, rows, self.kv, dict(inputs(group)), moving=True)
            self._prologue(self, part.state, part.state.values, self.weights.embed, -1)
            found[number] = {name: part.state.values[name] for name in self.graph.shared}
        return found

    # The experts of one layer.

    def _experts(self, layer: int, expert: Function, tokens: StepTokens) -> None:
        """Run a layer's experts over all ranks; the parts are then where their tokens are."""
        chosen = self._chosen(layer, tokens)
        moving = [part for part in self._parts if part.moving]
        values = carried(self.graph, self.program.segments, layer)
        rows = carried_rows(moving, values)
        home = chosen.home[len(chosen.home) - len(rows) :]
        sums, arrived = self._exchanges.run(
            chosen, rows, home, expert, self.weights.experts[layer], self._combine(layer, tokens)
        )
        stay = rows[torch.from_numpy(np.flatnonzero(home == self.rank))]
        fixed = [part for part in self._parts if not part.moving]
        self._parts = fixed + self._regrouped(torch.cat([stay, arrived]), values, tokens)
        numbers = [np.zeros(0, np.int64), *(part.numbers for part in self._parts)]
        y = add_up(sums, np.concatenate(numbers), chosen.x.shape[1]).to(self._dtype)
        sizes = [len(part.numbers) for part in self._parts]
        for part, own in zip(self._parts, torch.split(y, sizes), strict=True):
            self._outputs[id(part.state)] = own

    def _combine(self, layer: int, tokens: StepTokens) -> str:
        """Which sums come back: every rank says the same."""
        if self.way == "two":
            return "known"
        spec = experts_of(self.graph, layer)
        alone = spec is not None and spec.top_k == 1
        return "none" if alone and len(tokens.decode) == len(tokens.starts) else "told"

    def _chosen(self, layer: int, tokens: StepTokens) -> Chosen:
        """What this rank's tokens bring, those that move last."""
        spec = experts_of(self.graph, layer)
        assert spec is not None
        taken = [self._gathered.pop(id(part.state)) for part in self._parts]
        none = (
            torch.empty((0, spec.hidden), dtype=self._dtype),
            torch.empty((0, spec.top_k), dtype=torch.int64),
            torch.empty((0, spec.top_k), dtype=self._sums),
        )
        x, index, weight = (torch.cat(each) for each in zip(none, *taken, strict=True))
        numbers = np.concatenate([np.zeros(0, np.int64), *(p.numbers for p in self._parts)])
        if self.on_chosen is not None:
            self.on_chosen(layer, tokens.prompt[numbers], tokens.position[numbers], index)
        serving = self._dispatch.serving(
            self.weights.columns[layer],
            index.numpy(),
            tokens.prompt[numbers],
            tokens.position[numbers],
        )
        moving = [np.full(len(part.numbers), part.moving) for part in self._parts]
        home = np.full(len(numbers), self.rank)
        moves = np.concatenate([np.zeros(0, np.bool_), *moving])
        home[moves] = next_home(serving[moves], home[moves], self.ranks)
        return Chosen(x, index, weight.to(self._sums), numbers, serving, home)

    def _regrouped(
        self, rows: Tensor, values: Mapping[str, Value], tokens: StepTokens
    ) -> list[Part]:
        """The parts of the tokens that are here now, from their carried rows."""
        columns = [(torch_dtype(v.dtype), prod(value_shape(v, 1))) for v in values.values()]
        *carried_values, last = unpacked(rows, *columns, (torch.int32, 1))
        numbers = last[:, 0].numpy().astype(np.int64)
        parts = []
        for group in tokens.decode if self.way == "one" else ():
            own = np.flatnonzero(tokens.group[numbers] == group)
            own = own[numbers[own].argsort()]
            if not len(own):
                continue
            places = tokens.row[numbers[own]].tolist()
            seqs = len(tokens.step.groups[group].members)
            made = {n: by_row(v, seqs, places) for n, v in self._shared[group].items()}
            for (name, value), column in zip(values.items(), carried_values, strict=True):
                made[name] = column[torch.from_numpy(own)].view(value_shape(value, len(own)))
            parts.append(Part.of(tokens, group, places, self.kv, made, moving=True))
        return parts

    # The end of a step.

    def _next_tokens(self, tokens: StepTokens) -> list[int]:
        """The next token of every sequence that gets one, known to all ranks."""
        places, found = tokens.receivers(), [0] * len(tokens.receivers())
        rows = [torch.empty((0, TOKEN_ROW), dtype=torch.uint8)]
        for part in self._parts:
            numbers = part.last_numbers().tolist()
            if not numbers:
                continue
            logits = self._epilogue(self, part.state.last_hidden(), self.weights.head)
            chosen = self._choose(logits[:, -1])
            own = torch.tensor([places[number] for number in numbers], dtype=torch.int32)
            rows.append(packed(own, chosen.to(torch.int64)))
        mine = torch.cat(rows)
        everyone = torch.cat([mine, self.exchange.gather("token", mine)])
        for place, token in zip(
            *unpacked(everyone, (torch.int32, 1), (torch.int64, 1)), strict=True
        ):
            found[int(place)] = int(token)
        return found

    def _share_kv(self, tokens: StepTokens, written: Sequence[Sequence[Ints]]) -> None:
        """Pass around what is new in the KV store: ``written[layer]`` are this rank's tokens."""
        specs = {layer: self.graph.body(layer).kv for layer in range(len(written))}
        for spec in dict.fromkeys(spec for spec in specs.values() if spec is not None):
            rows = [torch.empty((0, kv_row(spec)), dtype=torch.uint8)]
            for layer in (layer for layer, kv in specs.items() if kv == spec):
                numbers = np.concatenate([np.zeros(0, np.int64), *written[layer]])
                slots = torch.from_numpy(tokens.slot[numbers])
                where = torch.stack([torch.full_like(slots, layer), slots], dim=1)
                keys, values = self.kv.arenas(layer)
                rows.append(packed(where.to(torch.int32), keys[slots], values[slots]))
            came = self.exchange.gather("coherence", torch.cat(rows))
            self._store_kv(spec, came)

    def _store_kv(self, spec: KvSpec, rows: Tensor) -> None:
        dtype = torch_dtype(spec.dtype)
        widths = (spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim)
        where, keys, values = unpacked(
            rows, (torch.int32, 2), (dtype, widths[0]), (dtype, widths[1])
        )
        for layer in sorted(set(where[:, 0].tolist())):
            own = (where[:, 0] == layer).nonzero().squeeze(1)
            slots = where[own, 1].long()
            for arena, new in zip(self.kv.arenas(layer), (keys, values), strict=True):
                arena.index_copy_(0, slots, new[own].view(-1, *arena.shape[1:]))
