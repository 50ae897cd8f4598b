"""Figures as inline SVG: `matplotlib figure -> element of a page`.

A page has colours of its own, light or dark, so charts are drawn in colours that stand for names,
and the names become CSS variables: ``colour("ink")`` is drawn as some hex number and ends up as
``var(--ink)``. Text stays text, in the page's font. What is marked with ``hint`` says its figures
when the pointer rests on it.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

NAMES = (
    "ink", "quiet", "line", "faint", "page", "accent", "budget", "wait",
    "attention", "experts", "after", "layer", "ends", "dense", "experts-light", "copy", "head",
    "p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7",
)  # fmt: skip
"""What colours are for; the page's style gives each a value."""
HINT = "hint: "
_HEX = {f"#{0xA50000 + 0x000701 * (i + 1):06x}": name for i, name in enumerate(NAMES)}
_BY_NAME = {name: code for code, name in _HEX.items()}


def colour(name: str) -> str:
    """What to draw in so that the page chooses the colour."""
    return _BY_NAME[name]


def hint(artist: Artist, text: str) -> None:
    """Give a mark a text that is shown when the pointer rests on it."""
    artist.set_gid(HINT + text)


def draw(make: Callable[[], Figure], name: str, label: str) -> ET.Element:
    """The figure that ``make`` makes as an element; ``name`` sets its identifiers apart from other
    figures' and ``label`` says what it shows to those who cannot see it."""
    nothing = {key: None for key in ("Date", "Creator", "Format", "Type")}
    file = io.StringIO()
    with rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 11.5,
            "svg.fonttype": "none",
            "svg.hashsalt": "dovetail",
            "text.color": colour("ink"),
            "axes.labelcolor": colour("quiet"),
            "xtick.color": colour("quiet"),
            "ytick.color": colour("quiet"),
            "hatch.linewidth": 0.7,
            "hatch.color": colour("wait"),
        }
    ):
        figure = make()
        FigureCanvasSVG(figure)
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    return _inline(file.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> ET.Element:
    root = ET.fromstring(svg)
    for element in list(root.iter()):
        _clean(element, name)
    for child in [c for c in root if c.tag == "metadata"]:
        root.remove(child)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", label)
    width = root.get("viewBox", "0 0 1 1").split()[2]
    root.set("style", f"max-width: {float(width):.0f}px")
    return root


def _clean(element: ET.Element, name: str) -> None:
    """Drop namespaces and styles for all pages, make identifiers unique and colours variables."""
    element.tag = element.tag.rpartition("}")[2]
    for child in [c for c in element if c.tag.endswith("style")]:
        element.remove(child)
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        plain = key.rpartition("}")[2]
        if plain == "id":
            _identify(element, name, value)
        elif plain == "style":
            element.set(plain, "; ".join(_styles(value, name)))
        else:
            start = "#" if plain == "href" else "url(#"
            element.set(plain, _coloured(value.replace(start, f"{start}{name}-")))


def _identify(element: ET.Element, name: str, value: str) -> None:
    if value.startswith(HINT):
        title = ET.Element("title")
        title.text = value.removeprefix(HINT)
        element.insert(0, title)
        element.set("class", "mark")
    else:
        element.set("id", f"{name}-{value}")


def _styles(style: str, name: str) -> Iterator[str]:
    for part in style.split(";"):
        key, _, value = (piece.strip() for piece in part.partition(":"))
        if key == "font":
            # "bold 12px 'DejaVu Sans', ...": the page has its own font.
            size = re.search(r"[\d.]+px", value)
            yield f"font-size: {size.group() if size else '11px'}"
            if value.startswith(("bold", "700")):
                yield "font-weight: 600"
        elif key and key != "font-family":
            yield f"{key}: {_coloured(value.replace('url(#', f'url(#{name}-'))}"


def _coloured(value: str) -> str:
    """A value with the page's colours in place of those that stand for them."""
    for code, name in _HEX.items():
        if code in value:
            value = value.replace(code, f"var(--{name})")
    return value
