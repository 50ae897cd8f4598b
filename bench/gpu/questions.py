"""What only a device can answer about launches and binaries."""

import ctypes
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from clock import Clock

from dovetail.codegen.gate.compile import compile_kernel
from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.choose import choose_layer
from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source
from dovetail.codegen.kernels.launch import grid_of, launch
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_spec import ReduceSpec


@dataclass(frozen=True, slots=True)
class Answer:
    """One question, what was done, and what came out."""

    question: str
    what: str
    answer: str


def launch_floor(clock: Clock, folder: Path) -> Iterator[Answer]:
    """Seconds of a chain of near-empty kernels in one graph: what a launch costs at best."""
    spec = ReduceSpec("moe_reduce", 4, 64, 2)
    module = load_source(emit_kernel(spec), folder, file_name(spec))
    part = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device=clock.device)
    ids = torch.zeros(1, 2, dtype=torch.int32, device=clock.device)
    y = torch.zeros(1, 64, dtype=torch.bfloat16, device=clock.device)
    values = {"part_ptr": part, "id_ptr": ids, "y_ptr": y, "num_tokens": 1}
    for chain in (1, 3, 5, 6):

        def work(count: int = chain) -> None:
            for _ in range(count):
                launch(module, spec, grid_of(spec, 1), values)

        timing = clock.time([work] * 8)
        found = f"{timing.seconds * 1e6:.2f} µs ({timing.how})"
        yield Answer("launch floor", f"{chain} dependent launches", found)


def binaries_load(layer: LayerSpec, arch: Arch, folder: Path) -> Iterator[Answer]:
    """Whether the driver takes the binaries that were compiled ahead of time for ``arch``."""
    driver = ctypes.CDLL("libcuda.so.1")
    torch.zeros(1, device="cuda")  # makes the device's primary context current
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    yield Answer("binaries", "driver's CUDA version", str(version.value))
    kernels = choose_layer(layer, arch, (2, 16))
    for spec in kernels.specs():
        module = load_source(emit_kernel(spec), folder, file_name(spec))
        for compiled in compile_kernel(module, spec, arch):
            handle, function = ctypes.c_void_p(), ctypes.c_void_p()
            code = driver.cuModuleLoadData(ctypes.byref(handle), compiled.binary)
            if not code:
                name = compiled.function.encode()
                code = driver.cuModuleGetFunction(ctypes.byref(function), handle, name)
            what = f"{compiled.function}, ELF OS ABI {compiled.elf_version}"
            yield Answer("binaries", what, "loads" if not code else f"CUDA error {code}")


def for_device(archs: dict[str, Arch], bandwidth: float, flops: float) -> Arch:
    """The architecture of the device at hand, with its measured rates.

    Raises KeyError where the device is of none that kernels are emitted for.
    """
    properties = torch.cuda.get_device_properties(0)
    name = "gfx942" if torch.version.hip else f"sm_{properties.major}0"
    arch = archs[name]
    # The model's rate is a peak, of which a measured product is a share already.
    return dataclasses.replace(
        arch,
        processors=properties.multi_processor_count,
        bandwidth=bandwidth,
        flops=max(flops, arch.flops),
    )
