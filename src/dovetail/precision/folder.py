"""Experts in fewer bits, in a folder of their own: made once, read beside the checkpoint.

The folder holds safetensors files with the routed experts alone, and a record of what they were
made from. Everything else stays in the checkpoint and is read from there.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from dovetail.checkpoint import ModelFolder
from dovetail.ir import codec
from dovetail.ir.errors import CheckpointError, PlanError
from dovetail.ir.kernel_parts import Weights
from dovetail.ir.moves import ExpertFormat
from dovetail.ir.record_file import load_record
from dovetail.ir.units import format_bytes
from dovetail.passes.expert_precision import weights_of
from dovetail.runtime.safetensors_index import CheckpointIndex

RECORD_FILE = "experts.json"
RECORD_VERSION = 1


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a layer's matrices are from the checkpoint's: the mean and the largest over its
    experts' matrices of ``||W - W'|| / ||W||`` (Frobenius), W' being what is computed with."""

    layer: int
    body: str
    mean: float
    worst: float


@dataclass(frozen=True, slots=True)
class ConvertedFile:
    """A safetensors file: plain name, size in bytes, sha256 of its header."""

    name: str
    size: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class ConvertedExperts:
    """What a folder of converted experts holds, and of which checkpoint and task graph (digests).

    ``weights`` is the format to the last detail, ``source_bytes`` and ``nbytes`` are those of the
    routed experts, before and after.
    """

    version: int
    weights: Weights
    checkpoint: str
    graph: str
    source_bytes: int
    nbytes: int
    layers: tuple[LayerError, ...]
    files: tuple[ConvertedFile, ...]

    def digest(self) -> str:
        """Hex sha256 of the content."""
        return codec.digest(self)

    @property
    def mean(self) -> float:
        """Mean error of the layers."""
        return sum(layer.mean for layer in self.layers) / len(self.layers)

    @property
    def worst(self) -> LayerError:
        """The layer that holds the matrix with the largest error."""
        return max(self.layers, key=lambda layer: layer.worst)

    def summary(self) -> str:
        """Sizes and errors, in a line."""
        return (
            f"{format_bytes(self.nbytes)} instead of {format_bytes(self.source_bytes)} "
            f"({self.nbytes / self.source_bytes:.3f} of it); the weights are off by "
            f"{self.mean:.2%} in the mean and {self.worst.worst:.2%} at most, in layer "
            f"{self.worst.layer}"
        )


def converted_folder(checkpoint: Path, form: ExpertFormat) -> Path:
    """Where the experts of a checkpoint are in ``form`` unless a place is named: beside it."""
    named = checkpoint if checkpoint.name not in ("", "..") else Path(os.path.abspath(checkpoint))
    return named.parent / f"{named.name}-experts-{form}"


def command_of(checkpoint: Path, form: ExpertFormat, where: Path) -> str:
    """The command that converts a checkpoint's experts into the folder ``where``."""
    usual = where == converted_folder(checkpoint, form)
    return f"dovetail convert {checkpoint} --experts {form}" + ("" if usual else f" -o {where}")


def open_converted(
    folder: ModelFolder, form: ExpertFormat, where: Path | None = None, graph: str = ""
) -> CheckpointIndex:
    """The checkpoint's tensors and those of its experts in ``form``, as one index.

    Its shards are the checkpoint's alone, so that its digest still names the checkpoint; entries
    name their files. ``graph`` is the digest of the task graph that the experts must be of, ""
    for any. Raises CheckpointError, with the command to run, if the folder ``where`` (by default
    ``converted_folder``) is missing, torn, or holds something else.
    """
    place = where or converted_folder(folder.path, form)
    command = command_of(folder.path, form, place)
    if not place.is_dir():
        raise CheckpointError(
            f"{place}: no such folder; expected the experts of {folder.path} in {form}, which "
            f"`{command}` writes once"
        )
    record = read_record(place, command)
    again = f"remove that folder and run `{command}`"
    if record.weights != weights_of(form):
        raise CheckpointError(
            f"{place}: found experts in {_described(record.weights)}, expected "
            f"{_described(weights_of(form))}; {again}"
        )
    if record.checkpoint != folder.index.digest():
        raise CheckpointError(
            f"{place}: found the experts of another checkpoint ({record.checkpoint[:12]}), expected"
            f" those of {folder.path} ({folder.index.digest()[:12]}); {again}"
        )
    if graph and record.graph != graph:
        raise CheckpointError(
            f"{place}: its experts were written for another task graph ({record.graph[:12]}), "
            f"expected {graph[:12]}: dovetail or the model's config has changed since; {again}"
        )
    entries = _index_of(place, record, again).entries
    return replace(folder.index, entries=MappingProxyType({**folder.index.entries, **entries}))


def read_record(place: Path, command: str) -> ConvertedExperts:
    """The record of a folder that ``command`` makes. Raises CheckpointError."""
    if not (place / RECORD_FILE).exists():
        raise CheckpointError(
            f"{place}: holds no {RECORD_FILE}, so that it is no folder of converted experts, or "
            f"not a whole one; move it away and run `{command}`"
        )
    try:
        return load_record(
            place / RECORD_FILE,
            ConvertedExperts,
            RECORD_VERSION,
            "record of converted experts",
            command,
        )
    except PlanError as error:
        raise CheckpointError(f"{error}: remove {place} and run `{command}`") from None


def _described(weights: Weights) -> str:
    groups = f", a scale for {weights.scale_k} inputs" if weights.scale_k else ""
    return f"{weights.format} (order {weights.order}{groups})"


def _index_of(place: Path, record: ConvertedExperts, again: str) -> CheckpointIndex:
    """The index of a folder whose files are those of its record."""
    for file in record.files:
        try:
            size = (place / file.name).stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{place / file.name}: {error.strerror}; expected {file.size} bytes of converted "
                f"experts: {again}"
            ) from None
        if size != file.size:
            raise CheckpointError(
                f"{place / file.name}: found {size} bytes, expected the {file.size} of converted "
                f"experts that were written: {again}"
            )
    changed = f"{place}: its safetensors files are not those that {RECORD_FILE} names; {again}"
    try:
        index = CheckpointIndex.open(place)
    except CheckpointError as error:
        raise CheckpointError(changed) from error
    if files_in(index) != record.files:
        raise CheckpointError(changed)
    return index


def files_in(index: CheckpointIndex) -> tuple[ConvertedFile, ...]:
    """The files of a folder, by name."""
    shards = sorted(index.shards, key=lambda shard: shard.file.name)
    return tuple(ConvertedFile(s.file.name, s.size, s.header_sha256) for s in shards)
