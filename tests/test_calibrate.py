"""Calibration: the shape of what it returns, on tiny sizes; never how fast anything is."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dovetail.ir import codec
from dovetail.ir.errors import InputError
from dovetail.ir.machine import Machine
from dovetail.runtime import calibrate_host as host
from dovetail.runtime.calibrate import calibrate
from dovetail.runtime.calibrate_compute import best_seconds, cold_weights
from dovetail.runtime.calibrate_disk import RegionReader, late_rate, readable_files
from dovetail.runtime.calibrate_spec import Spec
from dovetail.runtime.calibrate_together import best_window, products, run_together

TINY = Spec(
    fresh_bytes=1 << 20,
    gemm_rows=(1, 4),
    gemm_width=32,
    shared_rows=2,
    attention_lengths=(2, 4),
    kv_lengths=(2, 4),
    heads=2,
    head_dim=8,
    cold_bytes=16384,
    disk_blocks=(4096, 8192),
    scratch_bytes=65536,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> list[Path]:
    """Two files of 96 KiB, together more than the tiny spec asks for."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(bytes(range(256)) * 384)
    return files


def test_calibrate_measures_every_figure(tmp_path: Path, checkpoint: list[Path]) -> None:
    steps: list[tuple[str, float]] = []
    machine = calibrate(
        checkpoint,
        tmp_path,
        seconds=0.2,
        progress=lambda what, done: steps.append((what, done)),
        spec=TINY,
    )
    assert list(machine.gemm) == ["bfloat16", "float32", "int8", "int4"]
    for curves in (machine.attention, machine.kv_bandwidth):
        assert list(curves) == ["bfloat16", "float32"]
    assert machine.gemm["bfloat16"].x == (1.0, 4.0)
    assert machine.attention["float32"].x == (2.0, 4.0)
    # Two tensors of 2 heads x 8 values for each token: 64 bytes a token in bfloat16.
    assert machine.kv_bandwidth["bfloat16"].x == (128.0, 256.0)
    assert machine.kv_bandwidth["float32"].x == (256.0, 512.0)
    assert machine.disk.x == (4096.0, 8192.0)
    assert machine.memory_bandwidth > 0 and machine.op_seconds > 0
    assert set(machine.slowdown) == {"cpu|cpu", "cpu|disk", "disk|cpu", "cpu|cpu+disk", "op|op"}
    assert all(0 < share <= 1 for share in machine.slowdown.values())
    assert machine.workers == host.workers()
    assert machine.tiers["ram"] > 0 and machine.tiers["disk"] > 0
    assert {"processor", "cores", "memory", "kernel", "torch", "disk"} <= set(machine.silicon)
    assert codec.decode(codec.encode(machine), Machine) == machine
    done = [share for _, share in steps]
    assert done == sorted(done) and done[0] == 0.0 and done[-1] == pytest.approx(1.0)


def test_calibrate_puts_the_thread_count_back(tmp_path: Path, checkpoint: list[Path]) -> None:
    torch.set_num_threads(2)
    calibrate(checkpoint, tmp_path, dtypes=("float32",), seconds=0.05, spec=TINY)
    assert torch.get_num_threads() == 2
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtypes": ("bf16",)}, "found the dtype 'bf16', expected a floating-point type"),
        ({"dtypes": ("int8",)}, "found the dtype 'int8'"),
        ({"dtypes": ()}, "found no dtype to calibrate"),
        ({"seconds": 0}, "calibration time of 0 s: give it 10 s or more"),
        ({"seconds": float("nan")}, "calibration time of nan s"),
        ({"scratch": Path("no-such-folder")}, "scratch folder no-such-folder does not exist"),
        ({"checkpoint_files": [Path("no-such-file")]}, "file no-such-file does not exist"),
    ],
)
def test_calibrate_refuses(tmp_path: Path, change: dict[str, object], text: str) -> None:
    arguments: dict[str, object] = {"checkpoint_files": [], "scratch": tmp_path, "spec": TINY}
    with pytest.raises(InputError, match=text):
        calibrate(**(arguments | change))  # type: ignore[arg-type]


def test_small_checkpoints_are_replaced_by_standby_then_scratch(
    tmp_path: Path, checkpoint: list[Path]
) -> None:
    with readable_files(checkpoint, [], tmp_path, TINY) as files:
        assert files == checkpoint
    small = replace(TINY, scratch_bytes=128 * 1024)
    with readable_files(checkpoint[:1], checkpoint, tmp_path, small) as files:
        assert files == checkpoint
    with readable_files(checkpoint[:1], [], tmp_path, small) as files:
        (scratch,) = files
        assert scratch.stat().st_size == 128 * 1024
    assert not scratch.exists()


def test_scratch_file_goes_when_calibration_fails(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        readable_files([], [], tmp_path, TINY),
    ):
        raise RuntimeError("on purpose")
    assert list(tmp_path.iterdir()) == []


def test_scratch_file_refuses_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with (
        pytest.raises(InputError, match=r"65536 bytes: No space left on device; name another"),
        readable_files([], [], tmp_path, TINY),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_reader_counts_the_bytes_of_whole_regions(checkpoint: list[Path]) -> None:
    with RegionReader(checkpoint, 8192) as reader:
        marks = reader.read(4096, 0.0)
        stop = threading.Event()
        stop.set()
        stopped = reader.read(8192, 60.0, stop)
    assert [total for _, total in marks] == [0, 4096, 8192]
    assert [total for _, total in stopped] == [0, 8192]


def test_late_rate_leaves_the_burst_out() -> None:
    burst_then_steady = [(0.0, 0), (1.0, 900), (2.0, 1800), (3.0, 1900), (4.0, 2000)]
    assert late_rate(burst_then_steady) == 100.0
    assert late_rate([(0.0, 0), (2.0, 500)]) == 250.0


def test_best_window_is_that_of_all_workers_together() -> None:
    steady = [i / 10 for i in range(321)]
    assert best_window([steady]) == pytest.approx(10)
    # The other worker stands still in the first half and catches up in the second.
    uneven = [0.0] + [16 + i / 20 for i in range(321)]
    assert best_window([steady, uneven]) == pytest.approx(15, rel=0.05)
    assert best_window([[0.0, 1.0, 2.0], [5.0, 5.5, 6.0]]) == pytest.approx(1.5)


def test_best_seconds_runs_two_windows_even_without_time() -> None:
    calls: list[int] = []

    def call(index: int) -> None:
        calls.append(index)
        while time.thread_time() == 0:
            pass

    assert best_seconds(call, 3, 0.0) > 0
    assert calls == list(range(7))


def test_run_together_ends_when_a_worker_fails() -> None:
    weights = cold_weights(TINY, torch.float32, 1)
    weights[1] = torch.ones(1, 5)
    with pytest.raises(RuntimeError, match="shape"):
        run_together(products([weights[0], weights[1], weights[0], torch.ones(3, 7)], 2, 2), 0.01)


def test_cold_weights_fill_more_than_the_cache() -> None:
    weights = cold_weights(TINY, torch.bfloat16, 16384)
    assert [w.shape for w in weights] == [(32, 32)] * 8
    assert len({w.data_ptr() for w in weights}) == 8
    assert len(cold_weights(TINY, torch.bfloat16, 1, least=4)) == 4


def test_host_is_described_the_same_twice(tmp_path: Path) -> None:
    assert host.silicon() == host.silicon()
    assert host.software() == host.software()
    assert host.disk_device(tmp_path) == host.disk_device(tmp_path) != ""
    assert host.machine_name().endswith(f"-{host.workers()}core")
    assert host.cold_bytes() > host.l3_bytes() or host.cold_bytes() == 1024**3
