"""Timelines: the trace that Perfetto opens, what is read back of it, and the picture of a layer."""

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.ir.errors import InputError, OutputError
from dovetail.ir.program import Segment
from dovetail.ir.timeline import Span, Timeline, chrome_trace
from dovetail.plans.timeline_file import read_measured, write_trace
from dovetail.plans.timeline_panel import Panel, segment_classes, span_class

MS = 1e-3
PREDICTED = Timeline("predicted", (Span("cpu0", "run", "layer_0.before", 1, 0.0, MS, 7),))
MEASURED = Timeline(
    "measured",
    (
        Span("cpu0", "run", "layer_0_before", 1, 1.0, 1.25, 7),
        Span("cpu0", "wait", "tokens", -1, 1.25, 1.5, 7),
        Span("disk0", "load", "experts", 2, 0.5, 1.125, 7),
    ),
)
CLASSES = {"layer_0_before": "attention", "layer_0_experts_0": "experts", "layer_0_after": "after"}


def layer_spans(engine: str, layer: int, begin: float) -> list[Span]:
    """Ten milliseconds: wait 2, attention 3, experts 4, after 1."""
    parts = [("wait", "dense", 0, 2), ("run", "layer_0.before", 2, 5)]
    parts += [("run", "layer_0.experts_0", 5, 9), ("run", "layer_0.after", 9, 10)]
    return [
        Span(engine, kind, name, layer if kind == "run" else -1, begin + a * MS, begin + b * MS, 3)
        for kind, name, a, b in parts
    ]


def three_layers() -> Timeline:
    spans = [s for layer in range(3) for s in layer_spans("cpu0", layer, layer * 10 * MS)]
    loads = [
        Span("disk0", "load", "experts", layer, start * MS, end * MS, 3)
        for layer, start, end in ((1, 2, 8), (2, 8, 16), (0, 25, 30))
    ]
    return Timeline("predicted", (*spans, *loads))


def complete_events(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_trace_names_every_process_and_thread() -> None:
    trace: Any = json.loads(json.dumps(chrome_trace([PREDICTED, MEASURED]), allow_nan=False))
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X"}
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["ph"] == "M"
    }
    processes = {name for (kind, *_), name in names.items() if kind == "process_name"}
    assert processes == {"predicted", "measured"}
    for event in complete_events(trace):
        assert names["thread_name", event["pid"], event["tid"]] in ("cpu0", "disk0")
        assert ("process_name", event["pid"], None) in names
        assert math.isfinite(event["ts"]) and event["dur"] >= 0
        assert event["cat"] in ("run", "load", "wait", "room")


def test_trace_is_in_microseconds() -> None:
    first = complete_events(chrome_trace([MEASURED]))[0]
    assert (first["ts"], first["dur"]) == (1e6, 0.25e6)
    assert first["name"] == "layer_0_before[1]"


@given(st.lists(st.floats(1e-7, 1e-2), min_size=2, max_size=30))
def test_spans_of_a_thread_never_overlap_in_the_trace(lengths: list[float]) -> None:
    # Perfetto counts whole nanoseconds and leaves out a complete event that begins before the one
    # before it has ended (google/perfetto issue 4280).
    ends = list(itertools.accumulate(lengths, initial=25.188928))
    spans = (Span("cpu0", "run", "x", 0, a, b) for a, b in itertools.pairwise(ends))
    events = complete_events(chrome_trace([Timeline("predicted", tuple(spans))]))
    for event, following in itertools.pairwise(events):
        for nanoseconds in (math.floor, round, math.ceil):
            end = nanoseconds(event["ts"] * 1e3) + nanoseconds(event["dur"] * 1e3)
            assert end <= nanoseconds(following["ts"] * 1e3)


def test_measured_comes_back_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    write_trace(path, [PREDICTED, MEASURED])
    found = read_measured(path)
    assert found is not None and found.source == "measured"
    by_engine = defaultdict(list)
    for span in found.spans:
        by_engine[span.engine].append(span)
    assert [s.name for s in by_engine["cpu0"]] == ["layer_0_before", "tokens"]
    assert sorted(map(repr, found.spans)) == sorted(map(repr, MEASURED.spans))
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.json"]


def test_nothing_measured(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    assert read_measured(path) is None
    write_trace(path, [PREDICTED])
    assert read_measured(path) is None


MEASURED_PROCESS = '{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "measured"}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"traceEvents',
        f'{{"traceEvents": [{MEASURED_PROCESS}, {{"ph": "X", "pid": 1, "tid": 0}}]}}',
    ],
)
def test_read_measured_refuses_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "timeline.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"does not hold a timeline of dovetail.*delete it"):
        read_measured(path)


def test_write_trace_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be written.*name another place"):
        write_trace(tmp_path / "none" / "timeline.json", [PREDICTED])


def test_panel_begins_where_the_layer_before_ended() -> None:
    panel = Panel.of(three_layers(), step=3, layer=1)
    assert panel is not None
    assert panel.seconds == pytest.approx(10 * MS)
    assert panel.busy("cpu0") == pytest.approx(0.8)
    first = min((s for s in panel.spans if s.engine == "cpu0"), key=lambda s: s.start)
    assert (first.kind, first.start) == ("wait", 0.0)


def test_panel_has_the_loads_that_overlap_it_cut_to_size() -> None:
    panel = Panel.of(three_layers(), step=3, layer=1)
    assert panel is not None
    (load,) = (s for s in panel.spans if s.kind == "load")
    assert (load.layer, load.start) == (2, 0.0)
    assert load.end == pytest.approx(6 * MS)
    assert panel.busy("disk0") == pytest.approx(0.6)


def test_panel_of_the_first_layer_begins_with_its_first_segment() -> None:
    panel = Panel.of(three_layers(), step=3, layer=0)
    assert panel is not None and panel.seconds == pytest.approx(8 * MS)


@pytest.mark.parametrize(("step", "layer"), [(4, 1), (3, 9)])
def test_panel_of_what_did_not_run(step: int, layer: int) -> None:
    assert Panel.of(three_layers(), step, layer) is None


def test_segments_have_classes_by_what_they_hold() -> None:
    names = ("prologue", "dense", "layer.before", "layer.experts_0", "layer.after", "head")
    segments = [
        Segment(n, n.split(".")[0], (), (), (), "experts" if "experts" in n else "groups")
        for n in names
    ]
    assert segment_classes(segments) == {
        "prologue": "ends",
        "dense": "layer",
        "layer_before": "attention",
        "layer_experts_0": "experts",
        "layer_after": "after",
        "head": "ends",
    }


def test_predicted_and_measured_spans_have_the_same_class() -> None:
    spans = (PREDICTED.spans[0], MEASURED.spans[0])
    assert {span_class(span, CLASSES) for span in spans} == {"attention"}
    assert span_class(MEASURED.spans[1], CLASSES) == "wait"
    assert span_class(MEASURED.spans[2], CLASSES) == "load experts"
