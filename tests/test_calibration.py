"""`dovetail calibrate`: what is measured is remembered, shown as tables and written to a file."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dovetail import calibration
from dovetail.calibration import calibrate_and_store, machine_text, progress_on
from dovetail.cli import main
from dovetail.ir.errors import CheckpointError, InputError
from dovetail.ir.machine import Curve, Machine
from dovetail.machine_files import load_machine
from dovetail.runtime import calibrate as runtime_calibrate
from dovetail.runtime import calibrate_host as host
from dovetail.tuning_db.database import Database

MACHINE = Machine(
    name="test-2core",
    tiers={"ram": 16 << 30, "disk": 100 << 30},
    workers=2,
    gemm={
        "bfloat16": Curve((1.0, 128.0), (16.7e9, 450e9)),
        "float32": Curve((1.0, 128.0), (11e9, 106e9)),
    },
    attention={"float32": Curve((16.0, 1024.0), (57e9, 141e9))},
    kv_bandwidth={
        "bfloat16": Curve((131072.0,), (2.1e9,)),
        "float32": Curve((262144.0,), (15.5e9,)),
    },
    memory_bandwidth=42e9,
    op_seconds=2e-6,
    disk=Curve((131072.0, 8388608.0), (1.1e9, 3.0e9)),
    slowdown={"cpu|cpu": 0.95, "disk|cpu": 0.91, "new|pair": 0.5},
    silicon={"processor": "Test Processor", "disk": "vda 254:0"},
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """Calibration without measuring; returns the calls, and has an empty cache."""
    calls: list[tuple[Any, ...]] = []

    def calibrate(files: Sequence[Path], scratch: Path, **options: Any) -> Machine:
        calls.append((list(files), scratch, options["seconds"]))
        return MACHINE

    monkeypatch.setattr(runtime_calibrate, "calibrate", calibrate)
    monkeypatch.setenv("DOVETAIL_CACHE_DIR", str(tmp_path / "cache"))
    return calls


def stored(tmp_path: Path, device: str) -> Machine | None:
    with Database.open(tmp_path / "cache" / "facts.db") as database:
        return database.latest_calibration(host.silicon(), device, host.software())


def test_calibrate_prints_stores_and_writes(
    measured: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "machine.json"
    assert main(["calibrate", "--seconds", "5", "-o", str(out)]) == 0
    assert measured == [([], tmp_path / "cache", 5.0)]
    printed = capsys.readouterr().out
    assert machine_text(MACHINE) in printed
    assert str(out) in printed
    assert load_machine(str(out)) == MACHINE
    assert stored(tmp_path, "vda 254:0") == MACHINE


def test_calibration_is_stored_for_the_disk_of_the_files(
    measured: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    assert calibrate_and_store([file]) == MACHINE
    assert measured == [([file], tmp_path / "cache", calibration.SECONDS)]
    assert stored(tmp_path, host.disk_device(file)) == MACHINE


def test_calibrate_refuses_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        calibration.calibrate_now(tmp_path / "none", 5.0, None)


def test_calibrate_refuses_a_cache_that_cannot_be_made(
    measured: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOVETAIL_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="set DOVETAIL_CACHE_DIR"):
        calibrate_and_store([])
    assert measured == []


def test_text_of_a_machine() -> None:
    assert (
        machine_text(MACHINE)
        == """\
test-2core: 2 compute workers; ram 16.00 GiB, disk 100.00 GiB
Test Processor

GEMM, GFLOP/s of one worker by rows
                1    128
  bfloat16   16.7    450
  float32      11    106

attention, GFLOP/s of one worker by prompt length
              16   1024
  float32     57    141

KV reads, GB/s of one worker by bytes of one sequence and layer
            128 KiB
  bfloat16      2.1
            256 KiB
  float32      15.5

disk reads, GB/s by block
        128 KiB  8 MiB
  disk      1.1      3

other
  copying memory, one worker  42 GB/s
  one framework operator      2us

share of its rate that an engine keeps
  compute, with all workers busy  95%
  disk, with all workers busy     91%
  new|pair                        50%"""
    )


def test_progress_in_a_log_is_a_line_per_quarter() -> None:
    stream = io.StringIO()
    show = progress_on(stream)
    for what, share in (("preparing", 0.0), ("disk", 0.1), ("GEMM", 0.3), ("KV", 0.4), ("done", 1)):
        show(what, share)
    lines = ["calibrating 0%, preparing", "calibrating 30%, GEMM", "calibrating 100%, done"]
    assert stream.getvalue().splitlines() == lines


def test_progress_on_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    show = progress_on(stream)
    show("disk", 0.1)
    show("done", 1.0)
    assert stream.getvalue() == "\r\x1b[Kcalibrating  10%  disk\r\x1b[Kcalibrating 100%  done\n"
