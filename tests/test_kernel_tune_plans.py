"""Measured kernels in plans: the budget's split, winners, replay, the command and its refusals."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tests import kernel_tune_cases as cases
from tests.ir_cases import captured
from tests.plan_cases import save_beside
from tests.test_gpu_choose import MACHINE, WORKLOAD
from tests.test_kernel_plans import planned

from dovetail.cli import main
from dovetail.codegen.kernels.ladder import Here
from dovetail.ir.kernel_layer import LayerKernels
from dovetail.ir.plan import load_plan
from dovetail.kernels import timing
from dovetail.kernels.bench import KernelFailure
from dovetail.kernels.planned import ladder_kernels, save_kernels
from dovetail.passes.choose import choose
from dovetail.tuning.clock import Clock
from dovetail.tuning.kernels.replay import replay
from dovetail.tuning.kernels.rungs import Decided, shares_of, with_decided
from dovetail.tuning.kernels.tune import split, tune_rungs
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


def test_the_command_replays_and_the_database_commands_know_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows, out = cases.saved(tmp_path / "a"), tmp_path / "t.db", tmp_path / "b" / "tuned.json"
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


def on_a_gpu(patch: pytest.MonkeyPatch, bench: cases.FakeBench, arch: str = "sm_90") -> None:
    """Let the command find a GPU, whose kernels take the bench's time."""
    place = "dovetail.tuning.kernels.tune"
    patch.setattr(f"{place}.gpu_environment", lambda: cases.ENVIRONMENT)
    patch.setattr(f"{place}.gpu_bench", lambda rung, scratch: bench)
    patch.setattr("dovetail.kernels.binaries.here", lambda: (Here(arch, "triton 3", 12080), None))


def test_the_command_tunes_and_goes_on_from_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, rows = cases.saved(tmp_path / "a"), tmp_path / "b.json", tmp_path / "t.db"
    command = ["kernels", "tune", str(path), "-o", str(out), "--db", str(rows), "--time", "1m"]
    on_a_gpu(monkeypatch, cases.FakeBench(formula))
    assert main(command) == 0
    assert "2 of 2 rungs have measured kernels" in capsys.readouterr().out
    first = load_plan(out)
    assert [rung.measured is not None for rung in first.ladders[0].rungs] == [True, True]
    on_a_gpu(monkeypatch, again := cases.FakeBench(formula))
    assert main(command) == 0
    assert again.loads == [] and load_plan(out) == first
    assert main(["plan", "check", str(out)]) == 0
    replayed = tmp_path / "c.json"
    command = ["kernels", "tune", str(path), "-o", str(replayed), "--replay", str(rows)]
    assert main(command) == 0
    assert load_plan(replayed) == first


def test_a_lost_gpu_and_another_gpu_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(kernels: LayerKernels) -> KernelFailure | None:
        if kernels.up.tile.warps == 4:
            return None
        return KernelFailure("wrong_result", "illegal access", lost=True)

    path, out, rows = cases.saved(tmp_path / "a"), tmp_path / "b.json", tmp_path / "t.db"
    command = ["kernels", "tune", str(path), "-o", str(out), "--db", str(rows), "--time", "1m"]
    on_a_gpu(monkeypatch, cases.FakeBench(formula, broken))
    assert main(command) == 1
    assert "the GPU gave up on a kernel (illegal access)" in capsys.readouterr().err
    with Database.open(rows) as database:
        assert [tuning.stop for tuning in Trials(database).tunings()] == ["failed"]
    on_a_gpu(monkeypatch, cases.FakeBench(formula), "sm_80")
    assert main(command) == 1
    assert "kernels are for sm_90, this GPU is sm_80: tune on the" in capsys.readouterr().err
    assert not out.exists()


def test_a_sample_is_seconds_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    asked: list[int] = []

    def seconds(replay: object, rounds: int) -> float:
        asked.append(rounds)
        return 0.004

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append("wait"))
    monkeypatch.setattr(timing, "captured", lambda once: lambda: ran.append("replay"))
    monkeypatch.setattr(timing, "event_seconds", seconds)
    sample = timing.CudaTimer().load([lambda: ran.append("a"), lambda: ran.append("b")])
    assert ran == ["a", "b", "wait", "replay"]
    assert sample() == 0.002 and asked == [1, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_triton
def test_it_refuses_what_it_cannot_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = cases.saved(tmp_path / "a"), str(tmp_path / "plan.json")
    assert main(["kernels", "tune", str(path), "-o", out]) == 1
    assert "kernels are timed on a GPU, but torch finds none here" in capsys.readouterr().err
    assert main(["kernels", "tune", str(path), "-o", out, "--replay", "none.db"]) == 1
    assert "none.db: no such tuning database" in capsys.readouterr().err
    assert main(["kernels", "tune", str(path), "-o", str(tmp_path)]) == 1
    assert "found a folder, expected a file" in capsys.readouterr().err
    processor = choose(captured("olmoe"), MACHINE, {"ram": 1 << 28}, WORKLOAD, "model_batch")
    path = cases.saved(tmp_path / "c", processor)
    assert main(["kernels", "tune", str(path), "-o", out]) == 1
    assert "the plan has no kernels to tune" in capsys.readouterr().err
    assert not Path(out).exists()
