"""The experts of a GPU run by the plan's kernels: what the executor hands over, as launches.

An executor gives the weights of some experts of a layer as tensors, wherever they are just then;
here they become a table of addresses on the device. The kernels keep all counts on the device, so
the host waits for nothing.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dovetail.codegen.kernels.experts_runner import ExpertsRunner
from dovetail.codegen.kernels.gemm_rows import ALIGNED
from dovetail.codegen.kernels.launch import Kernel, source_kernel
from dovetail.codegen.kernels.layer import buffer_bytes
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.ir.kernel_parts import DTYPE_BYTES
from dovetail.ir.kernel_spec import KernelSpec
from dovetail.ir.placement import experts_of
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_bytes
from dovetail.kernels.planned import ladder_kernels
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu.memory import tier_bytes
from dovetail.runtime.gpu.experts import ExpertFunction, Experts, Routing, TorchExperts
from dovetail.runtime.weight_store import Tensors

Ladder = tuple[LayerSpec, tuple[LayerKernels, ...]]
_TABLES = 4096
"""Tables of addresses that are kept: buffers come round, so that the same ones are asked for."""


class KernelExperts:
    """Runs a plan's experts by its kernels; layers whose experts have none go to ``others``.

    ``ladders`` has the kernels of each layer's experts by layer. Buffers take at most ``nbytes`` of
    the device: longer batches are run in pieces. It serves one stream. Sums must be float32. Raises
    InputError where not even one token's buffers fit.
    """

    def __init__(
        self,
        ladders: Mapping[int, Ladder],
        device: str,
        folder: Path,
        nbytes: int,
        others: Experts,
        load: Callable[[KernelSpec, Path], Kernel] = source_kernel,
    ) -> None:
        self._ladders, self._device, self._others = dict(ladders), device, others
        kinds = dict.fromkeys(self._ladders.values())
        share = nbytes // max(1, len(kinds))
        self._runners = {
            kind: ExpertsRunner(*kind, _most_tokens(*kind, share), device, folder, load)
            for kind in kinds
        }
        self.nbytes = sum(runner.nbytes for runner in self._runners.values())
        # Set by who knows that kernels do all layers, and on a stream.
        self.capturable = False
        self._begun: dict[LayerSpec, tuple[Routing, int]] = {}
        self._tables: dict[tuple[int, ...], Tensor] = {}

    def run(
        self,
        layer: int,
        function: ExpertFunction,
        experts: Sequence[int],
        weights: Sequence[Tensors],
        routing: Routing,
        x: Tensor,
        sums: Tensor,
    ) -> None:
        """Add what ``experts`` make of the tokens that chose them to ``sums`` [tokens, hidden]; see
        ``Experts.run`` of the runtime. Raises InputError where weights lie otherwise than the plan
        says."""
        kind = self._ladders.get(layer)
        if kind is None:
            self._others.run(layer, function, experts, weights, routing, x, sums)
            return
        if not experts:
            return
        runner, table = self._runners[kind], self._table(kind[0], experts, weights)
        count = len(routing.index)
        for first in range(0, count, runner.tokens):
            last = min(count, first + runner.tokens)
            rows = slice(routing.start + first, routing.start + last)
            # Tokens are sorted once for all pieces of a layer, which share the record of choices.
            known = self._begun.get(kind[0])
            if known is None or known[0] is not routing or known[1] != first:
                runner.begin(x[rows], routing.index[first:last], routing.weight[first:last])
                self._begun[kind[0]] = routing, first
            runner.run(table, sums[rows])

    def _table(
        self, layer: LayerSpec, experts: Sequence[int], weights: Sequence[Tensors]
    ) -> Tensor:
        addresses = [0] * layer.experts
        for expert, tensors in zip(experts, weights, strict=True):
            addresses[expert] = _address(layer, expert, tensors)
        key = tuple(addresses)
        if key not in self._tables:
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            self._tables[key] = torch.tensor(addresses, dtype=torch.int64).to(self._device)
        return self._tables[key]


def kernel_experts(
    plan: Plan,
    graph: TaskGraph,
    device: str,
    folder: Path,
    nbytes: int,
    others: Experts,
    load: Callable[[KernelSpec, Path], Kernel] = source_kernel,
) -> Experts:
    """What runs a GPU plan's experts on ``device``: its kernels, or ``others`` where it has none.

    Sources are written to ``folder``. Raises PlanError for ladders that are not the plan's.
    """
    by_body = {
        body: (ladder.layer, ladder_kernels(plan, ladder))
        for ladder in plan.ladders
        for body in ladder.bodies
    }
    names = {body.name for body in graph.bodies}
    if not set(by_body) <= names:
        unknown = ", ".join(sorted(set(by_body) - names))
        raise PlanError(f"the plan has kernels for {unknown}, which the model has not; plan again")
    ladders = {
        layer: by_body[graph.body(layer).name]
        for layer in range(len(graph.layers))
        if graph.body(layer).name in by_body
    }
    if not ladders:
        return others
    folder.mkdir(parents=True, exist_ok=True)
    made = KernelExperts(ladders, device, folder, nbytes, others, load)
    made.capturable = device != "cpu" and all(
        layer in ladders or experts_of(graph, layer) is None for layer in range(len(graph.layers))
    )
    return made


def plan_experts(
    plan: Plan, layout: Layout, folder: Path, note: Callable[[str], None]
) -> Experts | None:
    """A GPU plan's kernels on torch's current GPU, their buffers within half of what the plan
    leaves to activations; None, with a note why, where experts run as torch's products."""
    why = plan.no_kernels
    if plan.ladders and importlib.util.find_spec("triton") is None:
        why = "Triton, which compiles the plan's kernels, is not installed"
    elif plan.ladders:
        count = plan.machine.accelerator.count if plan.machine.accelerator else 1
        nbytes = tier_bytes(layout, count)["hbm"]["activations"] // 2
        others = TorchExperts(layout.expert_rows)
        try:
            return kernel_experts(plan, layout.graph, "cuda", folder, nbytes, others)
        except InputError as error:
            why = str(error)
    note(f"experts run as torch's products: {why or 'the plan has no kernels'}")
    return None


def _most_tokens(layer: LayerSpec, ladder: Sequence[LayerKernels], nbytes: int) -> int:
    """The most tokens whose buffers fit in ``nbytes``, at most those of the last rung."""
    low, high = 0, max(kernels.bucket[1] for kernels in ladder)
    while low < high:
        middle = (low + high + 1) // 2
        used = [kernels for kernels in ladder if kernels.bucket[0] <= middle]
        if buffer_bytes(layer, used, middle) <= nbytes:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        needed = buffer_bytes(layer, ladder[:1], 1)
        raise InputError(
            f"layer {layer.name}: its kernels' buffers for one token take {format_bytes(needed)}, "
            f"found {format_bytes(nbytes)}; plan with more hbm"
        )
    return low


def _address(layer: LayerSpec, expert: int, tensors: Tensors) -> int:
    """Where an expert begins, whose tensors must lie as the layer says."""
    assert layer.up_place is not None and layer.down_place is not None
    wide = DTYPE_BYTES[layer.x]
    ups = ["gate", "up"] if len(layer.up_place.matrices) == 2 else ["gate_up"]
    if not layer.activation.gated:
        ups = ["up"]
    places = {
        **dict(zip(ups, layer.up_place.matrices, strict=True)),
        **dict(zip([f"{part}_bias" for part in ups], layer.up_place.biases, strict=False)),
        **dict(zip(("down", "down_bias"), _down(layer), strict=False)),
    }
    starts = {tensors[part].data_ptr() - place * wide for part, place in places.items()}
    start: int = starts.pop()
    if starts or start % ALIGNED or not all(tensors[part].is_contiguous() for part in places):
        raise InputError(
            f"layer {layer.name}, expert {expert}: its tensors lie at other places than the plan's "
            f"kernels read, or not at multiples of {ALIGNED} bytes; plan again"
        )
    return start


def _down(layer: LayerSpec) -> tuple[int, ...]:
    assert layer.down_place is not None
    return (*layer.down_place.matrices, *layer.down_place.biases)
