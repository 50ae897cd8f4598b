"""Writes a checkpoint's routed experts in fewer bits: `checkpoint, format -> folder`.

One expert is in memory at a time. The folder is written under another name and gets its own when
it is whole.
"""

import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dovetail.checkpoint import ModelFolder
from dovetail.codegen.kernels.quantise import pack, unpack
from dovetail.convert import (
    RECORD_FILE,
    RECORD_VERSION,
    ConvertedExperts,
    LayerError,
    command_of,
    files_in,
    open_converted,
    read_record,
)
from dovetail.convert_layout import (
    INDEX_FILE,
    ExpertFile,
    converted_bytes,
    files_of,
    in_file_order,
    index_text,
)
from dovetail.ir import codec
from dovetail.ir.errors import CheckpointError, InputError
from dovetail.ir.kernel_parts import Weights
from dovetail.ir.moves import ExpertFormat
from dovetail.ir.placement import experts_of
from dovetail.ir.record_file import fields, write_whole
from dovetail.ir.task_graph import SCALE, TaskGraph
from dovetail.ir.units import format_bytes
from dovetail.locked_file import open_locked
from dovetail.passes.expert_precision import weights_of, with_precision
from dovetail.runtime.direct_io import Reader
from dovetail.runtime.pools import torch_dtype
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.weight_store import Tensors, WeightStore

PIECE_VALUES = 1 << 17
"""Weights of a matrix that are rounded at a time: what is made of them stays in the caches."""
LOCK = "converting.lock"
_SMALL_FILES_BYTES = 1 << 20
_OURS = ("model*.safetensors", INDEX_FILE, RECORD_FILE, f"{RECORD_FILE}.tmp", f"{INDEX_FILE}.tmp")

Progress = Callable[[int, int], None]


def convert(
    folder: ModelFolder,
    graph: TaskGraph,
    form: ExpertFormat,
    out: Path,
    progress: Progress | None = None,
) -> ConvertedExperts:
    """Write the experts of ``folder``, captured as ``graph``, in ``form`` to the folder ``out``,
    unless they are there already, and return the record of what it holds.

    ``progress(done, total)`` is told bytes. Raises InputError if the model has no experts that
    convert, something else is at ``out``, another process writes there or the disk has no room,
    CheckpointError for weights that cannot be read or are not finite, and OSError.
    """
    if all(body.experts is None for body in graph.bodies):
        raise InputError(
            f"{folder.path}: found no routed experts that dovetail reads one by one, so that there "
            "is nothing to convert; run the model as it is"
        )
    target = with_precision(graph, form)
    found = converted_before(folder, graph, form, out)
    if found is not None:
        return found
    with _partial(out) as partial:
        _check_room(partial, converted_bytes(target))
        files = files_of(target)
        layers = _write_files(folder, graph, target, files, form, partial, progress)
        if len(files) > 1:
            write_whole(index_text(files, converted_bytes(target)), partial / INDEX_FILE)
        record = ConvertedExperts(
            RECORD_VERSION,
            form,
            folder.index.digest(),
            codec.digest(graph),
            converted_bytes(graph),
            converted_bytes(target),
            layers,
            files_in(CheckpointIndex.open(partial)),
        )
        write_whole(json.dumps(fields(record), indent=1) + "\n", partial / RECORD_FILE)
    return record


def converted_before(
    folder: ModelFolder, graph: TaskGraph, form: ExpertFormat, out: Path
) -> ConvertedExperts | None:
    """The record of ``out`` if it holds these experts whole, None if nothing is there yet. Raises
    InputError for anything else, which is never overwritten."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        open_converted(folder, form, out, codec.digest(graph))
        return read_record(out, command_of(folder.path, form, out))
    except CheckpointError as error:
        raise InputError(
            f"{out}: it is there already and is not overwritten; expected nothing, or the experts "
            f"of {folder.path} in {form}. {error}; or choose another folder with -o"
        ) from None


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
            "leaves; move it away, or choose another folder with -o"
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
    target: TaskGraph,
    files: Sequence[ExpertFile],
    form: ExpertFormat,
    partial: Path,
    progress: Progress | None,
) -> tuple[LayerError, ...]:
    """Write the files; returns the error of every layer."""
    total, done = converted_bytes(target), 0
    layers: list[LayerError] = []
    with Reader() as reader:
        for file in files:
            with (partial / file.name).open("wb") as stream:
                stream.write(file.header)
                for layer in file.layers:
                    errors: list[float] = []
                    for tensors in _experts_of_layer(folder, graph, layer, reader, form, errors):
                        done += _write(stream, target, layer, tensors)
                        if progress is not None:
                            progress(done, total)
                    layers.append(_layer_error(graph, layer, errors))
                stream.flush()
                os.fsync(stream.fileno())
    return tuple(layers)


def _experts_of_layer(
    folder: ModelFolder,
    graph: TaskGraph,
    layer: int,
    reader: Reader,
    form: ExpertFormat,
    errors: list[float],
) -> Iterator[Tensors]:
    """The converted tensors of one expert after the other; adds every matrix's error."""
    experts = experts_of(graph, layer)
    assert experts is not None
    store = WeightStore(graph, folder.index, reader)
    buffer = memoryview(b"")
    for expert in range(experts.count):
        unit = store.unit("experts", layer, range(expert, expert + 1))
        if len(buffer) < unit.nbytes:
            buffer = memoryview(mmap.mmap(-1, unit.nbytes))
        [source] = store.read(unit, buffer, streamed=False)
        made: Tensors = {}
        for tensor in experts.tensors:
            if len(tensor.shape) != 2:
                made[tensor.part] = source[tensor.part]
                continue
            turned = experts.transposed or tensor.transposed
            matrix = source[tensor.part].T if turned else source[tensor.part]
            stored, scales, error = rounded_matrix(matrix, weights_of(form))
            if not math.isfinite(error):
                raise CheckpointError(
                    f"{folder.path}: {tensor.part} of expert {expert} in layer {layer} holds "
                    "infinities or NaN, expected finite weights; the files are damaged: download "
                    "the checkpoint again"
                )
            made |= {tensor.part: stored, tensor.part + SCALE: scales}
            errors.append(error)
        yield made


def rounded_matrix(matrix: Tensor, weights: Weights) -> tuple[Tensor, Tensor, float]:
    """``matrix`` [outputs, inputs] as ``quantise.pack`` stores it, its scales, and its error
    ``||W - W'|| / ||W||``, which is not finite if the matrix is not.

    Goes by pieces of outputs, which have scales of their own, so that the memory it takes besides
    the result does not grow with the matrix.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    lost = norm = 0.0
    for piece in torch.split(matrix, max(1, PIECE_VALUES // matrix.shape[1])):
        stored, scales = pack(piece[None], weights)
        assert scales is not None
        lost += float(unpack(stored, scales, weights)[0].sub_(piece).square_().sum())
        norm += float(piece.double().square_().sum())
        parts.append((stored[0], scales[0]))
    error = math.sqrt(lost / norm) if norm else 0.0
    elements, scales_of = zip(*parts, strict=True)
    return torch.cat(elements, 1 if weights.order == "kn" else 0), torch.cat(scales_of), error


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
    # To six digits: sums depend on the number of threads, the file should not.
    return LayerError(layer, graph.body(layer).name, *(float(f"{x:.6g}") for x in (mean, worst)))
