"""Even device loads by weighted replicas: every device is filled to exactly the mean.

Walker's alias method (1974; Vose, 1991) on devices. Experts are dealt to devices in a snake, and
some slots are left open. The lightest device is then filled to the mean by a replica of the
largest expert of the heaviest device, which hands over just the tokens that are missing; each step
finishes a device. All layers at once: arrays are ``[layer, device, slot]``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
NONE = -1
_EVEN = 1e-12
"""Loads this close to the mean, as a share of it, count as equal to it."""


@dataclass(slots=True)
class Filling:
    """Slots under construction: ``expert`` (NONE: open) and the tokens ``amount`` of every slot,
    how many slots are ``used`` and what ``load`` they add up to, ``[layer, device]``."""

    expert: Ints
    amount: Floats
    used: Ints
    load: Floats


def fill(
    loads: Floats, capacity: Ints, node_of: Ints | None = None, home_node: Ints | None = None
) -> Filling:
    """Weighted replicas for ``loads[layer, expert]`` in ``capacity[device]`` slots.

    With as many slots to spare as there are devices nearly every load ends even; the caller looks
    at ``load``. With ``home_node[layer, expert]`` experts start on devices of their node
    (``node_of[device]``), and tokens leave a node only for what its devices cannot carry.
    """
    state = _deal(loads, capacity, node_of, home_node)
    mean = loads.sum(1) / len(capacity)
    layers = np.flatnonzero(mean > 0)
    for _ in range(2 * int(capacity.sum())):
        layers = _top_up(state, layers, mean, capacity, node_of)
        if not len(layers):
            break
    return state


def open_slots(experts: int, capacity: Ints) -> Ints:
    """Slots of each device that the first deal leaves open: as even as experts allow."""
    spare = int(capacity.sum()) - experts
    left = np.zeros_like(capacity)
    while spare > 0:
        room = np.flatnonzero(left < capacity - 1)
        if not len(room):
            room = np.flatnonzero(left < capacity)
        lowest = room[left[room] == left[room].min()][:spare]
        left[lowest] += 1
        spare -= len(lowest)
    return left


def _deal(loads: Floats, capacity: Ints, node_of: Ints | None, home_node: Ints | None) -> Filling:
    """Heaviest first, over the devices forth and back (a snake), node by node where asked."""
    layers, experts = loads.shape
    order = np.argsort(-loads, axis=1, kind="stable")
    dealt = capacity - open_slots(experts, capacity)
    device_of = np.empty((layers, experts), np.int64)
    if home_node is None or node_of is None:
        np.put_along_axis(device_of, order, np.tile(_snake(dealt), (layers, 1)), 1)
    else:
        dealt = capacity
        homes = np.take_along_axis(home_node, order, 1)
        for node in range(int(node_of.max()) + 1):
            devices = np.flatnonzero(node_of == node)
            where = np.nonzero(homes == node)
            sizes = np.bincount(where[0], minlength=layers)
            rank = np.arange(len(where[0])) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            device_of[where[0], order[where]] = devices[_snake(capacity[devices])][rank]
    return _put(loads, order, device_of, capacity)


def _snake(dealt: Ints) -> Ints:
    """The device of every rank when ``dealt[device]`` items go forth and back."""
    rows = []
    for number in range(int(dealt.max())):
        row = np.flatnonzero(dealt > number)
        rows.append(row[::-1] if number % 2 else row)
    return np.concatenate(rows)


def _put(loads: Floats, order: Ints, device_of: Ints, capacity: Ints) -> Filling:
    layers, experts = loads.shape
    shape = (layers, len(capacity), int(capacity.max()))
    by_rank = np.take_along_axis(device_of, order, 1)
    within = np.argsort(by_rank, axis=1, kind="stable")
    devices = np.take_along_axis(by_rank, within, 1)
    used = np.zeros(shape[:2], np.int64)
    rows = np.repeat(np.arange(layers), experts)
    np.add.at(used, (rows, device_of.ravel()), 1)
    starts = np.cumsum(used, 1) - used
    slot = np.arange(experts) - np.take_along_axis(starts, devices, 1)
    expert, amount = np.full(shape, NONE), np.zeros(shape)
    members = np.take_along_axis(order, within, 1)
    place = (rows, devices.ravel(), slot.ravel())
    expert[place] = members.ravel()
    amount[place] = np.take_along_axis(loads, members, 1).ravel()
    return Filling(expert, amount, used, amount.sum(2))


def _top_up(
    state: Filling, layers: Ints, mean: Floats, capacity: Ints, node_of: Ints | None
) -> Ints:
    """One replica in every layer of ``layers``; those that could use another step."""
    load, target = state.load[layers], mean[layers]
    need = np.where(state.used[layers] < capacity, target[:, None] - load, -np.inf)
    to = need.argmax(1)
    row = np.arange(len(layers))
    missing = need[row, to]
    over = load - target[:, None]
    if node_of is not None:
        near = (node_of == node_of[to][:, None]) & (over > _EVEN * target[:, None])
        over = np.where(near.any(1)[:, None] & ~near, -np.inf, over)
    source = over.argmax(1)
    slack = _EVEN * target
    go = (missing > slack) & (over[row, source] > slack)
    layers, to, source, missing = layers[go], to[go], source[go], missing[go]
    if not len(layers):
        return layers
    slot = state.amount[layers, source].argmax(1)
    moved = np.minimum(missing, state.amount[layers, source, slot])
    _hand_over(state, layers, source, slot, to, moved)
    return layers


def _hand_over(
    state: Filling, layers: Ints, source: Ints, slot: Ints, to: Ints, moved: Floats
) -> None:
    """``moved`` tokens of a slot go to a new replica; a slot that is left empty is closed."""
    expert = state.expert[layers, source, slot]
    place = state.used[layers, to]
    state.expert[layers, to, place], state.amount[layers, to, place] = expert, moved
    state.used[layers, to] += 1
    state.load[layers, to] += moved
    state.load[layers, source] -= moved
    state.amount[layers, source, slot] -= moved
    empty = state.amount[layers, source, slot] <= 0
    layers, source, slot = layers[empty], source[empty], slot[empty]
    last = state.used[layers, source] - 1
    for field in (state.expert, state.amount):
        field[layers, source, slot] = field[layers, source, last]
    state.expert[layers, source, last], state.amount[layers, source, last] = NONE, 0.0
    state.used[layers, source] -= 1
