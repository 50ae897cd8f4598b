"""How converted experts lie on disk: `task graph in fewer bits -> safetensors files`.

Layers follow each other, in a layer its experts, and of an expert its tensors, scales and biases
before matrices. So one read brings an expert, or several neighbours, and every tensor of it starts
where its elements are aligned.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import ITEMSIZE, Experts, ExpertTensor, TaskGraph

FILE_BYTES = 4 * 10**9
"""Most bytes of a file, unless one layer has more."""
WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"int8": "I8", "uint8": "U8", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """One safetensors file: its layers in order, what stands before their bytes, and their keys."""

    name: str
    layers: tuple[int, ...]
    header: bytes
    keys: tuple[str, ...]


def in_file_order(experts: Experts) -> tuple[ExpertTensor, ...]:
    """The tensors of one expert as they follow each other: wider elements first.

    A matrix of bytes has any number of them, so that what came after one might start anywhere.
    """
    return tuple(sorted(experts.tensors, key=lambda tensor: -ITEMSIZE[tensor.dtype]))


def converted_bytes(graph: TaskGraph) -> int:
    """Bytes of the routed experts of all layers, as the graph has them."""
    found = (experts_of(graph, layer) for layer in range(len(graph.layers)))
    return sum(experts.count * experts.nbytes for experts in found if experts is not None)


def files_of(graph: TaskGraph, file_bytes: int) -> tuple[ExpertFile, ...]:
    """The files of a graph's routed experts, each of whole layers and at most ``file_bytes``, or
    of one layer that is larger: neighbours in two files would be two reads."""
    shards: list[list[int]] = []
    room = 0
    for layer in range(len(graph.layers)):
        experts = experts_of(graph, layer)
        if experts is None:
            continue
        size = experts.count * experts.nbytes
        if not shards or size > room:
            shards.append([])
            room = file_bytes
        shards[-1].append(layer)
        room -= size
    return tuple(
        _file(graph, f"model-{number:05d}-of-{len(shards):05d}.safetensors", layers)
        if len(shards) > 1
        else _file(graph, WHOLE_FILE, layers)
        for number, layers in enumerate(shards, start=1)
    )


def index_text(files: tuple[ExpertFile, ...], nbytes: int) -> str:
    """The content of the index beside several files that hold ``nbytes`` of tensors."""
    places = {key: file.name for file in files for key in file.keys}
    index = {"metadata": {"total_size": nbytes}, "weight_map": places}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _file(graph: TaskGraph, name: str, layers: list[int]) -> ExpertFile:
    tensors = dict(_tensors(graph, layers))
    ends = pairwise(accumulate((tensor.nbytes for tensor in tensors.values()), initial=0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (key, tensor), (start, end) in zip(tensors.items(), ends, strict=True):
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return ExpertFile(name, tuple(layers), len(text).to_bytes(8, "little") + text, tuple(tensors))


def _tensors(graph: TaskGraph, layers: list[int]) -> Iterator[tuple[str, ExpertTensor]]:
    for layer in layers:
        experts = experts_of(graph, layer)
        assert experts is not None
        for expert in range(experts.count):
            for tensor in in_file_order(experts):
                yield tensor.key.format(layer=layer, expert=expert), tensor
