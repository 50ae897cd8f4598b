"""Emitted kernels: golden text, a pure function of the spec, in Python that compiles."""

import time
from collections.abc import Callable

import pytest

from dovetail.codegen.gate.cases import KERNELS, down, up
from dovetail.codegen.kernels.emit import emit_kernel, file_name
from dovetail.ir import codec
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import KernelReference
from dovetail.ir.kernel_parts import Tile, Weights
from dovetail.ir.kernel_spec import RouteSpec, spec_digest

GOLDEN = (
    "route groups by two best",
    "sort, two launches",
    "up bf16",
    "up TMA swapped",
    "up fp8 blocks",
    "up gpt-oss",
    "down int4 per output",
    "down split k",
    "reduce gated shared, splits",
    "activate",
)


@pytest.mark.parametrize("name", GOLDEN)
def test_kernel_text(name: str, golden: Callable[[str], None]) -> None:
    golden(emit_kernel(KERNELS[name]))


@pytest.mark.parametrize("name", KERNELS)
def test_same_spec_same_text(name: str) -> None:
    spec = KERNELS[name]
    text = emit_kernel(spec)
    assert text == emit_kernel(codec.decode(codec.encode(spec), type(spec)))
    compile(text, file_name(spec), "exec")
    assert all(len(line) <= 100 for line in text.splitlines())


def test_every_spec_has_its_own_text_and_digest() -> None:
    assert len({emit_kernel(spec) for spec in KERNELS.values()}) == len(KERNELS)
    assert len({spec_digest(spec) for spec in KERNELS.values()}) == len(KERNELS)
    assert len({file_name(spec) for spec in KERNELS.values()}) == len(KERNELS)


def test_emission_takes_milliseconds() -> None:
    begin = time.process_time()
    for spec in KERNELS.values():
        emit_kernel(spec)
    # A bound that only a loop over sympy's simplifiers would miss, not a measurement.
    assert (time.process_time() - begin) / len(KERNELS) < 0.25


def test_a_reference_survives_json() -> None:
    spec = up()
    reference = KernelReference("kernels/a.py", "sm_90", spec, spec_digest(spec), "00", "3.7.1", 80)
    assert codec.decode(codec.encode(reference), KernelReference) == reference


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Tile(24, 64, 64), "tile m=24: expected a power of two"),
        (lambda: Tile(16, 64, 64, stages=0), "must be at least 1"),
        (lambda: up(weights=Weights("int4"), k=63), "int4 needs an even k"),
        (lambda: up(weights=Weights("int8", scale_k=48)), "tile k must divide scale_k"),
        (lambda: up(tile=Tile(16, 32, 32, split_k=2), out="fp32"), "activate afterwards"),
        (lambda: down(tile=Tile(16, 32, 32, split_k=2)), "split_k stores float32 sums"),
        (lambda: down(store="add"), "store add needs out fp32"),
        (lambda: up(loads="tma", weights=Weights(order="kn")), "tma loads need order nk"),
        (lambda: up(rows="dense"), "dense rows are one expert's"),
        (lambda: RouteSpec("r", 16, 5, groups=4, top_groups=1), "leaves 4 to choose from"),
    ],
)
def test_a_spec_refuses_what_no_kernel_computes(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        make()
