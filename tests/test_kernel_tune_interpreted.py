"""What times a rung's kernels, and the command that uses it, in Triton's interpreter, which needs a
process of its own."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kernel_tune_cases as cases
from tests.test_kernel_plans import planned

from dovetail.codegen.gate.cases import LAYERS
from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.choose import choose_layer
from dovetail.codegen.kernels.launch import Kernel, source_kernel
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_spec import GemmSpec, KernelSpec
from dovetail.ir.plan import load_plan
from dovetail.kernels.bench import KernelFailure
from dovetail.tuning.kernels.replay import replay

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


SMALL = dataclasses.replace(LAYERS["slots, gate and up apart"], x="fp32", hidden=64, experts=4)
BIASED = dataclasses.replace(LAYERS["slots, gpt-oss-like"], x="fp32")


def bench_in_the_interpreter(folder: Path) -> None:
    """Run by the interpreting process: right kernels pass, wrong and broken ones do not."""
    from triton.errors import TritonError  # type: ignore[import-untyped]

    from dovetail.kernels.rung_bench import RungBench
    from dovetail.kernels.timing import HostTimer

    class Fails:
        """A kernel that fails as the compiler or the memory does."""

        def __init__(self, error: Exception) -> None:
            self.error = error

        def __call__(self, *_: object) -> None:
            raise self.error

    def load(spec: KernelSpec, place: Path) -> Kernel:
        right = source_kernel(spec, place)
        if not isinstance(spec, GemmSpec):
            return right
        match spec.tile.stages, spec.name:
            case 2, "moe_down":
                return lambda *_: None  # leaves memory as it was
            case 3, "moe_down":
                scaled = source_kernel(dataclasses.replace(spec, routed_weight=False), place)
                return scaled
            case 4, "moe_down":
                return Fails(TritonError("no such layout"))  # type: ignore[return-value]
            case 5, "moe_down" if spec.tile.warps == 8:
                return Fails(torch.OutOfMemoryError("out of memory"))  # type: ignore[return-value]
        return right

    for layer in (BIASED, SMALL):
        default = choose_layer(layer, ARCHS["sm_90"], (2, 6))
        tile = dataclasses.replace(default.down.tile, stages=5, warps=4)
        default = dataclasses.replace(default, down=dataclasses.replace(default.down, tile=tile))
        bench = RungBench(layer, default, HostTimer(), folder, 0, most=(1, 16), load=load)

        def other(stages: int, warps: int = 4, to: Any = bench, base: Any = default) -> str:
            tile = dataclasses.replace(base.down.tile, stages=stages, warps=warps)
            down = dataclasses.replace(base.down, tile=tile)
            try:
                to.load(dataclasses.replace(base, down=down))
            except KernelFailure as failure:
                return failure.state
            return "ok"

        swapped = dataclasses.replace(default, up=dataclasses.replace(default.up, swap_ab=True))
        loaded = bench.load(swapped)
        assert loaded.error < 1e-5 and loaded.seconds() > 0
        assert bench.load(default).error == 0.0
        if layer is BIASED:
            continue
        assert [other(stages) for stages in (2, 3, 4)] == [
            "wrong_result", "wrong_result", "compile_error",
        ]  # fmt: skip
        assert other(5, 8) == "out_of_memory"
        broken = dataclasses.replace(
            default,
            down=dataclasses.replace(default.down, tile=dataclasses.replace(tile, stages=3)),
        )
        with pytest.raises(KernelFailure, match=r"the cost model's kernels are off by"):
            RungBench(layer, broken, HostTimer(), folder, 0, most=(1, 16), load=load)
    stacked = dataclasses.replace(SMALL, up_place=None, down_place=None)
    with pytest.raises(InputError, match="its experts are stacked in tensors"):
        RungBench(stacked, default, HostTimer(), folder, 0)


def interpreted(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process in which Triton may be told to interpret."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@needs_triton
def test_wrong_kernels_are_told_from_right_ones() -> None:
    done = interpreted("-m", "tests.test_kernel_tune_interpreted")
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
def test_the_host_target_tries_the_search_and_leaves_the_plan(tmp_path: Path) -> None:
    path, out = cases.saved(tmp_path / "a"), tmp_path / "plan.json"
    done = interpreted(
        "-c", "import sys; from dovetail.cli import main; sys.exit(main())", "kernels", "tune",
        str(path), "-o", str(out), "--db", str(tmp_path / "t.db"), "--time", "2s",
        "--target", "host",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "these times mean nothing, and the plan is written as it was" in done.stdout
    assert "of the default's time" in done.stderr
    assert load_plan(out) == planned()
    with pytest.raises(InputError, match="has no trials of this plan's kernels"):
        replay(tmp_path / "t.db", cases.plan_rungs(), lambda text: None)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        bench_in_the_interpreter(Path(scratch))
