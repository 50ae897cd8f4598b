"""Converted experts when all is not well: cut off half-way, torn, of something else, no room."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert_cases import Source, tiny_source
from tests.e2e.support import save_tiny
from tests.families import tiny_model

from dovetail.checkpoint import ModelFolder
from dovetail.cli import main
from dovetail.ir import codec
from dovetail.ir.errors import CheckpointError, InputError
from dovetail.locked_file import open_locked
from dovetail.precision.convert import LOCK, convert
from dovetail.precision.folder import RECORD_FILE, open_converted

WHOLE = "model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A checkpoint."""
    return tiny_source(tmp_path_factory.mktemp("source"), "olmoe")


@pytest.fixture(scope="module")
def converted(source: Source) -> Path:
    """Its experts in int8, not to be changed."""
    place = source.out("converted")
    convert(source.folder, source.graph, "int8", place)
    return place


@pytest.fixture
def place(converted: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    found = tmp_path / "place"
    shutil.copytree(converted, found)
    return found


def refuses_to_open(source: Source, place: Path, *fragments: str) -> None:
    """Opening fails with all fragments and the command to run; converting there does so too."""
    command = f"`dovetail convert {source.path} --experts int8 -o {place}`"
    with pytest.raises(CheckpointError) as refused:
        open_converted(source.folder, "int8", place)
    for fragment in (str(place), command, *fragments):
        assert fragment in str(refused.value)


def interrupt(after: int, by: Callable[[], object]) -> Callable[[int], None]:
    """A listener to progress that does something at the given expert."""
    told = []

    def listen(nbytes: int) -> None:
        told.append(nbytes)
        if len(told) == after:
            by()

    return listen


def raise_interrupt() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 40, 64])
def test_an_interrupted_conversion_leaves_nothing(
    source: Source, tmp_path: Path, after: int
) -> None:
    place = tmp_path / "place"
    with pytest.raises(KeyboardInterrupt):
        convert(source.folder, source.graph, "int8", place, interrupt(after, raise_interrupt))
    assert not any(tmp_path.iterdir())
    refuses_to_open(source, place, "no such folder; expected the experts of", "writes once")


KILLED = """
import json, os, signal, sys
from pathlib import Path
from dovetail.checkpoint import ModelFolder
from dovetail.precision.convert import convert
from dovetail.ir.codec import decode
from dovetail.ir.task_graph import TaskGraph
told = []
def listen(nbytes):
    told.append(nbytes)
    if len(told) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint, graph, place = map(Path, sys.argv[1:])
graph = decode(json.loads(graph.read_text()), TaskGraph)
convert(ModelFolder.open(checkpoint), graph, "int8", place, listen)
"""


def test_a_killed_conversion_does_not_open_and_goes_again(
    source: Source, converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "graph.json").write_text(codec.canonical(source.graph))
    place, partial = tmp_path / "place", tmp_path / "place.partial"
    arguments = [str(source.path), str(tmp_path / "graph.json"), str(place)]
    child = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert child.returncode == -signal.SIGKILL
    assert (partial / WHOLE).stat().st_size > 0
    refuses_to_open(source, place, "no such folder")
    with pytest.raises(CheckpointError, match=r"place.partial: holds no experts.json"):
        open_converted(source.folder, "int8", partial)
    convert(source.folder, source.graph, "int8", place)
    assert not partial.exists()
    for name in (WHOLE, RECORD_FILE):
        assert (place / name).read_bytes() == (converted / name).read_bytes()


def test_what_others_put_in_the_way_is_kept(source: Source, tmp_path: Path) -> None:
    partial = tmp_path / "place.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"found notes.txt, expected only what an interrupted"):
        convert(source.folder, source.graph, "int8", tmp_path / "place")
    assert (partial / "notes.txt").read_text() == "mine"


def test_a_second_process_is_refused(source: Source, tmp_path: Path) -> None:
    partial = tmp_path / "place.partial"
    partial.mkdir()
    lock = open_locked(partial / LOCK, 0, "")
    try:
        with pytest.raises(InputError, match=r"in use by another process; expected to be the only"):
            convert(source.folder, source.graph, "int8", tmp_path / "place")
    finally:
        os.close(lock)
    assert (partial / LOCK).exists()


def test_refuses_experts_of_another_checkpoint(source: Source, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source.path, other)
    tensors = load_file(other / WHOLE)
    save_file({**tensors, "more": torch.zeros(1)}, other / WHOLE)
    changed = Source(ModelFolder.open(other), source.graph)
    found, expected = source.folder.index.digest()[:12], changed.folder.index.digest()[:12]
    refuses_to_open(changed, place, f"of another checkpoint ({found})", f"({expected})")
    with pytest.raises(InputError, match=r"of another checkpoint .* choose another place with -o"):
        convert(changed.folder, source.graph, "int8", place)
    assert (place / WHOLE).exists()


def test_refuses_another_format(source: Source, place: Path) -> None:
    expected = (
        r"found experts in int8 \(order kn\), expected int4 \(order nk, a scale for \d+ inputs"
    )
    with pytest.raises(CheckpointError, match=expected):
        open_converted(source.folder, "int4", place)


def test_refuses_another_task_graph(source: Source, place: Path) -> None:
    expected = r"written for another task graph \([0-9a-f]{12}\), expected 123456789012: dovetail"
    with pytest.raises(CheckpointError, match=expected):
        open_converted(source.folder, "int8", place, "1234567890123")


def test_refuses_torn_folders(source: Source, place: Path) -> None:
    record = (place / RECORD_FILE).read_text()
    for text, found in {
        "": "not a readable record of converted experts",
        record[: len(record) // 2]: "not a readable record of converted experts",
        "[]": "not a dovetail record of converted experts",
        record.replace('"version": 1', '"version": 7'): "version 7, this dovetail reads 1",
        record.replace('"format": "int8"', '"format": "int2"'): ".format: found 'int2'",
        record.replace('"order": "kn"', '"order": "nk"'): "does not match the content",
        record.replace('"layer": 1', '"layer": 2'): "does not match the content",
    }.items():
        (place / RECORD_FILE).write_text(text)
        refuses_to_open(source, place, found)
    (place / RECORD_FILE).unlink()
    refuses_to_open(source, place, f"holds no {RECORD_FILE}", "move it away")


def test_refuses_files_that_are_not_as_written(source: Source, place: Path) -> None:
    whole = (place / WHOLE).read_bytes()
    (place / WHOLE).write_bytes(whole[:-1])
    refuses_to_open(source, place, f"found {len(whole) - 1} bytes, expected the {len(whole)}")
    (place / WHOLE).write_bytes(whole.replace(b".gate_scale", b".gate_other"))
    refuses_to_open(source, place, "are not those that experts.json names")
    (place / WHOLE).write_bytes(b"\0" * len(whole))
    refuses_to_open(source, place, "are not those that experts.json names")
    (place / WHOLE).unlink()
    refuses_to_open(source, place, "No such file", f"expected {len(whole)} bytes")


def test_never_writes_over_other_files(source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found other files in it, expected nothing"):
        convert(source.folder, source.graph, "int8", source.path)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match=r"found a file, expected nothing .* nothing was written"):
        convert(source.folder, source.graph, "int8", file)
    assert file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(source.folder, source.graph, "int8", tmp_path / "empty")
    open_converted(source.folder, "int8", tmp_path / "empty")


def test_refuses_a_disk_without_room(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1 << 30, 0, 5 << 20))
    with pytest.raises(InputError, match=r"need .*MiB in .*, and the disk has 5.00 MiB free"):
        convert(source.folder, source.graph, "int8", tmp_path / "place")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(source: Source, tmp_path: Path, value: float) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(source.path, folder)
    tensors = load_file(folder / WHOLE)
    tensors["model.layers.2.mlp.experts.5.up_proj.weight"][7, 3] = value
    save_file(tensors, folder / WHOLE)
    expected = r"up of expert 5 in layer 2 holds infinities or NaN, expected finite weights"
    with pytest.raises(CheckpointError, match=expected):
        convert(ModelFolder.open(folder), source.graph, "int8", tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_refuses_a_model_without_experts(tmp_path: Path) -> None:
    tiny = save_tiny(tiny_model("llama").bfloat16(), tmp_path / "llama")
    folder = ModelFolder.open(tiny.folder)
    with pytest.raises(InputError, match=r"found no routed experts .* nothing to convert"):
        convert(folder, tiny.captured.graph, "int8", tmp_path / "place")


def test_the_command_says_that_nothing_is_left(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dovetail.precision.convert.convert", interrupted)
    place = tmp_path / "place"
    assert main(["convert", str(source.path), "--experts", "int8", "-o", str(place)]) == 130
    assert f"interrupted; nothing is left of {place}" in capfd.readouterr().err


def test_the_command_refuses_a_folder_that_is_no_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tmp_path / "none"), "--experts", "int8"]) == 1
    assert "no such folder; expected a model folder" in capfd.readouterr().err
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text(json.dumps({}))
    assert main(["convert", str(tmp_path / "none"), "--experts", "int8"]) == 1
    assert "expected model.safetensors" in capfd.readouterr().err
