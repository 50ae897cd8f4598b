"""Calibration: the rates of this machine, as the cost model needs them, in about half a minute."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

import torch

from dovetail.ir.errors import InputError
from dovetail.ir.machine import Curve, Machine
from dovetail.runtime import calibrate_compute as compute
from dovetail.runtime import calibrate_host as host
from dovetail.runtime.calibrate_disk import RegionReader, late_rate, readable_files
from dovetail.runtime.calibrate_spec import Spec
from dovetail.runtime.calibrate_together import products, run_together

PROTOCOL = 4
"""Raised when figures of an older calibration can no longer be compared with new ones."""

PROCESS_BYTES = 4 << 20
"""What runs of all sizes were seen to hold beside their pools, rounded up."""

LARGEST_BLOCK, OTHER_BLOCKS, TOGETHER, ONE_WORKER, OPS = 0.16, 0.10, 0.24, 0.45, 0.05
"""Shares of the time: disk by the largest block, by the others, slowdowns, one worker's rates, and
small operators on all workers."""

Progress = Callable[[str, float], None]
"""Called with what is measured next and the share (0 to 1) of the time that is used."""
Step = Callable[[str, float], float]
"""Reports the next measurement and its share of the time; returns the seconds it may take."""


def calibrate(
    checkpoint_files: Sequence[Path],
    scratch: Path,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    seconds: float = 30,
    progress: Progress | None = None,
    spec: Spec | None = None,
) -> Machine:
    """Measures this machine in about ``seconds`` and returns it.

    The disk figures are those of ``checkpoint_files``. Where these are too small, torch's own
    libraries are read if they are on the disk of the folder ``scratch``, else a scratch file
    there; ``scratch`` also says how much disk is free. The slowdowns and ``op_seconds`` are those
    of the first dtype. ``slowdown`` also has ``cpu|cpu+disk``: one worker while all others and
    the reader run, and ``op|op``: small operators with every worker busy. Raises InputError for a
    dtype that torch lacks, a missing file or folder, and a full disk.
    """
    kinds = {name: _dtype(name) for name in dtypes}
    _check_inputs(checkpoint_files, scratch, kinds, seconds)
    spec = spec or Spec()
    step = _steps(seconds, progress)
    with _threads_restored():
        step("preparing", 0.0)
        with (
            readable_files(checkpoint_files, host.library_files(), scratch, spec) as files,
            RegionReader(files, max(spec.disk_blocks)) as reader,
        ):
            device = host.disk_device(files[0])
            disk, slowdown = _disk_and_slowdown(reader, spec, kinds[dtypes[0]], step)
        rates = _one_worker(spec, kinds, step)
        slowdown |= {"op|op": _op_keeps(kinds[dtypes[0]], step)}
        fresh = compute.fresh_rate(min(spec.fresh_bytes, host.memory_bytes() // 4))
        step("done", 0.0)
    return Machine(
        name=host.machine_name(),
        tiers={"ram": host.memory_bytes(), "disk": disk_usage(scratch).free},
        workers=host.workers(),
        gemm=rates.gemm,
        attention=rates.attention,
        kv_bandwidth=rates.kv_bandwidth,
        memory_bandwidth=rates.memory_bandwidth,
        op_seconds=rates.op_seconds,
        disk=disk,
        fresh_bandwidth=fresh,
        slowdown=slowdown,
        process_bytes=PROCESS_BYTES,
        silicon=host.silicon() | host.software() | {"disk": device},
    )


def _disk_and_slowdown(
    reader: RegionReader, spec: Spec, dtype: torch.dtype, step: Step
) -> tuple[Curve, dict[str, float]]:
    """The disk's curve, and what each engine keeps of its rate beside the others.

    All that reads comes in one run without a pause, largest block first: a pause would refill
    the burst credit of a rate-limited disk.
    """
    workers = host.workers()
    weights = compute.cold_weights(spec, dtype, _cold_bytes(spec), least=2 * workers)
    *smaller, block = sorted(spec.disk_blocks)

    def together(what: str, count: int, reads: bool, share: float) -> tuple[float, float]:
        return run_together(
            products(weights, spec.shared_rows, count),
            step(what, share),
            (reader, block) if reads else None,
        )

    def without_disk() -> tuple[float, float]:
        one, _ = together("one worker", 1, False, TOGETHER / 8)
        every, _ = together("all workers", workers, False, TOGETHER / 8)
        return one, every

    before = without_disk()
    alone = late_rate(reader.read(block, step(f"disk, blocks of {block}", LARGEST_BLOCK)))
    one_beside, _ = together("one worker beside the disk", 1, True, TOGETHER / 4)
    all_beside, disk_beside = together("all workers beside the disk", workers, True, TOGETHER / 4)
    curve = {block: alone}
    for size in reversed(smaller):
        budget = step(f"disk, blocks of {size}", OTHER_BLOCKS / len(smaller))
        curve[size] = late_rate(reader.read(size, budget))
    # Twice, seconds apart, and the better one counts: a visitor on a core shows in neither.
    one, every = (max(pair) for pair in zip(before, without_disk(), strict=True))
    return _curve(curve), {
        "cpu|cpu": min(1.0, every / one),
        "cpu|disk": min(1.0, one_beside / one),
        "disk|cpu": min(1.0, disk_beside / alone),
        "cpu|cpu+disk": min(1.0, all_beside / one),
    }


@dataclass(frozen=True, slots=True)
class _Rates:
    """What one compute worker reaches; the fields are those of Machine."""

    gemm: Mapping[str, Curve]
    attention: Mapping[str, Curve]
    kv_bandwidth: Mapping[str, Curve]
    memory_bandwidth: float
    op_seconds: float


def _one_worker(spec: Spec, kinds: Mapping[str, torch.dtype], step: Step) -> _Rates:
    """Measures in a thread of its own, as the workers of a run are."""
    points = len(spec.gemm_rows) + len(spec.attention_lengths) + len(spec.kv_lengths)
    quantised = {"int8": compute.int8_rate, "int4": compute.int4_rate}
    share = ONE_WORKER / (points * len(kinds) + len(quantised) * len(spec.quantised_rows) + 2)
    cold = _cold_bytes(spec)
    gemm, attention, kv = {}, {}, {}
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as worker:

        def measure(what: str, call: Callable[..., float], *args: object) -> float:
            return worker.submit(call, *args, step(what, share)).result()

        for name, dtype in kinds.items():
            weights = compute.cold_weights(spec, dtype, cold)
            gemm[name] = _curve(
                {r: measure(f"{name} GEMM", compute.gemm_rate, r, weights) for r in spec.gemm_rows}
            )
            del weights
            attention[name] = _curve(
                {
                    n: measure(f"{name} attention", compute.attention_rate, spec, n, dtype)
                    for n in spec.attention_lengths
                }
            )
            kv[name] = _curve(
                {
                    compute.kv_bytes(spec, n, dtype): measure(
                        f"{name} KV reads", compute.kv_rate, spec, n, dtype, cold
                    )
                    for n in spec.kv_lengths
                }
            )
        for form, rate in quantised.items():
            gemm[form] = _curve(
                {
                    r: measure(f"{form} GEMM", rate, r, spec.gemm_width, cold)
                    for r in spec.quantised_rows
                }
            )
        copy = measure("memory copy", compute.copy_rate, cold)
        op = measure("small operators", compute.op_seconds, next(iter(kinds.values())))
    return _Rates(gemm, attention, kv, copy, op)


def _op_keeps(dtype: torch.dtype, step: Step) -> float:
    """The share of its rate of small operators that a worker keeps when all run them: each takes
    its turn in the interpreter."""
    chain, workers = compute.op_chain(dtype), host.workers()
    one, _ = run_together([chain], step("small operators, one worker", OPS / 2))
    every, _ = run_together([chain] * workers, step("small operators, all workers", OPS / 2))
    return min(1.0, every / one)


def _curve(rates: Mapping[int, float]) -> Curve:
    sizes = sorted(rates)
    return Curve(tuple(float(size) for size in sizes), tuple(rates[size] for size in sizes))


def _cold_bytes(spec: Spec) -> int:
    return host.cold_bytes() if spec.cold_bytes is None else spec.cold_bytes


def _steps(seconds: float, progress: Progress | None) -> Step:
    used = 0.0

    def step(what: str, share: float) -> float:
        nonlocal used
        if progress:
            progress(what, min(1.0, used))
        used += share
        return share * seconds

    return step


@contextmanager
def _threads_restored() -> Iterator[None]:
    """One thread per operator inside; what a worker thread sets is seen by threads started later,
    so the old number is put back from the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(
            f"found the dtype {name!r}, expected a floating-point type of torch: "
            "write for example bfloat16 or float32"
        )
    return dtype


def _check_inputs(
    files: Sequence[Path], scratch: Path, kinds: Mapping[str, torch.dtype], seconds: float
) -> None:
    if not kinds:
        raise InputError("found no dtype to calibrate, expected at least one: name bfloat16")
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"found a calibration time of {seconds} s: give it 10 s or more")
    if not scratch.is_dir():
        raise InputError(f"the scratch folder {scratch} does not exist: make it or name another")
    for path in files:
        if not path.is_file():
            raise InputError(f"the checkpoint file {path} does not exist: check the folder's name")
