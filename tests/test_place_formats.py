"""Placements in the forms of SGLang, vLLM and vllm-ascend, there and back."""

import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.expert_placement import ExpertPlacement, LayerPlacement
from dovetail.place.files import FORMATS, losses, read_slots, write_placement

LAYERS, MODEL_LAYERS = (1, 2, 4), 5


def placed(
    layers: list[list[list[int]]], shares: list[list[list[float]]] | None = None
) -> ExpertPlacement:
    """A placement of these slots, experts' tokens split evenly unless said otherwise."""
    made = []
    for number, rows in enumerate(layers):
        flat = [e for row in rows for e in row]
        even = [[1 / flat.count(e) for e in row] for row in rows]
        split = even if shares is None else shares[number]
        made.append(LayerPlacement(tuple(map(tuple, rows)), tuple(map(tuple, split))))
    experts = max(e for rows in layers for row in rows for e in row) + 1
    return ExpertPlacement(1, "", "eplb", {}, experts, 1, tuple(made), ())


SAMPLE = placed(
    [
        [[0, 1, 2], [3, 0, 4]],
        [[4, 3, 2], [1, 0, 0]],
        [[2, 2, 0], [1, 3, 4]],
    ]
)


@given(st.integers(0, 10**6), st.sampled_from(FORMATS))
def test_written_and_read_the_slots_are_the_same(seed: int, form: str) -> None:
    """Random slots of two to four devices, in every form."""
    generator = random.Random(seed)
    devices, each, experts = generator.randint(2, 4), generator.randint(2, 4), 5
    layers = []
    for _ in LAYERS:
        flat = [*range(experts), *(generator.randrange(experts) for _ in range(devices * each))]
        flat = flat[: max(experts, devices * each)]
        while len(flat) % devices:
            flat.append(generator.randrange(experts))
        generator.shuffle(flat)
        size = len(flat) // devices
        layers.append([flat[i : i + size] for i in range(0, len(flat), size)])
    placement = placed(layers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "placement.json"
        write_placement(placement, path, form, LAYERS, MODEL_LAYERS)
        read = read_slots(path, devices, LAYERS)
        assert [p.name for p in Path(folder).iterdir()] == ["placement.json"]
    assert read == tuple(layer.experts for layer in placement.layers)


def write(tmp_path: Path, form: str) -> object:
    """The sample as a file of that form, parsed."""
    path = tmp_path / f"{form}.json"
    write_placement(SAMPLE, path, form, LAYERS, MODEL_LAYERS)
    return json.loads(path.read_text(encoding="utf-8"))


def test_sglang_gets_a_row_for_every_layer_of_the_model(tmp_path: Path) -> None:
    trivial = [0, 1, 2, 3, 4, 0]
    assert write(tmp_path, "sglang") == {
        "physical_to_logical_map": [
            trivial,
            [0, 1, 2, 3, 0, 4],
            [4, 3, 2, 1, 0, 0],
            trivial,
            [2, 2, 0, 1, 3, 4],
        ]
    }


def test_vllm_gets_a_row_for_every_layer_with_experts(tmp_path: Path) -> None:
    assert write(tmp_path, "vllm") == [[0, 1, 2, 3, 0, 4], [4, 3, 2, 1, 0, 0], [2, 2, 0, 1, 3, 4]]


def test_vllm_ascend_gets_devices(tmp_path: Path) -> None:
    data = write(tmp_path, "vllm-ascend")
    assert isinstance(data, dict)
    assert data["moe_layer_count"] == 3
    assert data["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [
            {"device_id": 0, "device_expert": [4, 3, 2]},
            {"device_id": 1, "device_expert": [1, 0, 0]},
        ],
    }


def test_what_a_form_cannot_say_is_said() -> None:
    assert losses(SAMPLE, "sglang") == ""
    uneven = placed([[[0, 1], [0, 2]]], [[[0.75, 1.0], [0.25, 1.0]]])
    assert losses(uneven, "dovetail") == ""
    assert "1 experts whose replicas serve unequal shares" in losses(uneven, "vllm")


def test_write_refuses_what_the_form_cannot_say(tmp_path: Path) -> None:
    lopsided = placed([[[0, 1, 2], [3]]])
    with pytest.raises(InputError, match=r"found devices with \[1, 3\] slots, expected as many"):
        write_placement(lopsided, tmp_path / "p.json", "sglang", (0,), 1)
    write_placement(lopsided, tmp_path / "p.json", "dovetail", (0,), 1)
    with pytest.raises(InputError, match="format 'other': expected one of dovetail, sglang"):
        write_placement(SAMPLE, tmp_path / "p.json", "other", LAYERS, MODEL_LAYERS)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"other": 1}, r"found \['other'\], expected a placement in a form of dovetail, sglang"),
        (3, "found int, expected a placement"),
        ([[0, 1, 2]], "found 3 slots, which do not divide into 2 devices"),
        ([[]], "found 0 slots"),
        ([["a", 1]], "expected a list of expert numbers|something else than a list of expert"),
        ({"layer_list": [{}]}, "a layer has no device_list"),
        ({"layer_list": [{"device_list": [{}]}]}, "something else than a list of expert"),
    ],
)
def test_read_slots_refuses(tmp_path: Path, data: object, said: str) -> None:
    path = tmp_path / "current.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match=said) as caught:
        read_slots(path, 2, LAYERS)
    assert "current.json" in str(caught.value)


def test_read_slots_refuses_files_that_are_not_there_or_altered(tmp_path: Path) -> None:
    path = tmp_path / "current.json"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_slots(path, 2, LAYERS)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is not JSON"):
        read_slots(path, 2, LAYERS)
    write_placement(SAMPLE, path, "dovetail", LAYERS, MODEL_LAYERS)
    path.write_text(path.read_text().replace('"eplb"', '"other"'), encoding="utf-8")
    with pytest.raises(PlanError, match="digest"):
        read_slots(path, 2, LAYERS)
