"""What names the trials of a rung's kernels in the tuning database, and the GPU they are of."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from dovetail.codegen.kernels.driver import CudaDriver
from dovetail.ir import codec
from dovetail.ir.errors import ModelError
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.ir.workload import Workload
from dovetail.runtime import calibrate_host as host
from dovetail.tuning.staleness import kernel_code_digest
from dovetail.tuning_db.facts import Key, Protocol, Task

SOURCE = "uniform"
"""Where the batches come from: tokens choose experts with equal odds."""
Mode = Literal["graphs", "interpreted"]


def rung_task(layer: LayerSpec, arch: str, bucket: tuple[int, int]) -> Task:
    """What is tuned. The code of a trial's kernels is a function of this and of their specs.

    A layer's name is a model's and in no kernel: models of the same sizes share their trials.
    """
    sizes = {name: getattr(layer, name) for name in ("experts", "hidden", "inter", "top_k", "x")}
    return Task(
        "kernel",
        {
            "layer": codec.digest(replace(layer, name="")),
            "arch": arch,
            "first": bucket[0],
            "last": bucket[1],
            **sizes,
        },
    )


def rung_workload(bucket: tuple[int, int]) -> Workload:
    """The batch that is timed: the most tokens of the bucket."""
    return Workload.of([bucket[1]], 1)


def rung_key(
    layer: LayerSpec, default: LayerKernels, mode: Mode, environment: tuple[dict[str, str], ...]
) -> Key:
    """What trials of a rung must share to be compared; ``environment`` is silicon and software."""
    batch = rung_workload(default.bucket)
    silicon, software = environment
    return Key(
        rung_task(layer, default.arch, default.bucket),
        batch,
        Protocol(mode, batch, codec.digest(default)),
        silicon,
        software,
        SOURCE,
    )


def gpu_environment() -> tuple[dict[str, str], dict[str, str]]:
    """Silicon and software of the current GPU. Raises ModelError where there is none."""
    if not torch.cuda.is_available():
        raise ModelError(
            "kernels are timed on a GPU, but torch finds none here (torch "
            f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}): run this on the "
            "machine that the plan is for; --target host tries the search with no GPU, and "
            "--replay FILE.db decides from another machine's rows"
        )
    found: Any = torch.cuda.get_device_properties(0)
    silicon = {
        "device_name": found.name,
        "cc": f"{found.major}.{found.minor}" if torch.version.hip is None else found.gcnArchName,
        "sm_count": str(found.multi_processor_count),
        "l2_bytes": str(found.L2_cache_size),
        # Rounded, because drivers keep more or less of it to themselves.
        "hbm_bytes": f"{found.total_memory / 1024**3:.0f} GiB",
    }
    clock = getattr(found, "memory_clock_rate", 0)
    silicon |= {"mem_clock_khz": str(clock)} if clock else {}
    return silicon, _software() | {"driver": _driver()}


def host_environment() -> tuple[dict[str, str], dict[str, str]]:
    """Silicon and software where kernels are interpreted."""
    return host.silicon(), _software()


def gpu_fields() -> Mapping[str, str]:
    """The current GPU's environment in one, empty where kernels cannot be timed."""
    try:
        silicon, software = gpu_environment()
    except ModelError:
        return {}
    return silicon | software


def _software() -> dict[str, str]:
    try:
        from triton import __version__ as triton  # type: ignore[import-untyped]
    except ImportError:
        raise ModelError(
            "kernels are compiled by Triton, which is not installed here: install triton, or "
            "decide from another machine's rows with --replay FILE.db"
        ) from None
    return {
        "triton": triton,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip or "none"),
        "python": host.software()["python"],
        "dovetail": kernel_code_digest(),
    }


def _driver() -> str:
    """The CUDA version that the driver speaks; of AMD's nothing is told."""
    return str(CudaDriver().version()) if torch.version.hip is None else "hip"
