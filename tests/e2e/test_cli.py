"""The command line: what a run gives, plans that it is given, and the surface."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.e2e.cli_cases import IDS, NEW, PROMPTS, Place, complaint
from tests.e2e.support import save_tiny, tiny_model
from tokenizers import Tokenizer

from dovetail.cli import main, make_parser
from dovetail.ir.plan import load_plan

FIELDS = ["index", "id", "input_tokens", "tokens", "text", "finish_reason"]
ROWS = ["prompts done", "tokens", "throughput", "policy", "time", "peak RAM", "bound", "results",
        "plan", "executor", "timeline"]  # fmt: skip
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
