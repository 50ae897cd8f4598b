"""The command line: what it writes and says when all is well, and what it says when it is not."""

import argparse
import dataclasses
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.support import machine, save_tiny, tiny_model, transformers_tokens
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from dovetail.cli import main, make_parser
from dovetail.demo import write_demo
from dovetail.ir.plan import load_plan
from dovetail.machine_files import save_machine

NEW = 6
FIELDS = ["index", "id", "input_tokens", "tokens", "text", "finish_reason"]
ROWS = ["prompts done", "tokens", "throughput", "policy", "time", "peak RAM", "bound", "results",
        "plan", "executor", "timeline"]  # fmt: skip
PROMPTS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "It is a truth"},
    {"prompt": "She"},
    {"id": 7, "input_ids": [72, 101, 32]},
    {"prompt": "Mr. Darcy looked just as he had been used to look in Hertfordshire, paid his"},
]
IDS = ["a", 1, 7, 3]


@dataclass(frozen=True)
class Place:
    """A folder to run in: the demo checkpoint, a machine file, and a prompt file."""

    folder: Path
    checkpoint: Path

    @property
    def prompts(self) -> Path:
        """The prompt file."""
        return self.folder / "in.jsonl"

    @property
    def out(self) -> Path:
        """The output file."""
        return self.folder / "out.jsonl"

    def write(self, lines: Sequence[object]) -> None:
        """Write the prompt file; a text is a line as it is."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.prompts.write_text("\n".join(texts) + "\n", encoding="utf-8")

    def command(self, *options: str) -> list[str]:
        """`dovetail run` on the prompt file; later options win."""
        words = ["run", str(self.checkpoint), "--prompts", str(self.prompts), "--out"]
        words += [str(self.out), "--budget", "ram=64MiB", "--max-new-tokens", str(NEW)]
        return [*words, "--machine", str(self.folder / "machine.json"), *options]

    def run(self, *options: str) -> int:
        """Run the command in this process; returns its exit code."""
        return main(self.command(*options))

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the output file."""
        return [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint."""
    return write_demo(tmp_path_factory.mktemp("demo") / "checkpoint")


@pytest.fixture
def place(tmp_path: Path, demo: Path) -> Place:
    """A fresh folder to run in, with good prompts."""
    save_machine(machine(), tmp_path / "machine.json")
    found = Place(tmp_path, demo)
    found.write(PROMPTS)
    return found


@pytest.fixture(scope="module")
def expected(demo: Path) -> list[tuple[int, ...]]:
    """Greedy tokens of ``PROMPTS`` by transformers."""
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    ids = [p.get("input_ids") or tokenizer.encode(p["prompt"]).ids for p in PROMPTS]
    return transformers_tokens(model, ids, NEW)


def complaint(capfd: pytest.CaptureFixture[str]) -> str:
    """What standard error says, checked to be a message for a person and nothing else."""
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err, captured.err
    message = f"\n{captured.err}".rpartition("\ndovetail: ")[2].strip()
    assert len(message) > 30
    return message


# What a run gives.


def test_run_writes_results_in_the_order_of_the_prompts(
    place: Place, expected: list[tuple[int, ...]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert place.run() == 0
    captured = capfd.readouterr()
    lines = place.lines()
    assert [list(line) for line in lines] == [FIELDS] * len(PROMPTS)
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert [line["id"] for line in lines] == IDS
    tokenizer = Tokenizer.from_file(str(place.checkpoint / "tokenizer.json"))
    for line, prompt, tokens in zip(lines, PROMPTS, expected, strict=True):
        ids = prompt.get("input_ids") or tokenizer.encode(prompt["prompt"]).ids
        assert line["input_tokens"] == len(ids)
        assert tuple(line["tokens"]) == tokens
        assert line["text"] == tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert line["finish_reason"] == "length"
    rows = [row[: row.index("  ")] for row in captured.out.splitlines()]
    assert rows == ROWS
    kept = {path.name for path in Path(f"{place.out}.dovetail").iterdir()}
    assert kept >= {"plan.json", "graph.json", "executor.py", "timeline.json", "report.json"}
    trace = json.loads(Path(f"{place.out}.dovetail/timeline.json").read_text())
    assert trace["traceEvents"]

    before = place.out.read_bytes()
    assert place.run() == 0
    assert "is complete: 4 prompts; nothing to do" in capfd.readouterr().out
    assert place.out.read_bytes() == before


def test_run_reports_as_json(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert place.run("--json", "--policy", "weight_stream") == 0
    report = json.loads(capfd.readouterr().out)
    assert report["policy"] == "weight_stream"
    assert report["tokens"] == NEW * len(PROMPTS)
    assert report["budget"] == 64 << 20
    assert report["pool_bytes"] <= report["predicted_peak_bytes"] <= report["budget"]
    assert 0 < report["roof_fraction"] < 1
    assert report == json.loads(Path(f"{place.out}.dovetail/report.json").read_text())


def test_end_of_sequence_and_context_end_prompts(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((place.checkpoint / "config.json").read_text())
    context, end = config["max_position_embeddings"], place.folder / "end"
    shutil.copytree(place.checkpoint, end)
    long = {"id": "long", "input_ids": [97] * (context - 2)}
    place.write([*PROMPTS, long])
    assert place.run() == 0
    assert "1 prompts reach the context of 512 tokens" in capfd.readouterr().err
    first, *_, last = place.lines()
    assert len(last["tokens"]) == 2 and last["finish_reason"] == "length"

    generation = json.loads((end / "generation_config.json").read_text())
    stop = first["tokens"][2]
    (end / "generation_config.json").write_text(
        json.dumps({**generation, "eos_token_id": [stop, 258]})
    )
    again = dataclasses.replace(place, checkpoint=end)
    assert again.run("--restart") == 0
    stopped = place.lines()[0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["tokens"] == first["tokens"][: first["tokens"].index(stop) + 1]
    assert again.run("--restart", "--ignore-eos") == 0
    assert place.lines()[0] == first


def test_another_run_does_not_touch_the_output(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    assert place.run() == 0
    before = place.out.read_bytes()
    capfd.readouterr()
    assert place.run("--max-new-tokens", "3") == 1
    message = complaint(capfd)
    assert "max_new_tokens was 6 and is now 3" in message and "--restart" in message
    assert place.out.read_bytes() == before
    assert place.run("--max-new-tokens", "3", "--restart") == 0
    assert [line["tokens"] for line in place.lines()] == [
        json.loads(line)["tokens"][:3] for line in before.splitlines()
    ]


def test_skip_bad_leaves_bad_lines_out(
    place: Place, expected: list[tuple[int, ...]], capfd: pytest.CaptureFixture[str]
) -> None:
    bad = ['{"prompt": "unclosed', '{"prompt": ""}', {"input_ids": [1] * 512}, {"text": "x"}]
    place.write([PROMPTS[0], bad[0], bad[1], PROMPTS[3], bad[2], bad[3]])
    assert place.run("--skip-bad") == 0
    said = capfd.readouterr().err
    for line, reason in {
        2: "malformed JSON",
        3: "an empty prompt",
        5: "512 tokens",
        6: "'text'",
    }.items():
        assert any(
            f"left out line {line}:" in text and reason in text for text in said.splitlines()
        )
    assert [(line["index"], line["id"]) for line in place.lines()] == [(0, "a"), (1, 3)]
    assert [tuple(line["tokens"]) for line in place.lines()] == [expected[0], expected[3]]


# Plans.


def make_plan(place: Place, *options: str) -> Path:
    """A plan made for the prompts."""
    path = place.folder / "plan.json"
    words = ["plan", "make", str(place.checkpoint), "--prompts", str(place.prompts)]
    words += ["--budget", "64MiB", "--max-new-tokens", str(NEW), "--policy", "weight_stream"]
    words += ["--machine", str(place.folder / "machine.json"), "-o", str(path)]
    assert main([*words, *options]) == 0
    return path


@pytest.fixture
def plan(place: Place, capfd: pytest.CaptureFixture[str]) -> Path:
    """A plan made for the prompts, with what was printed left out."""
    path = make_plan(place)
    capfd.readouterr()
    return path


def test_run_uses_the_plan_it_is_given(
    place: Place, plan: Path, expected: list[tuple[int, ...]]
) -> None:
    assert place.run("--plan", str(plan)) == 0
    assert [tuple(line["tokens"]) for line in place.lines()] == expected
    given, used = load_plan(plan), load_plan(Path(f"{place.out}.dovetail/plan.json"))
    assert used.moves == given.moves and used.policy == "weight_stream"


def test_unusable_plans_are_refused(
    place: Place, plan: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(text: str | None, *options: str) -> str:
        path = place.folder / "given.json"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        assert place.run("--plan", str(path), *options) == 1
        assert not place.out.exists()
        message = complaint(capfd)
        assert str(path) in message
        return message

    good = plan.read_text()
    assert "no such plan file; make one with `dovetail plan make`" in refused(None)
    assert "not a readable plan" in refused(good[: len(good) // 2])
    assert "not a dovetail plan" in refused("[]")
    assert "plan version 99, this dovetail reads 1" in refused(
        json.dumps(json.loads(good) | {"version": 99})
    )
    altered = json.loads(good) | {"policy": "eager"}
    assert "the file was altered: make the plan again" in refused(json.dumps(altered))
    needs = refused(good, "--budget", "1MiB")
    assert "the plan needs ram=" in needs and "the budget is 1.00 MiB" in needs
    more = refused(good, "--max-new-tokens", "300")
    assert "plan again for this workload" in more


def test_plan_for_another_model_is_refused(
    place: Place, plan: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny(tiny_model("mixtral"), place.folder / "other").folder
    place.write([{"input_ids": [5, 6, 7]}])
    assert dataclasses.replace(place, checkpoint=other).run("--plan", str(plan)) == 1
    message = complaint(capfd)
    assert "the plan is for olmoe with 5 layers" in message
    assert "found mixtral with 4 layers" in message and "plan this model again" in message


def test_plan_for_shorter_prompts_is_refused(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its KV store would hold the longer prompt in place of new tokens; its steps would not."""
    place.write([{"input_ids": [97] * 10}])
    path = make_plan(place, "--max-new-tokens", "300")
    capfd.readouterr()
    place.write([{"input_ids": [97] * 150}])
    assert place.run("--plan", str(path)) == 1
    message = complaint(capfd)
    assert "prompts of up to 10 tokens, but the longest has 150" in message
    assert "plan again for this workload" in message


# Bad input.

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


# The surface.


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "checkpoint"],
        ["run", "checkpoint", "--prompts", "a", "--out", "b", "--fast"],
        ["run", "checkpoint", "--prompts", "a", "--out", "b", "--max-new-tokens", "many"],
        ["plan"],
        ["plan", "make"],
        ["demo"],
    ],
)
def test_wrong_use_exits_with_2(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        main(words)
    assert found.value.code == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: dovetail")


def test_commands_and_options_are_frozen(golden: Callable[[str], None]) -> None:
    golden("\n".join(surface(make_parser())) + "\n")


def surface(parser: argparse.ArgumentParser, name: str = "dovetail") -> Iterator[str]:
    """A line for every command and for each of its arguments, with what it takes by default."""
    yield name
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, child in action.choices.items():
                yield from surface(child, f"{name} {command}")
        elif action.dest != "help":
            names = ", ".join(action.option_strings) or action.dest
            needed = " required" if action.required else f" default={action.default!r}"
            yield f"  {names}{needed}"
