"""Random-weight OLMoE checkpoints of any size, written in memory that does not grow with them."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

Progress = Callable[[int, int], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16"}
_EXPERTS_KEY = "model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
_MAX_SHARD_BYTES = 4 * 10**9
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class DemoSpec:
    """Dimensions of a random-weight OLMoE checkpoint; ``vocab`` is at least the tokenizer's 259."""

    hidden: int
    layers: int
    heads: int
    experts: int
    experts_per_token: int
    intermediate: int
    vocab: int
    max_positions: int = 4096

    def values(self) -> int:
        """How many parameters the checkpoint has."""
        groups = _tensor_groups(self)
        return sum(math.prod(shape) for group in groups for shape in group.values())

    def config(self) -> dict[str, Any]:
        """The entries of ``config.json`` that depend on the dimensions."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_positions,
            # OLMoE does not renormalise the gates of the chosen experts.
            "norm_topk_prob": False,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocab,
        }


RANDOM_SPECS = {
    "400MB": DemoSpec(512, 8, 8, 32, 4, 480, 1024),
    "1GB": DemoSpec(1024, 9, 16, 32, 4, 512, 1024),
    "OLMoE-1B-7B": DemoSpec(2048, 16, 16, 64, 8, 1024, 50304),
}


def write_random_weights(
    directory: Path,
    spec: DemoSpec,
    dtype: str,
    seed: int = 0,
    progress: Progress | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Write ``spec``'s safetensors files, and their index where there are several.

    A file holds whole layers and at most ``max_shard_bytes``, unless one layer is larger; it gets
    its name when it is complete, and the index is written last. ``progress(done, total)`` is told
    bytes. Raises OSError if the disk is full or unwritable.
    """
    width = DTYPES[dtype].itemsize
    shards = _pack(_tensor_groups(spec), width, max_shard_bytes)
    total = spec.values() * width
    done = 0
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            name = "model.safetensors"
        partial = directory / f"{name}.partial"
        with partial.open("wb") as file:
            file.write(_header(shapes, dtype))
            for key, shape in shapes.items():
                for written in _write_values(file, spec, key, shape, dtype, generator):
                    done += written
                    if progress is not None:
                        progress(done, total)
        partial.replace(directory / name)
        weight_map |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _tensor_groups(spec: DemoSpec) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes in the order of use: embedding, each layer, norm and head."""
    hidden, inter = spec.hidden, spec.intermediate
    groups: list[dict[str, tuple[int, ...]]]
    groups = [{"model.embed_tokens.weight": (spec.vocab, hidden)}]
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        group: dict[str, tuple[int, ...]] = {prefix + "mlp.gate.weight": (spec.experts, hidden)}
        group |= {attention + f"{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        group |= {attention + f"{p}_norm.weight": (hidden,) for p in "qk"}
        group |= {prefix + f"{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
        for expert in range(spec.experts):
            for projection in ("gate", "up", "down"):
                key = _EXPERTS_KEY.format(layer=layer, expert=expert, projection=projection)
                group[key] = (hidden, inter) if projection == "down" else (inter, hidden)
        groups.append(group)
    groups.append({"model.norm.weight": (hidden,), "lm_head.weight": (spec.vocab, hidden)})
    return groups


def _pack(
    groups: list[dict[str, tuple[int, ...]]], width: int, max_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Consecutive groups joined into shards of at most ``max_bytes``, each sorted by name."""
    shards: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for group in groups:
        size = width * sum(math.prod(shape) for shape in group.values())
        if not shards or size > room:
            shards.append({})
            room = max_bytes
        shards[-1] |= group
        room -= size
    return [dict(sorted(shard.items())) for shard in shards]


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """The head of a safetensors file whose tensors follow in the order of ``shapes``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, shape in shapes.items():
        end = start + math.prod(shape) * DTYPES[dtype].itemsize
        header[key] = {
            "dtype": _SAFETENSORS_DTYPE[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_values(
    file: BinaryIO,
    spec: DemoSpec,
    key: str,
    shape: tuple[int, ...],
    dtype: str,
    generator: torch.Generator,
) -> Iterator[int]:
    """Write one tensor piece by piece, yielding the bytes of each piece."""
    left = math.prod(shape)
    while left:
        values = torch.ones(min(left, _CHUNK_VALUES))
        if len(shape) == 2:
            values.normal_(0.0, _deviation(spec, key, shape), generator=generator)
        yield file.write(values.to(DTYPES[dtype]).view(torch.uint8).numpy().data)
        left -= len(values)


def _deviation(spec: DemoSpec, key: str, shape: tuple[int, ...]) -> float:
    """A standard deviation that keeps hidden states near unit variance through all layers."""
    if key == "model.embed_tokens.weight":
        return 1.0
    # What a layer adds to the residual is scaled down, as there are two additions a layer.
    branches = 2 * spec.layers if key.endswith(("o_proj.weight", "down_proj.weight")) else 1
    return 1.0 / math.sqrt(shape[1] * branches)
