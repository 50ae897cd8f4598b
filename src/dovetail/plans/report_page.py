"""The page of a report: its elements and its style, with nothing that is fetched from anywhere."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

Child = ET.Element | str
STYLE = """
:root { color-scheme: light dark;
  --page: #ffffff; --sheet: #f6f7f9; --ink: #1b2530; --quiet: #5a6672; --line: #dde2e7;
  --faint: #eceff2; --wait: #c3cad1; --accent: #0072b2; --budget: #c2410c;
  --attention: #0072b2; --experts: #e08a00; --after: #009e73; --layer: #4aa5a0; --ends: #b5639a;
  --dense: #9ccbe8; --experts-light: #f6cf8f; --head: #e5bcd6; --copy: #a7b0b9;
  --p0: #0072b2; --p1: #e69f00; --p2: #009e73; --p3: #cc79a7; --p4: #56b4e9; --p5: #d9c94a;
  --p6: #8a6fb8; --p7: #98a2ac; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12171c; --sheet: #1a2127; --ink: #e6ebf0; --quiet: #9ba8b4; --line: #2d363f;
  --faint: #232b33; --wait: #46525d; --accent: #4aa8e0; --budget: #fb923c;
  --attention: #4aa8e0; --experts: #f0a731; --after: #2fbf93; --layer: #63c2bb; --ends: #d68bbb;
  --dense: #2f5f7f; --experts-light: #81601f; --head: #754e66; --copy: #6b7883;
  --p0: #3f9bd6; --p1: #eda722; --p2: #2bb58b; --p3: #d68bbb; --p4: #7cc6ee; --p5: #e6dc72;
  --p6: #a48bd0; --p7: #7b8792; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 40px 64px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 6px; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 0 0 4px; }
h3 { font-size: 16px; margin: 26px 0 2px; }
p { margin: 0 0 12px; max-width: 74ch; }
.kicker { color: var(--quiet); font-size: 14px; margin: 0 0 14px; }
.lead { color: var(--quiet); margin-bottom: 22px; }
section { border-top: 1px solid var(--line); margin-top: 40px; padding-top: 26px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 0; }
.tiles > div { background: var(--sheet); border-radius: 10px; padding: 13px 14px 11px; }
.tiles dt { color: var(--quiet); font-size: 13.5px; }
.tiles dd { margin: 0; }
.tiles .figure { font-size: 26px; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3;
  white-space: nowrap; }
.tiles .note { color: var(--quiet); font-size: 13.5px; }
figure { margin: 14px 0 6px; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 620px; height: auto; }
figcaption { color: var(--quiet); font-size: 14px; margin-top: 6px; max-width: 84ch; }
svg text { font-family: inherit; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg .mark:hover { filter: brightness(1.12); }
table { border-collapse: collapse; font-size: 14px; margin: 10px 0; }
th, td { text-align: left; padding: 4px 18px 4px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--quiet); font-size: 14px; }
pre { background: var(--sheet); border-radius: 10px; padding: 14px 16px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
ul.reasons { padding-left: 20px; margin: 4px 0 12px; max-width: 74ch; }
footer { color: var(--quiet); font-size: 13px; margin-top: 44px; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.92em; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 24px 18px 48px; } h1 { font-size: 27px; } }
@media print { main { max-width: none; padding: 0; } figure, .tiles { break-inside: avoid; } }
"""


def tag(name: str, /, *children: Child, **attributes: str) -> ET.Element:
    """An element; ``class_`` is written as ``class`` and ``aria_label`` as ``aria-label``."""
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    element = ET.Element(name, {names[key]: value for key, value in attributes.items()})
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def page(title: str, children: Sequence[ET.Element]) -> str:
    """A whole page of its own."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", STYLE),
    )
    root = tag("html", head, tag("body", tag("main", *children)), lang="en")
    return "<!doctype html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"


def section(name: str, title: str, *children: Child) -> ET.Element:
    """A section with a heading that names it."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def chart(svg: ET.Element, caption: str = "") -> ET.Element:
    """A chart and what is to be seen on it."""
    return tag("figure", svg, *([tag("figcaption", caption)] if caption else []))


def tile(name: str, figure: str, note: str) -> ET.Element:
    """One of the figures that one wants to see first."""
    parts = [tag("div", figure, class_="figure"), tag("div", note, class_="note")]
    return tag("div", tag("dt", name), tag("dd", *parts))


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> ET.Element:
    """A table; ``numbers`` are the columns that are aligned to the right."""

    def cells(kind: str, texts: Sequence[str]) -> ET.Element:
        classes = [{"class_": "number"} if i in numbers else {} for i in range(len(texts))]
        return tag("tr", *(tag(kind, t, **c) for t, c in zip(texts, classes, strict=True)))

    body = tag("tbody", *(cells("td", row) for row in rows))
    return tag("table", tag("thead", cells("th", head)), body)


def hidden(summary: str, *children: Child) -> ET.Element:
    """Something that is shown on a click."""
    return tag("details", tag("summary", summary), *children)
