"""The command line when all is not well: bad input, bad checkpoints, disks that are full."""

import dataclasses
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.cli_cases import IDS, PROMPTS, Place, complaint

Fragments = tuple[str, ...]


def refuses(
    place: Place, capfd: pytest.CaptureFixture[str], fragments: Fragments, *options: str
) -> None:
    """The run fails with all fragments in its message, and nothing is written or lost."""
    prompts = place.prompts.read_bytes() if place.prompts.exists() else b""
    assert place.run(*options) == 1
    message = complaint(capfd)
    for fragment in fragments:
        assert fragment in message
    assert not place.out.exists()
    assert not prompts or place.prompts.read_bytes() == prompts


BAD_LINES: dict[str, tuple[object, Fragments]] = {
    "not_json": ('{"prompt": "x"', ("line 2", "malformed JSON at column", "--skip-bad")),
    "not_an_object": ("[1, 2]", ("line 2", "expected a JSON object")),
    "no_prompt": ({"id": 3}, ("line 2", "no prompt and no input_ids", "exactly one")),
    "empty_prompt": ({"prompt": ""}, ("line 2", "an empty prompt; expected text")),
    "no_tokens": ({"input_ids": []}, ("line 2", "no tokens", "at least one")),
    "too_long": ({"input_ids": [97] * 512}, ("line 2", "a prompt of 512 tokens", "at most 511")),
    "unknown_token": ({"input_ids": [264]}, ("line 2", "token id 264", "from 0 to 263")),
    "id_twice": ({"id": "a", "prompt": "x"}, ("line 2", "'a', which line 1 has")),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_prompt_line_is_refused(
    place: Place, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    line, fragments = BAD_LINES[name]
    place.write([PROMPTS[0], line, PROMPTS[3]])
    refuses(place, capfd, fragments)


BAD_OPTIONS: dict[str, tuple[tuple[str, ...], Fragments]] = {
    "budget_text": (("--budget", "ram=lots"), ("budget 'ram=lots'", "expected", "ram=4GiB")),
    "budget_unit": (("--budget", "4 parsecs"), ("'parsecs' is not a unit", "4GiB")),
    "budget_tier": (("--budget", "vram=4GiB"), ("the tier 'vram'", "ram, hbm, disk, peer")),
    "budget_without_ram": (("--budget", "hbm=4GiB"), ("names no ram", "add ram=SIZE")),
    "budget_too_small": (
        ("--budget", "ram=100kB"),
        ("a budget of ram=97.66 KiB is too small", "needs ram=", "give at least that"),
    ),
    "policy": (("--policy", "magic"), ("policy 'magic' is not known", "auto", "module_batch")),
    "new_tokens": (("--max-new-tokens", "0"), ("max new tokens is 0", "at least 1")),
    "temperature": (("--temperature", "-1"), ("temperature must be >= 0, found -1",)),
    "top_k": (("--top-k", "-2"), ("top-k must be >= 0", "found -2")),
    "top_p": (("--top-p", "0"), ("top-p must be in (0, 1], found 0",)),
    "machine": (("--machine", "cray-1"), ("no machine 'cray-1'", "laptop-16gb")),
    "machine_file": (("--machine", "nowhere/m.json"), ("nowhere/m.json cannot be read",)),
    "out_folder": (("--out", "nowhere/out.jsonl"), ("found no folder ", "nowhere", "make it")),
    "prompts_file": (("--prompts", "none.jsonl"), ("cannot read the prompts none.jsonl",)),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option_is_refused(place: Place, capfd: pytest.CaptureFixture[str], name: str) -> None:
    options, fragments = BAD_OPTIONS[name]
    refuses(place, capfd, fragments, *options)


def test_output_in_place_of_the_prompts_is_refused(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    same = str(place.folder / "." / "in.jsonl")
    refuses(place, capfd, ("--out and --prompts are both", "another output file"), "--out", same)


def test_no_prompts_are_refused(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.write(["", " "])
    refuses(place, capfd, ("found no prompts", "one JSON object a line"))


def test_output_of_something_else_is_refused(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    place.out.write_text("precious\n")
    assert place.run() == 1
    assert "a file that this run did not write" in complaint(capfd)
    assert place.out.read_text() == "precious\n"


Spoil = Callable[[Path], object]


def edit_config(**entries: object) -> Spoil:
    """Change entries of config.json."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return spoil


def drop_shard(folder: Path) -> None:
    """Leave the first of two files that an index names."""
    names = header(folder)
    names.pop("__metadata__", None)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    files = {key: first for key in names} | {"model.norm.weight": second}
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def header(folder: Path) -> dict[str, Any]:
    """The header of the weight file."""
    with (folder / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(size))
    return found


def overwrite(at: int, data: bytes) -> Spoil:
    """Write over bytes of the weight file."""

    def spoil(folder: Path) -> None:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(at)
            file.write(data)

    return spoil


def truncate(size: int) -> Spoil:
    """Cut the weight file."""
    return lambda folder: os.truncate(folder / "model.safetensors", size)


BAD_CHECKPOINTS: dict[str, tuple[Spoil, Fragments]] = {
    "no_folder": (shutil.rmtree, ("no such folder", "config.json and safetensors")),
    "no_config": (lambda f: (f / "config.json").unlink(), ("config.json: missing", "complete")),
    "config_not_json": (
        lambda f: (f / "config.json").write_text("{"),
        ("config.json: not readable as JSON",),
    ),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), ("safetensors",)),
    "missing_shard": (drop_shard, ("model-00002-of-00002.safetensors",)),
    "truncated": (truncate(1_000_000), ("model.safetensors", "download")),
    "truncated_in_the_header": (truncate(100), ("model.safetensors",)),
    "empty_file": (truncate(0), ("model.safetensors",)),
    "corrupt_header": (overwrite(8, b"garbage!"), ("model.safetensors",)),
    "corrupt_header_size": (overwrite(0, b"\xff" * 8), ("model.safetensors",)),
    "unknown_architecture": (edit_config(model_type="notamodel"), ("notamodel",)),
    "unsupported_architecture": (edit_config(model_type="bert"), ("mask", "needs an adapter")),
    "more_layers": (edit_config(num_hidden_layers=6), ("layers.5.",)),
    "other_shapes": (edit_config(intermediate_size=64), ("112", "64")),
    "no_tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        ("tokenizer.json: missing", "give prompts as input_ids"),
    ),
    "bad_tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ("tokenizer.json: not a readable tokenizer",),
    ),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused(
    place: Place, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    spoil, fragments = BAD_CHECKPOINTS[name]
    copy = place.folder / "copy"
    shutil.copytree(place.checkpoint, copy)
    spoil(copy)
    refuses(dataclasses.replace(place, checkpoint=copy), capfd, fragments)


# Output that cannot be written.


def test_full_disk_loses_nothing(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # One sequence at a time, so that prompts finish one by one.
    place.write([{"input_ids": [97 + i] * (i + 1)} for i in range(12)])
    assert place.run() == 0
    undisturbed = place.out.read_bytes()
    place.out.unlink()
    Path(f"{place.out}.journal").unlink()
    capfd.readouterr()
    smallest = smallest_named(place, capfd)

    write, room = os.write, 6

    def limited(fd: int, data: bytes) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        assert place.run("--budget", smallest) == 1
    message = complaint(capfd)
    assert "No space left on device" in message
    kept = int(message.split("device; ")[1].split()[0])
    assert 0 < kept < 12 and f"{kept} prompts are finished and kept" in message
    assert "free some space and run the same command again" in message
    assert not place.out.exists()
    assert len(Path(f"{place.out}.journal").read_bytes().splitlines()) == 1 + kept

    assert place.run("--budget", smallest) == 0
    assert f"prompts done  12 ({kept} by an earlier run)" in capfd.readouterr().out
    assert place.out.read_bytes() == undisturbed


def smallest_named(place: Place, capfd: pytest.CaptureFixture[str]) -> str:
    """The smallest budget that works, as the refusal of a smaller one names it."""
    assert place.run("--budget", "ram=1kB") == 1
    return complaint(capfd).split("needs ")[1].split(";")[0]


def test_full_disk_at_the_end_loses_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert place.run() == 1
    assert "4 prompts are finished and kept" in complaint(capfd)
    assert place.run() == 0
    assert "is complete: 4 prompts" in capfd.readouterr().out
    assert [line["id"] for line in place.lines()] == IDS


@pytest.mark.parametrize("blocked", ["", "report.json", "executor.py", "plan.json.tmp"])
def test_files_beside_the_output_that_cannot_be_written(
    place: Place, capfd: pytest.CaptureFixture[str], blocked: str
) -> None:
    """Something else has the name of a file that the run writes beside its output."""
    beside = Path(f"{place.out}.dovetail")
    if blocked:
        (beside / blocked).mkdir(parents=True)
    else:
        beside.write_text("a file\n")
    assert place.run() == 1
    assert str(beside / blocked) in complaint(capfd)
    shutil.rmtree(beside) if blocked else beside.unlink()
    assert place.run() == 0
    assert [line["id"] for line in place.lines()] == IDS
