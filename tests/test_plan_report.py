"""`dovetail plan report`: one page that says what the plan says and needs nothing else."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tests.plan_cases import GPU, MACHINE, WORKLOAD, few_policies, save_beside, small_plan

from dovetail.cli import main
from dovetail.ir.errors import OutputError
from dovetail.ir.notation import move_text
from dovetail.ir.plan import Candidate, Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.timeline import Timeline
from dovetail.ir.units import format_bytes, format_duration
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.plans.explain import Second, reasons
from dovetail.plans.report import findings, tiers, write_report
from dovetail.plans.report_lanes import occupancy
from dovetail.plans.report_page import STYLE, page, tag
from dovetail.plans.report_sections import html
from dovetail.plans.report_svg import NAMES, colour, draw, hint
from dovetail.plans.timeline_file import compare, write_trace

Made = tuple[TaskGraph, Plan]
SECTIONS = ("time", "memory", "candidates", "sensitivity", "plan")
VOID = {"meta", "br", "img", "link", "input", "hr"}
FETCHING = ("src", "href", "srcset", "action", "data", "poster", "formaction")


@dataclass(slots=True)
class Page(HTMLParser):
    """What a page holds: its tags with their attributes, ids, and the text outside of styles."""

    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super(Page, self).__init__()

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, {key: value or "" for key, value in attrs}))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """All text, spaces made one."""
        return " ".join(" ".join(self.words).split())

    def having(self, key: str) -> list[str]:
        """The values of an attribute."""
        return [attributes[key] for _, attributes in self.tags if key in attributes]


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    assert found.open == []
    return found


_few_policies = pytest.fixture(autouse=True, scope="module")(few_policies)


@pytest.fixture(scope="module")
def made() -> Made:
    return small_plan()


@pytest.fixture(scope="module")
def quick() -> Made:
    """A plan that is solved again in no time, because one simple policy was asked for."""
    return small_plan("weight_stream")


@pytest.fixture(scope="module")
def text(quick: Made, tmp_path_factory: pytest.TempPathFactory) -> str:
    found = findings(*quick, tmp_path_factory.mktemp("none"), False, lambda text: None)
    return html(found)


def fast(made: Made, folder: Path) -> Page:
    return parsed(html(findings(*made, folder, True, lambda text: None)))


def test_the_page_has_every_section_with_its_charts(text: str) -> None:
    found = parsed(text)
    ids = found.having("id")
    assert set(SECTIONS) <= set(ids)
    assert [n for n, c in Counter(ids).items() if c > 1] == []
    assert set(found.having("aria-labelledby")) <= set(ids)
    charts = [attributes for name, attributes in found.tags if name == "svg"]
    assert len(charts) == 7
    for attributes in charts:
        assert attributes["role"] == "img" and len(attributes["aria-label"]) > 20
    assert [name for name, _ in found.tags].count("h1") == 1
    assert dict(found.tags)["html"] == {"lang": "en"}


def test_the_page_fetches_nothing(text: str) -> None:
    found = parsed(text)
    assert "http" not in text and "//" not in text.replace("<!--", "")
    assert not {"script", "link", "iframe", "img", "object", "base"} & {n for n, _ in found.tags}
    local = [v for _, a in found.tags for k, v in a.items() if k.split(":")[-1] in FETCHING]
    assert all(value.startswith("#") for value in local)
    referred = set(re.findall(r"url\(([^)]*)\)", text))
    ids = set(found.having("id"))
    assert {name.strip("\"'") for name in referred} | set(local) <= {f"#{name}" for name in ids}
    assert "@import" not in text and "@font-face" not in text


@pytest.mark.parametrize("policy", ["auto", "weight_stream"])
def test_the_page_says_what_the_plan_says(
    policy: str, made: Made, quick: Made, text: str, tmp_path: Path
) -> None:
    plan = made[1] if policy == "auto" else quick[1]
    words = fast(made, tmp_path).text if policy == "auto" else parsed(text).text
    assert f"{plan.prediction.tokens_per_second:.1f}" in words
    assert format_duration(plan.prediction.seconds) in words
    assert f"{plan.bound.seconds / plan.prediction.seconds:.0%}" in words
    assert format_bytes(plan.budget["ram"]) in words
    assert plan.digest() in words and plan.graph in words
    for candidate in plan.candidates:
        assert candidate.policy in words
    for what, size in plan.prediction.bytes.items():
        assert not size or (what in words and format_bytes(size) in words)
    assert all(move_text(move) in words for move in plan.moves)


def test_colours_are_the_pages(text: str) -> None:
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    defined = set(re.findall(r"--([\w-]+):", STYLE))
    assert used <= defined and set(NAMES) <= defined
    assert not re.search(r"#a5[0-9a-f]{4}", text)


def test_the_page_is_the_same_every_time(quick: Made, text: str, tmp_path: Path) -> None:
    assert html(findings(*quick, tmp_path, False, lambda text: None)) == text


def test_a_fast_page_says_what_it_leaves_out(made: Made, tmp_path: Path) -> None:
    found = fast(made, tmp_path)
    assert "made with --fast" in found.text
    assert [name for name, _ in found.tags].count("svg") == 5


def test_a_run_beside_the_plan_is_set_against_it(made: Made, tmp_path: Path) -> None:
    graph, plan = made
    record(graph, plan, tmp_path, plan.digest())
    found = fast(made, tmp_path)
    assert "77.7 measured" in found.text and "123.00 MiB measured" in found.text
    assert "measured" in " ".join(found.having("aria-label"))


def test_the_run_of_another_plan_is_not(made: Made, tmp_path: Path) -> None:
    record(*made, tmp_path, "f" * 64)
    assert "77.7 measured" not in fast(made, tmp_path).text


def record(graph: TaskGraph, plan: Plan, folder: Path, ran: str) -> None:
    """Leave what a run leaves: as predicted, a tenth slower."""
    steady = compare(plan, apply_moves(graph, plan.moves), folder, lambda text: None).steady
    spans = [replace(s, start=s.start * 1.1, end=s.end * 1.1) for s in steady.spans]
    write_trace(folder / "timeline.json", [Timeline("measured", tuple(spans))])
    figures = {"tokens_per_second": 77.7, "seconds": 2.5, "rss_bytes": 123 << 20}
    (folder / "report.json").write_text(json.dumps({"plan": ran, **figures}))


def test_refused_policies_are_listed_with_the_reason(made: Made, tmp_path: Path) -> None:
    graph, plan = made
    refused = Candidate("eager", {}, None, "none of 7 schedules tried fits <ram>")
    found = fast((graph, replace(plan, candidates=(*plan.candidates, refused))), tmp_path)
    assert "none of 7 schedules tried fits <ram>" in found.text


def test_a_plan_for_a_gpu_has_both_tiers(made: Made, tmp_path: Path) -> None:
    graph, _ = made
    machine = replace(MACHINE, accelerator=GPU)
    plan = choose(graph, machine, {"ram": 64 << 20, "hbm": 64 << 20}, WORKLOAD, "module_batch")
    assert list(tiers(plan)) == ["hbm", "ram"]
    found = fast((graph, plan), tmp_path)
    assert "In hbm" in found.text and "In ram" in found.text
    assert "gpu0" in found.text


def test_the_page_says_why_the_second_is_second(quick: Made, tmp_path: Path) -> None:
    found = findings(*quick, tmp_path, False, lambda text: None)
    explanation = found.explanation
    assert explanation is not None
    first = explanation.facts
    slower = replace(first, seconds=first.seconds + 3, waiting=first.waiting + 3, seqs=99)
    reason = reasons(first, slower)
    second = Second("zigzag", {"seqs": 99}, slower.seconds, False, slower, reason)
    page = parsed(html(replace(found, explanation=replace(explanation, second=second))))
    assert "Second: zigzag with" in page.text and "99 sequences in flight" in page.text
    assert "+3s: less overlap" in page.text


def test_command_writes_the_page(
    quick: Made, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = save_beside(*quick, tmp_path), tmp_path / "report.html"
    assert main(["plan", "report", str(path), "-o", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == text
    assert capsys.readouterr().out == f"report: {out}\n"
    assert {p.name for p in tmp_path.iterdir()} == {"graph.json", "plan.json", "report.html"}


def test_command_refuses_a_place_that_cannot_be_written(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_beside(*made, tmp_path)
    assert main(["plan", "report", str(path), "--fast", "-o", str(tmp_path / "no" / "r.html")]) == 1
    assert "cannot be written: No such file" in capsys.readouterr().err
    with pytest.raises(OutputError, match="name another place with -o"):
        write_report("", tmp_path / "no" / "r.html")


SPANS = st.lists(
    st.tuples(st.integers(-8, 14), st.integers(1, 24)).map(lambda s: (s[0] / 16, sum(s) / 16)),
    max_size=8,
)


@given(SPANS)
def test_occupancy_counts_the_buffers_that_are_held(spans: list[tuple[float, float]]) -> None:
    times, used = occupancy(spans, 1.0)
    assert times[0] == 0 and times[-1] == 1 and times == sorted(times)
    for a, b, count in zip(times, times[1:], used, strict=False):
        middle = (a + b) / 2
        shifted = ((s + k, e + k) for k in (-1, 0, 1) for s, e in spans)
        assert count == sum(s <= middle < e for s, e in shifted)


def test_text_is_escaped() -> None:
    found = page("a <b>", [tag("p", "x < y & ", tag("b", "z"), " > w", class_="one")])
    assert "x &lt; y &amp; <b>z</b> &gt; w" in found
    assert parsed(found).having("class") == ["one"]


def test_marks_have_their_figures_and_charts_their_names() -> None:
    def make() -> Figure:
        figure = Figure(figsize=(2, 1))
        axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
        (bar,) = axes.bar([0], [1], color=colour("accent"))
        hint(bar, "one <bar>")
        axes.plot([0, 1], [0, 1], clip_on=True)
        return figure

    elements = [draw(make, name, f"chart {name}") for name in ("first", "second")]
    ids: list[str] = []
    for element in elements:
        attributes: Mapping[str, str] = element.attrib
        assert attributes["aria-label"].startswith("chart ")
        assert [title.text for title in element.iter("title")] == ["one <bar>"]
        ids += [each.get("id", "") for each in element.iter() if each.get("id")]
        styles = " ".join(each.get("style", "") for each in element.iter())
        assert "var(--accent)" in styles and "DejaVu" not in styles
    assert len(set(ids)) == len(ids)
