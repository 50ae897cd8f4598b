"""What a GPU does: its rates, measured on it in a few seconds. It has never run on one.

Times are the device's own, by events; of several rounds the best counts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dovetail.ir.machine import Accelerator, Curve
from dovetail.runtime.gpu.device import require_gpu

ROUNDS = 5
WIDTH = 4096
"""Of the weights whose products are timed."""
GEMM_ROWS = (1, 16, 64, 256, 1024, 4096)
LENGTHS = (64, 256, 1024, 4096)
"""Query lengths of prefill attention, over 16 heads of 128."""
BLOCKS = (64 << 10, 1 << 20, 16 << 20, 128 << 20)
"""Bytes of copies over the link."""
STREAM = 1 << 30
"""Bytes that are read and written to time hbm."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def calibrate_gpu(index: int = 0) -> tuple[Accelerator, int]:
    """The GPU number ``index`` as the cost model sees it, and the bytes of its memory that are free
    now. Raises ModelError where torch finds none."""
    require_gpu()
    found: Any = torch.cuda.get_device_properties(index)
    device = torch.device("cuda", index)
    free, _ = torch.cuda.mem_get_info(index)
    gpu = Accelerator(
        name=found.name,
        count=1,
        gemm={name: _gemm(device, dtype) for name, dtype in DTYPES.items()},
        attention={name: _attention(device, dtype) for name, dtype in DTYPES.items()},
        hbm_bandwidth=_bandwidth(device),
        op_seconds=_op_seconds(device),
        h2d=_link(device, down=False),
        d2h=_link(device, down=True),
        arch=f"sm_{found.major}{found.minor}" if torch.version.cuda else found.gcnArchName,
        processors=found.multi_processor_count,
    )
    return gpu, free


def _best(call: Callable[[], object], calls: int) -> float:
    """Seconds of one call, of ``calls`` that are queued together."""
    cuda: Any = torch.cuda
    call()
    times: list[float] = []
    for _ in range(ROUNDS):
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return max(min(times), 1e-9)


def _gemm(device: torch.device, dtype: torch.dtype) -> Curve:
    """FLOP/s by rows with weights in hbm; for few rows that is what reading them allows."""
    weights = torch.ones(WIDTH, WIDTH, dtype=dtype, device=device)
    rates = []
    for rows in GEMM_ROWS:
        x = torch.ones(rows, WIDTH, dtype=dtype, device=device)
        seconds = _best(partial(torch.nn.functional.linear, x, weights), 10)
        rates.append(2 * rows * WIDTH * WIDTH / seconds)
    return Curve(tuple(float(n) for n in GEMM_ROWS), tuple(rates))


def _attention(device: torch.device, dtype: torch.dtype) -> Curve:
    """FLOP/s of causal attention by length, the masked half counted too."""
    rates = []
    for length in LENGTHS:
        x = torch.ones(1, 16, length, 128, dtype=dtype, device=device)
        attend = partial(torch.nn.functional.scaled_dot_product_attention, x, x, x, is_causal=True)
        seconds = _best(attend, 10)
        rates.append(4 * 16 * length * length * 128 / seconds)
    return Curve(tuple(float(n) for n in LENGTHS), tuple(rates))


def _bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy within hbm, read and written."""
    nbytes = int(min(STREAM, torch.cuda.mem_get_info(device)[0] // 4))
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return float(2 * nbytes / _best(lambda: target.copy_(source), 4))


def _op_seconds(device: torch.device) -> float:
    """Seconds that a kernel takes at least, queued behind others."""
    x = torch.ones(1, device=device)
    return _best(lambda: x.add_(1), 200)


def _link(device: torch.device, *, down: bool) -> Curve:
    """Bytes/s between pinned memory and the GPU, by block."""
    rates = []
    for nbytes in BLOCKS:
        here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(nbytes, dtype=torch.uint8, device=device)
        source, target = (there, here) if down else (here, there)
        rates.append(nbytes / _best(partial(target.copy_, source, non_blocking=True), 8))
    return Curve(tuple(float(n) for n in BLOCKS), tuple(rates))
