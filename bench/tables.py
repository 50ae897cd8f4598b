"""The sections' results as Markdown."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import chain

from accuracy_section import Accuracy, Point
from dovetail_run import Run
from offload_section import Duel, Equality
from peers import Outcome, Sweep
from resident_section import Resident

GB = 1e9
_QUIET_CORES = 0.15


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _spread(values: Sequence[float], form: str = ".1f") -> str:
    """The median, and the range where there are several."""
    middle = f"{statistics.median(values):{form}}"
    if len(values) == 1:
        return middle
    return f"{middle} [{min(values):{form}}-{max(values):{form}}]"


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _share(part: dict[str, float | int], what: str) -> str:
    return f"{part[what]:.1%} of {part['prompts']} prompts"


def _quiet(rows: Iterable[Outcome | Run]) -> str:
    """Whether the machine was quiet enough for the figures to be quoted."""
    most = max(row.other_cores for row in rows)
    if most <= _QUIET_CORES:
        return f"The machine was quiet: others used at most {most:.2f} cores."
    return (
        f"**The machine was not quiet**: others used up to {most:.2f} cores, so these figures are "
        "not to be quoted. Programs with several threads suffer most."
    )


def _equal(part: dict[str, float | int], dtype: str) -> str:
    if not part["prompts"]:
        return "not compared."
    first, every = _share(part, "first_token"), _share(part, "all_tokens")
    return f"first token equal for {first}, all tokens for {every} ({dtype})."


def machine_table(facts: dict[str, str | int]) -> str:
    """The machine and versions."""
    shown = {name: str(value) for name, value in facts.items() if name != "ram_bytes"}
    shown["ram"] = f"{int(facts['ram_bytes']) / GB:.1f} GB"
    return _table(("", ""), shown.items())


def duel_tables(duel: Duel) -> str:
    """All of an offload section."""
    shortest, longest = duel.lengths
    lengths = str(longest) if shortest == longest else f"{shortest}-{longest}"
    title = (
        f"## {duel.name}: {duel.prompts} prompts of {lengths} tokens, {duel.new_tokens} new tokens "
        f"each, {duel.weights / GB:.2f} GB of weights, budget {duel.budget / GB:.2f} GB"
    )
    loaded = duel.loaded
    return "\n\n".join(
        [
            title,
            _table(
                ("", "threads", "in flight", "tokens/s", "decode tokens/s", "decode step s",
                 "peak RSS GB", "of it anonymous", "disk GB/step", "others' cores"),
                [
                    *(_peer_row(n, done) for n, done in duel.peer.items()),
                    *(_our_row(n, done) for n, done in duel.ours.items()),
                ],
            ),
            _quiet([*chain(*duel.peer.values()), *chain(*duel.ours.values())]),
            f"accelerate's load: {loaded['seconds']:.0f} s, peak RSS "
            f"{loaded['peak_bytes'] / GB:.2f} GB ({loaded['anonymous_bytes'] / GB:.2f} GB "
            f"anonymous); {loaded['modules_on_disk']} modules on disk, "
            f"{loaded['modules_in_ram']} in ram.",
            "\n".join(_speedup(duel, n) for n in duel.ours),
            f"dovetail and accelerate: {_equal(duel.agreement, duel.dtype)} "
            f"accelerate and itself at another batch size: {_equal(duel.noise, duel.dtype)}",
            _sweep_table(duel.sweep),
            *(_our_time(n, done[0]) for n, done in duel.ours.items()),
        ]
    )  # fmt: skip


def _peer_row(threads: int, done: Sequence[Outcome]) -> list[str]:
    first = done[0]
    steps = len(first.decode_steps) + len(first.prefill_seconds)
    return [
        f"accelerate, {first.experts}",
        str(threads),
        str(first.batch),
        _spread([o.tokens_per_second for o in done]),
        _spread([o.decode_rate for o in done]),
        _spread([o.decode_seconds for o in done], ".2f"),
        _spread([o.peak_bytes / GB for o in done], ".2f"),
        _spread([o.anonymous_bytes / GB for o in done], ".2f"),
        f"{first.read_bytes / steps / GB:.2f}",
        _spread([o.other_cores for o in done], ".2f"),
    ]


def _our_row(threads: int, done: Sequence[Run]) -> list[str]:
    first = done[0]
    peak = _spread([r.peak_bytes / GB for r in done], ".2f")
    return [
        f"dovetail, {first.policy}",
        str(threads),
        str(first.knobs["seqs"]),
        _spread([r.tokens_per_second for r in done]),
        _spread([r.decode_rate for r in done]),
        _spread([r.decode_seconds for r in done], ".2f"),
        peak,
        peak,
        f"{first.read_bytes / first.report['steps'] / GB:.2f}",
        _spread([r.other_cores for r in done], ".2f"),
    ]


def _speedup(duel: Duel, threads: int) -> str:
    mine, theirs = duel.ours[threads], duel.peer[threads]
    whole = statistics.median([r.tokens_per_second for r in mine]) / statistics.median(
        [o.tokens_per_second for o in theirs]
    )
    decode = [r.decode_rate for r in mine], [o.decode_rate for o in theirs]
    parts = [f"whole {whole:.2f} x"]
    if min(map(statistics.median, decode)) > 0:
        ratio = statistics.median(decode[0]) / statistics.median(decode[1])
        parts.append(f"decode {ratio:.2f} x")
    return f"dovetail over accelerate, {_threads(threads)}: {', '.join(parts)}."


def _sweep_table(sweep: Sweep) -> str:
    rows = [
        [
            str(o.batch),
            o.experts,
            f"{sum(o.prefill_seconds):.2f}",
            f"{o.decode_seconds:.2f}",
            f"{o.rate_for(sweep.new_tokens):.1f}" + (" (best)" if o is sweep.best else ""),
            f"{o.peak_bytes / GB:.2f}",
            f"{o.anonymous_bytes / GB:.2f}",
            f"{o.other_cores:.2f}",
        ]
        for o in sweep.outcomes
    ]
    header = ("peer's batch", "experts", "prefill s", "decode step s", "expected tokens/s",
              "peak RSS GB", "of it anonymous", "others' cores")  # fmt: skip
    return "\n\n".join([_table(header, rows), *sweep.notes])


def _our_time(threads: int, run: Run) -> str:
    """Prediction, bound, and what makes up the rest."""
    report = run.report
    knobs = ", ".join(f"{name} {value}" for name, value in run.knobs.items())
    fraction = report["roof_fraction"]
    error = report["predicted_seconds"] / run.seconds - 1
    return "\n\n".join(
        [
            f"dovetail, {_threads(threads)}: {run.policy}, {knobs}. Measured "
            f"{run.seconds:.2f} s for {report['steps']} steps ({report['setup_seconds']:.2f} s of "
            f"it set-up, predicted {run.predicted_setup_seconds:.2f} s), predicted "
            f"{report['predicted_seconds']:.2f} s ({error:+.1%}); the bound is "
            f"{report['bound_seconds']:.2f} s, set by {report['bound_resource']}: {fraction:.1%} "
            f"of it reached. With planning and start {run.wall_seconds:.1f} s; before the run, "
            f"planning held {run.planning_bytes / GB:.2f} GB. Memory predicted "
            f"{report['predicted_peak_bytes'] / GB:.3f} GB, pools {report['pool_bytes'] / GB:.3f}, "
            f"peak RSS {run.peak_bytes / GB:.3f}, budget {report['budget'] / GB:.3f}.",
            "What makes up the rest, whole run:",
            _class_table(run),
            "The last steps, shares of each engine's time:",
            _engine_table(run),
        ]
    )


def _class_table(run: Run) -> str:
    """Busy seconds; loads are the disk's, the rest is shared by the workers."""
    predicted = {k.replace(".", "_"): v for k, v in run.report["predicted_classes"].items()}
    measured = {k.replace(".", "_"): v for k, v in run.report["measured_classes"].items()}
    cpu = run.seconds * run.workers
    rows = []
    for name in sorted(predicted.keys() | measured.keys(), key=lambda k: -measured.get(k, 0.0)):
        kind, _, what = name.partition(":")
        seconds = measured.get(name, 0.0)
        share = {
            "load": f"{seconds / run.seconds:.1%} of disk",
            "run": f"{seconds / cpu:.1%} of cpu",
        }
        shown = share.get(kind, "")
        rows.append([kind, what, f"{seconds:.2f}", f"{predicted.get(name, 0.0):.2f}", shown])
    return _table(("", "class", "measured s", "predicted s", "share of the run"), rows)


def _engine_table(run: Run) -> str:
    names = sorted(
        {name for part in run.engines.values() for name in part},
        key=lambda name: -max(part.get(name, 0.0) for part in run.engines.values()),
    )
    rows = [
        [name, *(f"{part.get(name, 0.0):.1%}" for part in run.engines.values())] for name in names
    ]
    return _table(("", *run.engines), rows)


def equality_text(equality: Equality) -> str:
    """The comparison in float32."""
    return (
        f"float32, trained demo checkpoint ({equality.weights / GB:.3f} GB, budget "
        f"{equality.budget / GB:.3f} GB): all greedy tokens equal for "
        f"{_share(equality.agreement, 'all_tokens')}."
    )


def resident_tables(result: Resident) -> str:
    """All of the resident section."""
    mine, theirs = [p[0] for p in result.pairs], [p[1] for p in result.pairs]
    first, peer, ratios = mine[0], theirs[0], result.ratios()
    threads = peer.threads
    return "\n\n".join(
        [
            f"## resident: {result.prompts} prompts of {result.lengths[0]}-{result.lengths[1]} "
            f"tokens, {result.new_tokens} new tokens each, {result.weights / GB:.2f} GB of "
            f"weights, budget {result.budget / GB:.2f} GB",
            _table(
                ("", "threads", "in flight", "tokens/s", "with reading weights",
                 "decode tokens/s", "peak RSS GB", "others' cores"),
                [
                    [f"transformers, {peer.experts}", str(threads), str(peer.batch),
                     _spread([o.tokens_per_second for o in theirs]), "-",
                     _spread([o.decode_rate for o in theirs]),
                     _spread([o.peak_bytes / GB for o in theirs], ".2f"),
                     _spread([o.other_cores for o in theirs], ".2f")],
                    [f"dovetail, {first.policy}", str(threads), str(first.knobs["seqs"]),
                     _spread([r.loaded_rate for r in mine]),
                     _spread([r.tokens_per_second for r in mine]),
                     _spread([r.decode_rate for r in mine]),
                     _spread([r.peak_bytes / GB for r in mine], ".2f"),
                     _spread([r.other_cores for r in mine], ".2f")],
                ],
            ),
            _quiet([*mine, *theirs]),
            f"dovetail over transformers, weights in memory: {ratios['of_medians']:.3f} x (of "
            f"medians; pairs {ratios['min']:.3f}-{ratios['max']:.3f}; never below 0.95 is the "
            "aim).",
            f"dovetail and transformers: {_equal(result.agreement, result.dtype)}",
            _sweep_table(result.sweep),
            _our_time(threads, first),
        ]
    )  # fmt: skip


def accuracy_table(result: Accuracy) -> str:
    """Predictions against measurements."""
    medians = result.medians()
    header = ("checkpoint", "policy", "threads", "budget GB", "in flight", "prompts",
              "predicted s", "measured s", "error", "predicted GB", "peak RSS GB", "error",
              "predicted disk GB", "read GB", "error", "others' cores")  # fmt: skip
    return "\n\n".join(
        [
            "## accuracy: predicted and measured",
            _table(header, map(_point_row, result.points)),
            f"Median error: time {medians['seconds']:.1%}, memory {medians['memory']:.1%}, bytes "
            f"read {medians['disk']:.1%}.",
        ]
    )


def _point_row(point: Point) -> list[str]:
    errors = point.errors()
    return [
        point.checkpoint,
        point.policy,
        str(point.workers),
        f"{point.budget / GB:.3f}",
        str(point.batch),
        point.prompts,
        f"{point.seconds[0]:.2f}",
        f"{point.seconds[1]:.2f}",
        f"{errors['seconds']:+.1%}",
        f"{point.memory[0] / GB:.3f}",
        f"{point.memory[1] / GB:.3f}",
        f"{errors['memory']:+.1%}",
        f"{point.disk[0] / GB:.2f}",
        f"{point.disk[1] / GB:.2f}",
        f"{errors['disk']:+.1%}",
        f"{point.other_cores:.2f}",
    ]
