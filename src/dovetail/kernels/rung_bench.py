"""Run and time kernels of one rung: random experts in slots, batches of the bucket's largest size.

Every kernel's outputs are compared before its time counts. The seconds are those of all launches of
a layer's experts (sort, both products, sum): rows of a tile act on the sort, a split on the sum.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from triton.errors import TritonError  # type: ignore[import-untyped]

from dovetail.codegen.gate.layer_numbers import experts_reference, tolerance
from dovetail.codegen.gate.placed import expert_elements, taken
from dovetail.codegen.kernels.addresses import slot_addresses
from dovetail.codegen.kernels.experts_runner import ExpertsRunner
from dovetail.codegen.kernels.launch import Kernel, source_kernel
from dovetail.codegen.kernels.layer import LayerWeights
from dovetail.codegen.kernels.quantise import TORCH_DTYPES
from dovetail.ir.errors import DovetailError, InputError
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.ir.kernel_parts import DTYPE_BYTES, Weights
from dovetail.ir.kernel_spec import KernelSpec
from dovetail.kernels.bench import Failed, KernelFailure, Loaded
from dovetail.kernels.timing import Timer

FEWEST_BATCHES, MOST_BATCHES = 4, 64
"""Batches of one sample. They choose different experts, so that weights come from memory."""
L2_TURNS = 3
"""Batches together read so many times what L2 holds, as far as MOST_BATCHES of them can."""
CHECKED = 4
"""Tokens whose output by the default is compared with float64."""
_SEED = 20
Load = Callable[[KernelSpec, Path], Kernel]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Tokens of one pass with their choices, and the addresses of the experts that they meet."""

    x: Tensor
    ids: Tensor
    routed: Tensor
    addresses: Tensor


class RungBench:
    """Times kernels of ``layer``, whose experts lie at addresses, for token counts of ``bucket``.

    Outputs are compared with those of the kernels ``default``, and these with float64. ``cache`` is
    what L2 holds, in bytes; ``most`` limits the batches of a sample and its tokens. Raises
    KernelFailure where memory or the default fails, InputError for a layer in stacked tensors.
    """

    def __init__(
        self,
        layer: LayerSpec,
        default: LayerKernels,
        timer: Timer,
        folder: Path,
        cache: int,
        most: tuple[int, int] = (MOST_BATCHES, 1 << 20),
        load: Load = source_kernel,
    ) -> None:
        if layer.up_place is None:
            raise InputError(
                f"layer {layer.name}: its experts are stacked in tensors; kernels are tuned for "
                "experts at addresses, as plans have them"
            )
        self.layer, self._timer, self._folder, self._load = layer, timer, folder, load
        self._default, self._tolerance = default, tolerance(layer)
        self._random = torch.Generator(timer.device).manual_seed(_SEED)
        with failures(timer.device):
            self._make(cache, most)
            self._expected = [self._output(self._runner(default), batch) for batch in self._checks]
            self._check_default()

    def load(self, kernels: LayerKernels) -> Loaded:
        """Compile, compare with the default's outputs, get ready to time. Raises KernelFailure."""
        with failures(self._timer.device):
            runner = self._runner(kernels)
            error = 0.0
            for batch, expected in zip(self._checks, self._expected, strict=True):
                found = self._output(runner, batch)
                largest = float(expected.abs().max())
                error = _worse(error, float((found - expected).abs().max()) / largest)
            # Either of two right results may be off by what rounding explains.
            if not error <= 2 * self._tolerance:
                raise KernelFailure(
                    "wrong_result",
                    f"outputs differ by {error:.2g} of the largest, rounding explains "
                    f"{2 * self._tolerance:.2g}",
                    error if math.isfinite(error) else None,
                )
            sums = torch.zeros(
                len(self._batches[0].x), self.layer.hidden, device=self._timer.device
            )
            works = [functools.partial(_pass, runner, batch, sums) for batch in self._batches]
            return Loaded(error, self._timer.load(works))

    def _make(self, cache: int, most: tuple[int, int]) -> None:
        """Experts, batches to time and batches to compare."""
        layer, default = self.layer, self._default
        tokens = min(default.bucket[1], most[1])
        elements = expert_elements([default.up, default.down])
        stride = elements * DTYPE_BYTES[layer.x]
        hit = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens)
        count = min(most[0], max(FEWEST_BATCHES, math.ceil(L2_TURNS * cache / (hit * stride))))
        copies = min(count, math.ceil(L2_TURNS * cache / (layer.experts * stride)) or 1)
        shape = (copies * layer.experts, elements)
        self._pool = torch.empty(shape, dtype=TORCH_DTYPES[layer.x], device=self._timer.device)
        self._pool.normal_(std=layer.hidden**-0.5, generator=self._random)
        first = torch.arange(layer.experts, dtype=torch.int32, device=self._timer.device)
        tables = [
            slot_addresses(self._pool, stride, first + copy * layer.experts)
            for copy in range(copies)
        ]
        self._batches = [
            self._batch(tokens, tables[number % copies], 0.0) for number in range(count)
        ]
        # The fewest tokens of the bucket leave tiles part empty; a few experts take most of them.
        few = min(default.bucket[0], tokens)
        self._checks = [self._batches[0], self._batch(few, tables[0], 1.5)]

    def _batch(self, tokens: int, addresses: Tensor, skew: float) -> _Batch:
        layer, device = self.layer, self._timer.device
        make = functools.partial(torch.rand, generator=self._random, device=device)
        x = torch.randn(tokens, layer.hidden, generator=self._random, device=device)
        ranks = torch.arange(1, layer.experts + 1, device=device).log()
        # Gumbel's trick: the largest of perturbed logarithms are draws without replacement.
        noise = -(-make(tokens, layer.experts).clamp_min(1e-20).log()).log()
        ids = (noise - skew * ranks).topk(layer.top_k).indices.int()
        routed = make(tokens, layer.top_k)
        return _Batch(x.to(TORCH_DTYPES[layer.x]), ids, routed, addresses)

    def _runner(self, kernels: LayerKernels) -> ExpertsRunner:
        tokens = len(self._batches[0].x)
        whole = replace(kernels, bucket=(1, kernels.bucket[1]))
        return ExpertsRunner(
            self.layer, [whole], tokens, self._timer.device, self._folder, self._load
        )

    def _output(self, runner: ExpertsRunner, batch: _Batch) -> Tensor:
        # What an earlier runner left in this memory must not pass for a result.
        runner.buffers["hidden"].fill_(math.nan)
        runner.buffers["part"].fill_(0xFF)
        sums = torch.zeros(batch.x.shape, device=self._timer.device)
        _pass(runner, batch, sums)
        return sums

    def _check_default(self) -> None:
        """Hold the default against float64."""
        batch, layer = self._checks[0], self.layer
        few = slice(0, CHECKED)
        hit, ids = torch.unique(batch.ids[few], return_inverse=True)
        experts = [self._pool[expert] for expert in hit.tolist()]
        up, down = (
            [taken(expert, spec) for expert in experts]
            for spec in (self._default.up, self._default.down)
        )
        weights = LayerWeights(
            up=torch.stack([matrix for matrix, _ in up]),
            down=torch.stack([matrix for matrix, _ in down]),
            up_bias=_stacked([bias for _, bias in up]),
            down_bias=_stacked([bias for _, bias in down]),
        )
        small = replace(
            layer, experts=len(hit), up=Weights(), down=Weights(), up_place=None, down_place=None
        )
        expected = experts_reference(small, batch.x[few], ids, batch.routed[few], weights)
        found = self._expected[0][few].double()
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= self._tolerance:
            raise KernelFailure(
                "wrong_result",
                f"the cost model's kernels are off by {error:.2g} of the largest output from "
                f"float64, rounding explains {self._tolerance:.2g}",
            )


@contextmanager
def failures(device: str) -> Iterator[None]:
    """Turns what goes wrong on ``device`` within it into KernelFailure."""
    try:
        yield
    except (TritonError, RuntimeError, TypeError, AssertionError, ValueError) as error:
        if isinstance(error, DovetailError):
            raise
        words = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]}"
        if isinstance(error, torch.OutOfMemoryError):
            raise KernelFailure("out_of_memory", words) from error
        lost = device == "cuda" and _context_lost()
        state: Failed = "wrong_result" if lost else "compile_error"
        raise KernelFailure(state, words, lost=lost) from error


def _context_lost() -> bool:
    """Whether the GPU refuses all work after a kernel that read or wrote where it may not."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _pass(runner: ExpertsRunner, batch: _Batch, sums: Tensor) -> None:
    runner.begin(batch.x, batch.ids, batch.routed)
    runner.run(batch.addresses, sums)


def _stacked(biases: Sequence[Tensor | None]) -> Tensor | None:
    there = [bias for bias in biases if bias is not None]
    return torch.stack(there) if there else None


def _worse(a: float, b: float) -> float:
    """The larger; NaN outweighs all."""
    return b if math.isnan(b) or b > a else a
