"""What `dovetail kernels tune` shows: a line per trial, and a table of rungs at the end."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dovetail.ir import codec, notation
from dovetail.ir.kernel_text import tile_text
from dovetail.tuning.kernels.rungs import Decided
from dovetail.tuning.known import ratio_of
from dovetail.tuning_db.facts import Trial

HEADER = (
    "experts of", "tokens", "default µs", "best µs", "ratio", "interval", "timed", "refused",
    "failed", "kernels",
)  # fmt: skip


def trial_text(trial: Trial, base: Mapping[str, int]) -> str:
    """A trial in a line: what came of it, and in which knobs it differs from the default."""
    changed = [f"{name} {value}" for name, value in trial.knobs.items() if base.get(name) != value]
    ratio = ratio_of(trial)
    said = trial.state if ratio is None else f"{ratio:.3f} of the default's time"
    if trial.state not in ("ok", "timeout", "throttled"):
        said += f" ({trial.note})"
    return f"trial {trial.number}: {said}; {', '.join(changed) or 'the default'}"


def rungs_table(decided: Sequence[Decided], *, dry: bool, as_json: bool, plan: Path) -> str:
    """All rungs, in words or as JSON."""
    if as_json:
        data = {"plan": str(plan), "dry": dry, "rungs": [rung_record(one) for one in decided]}
        return json.dumps(data, indent=1)
    lines = list(notation.table([HEADER, *map(rung_row, decided)], right=range(1, 9)))
    faster = sum(one.measured is not None for one in decided)
    if dry:
        lines.append(
            "tried in Triton's interpreter: these times mean nothing, and the plan is written as "
            "it was"
        )
    else:
        lines.append(f"{faster} of {len(decided)} rungs have measured kernels")
    return "\n".join([*lines, f"plan: {plan}"])


def rung_row(one: Decided) -> tuple[str, ...]:
    """A rung as a row under HEADER."""
    interval, measured = one.interval, one.measured
    best = measured.seconds if measured else one.default_seconds
    tiles = ", ".join(tile_text(spec) for spec in (one.kernels.up, one.kernels.down))
    return (
        ", ".join(one.rung.bodies),
        str(one.rung.space.bucket[1]),
        _micro(measured.default_seconds if measured else one.default_seconds),
        _micro(best),
        f"{interval.median:.3f}" if interval else "",
        f"{interval.low:.3f} to {interval.high:.3f}" if interval else "",
        str(one.timed),
        str(one.refused),
        str(one.failed),
        tiles if measured else f"the default: {one.reason}",
    )


def rung_record(one: Decided) -> dict[str, object]:
    """A rung as JSON data."""
    interval = one.interval
    return {
        "bodies": list(one.rung.bodies),
        "bucket": list(one.rung.space.bucket),
        "predicted_share_seconds": one.rung.seconds,
        "default_seconds": one.default_seconds,
        "interval": [interval.median, interval.low, interval.high] if interval else None,
        "measured": codec.encode(one.measured) if one.measured else None,
        "reason": one.reason,
        "timed": one.timed,
        "refused": one.refused,
        "failed": one.failed,
        "kernels": codec.encode(one.kernels) if one.measured else None,
    }


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds else ""
