"""What only a device can answer about launches and binaries."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from clock import Clock
from slots import Slots

from dovetail.codegen.gate.layer_numbers import random_weights
from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source
from dovetail.codegen.kernels.ladder import ladder_loader
from dovetail.codegen.kernels.launch import grid_of, launch
from dovetail.ir.errors import InputError, ModelError
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_spec import ReduceSpec
from dovetail.kernels.binaries import here
from dovetail.kernels.files import write_kernels


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


def binaries_run(layer: LayerSpec, arch: Arch, folder: Path) -> Iterator[Answer]:
    """Whether binaries that are compiled ahead of time load and run, bit for bit as the compiled
    source does, and what the ladder says of each."""
    counts = (16, 4096)
    slots = Slots(layer, random_weights(layer, "cuda"), arch, counts)
    made = write_kernels(slots.layer, arch, folder / "binaries", counts, binaries=True)
    place, driver = here()
    yield Answer("binaries", "driver's CUDA version", str(place.driver))
    for binary in (binary for reference in made.kernels for binary in reference.binaries):
        yield Answer("binaries", binary.file, f"ELF OS ABI {binary.elf}, {binary.compiler}")
    notes: list[str] = []
    load = ladder_loader(
        made.kernels, folder / "binaries", layer.top_k, place, driver, notes.append
    )
    compiled, from_source = slots.runner(folder, load), slots.runner(folder)
    yield from (Answer("binaries", "taken from source", note) for note in notes)
    for tokens in (1, 16, 4096):
        x = torch.randn(tokens, layer.hidden, device="cuda").to(slots.pool.dtype)
        ids = torch.rand(tokens, layer.experts, device="cuda").topk(layer.top_k).indices
        routed = torch.rand(tokens, layer.top_k, device="cuda")
        try:
            one = compiled(x, ids, routed).clone()
        except (ModelError, InputError) as error:
            yield Answer("binaries", f"{tokens} tokens", str(error))
            continue
        same = torch.equal(one, from_source(x, ids, routed))
        yield Answer("binaries", f"{tokens} tokens", "bit-equal" if same else "**differs**")


def for_device(archs: dict[str, Arch], bandwidth: float, flops: float) -> Arch:
    """The architecture of the device at hand, with its measured rates.

    Raises KeyError where the device is of none that kernels are emitted for.
    """
    properties = torch.cuda.get_device_properties(0)
    name = "gfx942" if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    arch = archs[name]
    # The model's rate is a peak, of which a measured product is a share already.
    return dataclasses.replace(
        arch,
        processors=properties.multi_processor_count,
        bandwidth=bandwidth,
        flops=max(flops, arch.flops),
    )
