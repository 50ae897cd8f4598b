"""Where every tensor of a checkpoint lies on disk, read from the safetensors headers alone.

A safetensors file is an 8-byte little-endian header length, a JSON header of that length, and the
tensors' bytes without holes. The headers are parsed here, so no tensor byte is touched, and
everything that a header claims is checked before a reader trusts it.
"""

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from dovetail.ir.errors import CheckpointError

# safetensors' own limit; a larger length is a corrupt file or not safetensors at all.
MAX_HEADER_BYTES = 100_000_000

# safetensors dtype -> (torch name, bytes per element)
_DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
_ITEMSIZE = dict(_DTYPES.values())


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor's place: ``nbytes`` at absolute ``offset`` of ``file``; dtype by torch's name."""

    key: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tensors of one file that a single read of ``nbytes`` at ``offset`` fetches.

    Every entry starts at a multiple of its itemsize once the run itself starts at a multiple of
    ``align`` in memory.
    """

    file: Path
    offset: int
    nbytes: int
    align: int
    entries: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its path, size in bytes, and the sha256 of its header."""

    file: Path
    size: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors of a checkpoint folder by key, and the files that hold them."""

    directory: Path
    shards: tuple[Shard, ...]
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, directory: Path) -> "CheckpointIndex":
        """Reads ``model.safetensors``, or else ``model.safetensors.index.json`` and its shards.

        Raises CheckpointError, naming the file, for anything missing, truncated or inconsistent.
        """
        promised = _promised_keys(directory)
        shards: list[Shard] = []
        entries: dict[str, TensorEntry] = {}
        for name, keys in promised.items():
            shard, found = _read_shard(directory / name, keys)
            missing = [key for key in keys if key not in found]
            if missing:
                raise CheckpointError(
                    f"{shard.file}: the checkpoint's index says that it holds {_some(missing)}, but"
                    f" its header, with {len(found)} tensors, does not list"
                    f" {'it' if len(missing) == 1 else 'them'}; the shard and the index are from"
                    f" different checkpoints: download both again"
                )
            for key, entry in found.items():
                if key in entries:
                    raise CheckpointError(
                        f"{shard.file}: tensor {key!r} is also in {entries[key].file.name}; each"
                        f" tensor must be in one shard: remove the shard that does not belong"
                    )
                entries[key] = entry
            shards.append(shard)
        return cls(directory, tuple(shards), MappingProxyType(entries))

    def digest(self) -> str:
        """Names the checkpoint: sha256 over file names, sizes and headers, without the data."""
        total = hashlib.sha256()
        for shard in sorted(self.shards, key=lambda s: s.file.name):
            total.update(f"{shard.file.name}\0{shard.size}\0{shard.header_sha256}\n".encode())
        return total.hexdigest()


def adjacent_runs(entries: Iterable[TensorEntry]) -> list[Run]:
    """Merges entries that touch in the same file into single reads, ordered by file and offset.

    An entry given twice is read once. A neighbour that could not be aligned to its itemsize
    together with the run before it starts a run of its own.
    """
    runs: list[Run] = []
    group: list[TensorEntry] = []
    for entry in sorted(set(entries), key=lambda e: (e.file, e.offset, e.nbytes, e.key)):
        if group and not _continues(group, entry):
            runs.append(_run(group))
            group = []
        group.append(entry)
    if group:
        runs.append(_run(group))
    return runs


def _continues(group: list[TensorEntry], entry: TensorEntry) -> bool:
    first, last = group[0], group[-1]
    touches = entry.file == last.file and entry.offset == last.offset + last.nbytes
    return touches and (entry.offset - first.offset) % entry.itemsize == 0


def _run(group: list[TensorEntry]) -> Run:
    first, last = group[0], group[-1]
    nbytes = last.offset + last.nbytes - first.offset
    return Run(first.file, first.offset, nbytes, max(e.itemsize for e in group), tuple(group))


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + rest


def _promised_keys(directory: Path) -> dict[str, list[str]]:
    """File name -> the keys that the index promises in it (none for a single file)."""
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: found no such folder; expected a checkpoint folder with config.json and"
            f" safetensors files: check the path"
        )
    if os.path.lexists(directory / "model.safetensors"):
        return {"model.safetensors": []}
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        _refuse_folder(directory)
    return _read_weight_map(index)


def _refuse_folder(directory: Path) -> NoReturn:
    expected = "expected model.safetensors or model.safetensors.index.json"
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors:
        found = f"found {_some(tensors)} without an index; {expected}: download the missing file"
    elif pickles:
        found = (
            f"found only PyTorch pickle files ({_some(pickles)}); {expected}. Pickle is never read:"
            f" convert the checkpoint with transformers' save_pretrained, which writes safetensors"
        )
    else:
        listed = _some(names) if names else "an empty folder"
        found = f"found {listed}; {expected}: check the path or download the weights"
    raise CheckpointError(f"{directory}: {found}")


def _read_weight_map(index: Path) -> dict[str, list[str]]:
    try:
        parsed = _parse_json(index, index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from error
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: found no weight_map with tensors in it, expected an object from tensor names"
            f" to file names; download the index again"
        )
    promised: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        # A plain name, so that an index cannot point the reader outside the checkpoint.
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise CheckpointError(
                f"{index}: tensor {key!r} is mapped to {name!r}, expected the plain name of a file"
                f" in this folder; download the index again"
            )
        promised.setdefault(name, []).append(key)
    return dict(sorted(promised.items()))


def _parse_json(file: Path, text: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(
                f"{file}: the JSON lists {twice!r} twice, expected every name once; the file is"
                f" corrupt: download it again"
            )
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: found {len(text)} bytes that are not JSON ({error}), expected a JSON object;"
            f" the file is corrupt or not safetensors: download it again"
        ) from error
    if not isinstance(parsed, dict):
        raise CheckpointError(
            f"{file}: the JSON is a {type(parsed).__name__}, expected an object; download it again"
        )
    return parsed


def _read_shard(file: Path, promised: list[str]) -> tuple[Shard, dict[str, TensorEntry]]:
    size, header = _read_header(file, promised)
    start = 8 + len(header)
    parsed = _parse_json(file, header)
    parsed.pop("__metadata__", None)
    entries = {key: _entry(file, start, key, value) for key, value in parsed.items()}
    _check_layout(file, start, size, entries.values())
    return Shard(file, size, hashlib.sha256(header).hexdigest()), entries


def _read_header(file: Path, promised: list[str]) -> tuple[int, bytes]:
    """The file's size in bytes and its JSON header."""
    try:
        info = file.stat()
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(
                f"{file}: expected a regular safetensors file, found another kind"
            )
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            _check_header_length(file, prefix, length, info.st_size)
            header = stream.read(length)
    except FileNotFoundError as error:
        holds = f", which should hold {_some(promised)}," if promised else ""
        raise CheckpointError(f"{file}: this shard{holds} is missing; download it again") from error
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {error.strerror}; check its permissions and its disk"
        ) from error
    return info.st_size, header


def _check_header_length(file: Path, prefix: bytes, length: int, size: int) -> None:
    if prefix == b"version ":
        raise CheckpointError(
            f"{file}: found a Git LFS pointer of {size} bytes, expected the weights themselves;"
            f" run 'git lfs pull' in the checkpoint folder"
        )
    if size < 8:
        raise CheckpointError(
            f"{file}: truncated: expected at least 8 bytes, found {size}; download it again"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: found a header length of {length} bytes, expected at most {MAX_HEADER_BYTES};"
            f" the file is corrupt or not safetensors: download it again"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file}: truncated in its header: expected at least {8 + length} bytes, found {size};"
            f" download it again"
        )


def _entry(file: Path, start: int, key: str, value: object) -> TensorEntry:
    """Checks one header record and makes its offset absolute."""

    def refuse(found: str, expected: str) -> NoReturn:
        raise CheckpointError(
            f"{file}: tensor {key!r} has {found}, expected {expected}; the header is corrupt:"
            f" download the file again"
        )

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(f"the record {str(value)[:80]}", "an object of dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{file}: tensor {key!r} has dtype {dtype!r}, expected one of {', '.join(_DTYPES)};"
            f" convert the checkpoint to one of these"
        )
    if not _is_sizes(shape):
        refuse(f"shape {str(shape)[:80]}", "a list of sizes >= 0")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"data_offsets {str(offsets)[:80]}", "two integers 0 <= begin <= end")
    name, itemsize = _DTYPES[dtype]
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * itemsize:
        refuse(
            f"{nbytes} bytes of data",
            f"{math.prod(shape) * itemsize} for shape {shape} of {itemsize}-byte {dtype}",
        )
    return TensorEntry(key, file, start + offsets[0], nbytes, name, tuple(shape))


def _is_sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > 64:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(file: Path, start: int, size: int, entries: Iterable[TensorEntry]) -> None:
    """The data must tile the rest of the file: no overlap, no hole, nothing missing or left."""
    ordered = sorted(entries, key=lambda e: (e.offset, e.nbytes))
    end = ordered[-1].offset + ordered[-1].nbytes if ordered else start
    if end != size:
        kind = "truncated" if end > size else "too long for its header"
        raise CheckpointError(
            f"{file}: {kind}: expected {end} bytes, found {size}; download it again"
        )
    if ordered and ordered[0].offset != start:
        raise CheckpointError(
            f"{file}: tensor {ordered[0].key!r} starts at byte {ordered[0].offset}, expected"
            f" {start}; the header is corrupt: download the file again"
        )
    for before, after in pairwise(ordered):
        if after.offset != before.offset + before.nbytes:
            kind = (
                "overlaps" if after.offset < before.offset + before.nbytes else "leaves a hole to"
            )
            raise CheckpointError(
                f"{file}: tensor {after.key!r} {kind} {before.key!r}: it starts at byte"
                f" {after.offset}, expected {before.offset + before.nbytes}; the header is corrupt:"
                f" download the file again"
            )
