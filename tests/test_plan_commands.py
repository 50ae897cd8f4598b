"""`dovetail plan`: make, show, check, diff and timeline on a small model and a fixed machine."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from dovetail.checkpoint import ModelFolder
from dovetail.cli import main
from dovetail.ir.errors import BudgetError, PlanError
from dovetail.ir.machine import Curve, Machine
from dovetail.ir.plan import Plan, load_plan, save_plan
from dovetail.ir.printer import print_graph, print_plan
from dovetail.ir.timeline import Span, Timeline
from dovetail.ir.units import format_bytes
from dovetail.ir.workload import Workload
from dovetail.machine_files import save_machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import smallest_budget
from dovetail.planning import captured_model
from dovetail.plans.check import PlanCheck, load_graph
from dovetail.plans.timeline_file import compare, write_trace

RATES = {"float32": Curve((1.0, 1024.0), (1e10, 1e11))}
MACHINE = Machine(
    name="test-2core",
    tiers={"ram": 1 << 34, "disk": 1 << 36},
    workers=2,
    gemm=RATES,
    attention=RATES,
    kv_bandwidth=RATES,
    memory_bandwidth=1e10,
    op_seconds=3e-6,
    disk=Curve((4096.0, 8e6), (1e8, 1.4e9)),
    slowdown={"cpu|cpu": 0.9},
)
NEW_TOKENS = 6
LENGTHS = (5, 9, 9, 20, 3, 7)


@dataclass(frozen=True, slots=True)
class Place:
    """A checkpoint with prompts, a machine file, and a plan made from them."""

    folder: Path
    plan: Path
    budget: int

    def make(self, out: Path, *more: str, budget: int = 0) -> int:
        """Run `dovetail plan make`."""
        place = self.folder
        words = ["plan", "make", str(place / "model"), "--prompts", str(place / "prompts.jsonl")]
        words += ["--machine", str(place / "machine.json"), "-o", str(out)]
        words += ["--budget", f"ram={budget or self.budget}", "--max-new-tokens", str(NEW_TOKENS)]
        return main([*words, *more])

    def copy(self, folder: Path, change: Callable[[Plan], Plan] = lambda plan: plan) -> Path:
        """The plan, changed, with its graph in another folder."""
        (folder / "graph.json").write_bytes((self.plan.parent / "graph.json").read_bytes())
        save_plan(change(load_plan(self.plan)), folder / "plan.json")
        return folder / "plan.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("plans")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    OlmoeForCausalLM(config).save_pretrained(folder / "model")
    lines = [json.dumps({"input_ids": list(range(3, 3 + n))}) for n in LENGTHS]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    save_machine(MACHINE, folder / "machine.json")
    # Less than the weights with all else, so that there is something to read in every layer.
    model = ModelFolder.open(folder / "model")
    graph = captured_model(model, lambda text: None).graph
    least = smallest_budget(graph, MACHINE, Workload.of(LENGTHS, NEW_TOKENS))
    place = Place(folder, folder / "out" / "plan.json", least + graph.weight_bytes // 8)
    assert place.make(place.plan, "--policy", "module_batch") == 0
    return place


def test_make_leaves_a_plan_that_loads_beside_its_graph(place: Place) -> None:
    names = {path.name for path in place.plan.parent.iterdir()}
    assert names == {"plan.json", "graph.json", "constants.safetensors"}
    plan = load_plan(place.plan)
    assert plan.budget == {"ram": place.budget}
    assert (plan.workload.prompts, plan.workload.new_tokens) == (6, 6)
    assert plan.machine == MACHINE


def test_make_prints_the_plan_and_is_deterministic(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.json"
    assert place.make(out, "--policy", "module_batch") == 0
    printed = capsys.readouterr().out
    assert load_plan(out).digest() == load_plan(place.plan).digest()
    assert printed == f"{print_plan(load_plan(out))}\n\nplan: {out}\n"


def test_make_refuses_a_folder(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.make(tmp_path) == 1
    assert (
        f"found a folder, expected a file; give {tmp_path / 'plan.json'}" in capsys.readouterr().err
    )


def test_make_refuses_a_place_that_cannot_be_written(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert place.make(tmp_path / "file" / "plan.json") == 1
    error = capsys.readouterr().err
    assert "plan.json cannot be written: File exists; name another place with -o" in error


def test_make_refuses_a_budget_that_is_too_small(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.make(tmp_path / "plan.json", budget=1 << 16) == 1
    error = capsys.readouterr().err
    assert "too small" in error and "needs ram=" in error
    assert list(tmp_path.iterdir()) == []


def test_show_prints_the_plan(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(place.plan)]) == 0
    assert capsys.readouterr().out == print_plan(load_plan(place.plan)) + "\n"


def test_show_prints_graph_and_program(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(place.plan), "--graph", "--program"]) == 0
    printed = capsys.readouterr().out
    graph = load_graph(place.plan, load_plan(place.plan))
    assert print_graph(graph).splitlines()[0] in printed
    assert "attention_0" in printed
    assert "cpu0" in printed and "load" in printed


def test_show_graph_refuses_a_plan_alone(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(load_plan(place.plan), tmp_path / "plan.json")
    assert main(["plan", "show", str(tmp_path / "plan.json")]) == 0
    assert main(["plan", "show", str(tmp_path / "plan.json"), "--graph"]) == 1
    error = capsys.readouterr().err
    assert "graph.json: missing" in error and "make the plan again" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a readable task graph"), ("{}", "not a readable task graph.*'model'")],
)
def test_load_graph_refuses_a_damaged_file(
    place: Place, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "graph.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        load_graph(tmp_path / "plan.json", load_plan(place.plan))


@pytest.mark.parametrize("command", ["show", "check", "diff", "timeline"])
def test_reading_a_plan_needs_no_torch(place: Place, tmp_path: Path, command: str) -> None:
    words = {"diff": [str(place.plan)], "timeline": ["-o", str(tmp_path / "t.json")]}
    code = (
        "import sys; from dovetail.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "sys.exit(bool({'torch', 'transformers', 'ortools', 'matplotlib'} & set(sys.modules)))"
    )
    arguments = [sys.executable, "-c", code, "plan", command, str(place.plan)]
    done = subprocess.run([*arguments, *words.get(command, [])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_of_a_sound_plan(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "check", str(place.plan)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[:2] for line in lines]
    names = "file", "graph", "moves", "program", "memory", "bound", "certificates", "kernels"
    assert found == [["ok", name] for name in names]


def test_check_without_a_graph_says_what_it_skips(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(load_plan(place.plan), tmp_path / "plan.json")
    assert main(["plan", "check", str(tmp_path / "plan.json")]) == 0
    found = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [name for state, name in found if state == "skipped"] == ["graph", "moves", "program"]


def over_budget(plan: Plan) -> Plan:
    return replace(plan, budget={"ram": plan.prediction.peak_bytes // 2})


def too_fast(plan: Plan) -> Plan:
    return replace(plan, prediction=replace(plan.prediction, seconds=plan.bound.seconds / 2))


@pytest.mark.parametrize(
    ("change", "failed", "reason"),
    [
        (lambda plan: replace(plan, moves=plan.moves[1:]), "moves", "exactly one dispatch move"),
        (lambda plan: replace(plan, graph="0" * 64), "graph", "the plan is for 000000000000"),
        (over_budget, "program", "of ram"),
        (too_fast, "bound", "which no schedule can beat"),
    ],
)
def test_check_refuses(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Plan], Plan],
    failed: str,
    reason: str,
) -> None:
    assert main(["plan", "check", str(place.copy(tmp_path, change))]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:2] == ["failed", failed]
    assert reason in last


def test_check_refuses_an_altered_file(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place.copy(tmp_path)
    path.write_text(path.read_text().replace('"steps": ', '"steps": 1'))
    assert main(["plan", "check", str(path)]) == 1
    assert "failed   file" in (line := capsys.readouterr().out)
    assert "does not match the content" in line


def test_check_memory_refuses_a_stated_peak_above_the_budget(place: Place, tmp_path: Path) -> None:
    save_plan(over_budget(load_plan(place.plan)), tmp_path / "plan.json")
    checks = PlanCheck(tmp_path / "plan.json")
    checks.check_file()
    checks.check_graph()
    with pytest.raises(BudgetError, match=r"the peak of ram is .* \(stated\), expected at most"):
        checks.check_memory()


def test_diff_of_equal_plans(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "diff", str(place.plan), str(place.plan)]) == 0
    assert capsys.readouterr().out == "the plans are the same\n"


def test_diff_names_moves_knobs_and_predictions(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(plan: Plan) -> Plan:
        slower = replace(plan.prediction, seconds=plan.prediction.seconds * 2)
        return replace(
            plan, moves=plan.moves[:-1], knobs={**plan.knobs, "extra": 3}, prediction=slower
        )

    after = place.copy(tmp_path, change)
    assert main(["plan", "diff", str(place.plan), str(after)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  extra  - -> 3" in lines
    assert sum(line.startswith("  - ") for line in lines) == 1
    assert not any(line.startswith("  + ") for line in lines)
    assert any(line.split()[0] == "time" and "(+100.0%)" in line for line in lines if line.strip())
    assert "made for" not in lines


def test_diff_names_what_the_plans_are_for(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = place.copy(tmp_path, lambda plan: replace(plan, budget={"ram": 128 << 20}))
    assert main(["plan", "diff", str(place.plan), str(after)]) == 0
    before = format_bytes(place.budget)
    assert capsys.readouterr().out == f"made for\n  budget ram  {before} -> 128.00 MiB\n"


def test_diff_refuses_a_missing_plan(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "diff", str(place.plan), "none.json"]) == 1
    assert "none.json: no such plan file" in capsys.readouterr().err


def record(folder: Path) -> None:
    """Leave what a run would: steps 2 to 4, each half as slow again as predicted."""
    plan = load_plan(folder / "plan.json")
    layout = apply_moves(load_graph(folder / "plan.json", plan), plan.moves)
    (one,) = compare(plan, layout, folder, lambda text: None).timelines()

    def later(span: Span, step: int) -> Span:
        begin = 1.0 + step * one.seconds * 1.5
        start, end = begin + span.start * 1.5, begin + span.end * 1.5
        return replace(span, name=span.name.replace(".", "_"), start=start, end=end, step=step)

    spans = tuple(later(span, step) for step in (2, 3, 4) for span in one.spans)
    write_trace(folder / "timeline.json", [Timeline("measured", spans)])


def sources(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["args"]["name"] for event in events if event["name"] == "process_name"]


def test_timeline_without_a_run_is_predicted(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    assert main(["plan", "timeline", str(place.plan), "-o", str(out)]) == 0
    assert sources(out) == ["predicted"]
    assert str(out) in capsys.readouterr().out
    events = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X"]
    assert min(event["ts"] for event in events) == 0
    assert {e["args"]["layer"] for e in events if e["cat"] == "run"} == {-1, 0, 1, 2, 3}


def test_timeline_sets_the_predicted_step_where_it_was_measured(
    place: Place, tmp_path: Path
) -> None:
    path, out = place.copy(tmp_path), tmp_path / "both.json"
    record(tmp_path)
    assert main(["plan", "timeline", str(path), "-o", str(out)]) == 0
    assert sources(out) == ["predicted", "measured"]
    starts: dict[int, list[float]] = {}
    for event in json.loads(out.read_text())["traceEvents"]:
        if event["ph"] == "X" and event["cat"] == "run" and event["args"]["step"] == 3:
            starts.setdefault(event["pid"], []).append(event["ts"])
    predicted, measured = (min(found) for found in starts.values())
    assert predicted == pytest.approx(measured, abs=2)


def test_timeline_leaves_out_the_run_of_another_plan(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = place.copy(tmp_path), tmp_path / "t.json"
    record(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"plan": "f" * 64}))
    assert main(["plan", "timeline", str(path), "-o", str(out)]) == 0
    assert sources(out) == ["predicted"]
    assert "of a run of another plan (ffffffffffff)" in capsys.readouterr().err


def test_timeline_refuses_a_damaged_recording(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place.copy(tmp_path)
    (tmp_path / "timeline.json").write_text("{")
    assert main(["plan", "timeline", str(path), "-o", str(tmp_path / "t.json")]) == 1
    assert "does not hold a timeline of dovetail" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [False, True])
def test_picture_as_png(place: Place, tmp_path: Path, recorded: bool) -> None:
    path, picture = place.copy(tmp_path), tmp_path / "layer.png"
    if recorded:
        record(tmp_path)
    words = ["plan", "timeline", str(path), "-o", str(tmp_path / "t.json")]
    assert main([*words, "--picture", str(picture)]) == 0
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1500 <= width <= 2500 and 400 <= height <= 1500
    assert len(content) > 10_000


def test_picture_as_svg_has_lanes_classes_and_both_timelines(place: Place, tmp_path: Path) -> None:
    path, picture = place.copy(tmp_path), tmp_path / "layer.svg"
    record(tmp_path)
    words = ["plan", "timeline", str(path), "-o", str(tmp_path / "t.json")]
    assert main([*words, "--picture", str(picture)]) == 0
    text = picture.read_text()
    for label in (
        "cpu0",
        "disk0",
        "read experts",
        "predicted",
        "measured",
        "attention",
        "experts",
        "ms since",
    ):
        assert label in text
    assert "olmoe, 4 layers: module_batch" in text
    assert "layer 2 of step 3 takes" in text
    assert "the prediction is 33% below that" in text


def test_picture_refuses_other_kinds(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "timeline", str(place.plan), "-o", str(tmp_path / "t.json")]
    assert main([*words, "--picture", str(tmp_path / "layer.gif")]) == 1
    assert "found the kind '.gif', expected one of .png, .svg" in capsys.readouterr().err
