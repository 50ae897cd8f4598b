"""The report as a browser shows it: headless Chromium opens it and says what is on the page."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from tests.plan_cases import save_beside, small_plan

from dovetail.cli import main

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a browser: none of {', '.join(NAMES)} is on the PATH"
)
PROBE = """
<script>
const box = (e) => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
const hits = (a, b) => a[0] < b[0] + b[2] - 1 && b[0] < a[0] + a[2] - 1
  && a[1] < b[1] + b[3] - 1 && b[1] < a[1] + a[3] - 1;
const charts = [...document.querySelectorAll("svg")].map((svg) => {
  const texts = [...svg.querySelectorAll("text")].map((t) => [t.textContent, box(t)]);
  const frame = box(svg);
  const outside = texts.filter(([, b]) => b[0] < frame[0] - 1 || b[1] < frame[1] - 1
    || b[0] + b[2] > frame[0] + frame[2] + 1 || b[1] + b[3] > frame[1] + frame[3] + 1);
  const overlapping = texts.flatMap(([s, a], i) =>
    texts.slice(i + 1).filter(([, b]) => hits(a, b)).map(([t]) => [s, t]));
  return { box: frame, marks: svg.querySelectorAll(".mark").length, outside, overlapping };
});
const style = getComputedStyle(document.body);
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify({
  charts,
  sections: [...document.querySelectorAll("section")].map((s) => [s.id, box(s)]),
  wide: document.documentElement.scrollWidth,
  fetched: performance.getEntriesByType("resource").map((e) => e.name),
  colours: [style.color, style.backgroundColor],
});
document.body.append(out);
</script>
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the browser found, and its picture of the page."""

    found: dict[str, Any]
    picture: Path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    out = folder / "report.html"
    plan = save_beside(*small_plan("weight_stream"), folder)
    assert main(["plan", "report", str(plan), "-o", str(out)]) == 0
    probed = out.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>")
    (folder / "probed.html").write_text(probed, encoding="utf-8")
    return folder


def look(folder: Path, width: int, dark: bool) -> Seen:
    """Open the page in a window of this width, in a light or dark scheme."""
    assert BROWSER is not None
    picture = folder / f"{width}-{'dark' if dark else 'light'}.png"
    words = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-quic",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},4200",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    shown = subprocess.run(
        [*words, f"--screenshot={picture}", (folder / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    dumped = subprocess.run(
        [*words, "--dump-dom", (folder / "probed.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert dumped.returncode == 0, dumped.stderr
    text = dumped.stdout.partition('<pre id="probe">')[2].partition("</pre>")[0]
    found = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return Seen(found, picture)


@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_whole_in_a_browser(report: Path, width: int, dark: bool) -> None:
    seen = look(report, width, dark)
    found = seen.found
    assert found["fetched"] == []
    assert found["wide"] <= width, "the page scrolls sideways"
    assert [name for name, _ in found["sections"]] == [
        "time", "memory", "candidates", "sensitivity", "plan",
    ]  # fmt: skip
    for chart in found["charts"]:
        assert chart["box"][2] > 400 and chart["box"][3] > 40
        assert chart["outside"] == [] and chart["overlapping"] == []
    assert sum(chart["marks"] for chart in found["charts"]) > 30
    ink, ground = (luminance(colour) for colour in found["colours"])
    assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) > 7
    assert (ground < 0.2) == dark


@pytest.mark.parametrize("dark", [False, True])
def test_the_charts_are_drawn(report: Path, dark: bool) -> None:
    seen = look(report, 1280, dark)
    picture = matplotlib.image.imread(seen.picture)[..., :3]
    for chart in seen.found["charts"]:
        x, y, width, height = (round(v) for v in chart["box"])
        part = picture[y : y + height, x : x + width].reshape(-1, 3)
        assert len(np.unique((part * 255).astype(int), axis=0)) > 20
    ground = picture[5, 5]
    assert (ground.mean() < 0.3) == dark


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` as in WCAG 2."""
    parts = [float(n) / 255 for n in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
