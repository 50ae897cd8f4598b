"""SGLang's ``per_pass`` and ``per_token`` records: `physical experts -> loads, or a trace`.

The recorder counts and lists *physical* experts, the slots; ``last_physical_to_logical_map
[layers, slots]`` says which expert each of them held at the end. A record is one pass of one rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.ir.errors import InputError
from dovetail.ir.routing_trace import RoutingTrace, make_trace

Record = Mapping[str, Any]
Ints = NDArray[np.int64]
DECODE = 2
"""SGLang's number of the forward mode in which every sequence has one token."""


def records_to_loads(records: Sequence[Record], places: Ints) -> NDArray[np.float64]:
    """The load of every expert, ``[layers, experts]``, from counts by slot. Raises InputError."""
    total = np.zeros(_checked(places).shape)
    for record in records:
        counts = np.asarray(_of(record, "global_physical_count"), np.float64)
        if counts.shape != places.shape:
            raise InputError(
                f"global_physical_count has the shape {list(counts.shape)} and the map "
                f"{list(places.shape)}, expected one shape [layers, slots]"
            )
        total += counts
    loads = np.zeros((len(places), int(places.max()) + 1))
    np.add.at(loads, (np.arange(len(places))[:, None], places), total)
    return loads


def records_to_trace(records: Sequence[Record], places: Ints) -> RoutingTrace:
    """The trace of ``per_token`` records: layers without experts and choices that were never made
    are left out. SGLang does not say which request a token is of: each pass stands for a prompt.

    Raises InputError where records do not fit together.
    """
    _checked(places)
    ordered = sorted(records, key=lambda record: int(_of(record, "forward_pass_id")))
    ids = [np.asarray(_of(record, "topk_ids_of_layer")) for record in ordered]
    if any(each.ndim != 3 or len(each) != len(places) for each in ids):
        raise InputError(
            f"topk_ids_of_layer has the shape {list(ids[0].shape)}, expected [{len(places)} "
            "layers, tokens, choices]"
        )
    slots = np.concatenate(ids, axis=1).transpose(1, 0, 2).astype(np.int64)
    if slots.size and slots.max() >= places.shape[1]:
        raise InputError(f"found slot {slots.max()}, expected 0 to {places.shape[1] - 1}")
    layers = np.flatnonzero((slots >= 0).any(axis=(0, 2)))
    choices = np.flatnonzero((slots >= 0).any(axis=(0, 1)))
    slots = slots[:, layers][:, :, choices]
    whole = (slots >= 0).all(axis=(1, 2))
    lengths = [each.shape[1] for each in ids]
    passes = np.repeat(np.arange(len(ids)), lengths)[whole]
    modes = np.repeat([int(record.get("forward_mode", 0)) for record in ordered], lengths)[whole]
    position = [
        np.asarray(record.get("positions", range(length)))
        for record, length in zip(ordered, lengths, strict=True)
    ]
    if [len(each) for each in position] != lengths:
        raise InputError("a record has more or fewer positions than tokens; record again")
    experts = places[layers][np.arange(len(layers))[None, :, None], slots[whole]]
    return make_trace(
        experts,
        int(places.max()) + 1,
        prompt=passes,
        position=np.concatenate(position)[whole],
        step=passes,
        decode=modes == DECODE,
        layers=layers.tolist(),
        model_layers=len(places),
    )


def _of(record: Record, name: str) -> Any:
    if not isinstance(record, Mapping) or name not in record:
        raise InputError(f"a record has no {name!r}; record again with SGLang")
    return record[name]


def _checked(places: Ints) -> Ints:
    if places.ndim != 2 or 0 in places.shape or places.min() < 0:
        raise InputError(
            f"the map from slots to experts has the shape {list(places.shape)}, expected "
            "[layers, slots] of expert numbers"
        )
    return places
