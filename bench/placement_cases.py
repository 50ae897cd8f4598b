"""Loads and routing traces for `bench/placement.py`, all from seeds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dovetail.ir.expert_placement import PlacementProblem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
TOKENS = 1e6


def zipf_loads(power: float, layers: int, experts: int, seed: int) -> Floats:
    """Tokens ``[layer, expert]`` by Zipf's law, in another order in every layer, as counted among a
    million (Poisson)."""
    rng = np.random.default_rng(seed)
    ranks = np.tile(1 / np.arange(1, experts + 1) ** power, (layers, 1))
    rates = rng.permuted(ranks, axis=1)
    return np.asarray(rng.poisson(rates / rates.sum(1, keepdims=True) * TOKENS), float)


def lognormal_loads(sigma: float, layers: int, experts: int, seed: int) -> Floats:
    """Tokens ``[layer, expert]``, lognormal."""
    return np.asarray(np.random.default_rng(seed).lognormal(0, sigma, (layers, experts)))


def markov_trace(
    layers: int, experts: int, devices: int, tokens: int, noise: float, seed: int = 0
) -> Ints:
    """One expert per token and layer, ``[token, layer]``. Every layer has a hidden random partition
    into as many clusters as there are devices; a token stays in its cluster but for ``noise``, and
    within a cluster experts are chosen by Zipf's law of power 0.6."""
    rng = np.random.default_rng(seed)
    cluster = np.zeros((layers, experts), np.int64)
    for layer in range(layers):
        cluster[layer, rng.permutation(experts)] = np.repeat(np.arange(devices), experts // devices)
    ranks = np.tile(1 / np.arange(1, experts + 1) ** 0.6, (layers, 1))
    popular = rng.permuted(ranks, axis=1)
    popular /= popular.sum(1, keepdims=True)
    routes = np.empty((tokens, layers), np.int64)
    routes[:, 0] = rng.choice(experts, tokens, p=popular[0])
    for layer in range(1, layers):
        home = cluster[layer - 1, routes[:, layer - 1]]
        stays = rng.random(tokens) > noise
        routes[:, layer] = rng.choice(experts, tokens, p=popular[layer])
        for device in range(devices):
            mine = stays & (home == device)
            members = np.flatnonzero(cluster[layer] == device)
            rate = popular[layer, members]
            routes[mine, layer] = rng.choice(members, mine.sum(), p=rate / rate.sum())
    return routes


def transition_counts(routes: Ints, experts: int) -> Floats:
    """``[layer, expert, next expert]`` of routes ``[token, layer]``."""
    pairs = routes[:, :-1] * experts + routes[:, 1:]
    counts = [np.bincount(column, minlength=experts**2) for column in pairs.T]
    return np.stack(counts).reshape(-1, experts, experts).astype(float)


def expert_counts(routes: Ints, experts: int) -> Floats:
    """``[layer, expert]`` of routes ``[token, layer]``."""
    return np.stack([np.bincount(c, minlength=experts) for c in routes.T]).astype(float)


def read_domains(path: Path) -> dict[str, Floats]:
    """Counts ``[layer, expert]`` by domain, from a JSON file ``{"counts": {domain: [[..]]}}``."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return {name: np.array(counts, float) for name, counts in data["counts"].items()}


def drifting_domains(layers: int, experts: int, names: int, seed: int) -> dict[str, Floats]:
    """Domains that share half of their (logarithmic) popularity, where no counts are given."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.6, (layers, experts))
    return {
        f"domain {n}": np.exp(shared + rng.normal(0, 0.6, (layers, experts))) * 1e4
        for n in range(names)
    }


def problem(*scenarios: Floats, slots: int, devices: int, **fields: Any) -> PlacementProblem:
    """A placement problem of loads ``[layer, expert]`` and ``slots`` in all."""
    each = tuple(int(s) for s in np.diff(np.linspace(0, slots, devices + 1).round()))
    return PlacementProblem(loads=tuple(map(nested, scenarios)), slots=each, **fields)


def nested(array: Floats) -> Any:
    """An array as nested tuples."""
    return tuple(map(nested, array)) if array.ndim > 1 else tuple(array.tolist())
