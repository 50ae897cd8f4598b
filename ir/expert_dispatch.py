"""Which replica serves a token: `placement, tokens, their experts -> devices`, the same everywhere.

The choice is a function of the token and the layer alone, so that whoever knows the token knows the
device: the rank that sends it, and the model that predicts the bytes. A token at ``position`` of
``prompt`` falls on the point ``frac(hash(prompt, layer, expert) + position * golden ratio)`` of
[0, 1), and the replicas' shares cut that interval: positions one after the other spread as evenly
as points can (a Kronecker sequence), and prompts begin at points of their own.

Shapes: ``experts`` is ``[tokens, top_k]``, prompt and position are ``[tokens]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.ir.expert_placement import ExpertPlacement, LayerPlacement

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
GOLDEN = 0.6180339887498949
_LEAST_SHARE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A layer's replicas by expert: the share up to each, ``ends [experts, replicas]``, and its
    device; expert e has its own and then repeats of the last."""

    ends: Floats
    devices: Ints

    @classmethod
    def of(cls, layer: LayerPlacement, experts: int) -> "_Layer":
        """The replicas that serve a share, in the order of devices and slots."""
        homes = [
            [(d, share) for d, _, share in layer.homes(e) if share > _LEAST_SHARE]
            for e in range(experts)
        ]
        most = max(map(len, homes))
        ends, devices = np.ones((experts, most)), np.zeros((experts, most), np.int64)
        for expert, found in enumerate(homes):
            for place in range(most):
                device, _ = found[min(place, len(found) - 1)]
                devices[expert, place] = device
                # The last share takes what rounding leaves.
                if place < len(found) - 1:
                    ends[expert, place] = sum(share for _, share in found[: place + 1])
        return cls(ends, devices)


class ExpertDispatch:
    """The devices that serve tokens under a placement."""

    def __init__(self, placement: ExpertPlacement) -> None:
        self.devices = placement.devices
        self._layers = [_Layer.of(layer, placement.experts) for layer in placement.layers]

    def serving(self, layer: int, experts: Ints, prompt: Ints, position: Ints) -> Ints:
        """The device that serves each choice in the placement's ``layer``, ``[tokens, top_k]``."""
        table = self._layers[layer]
        start = _hash(prompt[:, None], np.int64(layer), experts)
        point = (start + position[:, None] * GOLDEN) % 1.0
        passed = point[:, :, None] >= table.ends[experts]
        place = np.minimum(passed.sum(axis=2), table.ends.shape[1] - 1)
        found: Ints = table.devices[experts, place]
        return found


def next_home(serving: Ints, here: Ints, devices: int) -> Ints:
    """Where a token is after a layer if it stays with its experts, ``[tokens]``: the device that
    serves most of its choices; among equals the one where it is, and else the first.

    For one choice this is ExFlow's context-coherent parallelism (arXiv 2401.08383), where a token
    does not return to where it came from.
    """
    counts = np.zeros((len(serving), devices), np.int64)
    np.add.at(counts, (np.arange(len(serving))[:, None], serving), 1)
    rank = counts * 2
    rank[np.arange(len(serving)), here] += counts[np.arange(len(serving)), here] > 0
    found: Ints = rank.argmax(axis=1)
    return found


def visited(serving: Ints, devices: int) -> NDArray[np.bool_]:
    """Which devices a token's input goes to, ``[tokens, devices]``: once for all experts there."""
    goes = np.zeros((len(serving), devices), np.bool_)
    goes[np.arange(len(serving))[:, None], serving] = True
    return goes


def owners(prompts: Sequence[int] | Ints, devices: int) -> Ints:
    """The device that a prompt's attention runs on, in turn."""
    found: Ints = np.asarray(prompts, np.int64) % devices
    return found


def _hash(prompt: Ints, layer: np.int64, expert: Ints) -> Floats:
    """A point of [0, 1) for each combination (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = (
            prompt.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            + np.uint64(layer) * np.uint64(0xD1B54A32D192ED03)
            + expert.astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7)
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    points: Floats = (z >> np.uint64(11)) / float(1 << 53)
    return points
