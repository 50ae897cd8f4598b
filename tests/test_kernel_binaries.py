"""Binaries of kernels: their manifest, the ladder from binary to source, and a stand-in driver."""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.cli import main
from dovetail.codegen.gate.cases import KERNELS
from dovetail.codegen.gate.suite import QWEN3_30B_IN_SLOTS
from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.choose import choose_ladder
from dovetail.codegen.kernels.emit import emit_kernel
from dovetail.codegen.kernels.interface import grid_text, interface_of
from dovetail.codegen.kernels.ladder import BinaryKernel, Here, decide, ladder_loader, packed
from dovetail.codegen.kernels.launch import SourceKernel, grid_of
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.kernel_binary import Argument, KernelBinary
from dovetail.ir.kernel_layer import KernelReference
from dovetail.ir.kernel_spec import GemmSpec, SortSpec
from dovetail.kernels.files import KernelSet, check_kernels, write_kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
TOP_K = QWEN3_30B_IN_SLOTS.top_k


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[KernelSet, Path]:
    """Kernels in slots with their binaries, for one bucket of few and one of many tokens."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        layer, arch = QWEN3_30B_IN_SLOTS, ARCHS["sm_90"]
        found = write_kernels(layer, arch, folder / "out", (16,), binaries=True)
    return found, folder / "out"


def matching(made: tuple[KernelSet, Path]) -> Here:
    return Here("sm_90", made[0].kernels[0].binaries[0].compiler, 12080)


def of(found: KernelSet, name: str) -> KernelReference:
    return next(one for one in found.kernels if one.spec.name == name)


class FakeDriver:
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, int]] = []
        self.launches: list[tuple[Any, ...]] = []

    def device(self) -> int:
        return 0

    def load(self, binary: bytes, function: str, shared_bytes: int) -> str:
        self.loads.append((function, shared_bytes))
        return function

    def launch(self, *arguments: Any) -> None:
        self.launches.append(arguments)


def test_every_kernel_has_a_binary_that_passes(made: tuple[KernelSet, Path]) -> None:
    found, folder = made
    assert check_kernels(folder) == found
    for reference in found.kernels:
        assert decide(reference, folder, TOP_K, matching(made)).rung == "binary"
        for binary in reference.binaries:
            assert binary.threads == 32 * binary.options["num_warps"]
            assert binary.options["enable_fp_fusion"] and binary.scratch == 2
    up = of(found, "moe_up").binaries[0]
    assert [(a.name, a.type) for a in up.arguments][:3] == [
        ("x_ptr", "*bf16"), ("expert_at_ptr", "*i64"), ("y_ptr", "*bf16")
    ]  # fmt: skip
    assert up.constants["K"] == 2048 and up.shared_bytes > 48 << 10


def change(**fields: Any) -> Callable[[KernelBinary], KernelBinary]:
    return lambda binary: dataclasses.replace(binary, **fields)


@pytest.mark.parametrize(
    ("altered", "where", "reason"),
    [
        (change(), {"arch": "sm_89"}, "it is for sm_90, this GPU is sm_89"),
        (change(), {"compiler": "triton 9.9"}, "it was compiled by triton .*, triton 9.9 is inst"),
        (change(elf=(65, 8)), {}, "its ELF version needs CUDA 13, the driver has 12080"),
        (change(elf=(1, 2)), {}, r"drivers for its ELF version \(1, 2\) are not known"),
        (change(source_digest="0"), {}, "compiled from another source than this version emits"),
        (change(arguments=()), {}, "manifest's arguments are not those of its source"),
        (change(constants={}), {}, "manifest's constants are not those of its source"),
        (change(options={"num_warps": 1}), {}, "manifest's options are not those of its source"),
        (change(grid="(1,)"), {}, "manifest's grid are not those of its source"),
        (change(shared_bytes=1 << 20), {}, "1048576 bytes of shared memory, sm_90 has less"),
        (change(digest="0"), {}, "the file was altered"),
        (change(scratch=1), {}, "its parameters are .* bytes, the manifest says"),
        (change(threads=64), {}, "it wants 128 threads, the manifest says 64"),
        (change(file="../x.cubin"), {}, "it belongs in moe_up_"),
    ],
)
def test_the_ladder_refuses_a_binary_that_does_not_match(
    made: tuple[KernelSet, Path],
    altered: Callable[[KernelBinary], KernelBinary],
    where: dict[str, Any],
    reason: str,
) -> None:
    found, folder = made
    reference = of(found, "moe_up")
    reference = dataclasses.replace(reference, binaries=(altered(reference.binaries[0]),))
    place = dataclasses.replace(matching(made), **where)
    decision = decide(reference, folder, TOP_K, place)
    assert decision.rung == "source"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("; ".join(decision.reasons))


def test_tampered_files_are_refused_with_their_own_digest_too(
    made: tuple[KernelSet, Path], tmp_path: Path
) -> None:
    reference = of(made[0], "moe_up")
    (binary,) = reference.binaries
    content = (made[1] / binary.file).read_bytes()
    sort = of(made[0], "moe_sort").binaries[0]
    swapped = (made[1] / sort.file).read_bytes()
    for other, reason in (
        (content[:64] + b"\x00" * 64, "not a whole ELF file|no kernel moe_up|cubin"),
        (b"#!/bin/sh\n" + content, "not a 64-bit little-endian ELF file"),
        (swapped, "cubin: no kernel moe_up"),
    ):
        (tmp_path / binary.file).write_bytes(other)
        said = dataclasses.replace(binary, digest=hashlib.sha256(other).hexdigest())
        one = dataclasses.replace(reference, binaries=(said,))
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(decide(one, tmp_path, TOP_K, matching(made)).reasons)
    (tmp_path / binary.file).unlink()
    decision = decide(reference, tmp_path, TOP_K, matching(made))
    assert "it cannot be read: No such file or directory" in decision.reasons[0]


def test_the_loader_takes_source_with_a_note_and_binaries_without(
    made: tuple[KernelSet, Path], tmp_path: Path
) -> None:
    found, folder = made
    notes: list[str] = []
    driver, spec = FakeDriver(), of(found, "moe_up").spec
    load = ladder_loader(found.kernels, folder, TOP_K, matching(made), driver, notes.append)
    assert isinstance(load(spec, tmp_path), BinaryKernel) and not notes
    other = dataclasses.replace(matching(made), arch="sm_100")
    load = ladder_loader(found.kernels, folder, TOP_K, other, driver, notes.append)
    assert isinstance(load(spec, tmp_path), SourceKernel)
    assert "kernel moe_up is compiled from its source: moe_up_" in notes[0]
    assert "it is for sm_90, this GPU is sm_100" in notes[0]
    load = ladder_loader((), folder, TOP_K, other, driver, notes.append)
    assert isinstance(load(spec, tmp_path), SourceKernel)
    assert "the manifest does not have it" in notes[1]
    nothing = dataclasses.replace(other, compiler="")
    load = ladder_loader(found.kernels, folder, TOP_K, nothing, driver, notes.append)
    with pytest.raises(InputError, match=r"cannot run: its binary is not taken .* not installed"):
        load(spec, tmp_path)


def test_a_launch_passes_arguments_as_the_binary_lists_them(made: tuple[KernelSet, Path]) -> None:
    found, folder = made
    driver, reference = FakeDriver(), of(found, "moe_sort")
    kernel = BinaryKernel(reference, folder, driver)
    names = ("id_ptr", "slot_ptr", "tile_expert_ptr", "count_ptr", "num_rows_ptr")
    values: dict[str, Any] = {name: torch.zeros(8, dtype=torch.int32) for name in names}
    assert isinstance(reference.spec, SortSpec)
    kernel((128,), values | {"num_slots": 24})
    kernel((0,), values | {"num_slots": 0})
    assert len(driver.launches) == 1 and driver.loads[0][0] == "moe_sort"
    function, grid, threads, shared, arguments = driver.launches[0]
    assert (function, grid, threads) == ("moe_sort", (128, 1, 1), 128)
    assert shared == reference.binaries[0].shared_bytes
    pointers = [values[name].data_ptr() for name in names]
    assert [a.value for a in arguments] == [*pointers, 24, None, None]


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("i32", 1 << 31, "argument a: 2147483648 is no 32-bit number"),
        ("*bf16", torch.zeros(8), "argument a: found torch.float32, expected a tensor of torch.b"),
        ("*i32", 3, "argument a: found int, expected a tensor of torch.int32"),
        ("*fp32", torch.zeros(8)[1:], "argument a: it lies at .* multiples of 16 bytes"),
    ],
)
def test_values_that_a_binary_does_not_take_are_refused(kind: str, value: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        packed(Argument("a", kind), value)


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 500, 20000])
def test_written_grids_are_those_of_launches(tokens: int) -> None:
    layers = choose_ladder(QWEN3_30B_IN_SLOTS, ARCHS["sm_90"], (16, 4096))
    specs = [*KERNELS.values(), *(spec for kernels in layers for spec in kernels.specs())]
    for spec in specs:
        top_k = spec.top_k if isinstance(spec, GemmSpec) else 3
        text = grid_text(spec, top_k, spec.name)
        assert eval(text, {"tokens": tokens}) == grid_of(spec, tokens, top_k), (spec, text)


def test_interfaces_are_read_from_the_text() -> None:
    for spec in KERNELS.values():
        found = interface_of(spec, emit_kernel(spec))
        assert set(found.functions) >= {spec.name} and found.options["enable_fp_fusion"] is True
        assert found.constants


def test_altered_binaries_are_refused_by_kernels_check(
    made: tuple[KernelSet, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in made[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert main(["kernels", "check", str(tmp_path)]) == 0
    file = tmp_path / made[0].kernels[1].binaries[0].file
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(PlanError, match="the file was altered; make the kernels again"):
        check_kernels(tmp_path)
    with pytest.raises(InputError, match="binaries are launched on NVIDIA GPUs only, gfx942"):
        write_kernels(QWEN3_30B_IN_SLOTS, ARCHS["gfx942"], tmp_path, (16,), binaries=True)
