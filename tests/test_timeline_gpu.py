"""`dovetail plan timeline` and `report` of plans for a GPU: they show what was predicted."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tests.ir_cases import captured
from tests.test_gpu_choose import MACHINE, WORKLOAD, plan, sizes

from dovetail.capture.captured import Captured
from dovetail.cli import main
from dovetail.ir.plan import Plan, save_plan
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.predict import GpuPredictor, alike_layers
from dovetail.plans.report import findings
from dovetail.plans.report_lanes import occupancy
from dovetail.plans.timeline_gpu import gpu_panels, gpu_rings, gpu_timeline

GRAPH = captured("deepseek_v2")


@pytest.fixture(scope="module", params=["module_batch", "zigzag", "nano_overlap", "auto"])
def made(request: pytest.FixtureRequest) -> Plan:
    """A plan that streams a part of the weights, with layers of two kinds."""
    found = plan("deepseek_v2", 0.6, request.param)
    assert found is not None
    return found


def test_every_layer_of_every_kind_of_step_is_there(made: Plan) -> None:
    layout = apply_moves(GRAPH, made.moves)
    spans = gpu_timeline(made, layout).spans
    layers = set(range(len(GRAPH.layers)))
    assert all({s.layer for s in spans if s.step == i} == layers for i in {s.step for s in spans})
    for engine in {span.engine for span in spans}:
        mine = sorted((s for s in spans if s.engine == engine), key=lambda s: s.start)
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(mine)), engine


def test_a_step_of_the_timeline_takes_what_is_predicted(made: Plan) -> None:
    layout = apply_moves(GRAPH, made.moves)
    predictor = GpuPredictor(layout, GpuCosts(MACHINE, "float32"))
    spans = gpu_timeline(made, layout).spans
    first = [span for span in spans if span.step == 0]
    length = max(s.end for s in first) - min(s.start for s in first)
    longest = max(
        predictor.step(phase.work)[0] * phase.steps for phase in predictor.phases(WORKLOAD)
    )
    works = [p.work for p in predictor.phases(WORKLOAD)]
    seconds = [predictor.step(w)[0] for w in works]
    assert longest and 0.4 * min(seconds) < length < 1.7 * max(seconds)


def test_panels_show_the_beginning_the_steady_state_and_the_end(made: Plan) -> None:
    layout = apply_moves(GRAPH, made.moves)
    panels = gpu_panels(made, layout)
    assert len(panels) == (3 if max(map(len, alike_layers(layout))) >= 7 else 1)
    for panel in panels:
        assert panel.seconds > 0 and panel.title
        assert all(0 <= s.start <= s.end <= panel.seconds + 1e-9 for s in panel.spans)


def test_rings_never_hold_more_than_they_have(made: Plan) -> None:
    layout = apply_moves(GRAPH, made.moves)
    predictor = GpuPredictor(layout, GpuCosts(MACHINE, "float32"))
    held, rings = gpu_rings(predictor, WORKLOAD)
    assert set(held) <= set(rings)
    for pool, spans in held.items():
        slots, size = rings[pool]
        assert slots > 0 and size > 0
        period = max([end for _, end in spans] + [1e-6])
        assert max(occupancy(spans, period)[1]) <= 4 * slots


def test_commands_write_timeline_picture_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = choose(GRAPH, MACHINE, sizes("deepseek_v2", 0.6), WORKLOAD, "module_batch")
    path, trace, picture = (tmp_path / n for n in ("plan.json", "t.json", "layer.svg"))
    save_plan(made, path)
    Captured(GRAPH, {}, 0.0).save(tmp_path)
    words = ["plan", "timeline", str(path), "-o", str(trace), "--picture", str(picture)]
    assert main(words) == 0
    assert "predicted" in capsys.readouterr().out
    events = json.loads(trace.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"predicted", "gpu0", "h2d"} <= names
    assert "copy experts" in picture.read_text()
    assert main([*words[:-1], str(tmp_path / "layer.pdf")]) == 1
    assert "expected one of .png, .svg" in capsys.readouterr().err
    found = findings(GRAPH, made, tmp_path, fast=True, note=lambda text: None)
    assert found.steady.held and found.steady.rings
    assert main(["plan", "report", str(path), "-o", str(tmp_path / "r.html"), "--fast"]) == 0
    assert "Rings over time" in (tmp_path / "r.html").read_text()
