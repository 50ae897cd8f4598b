"""Engines, resources, waits and knobs in plain words: one spelling for explanations and reports."""

from collections.abc import Iterable, Sequence

from dovetail.ir.units import format_bytes
from dovetail.passes.engine_use import EngineUse
from dovetail.passes.sensitivity import Effect, Knobs, Resource

SAME = 0.005
"""Relative difference below which two times are said to be the same."""
ENGINES = {
    "gpu": "the GPU",
    "cpu": "the processor",
    "h2d": "copying from ram to hbm",
    "d2h": "copying from hbm to ram",
    "peer": "the link between GPUs",
    "disk": "the disk",
    "compute": "arithmetic",
    "memory": "the bandwidth of hbm",
    "links": "the links between ram and hbm",
}
LINKS = {
    "disk": "disk bandwidth",
    "h2d": "bandwidth from ram to hbm",
    "d2h": "bandwidth from hbm to ram",
    "peer": "bandwidth between GPUs",
}


def grouped(engines: Iterable[EngineUse]) -> dict[str, list[EngineUse]]:
    """The engines by kind, as in ``cpu``: cpu0 and cpu1."""
    found: dict[str, list[EngineUse]] = {}
    for use in sorted(engines, key=lambda use: engine_order(use.engine)):
        found.setdefault(engine_kind(use.engine), []).append(use)
    return found


def wait_texts(uses: Sequence[EngineUse]) -> list[str]:
    """What engines of a kind wait for and how much of the time, longest first: ``12% ram``."""
    total = sum(use.seconds for use in uses)
    waits: dict[str, float] = {}
    for use in uses:
        for what, seconds in use.waits.items():
            text = wait_text(what)
            waits[text] = waits.get(text, 0.0) + seconds / total
    longest = sorted(waits.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{share:.0%} {text}" for text, share in longest if share >= SAME]
    left = 1 - sum(use.busy for use in uses) / total
    return texts or ["nothing" if left < SAME else f"{left:.0%} other engines"]


def wait_text(what: str) -> str:
    """What a wait is for, in words: ``ready:experts`` is "experts to be read"."""
    kind, _, name = what.partition(":")
    if kind == "ready":
        return f"{name} to be read"
    return f"a free buffer for {name}" if kind == "room" else "the other workers"


def more_text(effect: Effect) -> str:
    """How much more of what: ``+1.00 GiB ram (4.00 to 5.00 GiB)``."""
    resource, more = effect.resource, effect.amount - effect.resource.amount
    if resource.kind == "rate":
        return f"+{more / resource.amount:.0%} rate of products on {engine_name(resource.name)}"
    if resource.kind == "link":
        return f"+{more / 1e9:.3g} GB/s {LINKS.get(resource.name, resource.name)}"
    share = f", {more / resource.amount:+.0%}" if more < 1 << 30 else ""
    return f"+{format_bytes(round(more))} {resource.name}{share}"


def amount_text(resource: Resource, amount: float) -> str:
    """An amount of a resource with its unit."""
    if resource.kind == "tier":
        return format_bytes(round(amount)).replace(".00 ", " ")
    if resource.kind == "link":
        return f"{amount / 1e9:.3g} GB/s"
    return f"{amount / 1e9:.3g} GFLOP/s"


def resource_name(resource: Resource) -> str:
    """A resource in words: ``budget of ram``, ``disk bandwidth``."""
    if resource.kind == "tier":
        return f"budget of {resource.name}"
    if resource.kind == "link":
        return LINKS.get(resource.name, resource.name)
    return f"rate of products on {engine_name(resource.name)}"


def knobs_text(knobs: Knobs) -> str:
    """Knobs as ``seqs=32 rows=4``."""
    return " ".join(f"{name}={value}" for name, value in knobs.items()) or "no knobs"


def engine_kind(engine: str) -> str:
    """An engine's name without its number."""
    return engine.rstrip("0123456789")


def engine_name(engine: str) -> str:
    """An engine or the resource of a bound in words; as it is if it has none."""
    return ENGINES.get(engine_kind(engine), engine)


def engine_order(engine: str) -> tuple[int, str]:
    """Where an engine stands in a list: processors, then links, then the disk."""
    kinds = list(ENGINES)
    kind = engine_kind(engine)
    return kinds.index(kind) if kind in kinds else len(kinds), engine
