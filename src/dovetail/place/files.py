"""Placements in the forms of other engines: `placement -> file`, and `file -> slots`.

    dovetail     slots, shares, certificates and a digest (ir/expert_placement.py)
    sglang       {"physical_to_logical_map": [layers][slots]}, for --init-expert-location
    vllm         [layers][slots], for eplb_config.initial_expert_map_path (vLLM pull request 49572)
    vllm-ascend  layer_list of device_list, for expert_map_path

SGLang numbers all layers of the model, so that a layer without experts gets the placement without
a plan; the others have the layers with experts only. Slots are listed device by device, as many on
each. Shares are dovetail's own: the others spread tokens over replicas as they see fit.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import (
    ExpertPlacement,
    LayerPlacement,
    load_placement,
    save_placement,
)
from dovetail.ir.expert_slots import Slots, contiguous
from dovetail.ir.record_file import write_whole

FORMATS = ("dovetail", "sglang", "vllm", "vllm-ascend")


def check_format(form: str) -> None:
    """Raise InputError unless ``form`` is one of ours."""
    if form not in FORMATS:
        raise InputError(f"format {form!r}: expected one of {', '.join(FORMATS)}")


def write_placement(
    placement: ExpertPlacement,
    path: Path,
    form: str,
    layers: Sequence[int],
    model_layers: int,
) -> None:
    """Write a placement of the model's ``layers`` in one of the forms.

    Raises InputError if the form cannot say it; OSError if the file cannot be written.
    """
    check_format(form)
    if form == "dovetail":
        save_placement(placement, path)
        return
    data = _in_form(placement, form, layers, model_layers)
    write_whole(json.dumps(data) + "\n", path)


def losses(placement: ExpertPlacement, form: str) -> str:
    """What the form cannot say of this placement, "" if nothing."""
    if form == "dovetail":
        return ""
    uneven = sum(
        len({share for _, _, share in layer.homes(expert)}) > 1
        for layer in placement.layers
        for expert in range(placement.experts)
    )
    if not uneven:
        return ""
    return (
        f"{form}'s form has no shares: {uneven} experts whose replicas serve unequal shares here "
        f"are split by {form} as it sees fit"
    )


def _in_form(
    placement: ExpertPlacement, form: str, layers: Sequence[int], model_layers: int
) -> object:
    if len(set(placement.slots)) != 1:
        raise InputError(
            f"format {form}: found devices with {sorted(set(placement.slots))} slots, expected as "
            "many on each, which is all that it can say; use --format dovetail"
        )
    flat = [[e for row in layer.experts for e in row] for layer in placement.layers]
    if form == "vllm":
        return flat
    if form == "vllm-ascend":
        layer_list = [_ascend_layer(number, la) for number, la in enumerate(placement.layers)]
        return {"moe_layer_count": len(flat), "layer_list": layer_list}
    trivial = contiguous(placement.experts, placement.slots)
    rows = [[e for row in trivial for e in row] for _ in range(model_layers)]
    for layer, row in zip(layers, flat, strict=True):
        rows[layer] = row
    return {"physical_to_logical_map": rows}


def _ascend_layer(number: int, layer: LayerPlacement) -> dict[str, object]:
    devices = [
        {"device_id": device, "device_expert": list(row)}
        for device, row in enumerate(layer.experts)
    ]
    return {"layer_id": number, "device_count": len(devices), "device_list": devices}


def read_slots(path: Path, devices: int, layers: Sequence[int]) -> tuple[Slots, ...]:
    """``[layer][device][slot]`` of a file in any of the forms, for ``devices`` devices.

    ``layers`` are the numbers of the layers with experts, where the file lists all of the model's.
    Raises InputError, naming the file, for everything else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the placement {path} cannot be read: {error.strerror}; give a file of `dovetail "
            f"place` or in a form of {', '.join(FORMATS[1:])}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the placement {path} is not JSON: {error}") from error
    if isinstance(data, dict) and data.get("kind") == "ExpertPlacement":
        return tuple(layer.experts for layer in load_placement(path).layers)
    try:
        return _slots_of(data, devices, layers)
    except InputError as error:
        raise InputError(f"the placement {path}: {error}") from None


def _slots_of(data: Any, devices: int, layers: Sequence[int]) -> tuple[Slots, ...]:
    match data:
        case {"physical_to_logical_map": [*rows]}:
            if len(rows) > len(layers) and max(layers) < len(rows):
                rows = [rows[layer] for layer in layers]
            return tuple(_split(row, devices) for row in rows)
        case {"layer_list": [*found]}:
            return tuple(_ascend(layer) for layer in found)
        case [*rows]:
            return tuple(_split(row, devices) for row in rows)
    keys = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
    raise InputError(f"found {keys}, expected a placement in a form of {', '.join(FORMATS)}")


def _split(row: Any, devices: int) -> Slots:
    numbers = _experts(row)
    if not numbers or len(numbers) % devices:
        raise InputError(
            f"found {len(numbers)} slots, which do not divide into {devices} devices; give the "
            "number of devices it was made for"
        )
    each = len(numbers) // devices
    return tuple(numbers[i : i + each] for i in range(0, len(numbers), each))


def _ascend(layer: Any) -> Slots:
    match layer:
        case {"device_list": [*devices]}:
            rows = [d.get("device_expert") if isinstance(d, dict) else None for d in devices]
            return tuple(_experts(row) for row in rows)
    raise InputError("a layer has no device_list; write the file again")


def _experts(row: Any) -> tuple[int, ...]:
    if not isinstance(row, list) or not all(type(e) is int for e in row):
        raise InputError("found something else than a list of expert numbers; write it again")
    return tuple(row)
