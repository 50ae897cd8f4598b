"""The figures as JSON and as one Markdown page."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clock import Peaks
from layers import Measured, verdicts
from questions import Answer
from runs import Run, end_to_end_verdicts
from tiles import Tried, kendall

from dovetail.ir import codec
from dovetail.ir.kernel_text import tile_text
from dovetail.tuning.kernels.rungs import Decided
from dovetail.tuning.kernels.table import HEADER, rung_record, rung_row


@dataclass(slots=True)
class Report:
    """Everything that a run found, and what it left out."""

    machine: dict[str, str]
    peaks: Peaks | None = None
    numbers: list[dict[str, Any]] = field(default_factory=list)
    layers: list[Measured] = field(default_factory=list)
    tiles: list[Tried] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    tuned: list[Decided] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def write(self, out: Path) -> None:
        """Write ``out`` (.md) and the same beside it as .json."""
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(self.text(), encoding="utf-8")
        data = {
            "machine": self.machine,
            "peaks": asdict(self.peaks) if self.peaks else None,
            "numbers": self.numbers,
            "layers": [measured.record() for measured in self.layers],
            "tiles": [asdict(tried) | {"spec": codec.encode(tried.spec)} for tried in self.tiles],
            "answers": [asdict(answer) for answer in self.answers],
            "runs": [run.record() for run in self.runs],
            "tuned": [rung_record(one) for one in self.tuned],
            "skipped": self.skipped,
        }
        text = json.dumps(data, indent=1) + "\n"
        out.with_suffix(".json").write_text(text, encoding="utf-8")

    def text(self) -> str:
        """The page."""
        parts = ["# MoE kernels on a GPU", "", _table(("", ""), self.machine.items())]
        if self.peaks:
            parts += [
                "",
                f"Measured peaks: copy {self.peaks.bandwidth / 1e12:.2f} TB/s, "
                f"bf16 product {self.peaks.flops / 1e12:.0f} TFLOP/s.",
            ]
        parts += self._numbers() + self._layers() + self._tiles() + self._answers()
        parts += self._runs() + self._tuned()
        if self.skipped:
            parts += ["", "## Left out", "", *(f"- {line}" for line in self.skipped)]
        return "\n".join(parts) + "\n"

    def _numbers(self) -> list[str]:
        if not self.numbers:
            return []
        wrong = [entry for entry in self.numbers if not entry["right"]]
        count = f"{len(self.numbers) - len(wrong)} of {len(self.numbers)} within rounding"
        lines = [f"- **WRONG** {e['kernel']}: {e['error']:.3g} {e['note']}" for e in wrong]
        return ["", "## Numbers against float64", "", f"{count} of float64.", *lines]

    def _layers(self) -> list[str]:
        if not self.layers:
            return []
        rows = [
            (
                measured.layer,
                str(measured.tokens),
                measured.way,
                f"{measured.timing.seconds * 1e6:.1f} ({measured.timing.how})",
                f"{measured.share:.0%} of {measured.resource}",
                f"{measured.error:.2g}",
            )
            if measured.timing
            else (measured.layer, str(measured.tokens), measured.way, measured.skipped, "", "")
            for measured in self.layers
        ]
        header = ("layer", "tokens", "way", "µs", "share of measured peak", "error")
        targets = [f"- {line}" for line in verdicts(self.layers)]
        return ["", "## Layers", "", _table(header, rows), "", "### Targets", "", *targets]

    def _tiles(self) -> list[str]:
        if not self.tiles:
            return []
        lines: list[str] = ["", "## Tiles of moe_up"]
        for question in dict.fromkeys(tried.question for tried in self.tiles):
            asked = [tried for tried in self.tiles if tried.question == question]
            header = ("tokens", "variant", "tile", "µs", "predicted µs", "registers", "spilled")
            lines += ["", f"### {question}", "", _table(header, map(_tile_row, asked))]
            if question.startswith("rank"):
                lines += ["", *_ranks(asked)]
        return lines

    def _runs(self) -> list[str]:
        if not self.runs:
            return []
        header = (
            "model", "place", "way", "tokens/s", "decode step, ms", "predicted / measured",
            "share of link's bound", "tokens as transformers",
        )  # fmt: skip
        lines = [f"- {line}" for line in end_to_end_verdicts(self.runs)]
        return ["", "## End to end", "", _table(header, map(_run_row, self.runs)), "", *lines]

    def _tuned(self) -> list[str]:
        if not self.tuned:
            return []
        lines = [f"- {line}" for line in tuned_verdicts(self.tuned)]
        table = _table(HEADER, map(rung_row, self.tuned))
        return ["", "## Tuned kernels", "", table, "", *lines]

    def _answers(self) -> list[str]:
        if not self.answers:
            return []
        rows = [(answer.question, answer.what, answer.answer) for answer in self.answers]
        return ["", "## Launches and binaries", "", _table(("", "what", "found"), rows)]


def tuned_verdicts(tuned: Sequence[Decided]) -> list[str]:
    """What the search gained over the cost model's choice, rung by rung."""
    return [
        f"{one.rung.name}: tuned kernels take {one.measured.ratio:.3f} of the time "
        f"({one.measured.low:.3f} to {one.measured.high:.3f}, {one.measured.pairs} pairs)"
        if one.measured
        else f"{one.rung.name}: the cost model's kernels stay: {one.reason}"
        for one in tuned
    ]


def _run_row(run: Run) -> tuple[str, ...]:
    if run.skipped:
        return run.model, run.place, run.way, run.skipped, "", "", "", ""
    predicted = f"{run.predicted / run.seconds:.2f}" if run.predicted else ""
    link = f"{run.link_share:.0%}" if run.link else ""
    same = f"{run.same:.0%}" if run.same is not None else ""
    rate, decode = f"{run.tokens / run.seconds:.1f}", f"{run.decode * 1e3:.2f}"
    return run.model, run.place, run.way, rate, decode, predicted, link, same


def _tile_row(tried: Tried) -> tuple[str, ...]:
    found = f"{tried.timing.seconds * 1e6:.1f}" if tried.timing else tried.skipped
    facts = (str(tried.facts.registers), str(tried.facts.spill_bytes)) if tried.facts else ("", "")
    predicted = f"{tried.predicted * 1e6:.1f}"
    return (str(tried.tokens), tried.label, tile_text(tried.spec), found, predicted, *facts)


def _ranks(asked: Sequence[Tried]) -> list[str]:
    lines = []
    for tokens in dict.fromkeys(tried.tokens for tried in asked):
        pairs = [
            (tried.predicted, tried.timing.seconds)
            for tried in asked
            if tried.tokens == tokens and tried.timing
        ]
        if len(pairs) < 2:
            continue
        first, best = min(pairs)[1], min(seconds for _, seconds in pairs)
        lines.append(
            f"{tokens} tokens: Kendall's tau {kendall(pairs):.2f}; the first predicted takes "
            f"{first / best:.2f} × the fastest measured of {len(pairs)}."
        )
    return lines


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
