"""DeepSeek's expert-parallel load balancer (EPLB, 2025), all layers at once.

Three steps, twice greedy: groups of experts are packed onto nodes, the expert whose replicas are
heaviest gets one more replica until the slots are used, and replicas are packed onto the node's
devices. Global mode is one group on one node. Arithmetic is in float32 and ties go to the lowest
index, so that the slots equal those of the published program.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def eplb(loads: npt.ArrayLike, slots: int, groups: int, nodes: int, devices: int) -> Ints:
    """Expert of every slot, ``[layer, slot]``, device by device, for ``loads[layer, expert]``.

    Hierarchical where ``groups`` divide over ``nodes``, global where they do not, as published.
    Raises ValueError where devices, slots or experts do not divide.
    """
    w = np.asarray(loads, np.float32)
    if groups % nodes:
        groups = nodes = 1
    _check(w.shape[1], slots, groups, nodes, devices)
    layers, experts = w.shape
    size, per_node = experts // groups, experts // nodes

    node, rank = pack(w.reshape(layers, groups, size).sum(-1, dtype=np.float32), nodes)
    place = (node * (groups // nodes) + rank)[..., None] * size + np.arange(size)
    in_node_order = _inverse(place.reshape(layers, experts))

    w_node = np.take_along_axis(w, in_node_order, 1).reshape(layers * nodes, per_node)
    replica, count = replicate(w_node, slots // nodes)
    w_replica = np.asarray(np.take_along_axis(w_node / count, replica, 1), np.float32)
    device, rank = pack(w_replica, devices // nodes)
    in_device_order = _inverse(device * (slots // devices) + rank)

    local = np.take_along_axis(replica, in_device_order, 1).reshape(layers, nodes, -1)
    member = (local + np.arange(0, experts, per_node)[:, None]).reshape(layers, slots)
    return np.take_along_axis(in_node_order, member, 1)


def pack(w: Floats, packs: int) -> tuple[Ints, Ints]:
    """Pack and rank in its pack of every item ``w[row, item]``: heaviest first, each into the
    lightest pack that is not full (longest processing time with equal counts)."""
    rows, items = w.shape
    each = items // packs
    if each == 1:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64)
    order = np.argsort(-w, axis=1, kind="stable")
    sorted_w = np.take_along_axis(w, order, 1)
    pack_of, rank = np.empty((rows, items), np.int64), np.empty((rows, items), np.int64)
    weight = np.zeros((rows, packs), np.float32)
    count, row = np.zeros((rows, packs), np.int64), np.arange(rows)
    open_weight = weight.copy()
    for i in range(items):
        lightest = open_weight.argmin(1)
        pack_of[row, order[:, i]] = lightest
        rank[row, order[:, i]] = count[row, lightest]
        count[row, lightest] += 1
        weight[row, lightest] += sorted_w[:, i]
        is_full = count[row, lightest] == each
        open_weight[row, lightest] = np.where(is_full, np.inf, weight[row, lightest])
    return pack_of, rank


def replicate(w: npt.NDArray[np.floating], slots: int) -> tuple[Ints, Ints]:
    """Expert of every replica ``[row, slot]`` and replicas of every expert ``[row, expert]``.

    Each further replica goes to the expert whose replicas are heaviest, which makes the heaviest
    replica as light as any choice of counts can.
    """
    rows, experts = w.shape
    replica = np.tile(np.arange(slots), (rows, 1))
    count, row = np.ones((rows, experts), np.int64), np.arange(rows)
    each = w.copy()
    for i in range(experts, slots):
        heaviest = each.argmax(1)
        replica[:, i] = heaviest
        count[row, heaviest] += 1
        each[row, heaviest] = w[row, heaviest] / count[row, heaviest]
    return replica, count


def _inverse(permutation: Ints) -> Ints:
    inverse = np.empty_like(permutation)
    numbers = np.broadcast_to(np.arange(permutation.shape[1]), permutation.shape)
    np.put_along_axis(inverse, permutation, numbers, 1)
    return inverse


def _check(experts: int, slots: int, groups: int, nodes: int, devices: int) -> None:
    for count, parts, what in (
        (experts, groups, "experts over groups"),
        (devices, nodes, "devices over nodes"),
        (slots, devices, "slots over devices"),
    ):
        if count % parts:
            raise ValueError(f"EPLB needs an even split of {what}: {count} over {parts}")
