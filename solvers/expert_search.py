"""Replicas that share an expert's tokens evenly: list heuristic, then iterated local search.

    minimise  max_{s,g}  sum_{slots of g} cost(w[s,e] / c[e])        c[e]: replicas of expert e

over the expert of every slot, for several load scenarios s at once and all layers together: arrays
are ``[layer, scenario, expert]`` and ``[layer, device, slot]``. A step takes the device that sets
the maximum and swaps one of its replicas for one of another device; where no swap helps, a replica
elsewhere becomes one more replica of an expert of that device. Only steps that lower the maximum
on all devices touched are taken, so the search ends; rounds restart it from a shaken best.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dovetail.solvers.expert_eplb import replicate

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Cost = Callable[[Floats], Floats]
_LESS = 1 - 1e-9
_PARTNERS = 16
_RETYPED = 4


def same(tokens: Floats) -> Floats:
    """The cost of a replica where tokens are what is balanced."""
    return tokens


class SlotSearch:
    """Slots of all layers, and the local search on them. ``slots[layer, device, slot]`` is an
    expert or ``experts`` for an open slot; ``exists[device, slot]`` masks ragged devices."""

    def __init__(
        self, loads: Floats, capacity: Ints, cost: Cost = same, replicas: int | None = None
    ) -> None:
        """``loads[layer, scenario, expert]``; ``replicas`` counts all replicas of a layer (default:
        every slot is used)."""
        self.w, self.capacity, self.cost = loads, capacity, cost
        self.layers, self.scenarios, self.experts = loads.shape
        self.exists = np.arange(capacity.max()) < capacity[:, None]
        total = int(capacity.sum()) if replicas is None else replicas
        replica, self.count = replicate(loads.max(1), total)
        self.value = np.zeros((self.layers, self.scenarios, self.experts + 1))
        self._revalue(np.arange(self.layers))
        self._pack(replica)

    def _revalue(self, layers: Ints) -> None:
        each = self.w[layers] / self.count[layers][:, None, :]
        self.value[layers, :, : self.experts] = self.cost(each)

    def _pack(self, replica: Ints) -> None:
        """Heaviest replica first, onto the open device that it leaves lightest, never beside
        another replica of its expert while there is a choice."""
        devices, row = len(self.capacity), np.arange(self.layers)
        worth = np.take_along_axis(self.value.max(1), replica, 1)
        order = np.argsort(-worth, axis=1, kind="stable")
        replica = np.take_along_axis(replica, order, 1)
        shape = (self.layers, devices, int(self.capacity.max()))
        self.slots = np.full(shape, self.experts)
        self.held = np.zeros((self.layers, devices, self.experts + 1), np.int8)
        self.load = np.zeros((self.layers, self.scenarios, devices))
        used = np.zeros((self.layers, devices), np.int64)
        for expert in replica.T:
            value = self.value[row, :, expert]
            after = (self.load + value[:, :, None]).max(1)
            after += np.where(self.held[row, :, expert] > 0, 1e30, 0.0)
            device = np.where(used < self.capacity, after, np.inf).argmin(1)
            self.slots[row, device, used[row, device]] = expert
            used[row, device] += 1
            self.held[row, device, expert] += 1
            self.load[row, :, device] += value

    def adopt(self, slots: Ints) -> None:
        """Start from ``slots[layer, device, slot]`` instead (``experts`` where open)."""
        self.slots = slots.copy()
        self.held = np.zeros((self.layers, len(self.capacity), self.experts + 1), np.int8)
        layer, device, slot = np.nonzero(np.broadcast_to(self.exists, slots.shape))
        np.add.at(self.held, (layer, device, slots[layer, device, slot]), 1)
        held = self.held[:, :, : self.experts]
        self.count = held.sum(1, dtype=np.int64)
        self._revalue(np.arange(self.layers))
        self.load = self.value[:, :, : self.experts] @ held.transpose(0, 2, 1)

    def worst(self) -> Floats:
        """The objective of every layer."""
        return np.asarray(self.load.max((1, 2)))

    def run(self, bound: Floats, rounds: int = 0, seed: int = 0, tolerance: float = 5e-4) -> None:
        """Descend, then ``rounds`` times shake and descend again, in layers that are still more
        than ``tolerance`` above ``bound[layer]``. Same seed, same answer."""
        self._descend(np.arange(self.layers), bound * (1 + tolerance))
        rng = np.random.default_rng(seed)
        for number in range(rounds):
            open_layers = np.flatnonzero(self.worst() > bound * (1 + tolerance))
            if not len(open_layers):
                return
            saved = self._copy(open_layers)
            for layer in open_layers:
                self._shake(int(layer), rng, 3 + number % 6)
            self._descend(open_layers, bound * (1 + tolerance))
            self._restore(open_layers, saved)

    def _copy(self, layers: Ints) -> tuple[npt.NDArray[np.generic], ...]:
        fields = (self.slots, self.count, self.value, self.held, self.load)
        return tuple(field[layers].copy() for field in fields)

    def _restore(self, layers: Ints, saved: tuple[npt.NDArray[np.generic], ...]) -> None:
        """Back to ``saved`` where it was better."""
        was = saved[-1].max((1, 2))
        back = np.flatnonzero(self.worst()[layers] >= was)
        fields = (self.slots, self.count, self.value, self.held, self.load)
        for field, old in zip(fields, saved, strict=True):
            field[layers[back]] = old[back]

    def _shake(self, layer: int, rng: np.random.Generator, swaps: int) -> None:
        places = np.argwhere(self.exists)
        for first, second in rng.integers(0, len(places), (swaps, 2)):
            (g, k), (h, q) = places[first], places[second]
            e, f = self.slots[layer, g, k], self.slots[layer, h, q]
            if g != h and not self.held[layer, g, f] and not self.held[layer, h, e]:
                self._swap(np.array([layer]), *(np.array([x]) for x in (g, k, h, q)))

    def _descend(self, layers: Ints, enough: Floats) -> None:
        layers = layers[self.worst()[layers] > enough[layers]]
        while len(layers):
            moved = self._swap_step(layers)
            for i in np.flatnonzero(~moved):
                moved[i] = self._retype_step(int(layers[i]))
            layers = layers[moved]
            layers = layers[self.worst()[layers] > enough[layers]]

    def _swap_step(self, layers: Ints) -> Bools:
        """The best swap of every layer, where one lowers the maximum; which layers moved."""
        load = self.load[layers]
        devices, slots = self.exists.shape
        top = load.max(1)
        hot, row = top.argmax(1), np.arange(len(layers))
        limit = top[row, hot] * _LESS
        top[row, hot] = np.inf
        count = min(devices - 1, _PARTNERS)
        if count < 1:
            return np.zeros(len(layers), bool)
        partner = np.argpartition(top, count - 1, axis=1)[:, :count]
        mine, theirs = self.slots[layers, hot], self.slots[layers[:, None], partner]
        value = self.value[layers]
        mine_v = np.take_along_axis(value, mine[:, None, :], 2)
        flat = theirs.reshape(len(layers), 1, -1)
        theirs_v = np.take_along_axis(value, flat, 2).reshape(len(layers), -1, count, slots)
        less = mine_v[:, :, :, None, None] - theirs_v[:, :, None]
        hot_after = load[row, :, hot][:, :, None, None, None] - less
        near_after = np.take_along_axis(load, partner[:, None, :], 2)[:, :, None, :, None] + less
        after = np.maximum(hot_after, near_after).max(1)
        after[self._blocked(layers, hot, partner, mine, theirs)] = np.inf
        best = after.reshape(len(layers), -1).argmin(1)
        moved: Bools = np.less(after.reshape(len(layers), -1)[row, best], limit)
        k, p, q = np.unravel_index(best, (slots, count, slots))
        self._swap(layers[moved], hot[moved], k[moved], partner[row, p][moved], q[moved])
        return moved

    def _blocked(self, layers: Ints, hot: Ints, partner: Ints, mine: Ints, theirs: Ints) -> Bools:
        """Swaps ``[layer, slot, partner, slot]`` of slots that do not exist, or that would put an
        expert twice on a device."""
        twice = self.held[layers[:, None, None], partner[:, None, :], mine[:, :, None]] > 0
        back = self.held[layers[:, None, None], hot[:, None, None], theirs] > 0
        twice &= (mine < self.experts)[:, :, None]
        back &= theirs < self.experts
        back |= ~self.exists[partner]
        blocked = twice[:, :, :, None] | back[:, None]
        hot_missing: Bools = ~self.exists[hot][:, :, None, None]
        return np.logical_or(blocked, hot_missing)

    def _swap(self, layers: Ints, g: Ints, k: Ints, h: Ints, q: Ints) -> None:
        e, f = self.slots[layers, g, k], self.slots[layers, h, q]
        self.slots[layers, g, k], self.slots[layers, h, q] = f, e
        for device, out, new in ((g, e, f), (h, f, e)):
            self.held[layers, device, out] -= 1
            self.held[layers, device, new] += 1
            self.load[layers, :, device] += self.value[layers, :, new] - self.value[layers, :, out]

    def _retype_step(self, layer: int) -> bool:
        """The best change of a replica elsewhere into one of an expert of the device that sets
        the maximum; False if none lowers it."""
        load = self.load[layer]
        hot = int(load.max(0).argmax())
        mine = np.unique(self.slots[layer, hot][self.exists[hot]])
        mine = mine[mine < self.experts]
        heaviest = mine[np.argsort(-self.value[layer].max(0)[mine], kind="stable")][:_RETYPED]
        best, choice = load.max() * _LESS, None
        for expert in heaviest:
            device, slot = self._replaceable(layer, hot, int(expert))
            if not len(device):
                continue
            after = self._after_retype(layer, int(expert), device, slot)
            i = int(after.argmin())
            if after[i] < best:
                best, choice = after[i], (int(expert), int(device[i]), int(slot[i]))
        if choice is not None:
            self._retype(layer, *choice)
        return choice is not None

    def _replaceable(self, layer: int, hot: int, expert: int) -> tuple[Ints, Ints]:
        spare = np.append(self.count[layer] > 1, True)
        free = self.exists & spare[self.slots[layer]] & (self.slots[layer] != expert)
        free &= self.held[layer, :, expert, None] == 0
        free[hot] = False
        device, slot = np.nonzero(free)
        return device, slot

    def _after_retype(self, layer: int, expert: int, device: Ints, slot: Ints) -> Floats:
        """The maximum after each candidate (device, slot) becomes a replica of ``expert``."""
        old = self.slots[layer, device, slot]
        w, count = self.w[layer], np.append(self.count[layer], 2)
        padded = np.pad(w, ((0, 0), (0, 1)))
        mine_after = self.cost(w[:, expert] / (count[expert] + 1))
        old_after = self.cost(padded[:, old] / (count[old] - 1))
        saved = self.value[layer, :, expert] - mine_after
        added = old_after - self.value[layer][:, old]
        held = self.held[layer]
        after = (self.load[layer] - saved[:, None] * held[:, expert])[:, None, :] + added[
            :, :, None
        ] * held[:, old].T
        i = np.arange(len(device))
        after[:, i, device] += mine_after[:, None] - old_after
        return np.asarray(after.max((0, 2)))

    def _retype(self, layer: int, expert: int, device: int, slot: int) -> None:
        old = self.slots[layer, device, slot]
        self.slots[layer, device, slot] = expert
        self.held[layer, device, old] -= 1
        self.held[layer, device, expert] += 1
        self.count[layer, expert] += 1
        if old < self.experts:
            self.count[layer, old] -= 1
        self._revalue(np.array([layer]))
        held = self.held[layer, :, : self.experts]
        self.load[layer] = self.value[layer, :, : self.experts] @ held.T
