"""Measured kernels in plans: the budget's split, winners, replay, the command and its refusals."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kernel_tune_cases as cases
from tests.ir_cases import captured
from tests.plan_cases import save_beside
from tests.test_gpu_choose import MACHINE, WORKLOAD
from tests.test_kernel_plans import planned

from dovetail.cli import main
from dovetail.codegen.gate.cases import LAYERS
from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.choose import choose_layer
from dovetail.codegen.kernels.launch import Kernel, source_kernel
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import LayerKernels
from dovetail.ir.kernel_spec import GemmSpec, KernelSpec
from dovetail.ir.plan import Plan, load_plan
from dovetail.kernels.bench import KernelFailure
from dovetail.kernels.planned import ladder_kernels, save_kernels
from dovetail.passes.choose import choose
from dovetail.tuning.clock import Clock
from dovetail.tuning.kernel_replay import replay
from dovetail.tuning.kernel_rungs import Decided, shares_of, with_decided
from dovetail.tuning.kernel_tune import split, tune_rungs
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.maintain import merge
from dovetail.tuning_db.trials import Trials

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def quiet(text: str) -> None:
    """Say nothing."""


def formula(kernels: LayerKernels) -> float:
    """8 warps in the up product are best by far."""
    return 1e-4 if kernels.up.tile.warps == 4 else 0.7e-4


def tuned(path: Path) -> list[Decided]:
    """The rungs of the plan, tuned."""
    with Database.open(path) as database:
        return tune_rungs(cases.job(cases.FakeBench(formula)), Trials(database), quiet)


def test_the_budget_is_split_by_the_predicted_time() -> None:
    rungs = cases.plan_rungs()
    shares = shares_of(rungs)
    assert sum(shares) == pytest.approx(1.0) and all(share > 0 for share in shares)
    now = 0.0
    clock = Clock(100.0, lambda: now)
    given = list(split(rungs, clock))
    first, _ = given[0]
    assert shares[first] == max(shares)
    assert given[0][1] == pytest.approx(100.0 * max(shares))
    # What the first leaves goes to the others: none was spent here.
    assert given[-1][1] == pytest.approx(100.0)
    idle = dataclasses.replace(rungs[0], seconds=0.0)
    assert [at for at, _ in split([idle, rungs[1]], clock)] == [1]


def test_winners_are_put_into_the_plan_with_their_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decided = tuned(tmp_path / "t.db")
    assert all(one.measured is not None for one in decided)
    plan = with_decided(planned(), decided)
    (ladder,) = plan.ladders
    for one, rung, kernels in zip(decided, ladder.rungs, ladder_kernels(plan, ladder), strict=True):
        assert kernels == one.kernels and kernels.up.tile.warps == 8
        assert rung.measured == one.measured and rung.measured is not None
        assert rung.measured.ratio == pytest.approx(0.7)
        assert rung.measured.environment["device_name"] == "paper gpu"
        assert rung.measured.refused == one.refused > 0
    path = save_beside(captured("olmoe"), plan, tmp_path)
    save_kernels(plan, tmp_path)
    assert load_plan(path) == plan and plan.digest() != planned().digest()
    for command, said in (
        ("check", "for sm_90; some of 2 token counts measured on paper gpu"),
        ("show", "measured, 0.700 of the model's choice"),
        ("explain", "were measured: with sort and sum 70us"),
    ):
        assert main(["plan", command, str(path)]) == 0
        assert said in " ".join(capsys.readouterr().out.split())


def test_rungs_without_a_winner_have_the_models_kernels(tmp_path: Path) -> None:
    plan = with_decided(planned(), tuned(tmp_path / "t.db"))
    with Database.open(tmp_path / "other.db") as database:
        job = cases.job(cases.FakeBench(lambda kernels: 1e-4))
        decided = tune_rungs(job, Trials(database), quiet)
    assert all(one.measured is None for one in decided)
    assert with_decided(plan, decided) == planned()


def test_the_same_rows_give_the_same_plan_elsewhere(tmp_path: Path) -> None:
    decided = tuned(tmp_path / "t.db")
    with Database.open(tmp_path / "merged.db") as database:
        merge(database, tmp_path / "t.db")
        merge(database, tmp_path / "t.db")
    for path in (tmp_path / "t.db", tmp_path / "merged.db"):
        again = replay(path, cases.plan_rungs(), quiet)
        assert with_decided(planned(), again).digest() == with_decided(planned(), decided).digest()


def test_a_default_that_fails_leaves_its_rung_alone(tmp_path: Path) -> None:
    def broken(kernels: LayerKernels) -> KernelFailure | None:
        return KernelFailure("out_of_memory", "too large") if kernels.bucket[0] > 1 else None

    notes: list[str] = []
    with Database.open(tmp_path / "t.db") as database:
        job = cases.job(cases.FakeBench(formula, broken))
        first, second = tune_rungs(job, Trials(database), notes.append)
    assert first.measured is not None and second.reason == "not tuned: too large"
    assert any("for 150 tokens: not tuned: too large" in note for note in notes)


def saved(folder: Path, plan: Plan | None = None) -> Path:
    """A plan in a file with all that belongs to it."""
    plan = plan or planned()
    folder.mkdir(exist_ok=True)
    path = save_beside(captured("olmoe"), plan, folder)
    save_kernels(plan, folder)
    return path


def test_the_command_replays_and_the_database_commands_know_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows, out = saved(tmp_path / "a"), tmp_path / "t.db", tmp_path / "b" / "tuned.json"
    expected = with_decided(planned(), tuned(rows))
    assert main(["kernels", "tune", str(path), "--replay", str(rows), "-o", str(out)]) == 0
    shown = capsys.readouterr()
    assert "2 of 2 rungs have measured kernels" in shown.out and "0.700 to 0.700" in shown.out
    assert "was made for a different machine" in shown.err
    assert load_plan(out) == expected
    assert main(["plan", "check", str(out)]) == 0
    capsys.readouterr()
    command = ["kernels", "tune", str(path), "--replay", str(rows), "-o", str(out), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)["rungs"]
    assert [one["measured"]["ratio"] for one in found] == pytest.approx([0.7, 0.7])
    assert main(["db", "status", str(rows)]) == 0
    status = capsys.readouterr().out
    assert "foreign, paper gpu" in status and "sound" in status
    assert main(["db", "export", str(rows)]) == 0
    assert '"kernel"' in capsys.readouterr().out
    assert main(["db", "prune", str(rows), "--foreign"]) == 0
    assert main(["kernels", "tune", str(path), "--replay", str(rows), "-o", str(out)]) == 1
    assert "has no trials of this plan's kernels" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_triton
def test_it_refuses_what_it_cannot_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = saved(tmp_path / "a"), str(tmp_path / "plan.json")
    assert main(["kernels", "tune", str(path), "-o", out]) == 1
    assert "kernels are timed on a GPU, but torch finds none here" in capsys.readouterr().err
    assert main(["kernels", "tune", str(path), "-o", out, "--replay", "none.db"]) == 1
    assert "none.db: no such tuning database" in capsys.readouterr().err
    assert main(["kernels", "tune", str(path), "-o", str(tmp_path)]) == 1
    assert "found a folder, expected a file" in capsys.readouterr().err
    processor = choose(captured("olmoe"), MACHINE, {"ram": 1 << 28}, WORKLOAD, "model_batch")
    path = saved(tmp_path / "c", processor)
    assert main(["kernels", "tune", str(path), "-o", out]) == 1
    assert "the plan has no kernels to tune" in capsys.readouterr().err
    assert not Path(out).exists()


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
    done = interpreted("-m", "tests.test_kernel_tune_plans")
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
def test_the_host_target_tries_the_search_and_leaves_the_plan(tmp_path: Path) -> None:
    path, out = saved(tmp_path / "a"), tmp_path / "plan.json"
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
        replay(tmp_path / "t.db", cases.plan_rungs(), quiet)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        bench_in_the_interpreter(Path(scratch))
