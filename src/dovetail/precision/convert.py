"""Writes a checkpoint's routed experts in fewer bits: `checkpoint, format -> folder`.

One expert is in memory at a time. The folder is written under another name and gets its own when
it is whole.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from dovetail.checkpoint import ModelFolder
from dovetail.ir import codec
from dovetail.ir.errors import CheckpointError, InputError
from dovetail.ir.moves import ExpertFormat
from dovetail.ir.placement import experts_of
from dovetail.ir.record_file import fields, write_whole
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_bytes
from dovetail.locked_file import open_locked
from dovetail.passes.expert_precision import weights_of, with_precision
from dovetail.precision.folder import (
    RECORD_FILE,
    RECORD_VERSION,
    ConvertedExperts,
    LayerError,
    command_of,
    files_in,
    open_converted,
    read_record,
)
from dovetail.precision.layout import (
    FILE_BYTES,
    INDEX_FILE,
    ExpertFile,
    converted_bytes,
    files_of,
    in_file_order,
    index_text,
)
from dovetail.precision.rounding import Rounding
from dovetail.runtime.pools import torch_dtype
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.weight_store import Tensors

LOCK = "converting.lock"
_SMALL_FILES_BYTES = 1 << 20
_OURS = ("model*.safetensors", INDEX_FILE, RECORD_FILE, f"{RECORD_FILE}.tmp", f"{INDEX_FILE}.tmp")

Progress = Callable[[int], None]


def convert(
    folder: ModelFolder,
    graph: TaskGraph,
    form: ExpertFormat,
    out: Path,
    progress: Progress | None = None,
    file_bytes: int = FILE_BYTES,
) -> ConvertedExperts:
    """Write the experts of ``folder``, captured as ``graph``, in ``form`` to the folder ``out``,
    unless they are there already, and return the record of what it holds.

    ``progress`` is told the bytes of every expert that is written; a file has ``file_bytes`` at
    most, or one layer. Raises InputError if the model has no experts that convert, something else
    is at ``out``, another process writes there or the disk has no room, CheckpointError for
    weights that cannot be read or are not finite, and OSError.
    """
    target = target_of(folder, graph, form)
    found = converted_before(folder, graph, form, out)
    if found is not None:
        return found
    with _partial(out) as partial:
        _check_room(partial, converted_bytes(target))
        files = files_of(target, file_bytes)
        layers = _write_files(folder, graph, form, files, partial, progress)
        if len(files) > 1:
            write_whole(index_text(files, converted_bytes(target)), partial / INDEX_FILE)
        record = ConvertedExperts(
            RECORD_VERSION,
            weights_of(form),
            folder.index.digest(),
            codec.digest(graph),
            converted_bytes(graph),
            converted_bytes(target),
            layers,
            files_in(CheckpointIndex.open(partial)),
        )
        write_whole(json.dumps(fields(record), indent=1) + "\n", partial / RECORD_FILE)
    return record


def target_of(folder: ModelFolder, graph: TaskGraph, form: ExpertFormat) -> TaskGraph:
    """The graph that reads converted experts. Raises InputError if there are none to convert."""
    if all(body.experts is None for body in graph.bodies):
        raise InputError(
            f"{folder.path}: found no routed experts that dovetail reads one by one, so that there "
            "is nothing to convert; run the model as it is"
        )
    return with_precision(graph, form)


def converted_before(
    folder: ModelFolder, graph: TaskGraph, form: ExpertFormat, out: Path
) -> ConvertedExperts | None:
    """The record of ``out`` if it holds these experts whole, None if nothing is there yet. Raises
    InputError for anything else, which is never overwritten."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / RECORD_FILE).exists():
        raise InputError(
            f"{out}: found {'other files in it' if out.is_dir() else 'a file'}, expected nothing "
            "or a folder of converted experts; nothing was written: choose another place with -o"
        )
    try:
        open_converted(folder, form, out, codec.digest(graph))
    except CheckpointError as error:
        raise InputError(f"{error}; or choose another place with -o") from None
    return read_record(out, command_of(folder.path, form, out))


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A folder of this process alone that takes the place of ``out`` at the end of the context,
    and is gone if it does not come to that."""
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    alone = f"expected to be the only one that writes {out}: wait until it is done"
    with ExitStack() as at_end:
        at_end.callback(os.close, open_locked(partial / LOCK, 0, alone))
        _clear(partial)
        try:
            yield partial
            (partial / LOCK).unlink()
            partial.replace(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _clear(partial: Path) -> None:
    """Remove what a conversion that was killed has left. Raises InputError for other files."""
    left = {path for name in _OURS for path in partial.glob(name)}
    others = sorted(set(partial.iterdir()) - left - {partial / LOCK})
    if others:
        raise InputError(
            f"{partial}: found {others[0].name}, expected only what an interrupted conversion "
            "leaves; move it away, or choose another place with -o"
        )
    for path in left:
        path.unlink()


def _check_room(place: Path, nbytes: int) -> None:
    needed = nbytes + _SMALL_FILES_BYTES
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"the converted experts need {format_bytes(needed, up=True)} in {place.parent}, and "
            f"the disk has {format_bytes(free)} free; nothing was written: free some space, or "
            "choose a folder on another disk with -o"
        )


def _write_files(
    folder: ModelFolder,
    graph: TaskGraph,
    form: ExpertFormat,
    files: Sequence[ExpertFile],
    partial: Path,
    progress: Progress | None,
) -> tuple[LayerError, ...]:
    """Write the files; returns the error of every layer."""
    target = with_precision(graph, form)
    layers: list[LayerError] = []
    with Rounding(graph, folder.index, form) as rounding:
        for file in files:
            with (partial / file.name).open("wb") as stream:
                stream.write(file.header)
                for layer in file.layers:
                    errors: list[float] = []
                    for expert in rounding.experts(layer):
                        written = _write(stream, target, layer, expert.tensors)
                        errors += expert.errors
                        if progress is not None:
                            progress(written)
                    layers.append(_layer_error(graph, layer, errors))
                stream.flush()
                os.fsync(stream.fileno())
    return tuple(layers)


def _write(stream: BinaryIO, target: TaskGraph, layer: int, tensors: Tensors) -> int:
    """Write one expert; returns its bytes."""
    experts = experts_of(target, layer)
    assert experts is not None
    for spec in in_file_order(experts):
        tensor = tensors[spec.part].contiguous()
        assert tuple(tensor.shape) == spec.shape and tensor.dtype == torch_dtype(spec.dtype)
        stream.write(tensor.view(torch.uint8).numpy().data)
    return experts.nbytes


def _layer_error(graph: TaskGraph, layer: int, errors: Sequence[float]) -> LayerError:
    mean, worst = sum(errors) / len(errors) if errors else 0.0, max(errors, default=0.0)
    # To six digits: sums may differ in the last ones between machines, the file should not.
    return LayerError(layer, graph.body(layer).name, *(float(f"{x:.6g}") for x in (mean, worst)))
