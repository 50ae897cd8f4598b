"""The gate: kernels compiled ahead of time for four architectures, held against their budgets."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.codegen.gate.binary import cuda_facts
from dovetail.codegen.gate.cases import up
from dovetail.codegen.gate.compile import compile_kernel, triton_version
from dovetail.codegen.gate.judge import problems
from dovetail.codegen.gate.suite import LIKE_OTHERS, MIXTRAL_8X7B, broken_suite
from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.choose import LADDER, choose_ladder, variants
from dovetail.codegen.kernels.cost import predicted_seconds, refusal
from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source
from dovetail.codegen.kernels.launch_bounds import most_tiles
from dovetail.ir.kernel_parts import Tile
from dovetail.ir.kernel_spec import GemmSpec

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
SNAPSHOT = Path(__file__).parents[1] / "bench" / "results" / "kernels.md"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of compiled kernels that ends with the test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@needs_triton
@pytest.mark.timeout(900)  # 114 compilations: half a minute of one core that is free
def test_the_suite_passes_and_takes_what_the_table_says(own_cache: Path) -> None:
    expected = SNAPSHOT.read_text(encoding="utf-8")
    made_with = re.search(r"Triton ([\d.]+\d)", expected)
    assert made_with is not None
    if made_with[1] != triton_version():
        # Another compiler allocates registers otherwise: tiles near the limit may spill.
        pytest.skip(f"the table is of Triton {made_with[1]}, here is {triton_version()}")
    table = own_cache / "kernels.md"
    command = [sys.executable, "-m", "dovetail.codegen.gate.table", "--out", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    advice = f"if the new one is right: {' '.join(command[1:-1])} {SNAPSHOT}"
    assert table.read_text(encoding="utf-8") == expected, advice


@needs_triton
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in LIKE_OTHERS])
def test_the_gate_refuses_tiles_that_do_not_fit(arch: str, own_cache: Path) -> None:
    for said, spec in broken_suite(ARCHS[arch]):
        # The cost model refuses it without compiling, and the binary shows that it was right.
        assert refusal(spec, ARCHS[arch])
        module = load_source(emit_kernel(spec), own_cache, file_name(spec))
        (compiled,) = compile_kernel(module, spec, ARCHS[arch])
        assert any(said in problem for problem in problems(spec, ARCHS[arch], compiled))


@needs_triton
def test_the_gate_refuses_another_instruction_than_was_meant(own_cache: Path) -> None:
    spec = up(tile=Tile(16, 64, 32, 4, 3), n=256, k=512)
    hopper = ARCHS["sm_90"]
    module = load_source(emit_kernel(spec), own_cache, file_name(spec))
    (compiled,) = compile_kernel(module, spec, hopper)
    assert problems(spec, hopper, compiled) == []
    found = problems(spec, hopper, compiled, meant="wgmma")
    assert found == ["no wgmma instruction; found mma.sync, async copy"]


def test_facts_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        cuda_facts(b"#!/bin/sh\n" + bytes(64), 0, tmp_path)


@pytest.mark.parametrize("arch", ARCHS)
def test_chosen_tiles_fit_and_follow_the_rows_per_expert(arch: str) -> None:
    ladder = choose_ladder(MIXTRAL_8X7B, ARCHS[arch])
    assert [kernels.bucket[1] for kernels in ladder] == list(LADDER)
    for kernels in ladder:
        for spec in (kernels.up, kernels.down):
            assert refusal(spec, ARCHS[arch]) == ""
        assert kernels.up.tile.m == kernels.down.tile.m == kernels.sort.tile_m
        assert kernels.down.tile.split_k == kernels.reduce.split_k
    rows = [kernels.up.tile.m for kernels in ladder]
    assert rows == sorted(rows) and rows[0] == 16 and rows[-1] >= 128


def test_arithmetic_prunes_the_space_before_anything_is_compiled() -> None:
    base = GemmSpec("moe_up", 8, 14336, 4096, 2, "bf16", Tile(16, 64, 32), rows="gather")
    kept = {arch: len(list(variants(base, ARCHS[arch], 128))) for arch in ARCHS}
    # 3 · 3 · 2 · 4 tiles, by pointer and by TMA.
    assert all(0 < count < 144 for count in kept.values()), kept
    assert kept["sm_80"] < kept["sm_90"]


def test_predicted_times_are_bounded_by_memory_and_by_compute() -> None:
    hopper = ARCHS["sm_90"]
    for kernels in choose_ladder(MIXTRAL_8X7B, hopper):
        tokens, spec = kernels.bucket[1], kernels.up
        hit = 8 * (1 - (1 - 2 / 8) ** tokens)
        reads = hit * spec.outputs * spec.k * 2 / hopper.bandwidth
        computes = tokens * 2 * 2 * spec.outputs * spec.k / hopper.flops
        assert (
            max(reads, computes)
            < predicted_seconds(spec, hopper, tokens)
            < 1e-4 + 3 * (reads + computes)
        )


@pytest.mark.parametrize("experts", [1, 3, 8])
def test_no_routing_needs_more_tiles_than_the_bound(experts: int) -> None:
    def tiles(counts: tuple[int, ...]) -> int:
        return sum(-(-count // 4) for count in counts)

    def routings(slots: int, bins: int) -> list[tuple[int, ...]]:
        if bins == 1:
            return [(slots,)]
        return [(n, *rest) for n in range(slots + 1) for rest in routings(slots - n, bins - 1)]

    for slots in range(1, 12 if experts < 8 else 7):
        assert max(map(tiles, routings(slots, experts))) == most_tiles(slots, experts, 4)
