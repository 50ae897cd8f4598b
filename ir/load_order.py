"""Load order: `flat program -> which load of its ring an engine's n-th load is`.

The loads of a ring fill its buffers in the order in which the workers take them. A ring with one
loader is loaded in that order. Where several share the work, each makes its part of the loads in
that order, and none waits for another: buffers belong to loads by number, not by who was first.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from dovetail.ir.errors import VerifyError
from dovetail.ir.program import Flat, Free, Load

Part = tuple[int, int]
"""Layer and chunk of a load; one ring streams one kind of unit."""


class LoadOrder:
    """The numbers of all loads, counted per ring from the first step on. ``flat`` are the engines'
    instructions of one step; raises VerifyError where loaders do not share a ring's loads."""

    def __init__(self, flat: Mapping[str, Sequence[Flat]]) -> None:
        loads: dict[str, dict[str, list[Part]]] = {}
        for engine, items in flat.items():
            for item in items:
                if isinstance(item, Load):
                    parts = loads.setdefault(item.ring, {}).setdefault(engine, [])
                    parts.append((item.layer, item.chunk))
        self._places: dict[tuple[str, str], tuple[int, ...]] = {}
        self._loader: dict[str, list[str]] = {}
        for ring, engines in loads.items():
            order = _order(flat, ring, engines)
            owners = [""] * sum(map(len, engines.values()))
            for engine, parts in engines.items():
                places = tuple(order[part] for part in parts) if order else range(len(parts))
                self._places[engine, ring] = tuple(places)
                for place in places:
                    owners[place] = engine
            self._loader[ring] = owners

    def in_step(self, ring: str) -> int:
        """Loads of the ring in a step."""
        return len(self._loader.get(ring, ()))

    def number(self, engine: str, ring: str, count: int) -> int:
        """The number of the load that ``engine`` makes after ``count`` others of the ring."""
        places = self._places.get((engine, ring), ())
        if len(places) == self.in_step(ring):
            return count
        step, at = divmod(count, len(places)) if places else (count, 0)
        return step * self.in_step(ring) + (places[at] if places else 0)

    def loader(self, ring: str, number: int) -> str:
        """The engine that makes load ``number`` of the ring, or "" if no one loads it."""
        owners = self._loader.get(ring)
        return owners[number % len(owners)] if owners else ""


def _order(
    flat: Mapping[str, Sequence[Flat]], ring: str, engines: Mapping[str, Sequence[Part]]
) -> dict[Part, int]:
    """The place of every load of a ring that several engines load; empty where one does."""
    if len(engines) < 2:
        return {}
    worker = next((items for name, items in flat.items() if name.startswith("cpu")), ())
    taken = [(i.layer, i.chunk) for i in worker if isinstance(i, Free) and i.ring == ring]
    order = {part: place for place, part in enumerate(taken)}
    loaded = sorted(part for parts in engines.values() for part in parts)
    ascending = all(_rises([order.get(part, -1) for part in parts]) for parts in engines.values())
    if loaded != sorted(taken) or len(order) != len(taken) or not ascending:
        raise VerifyError(
            f"ring {ring} is loaded by {' and '.join(engines)}, expected one engine, or every load "
            "of a step by one of them, in the order in which the workers take them"
        )
    return order


def _rises(places: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(places))
