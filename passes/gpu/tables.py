"""GPU tables: `setting -> the integer program of batch sizes and residency` (batch_problem.py).

One batch for every pair of sequences in flight and prompt tokens a step, with refill and without;
a span for each kind of step and of layer. Roles are attention (rows of a group, where KV is and who
attends, streams), experts (the CPU's share, loads and their buffers), dense layers, head and
embedding; units are the experts of all layers together.

Layers share their units evenly; the busiest row is convex in them, so the mean bounds every other
way to deal them out. Wherever a rate depends on sizes, the best one is taken: the program's
optimum is a bound for the simulated time of every schedule that these knobs can make.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import overload

from dovetail.passes.gpu.batch_tables import BatchTables
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.table_setting import Setting, Sizes
from dovetail.passes.policies.common import Knobs
from dovetail.passes.policies.gpu import DEFAULTS, GpuSetting
from dovetail.solvers.batch_problem import Batch, Choice


class Tables(Setting, Sequence[Batch]):
    """The batches of a setting; their tables are made when they are asked for."""

    def __init__(self, setting: GpuSetting, costs: GpuCosts) -> None:
        super().__init__(setting, costs)
        self.batches = tuple(self._batches())

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return BatchTables(self, self.batches[index]).batch()

    def floors(self) -> list[int]:
        """What every batch takes at least, without looking at its buffers."""
        return [BatchTables(self, sizes).floor() for sizes in self.batches]

    def knobs(self, choice: Choice) -> Knobs:
        """The knobs of an answer."""
        sizes = self.batches[choice.batch]
        tables = BatchTables(self, sizes)
        way, experts = tables.ways[choice.options[0]], tables.expert_ways[choice.options[1]]
        return {
            **DEFAULTS,
            "seqs": sizes.seqs,
            "prefill_tokens": sizes.prefill,
            "refill": sizes.refill,
            "rows": way.rows,
            "kv_hbm": way.kv_hbm,
            "attention_cpu": way.cpu,
            "streams": way.streams,
            "experts_cpu": experts.cpu,
            "chunk": experts.chunk,
            "slots": experts.slots or int(self.steps["slots"][0]),
            "accumulate": not experts.rows,
            "paged": experts.rows > 0,
            "layers": 2 if experts.rows else 0,
        }

    def _batches(self) -> Iterator[Sizes]:
        workload, seen = self.setting.workload, set[Sizes]()
        names = ("seqs", "prefill_tokens", "refill")
        for seqs, tokens, refill in product(*(self.steps[name] for name in names)):
            prefill = max(workload.longest, min(int(tokens), int(seqs) * workload.longest))
            sizes = Sizes(int(seqs), prefill, bool(refill))
            if sizes not in seen:
                seen.add(sizes)
                yield sizes
