"""Expert loads from dovetail's, SGLang's and vLLM's files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dovetail.doors.load_files import read_loads
from dovetail.ir.errors import InputError
from dovetail.routing.trace import make_trace, save_trace

COUNTS = [[0, 0, 0], [5, 1, 2], [1, 1, 6]]
"""A layer without experts, and two with three."""
PLACES = [[0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 2]]
"""Slots of SGLang and vLLM: two of one expert, in the last layer in another order."""
SLOTS = [[0, 0, 0, 0], [3, 1, 2, 2], [4, 1, 1, 2]]
"""The counts by slot."""


def write_json(value: object) -> Callable[[Path], Path]:
    """A writer of a JSON file."""

    def write(folder: Path) -> Path:
        path = folder / "loads.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return write


def write_pt(value: object) -> Callable[[Path], Path]:
    """A writer of what torch.save makes."""

    def write(folder: Path) -> Path:
        path = folder / "expert_distribution_recorder_1.pt"
        torch.save(value, path)
        return path

    return write


def vllm(load: object, places: object = PLACES) -> dict[str, object]:
    """A snapshot of vLLM's load balancer."""
    return {"step": 1, "window_expert_load": load, "physical_to_logical_map": places}


def sglang_pass(number: int, counts: object) -> dict[str, object]:
    """A record of SGLang's mode per_pass."""
    return {"forward_pass_id": number, "rank": 0, "global_physical_count": torch.tensor(counts)}


STAT = {"rank": 0, "logical_count": torch.tensor([COUNTS, COUNTS]), "average": None}


@pytest.mark.parametrize(
    ("write", "times"),
    [
        (write_pt(STAT), 2),
        (write_pt({"logical_count": torch.tensor(COUNTS)}), 1),
        (write_json({"logical_count": COUNTS}), 1),
        (write_json({"logical_count": [COUNTS] * 3}), 3),
        (write_json(COUNTS), 1),
        (write_json({"load_history": [{"logical_expert_load": COUNTS}] * 4}), 4),
        (write_json({"snapshots": [vllm(SLOTS), vllm(SLOTS)]}), 2),
        (
            write_pt(
                {
                    "records": [sglang_pass(1, SLOTS), sglang_pass(2, SLOTS)],
                    "last_physical_to_logical_map": torch.tensor(PLACES),
                }
            ),
            2,
        ),
    ],
)
def test_loads_of_every_form(tmp_path: Path, write: Callable[[Path], Path], times: int) -> None:
    found = read_loads(write(tmp_path))
    assert found.loads.tolist() == (times * np.array(COUNTS[1:])).tolist()
    assert (found.layers, found.model_layers, found.trace) == ((1, 2), 3, None)


def test_loads_of_a_trace(tmp_path: Path) -> None:
    ids = np.array([[[0, 2], [1, 0]], [[2, 1], [2, 0]]])
    trace = make_trace(ids, 3, layers=[1, 4], model_layers=5)
    save_trace(trace, tmp_path / "domain.npz")
    found = read_loads(tmp_path / "domain.npz")
    assert (found.name, found.layers, found.model_layers) == ("domain", (1, 4), 5)
    assert found.trace is not None
    assert found.loads.tolist() == [[1, 1, 2], [2, 1, 1]]


def token_records() -> list[dict[str, object]]:
    """Two passes of SGLang's mode per_token: a prompt of three tokens, of which the last is
    padding, and a decode pass of two; three layers, of which the first has no experts, and
    choices in the first two of eight columns."""
    prefill = torch.full((3, 3, 8), -1)
    prefill[1:, :2, :2] = torch.tensor([[[3, 1], [2, 1]], [[0, 1], [3, 2]]])
    decode = torch.full((3, 2, 8), -1)
    decode[1:, :, :2] = torch.tensor([[[0, 2], [1, 2]], [[1, 2], [2, 3]]])
    return [
        {
            "forward_pass_id": 9,
            "forward_mode": 2,
            "positions": [2, 7],
            "topk_ids_of_layer": decode,
        },
        {
            "forward_pass_id": 8,
            "forward_mode": 1,
            "positions": [0, 1, 2],
            "topk_ids_of_layer": prefill,
        },
    ]


def test_a_trace_of_sglang_records(tmp_path: Path) -> None:
    data = {"records": token_records(), "last_physical_to_logical_map": torch.tensor(PLACES)}
    found = read_loads(write_pt(data)(tmp_path))
    trace = found.trace
    assert trace is not None
    assert (trace.layers, trace.model_layers, trace.top_k, trace.num_experts) == ((1, 2), 3, 2, 3)
    # Slot 3 holds expert 0 in layer 1 and expert 2 in layer 2.
    expected = [[[0, 1], [2, 1]], [[2, 1], [2, 0]], [[0, 2], [1, 0]], [[1, 2], [0, 2]]]
    assert trace.experts.tolist() == expected
    assert trace.decode.tolist() == [False, False, True, True]
    assert trace.position.tolist() == [0, 1, 2, 7]
    assert trace.step.tolist() == [0, 0, 1, 1]
    assert (found.loads == trace.loads()).all()


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_json({"logical_count": [[1, -2]]}), "found a load that is -2, expected counts"),
        (write_json([[1, float("nan")]]), "found a load that is NaN or infinite"),
        (write_json([[1, float("inf")]]), "found a load that is NaN or infinite"),
        (write_json([[0, 0]]), "found no load at all"),
        (write_json([1, 2]), r"found counts of the shape \[2\], expected \[layers, experts\]"),
        (write_json([[1, 2], [3]]), "loads is not a table of numbers"),
        (write_json([["a"]]), "loads is not a table of numbers"),
        (write_json([[True]]), "loads is not a table of numbers"),
        (write_json({"counts": [[1]]}), r"found \['counts'\], expected a routing trace"),
        (write_json("text"), "found str, expected a routing trace"),
        (write_json({"snapshots": []}), r"found \['snapshots'\], expected"),
        (write_json({"snapshots": [{"step": 1}]}), "an entry has no 'window_expert_load'"),
        (write_json({"snapshots": [vllm(SLOTS[:2])]}), "expected one shape"),
        (write_json({"snapshots": [vllm(SLOTS, [[0, 1, -2, 3]] * 3)]}), "of expert numbers"),
        (
            write_json(
                {
                    "load_history": [
                        {"logical_expert_load": [[1]]},
                        {"logical_expert_load": [[1, 2]]},
                    ]
                }
            ),
            "entries have the shapes",
        ),
        (write_pt({"records": [{}], "last_physical_to_logical_map": PLACES}), "has no 'global_ph"),
        (
            write_pt(
                {
                    "records": [sglang_pass(1, [[1]])],
                    "last_physical_to_logical_map": torch.tensor(PLACES),
                }
            ),
            r"shape \[1, 1\] and the map \[3, 4\]",
        ),
        (
            write_pt(
                {
                    "records": token_records(),
                    "last_physical_to_logical_map": torch.tensor(PLACES)[:, :3],
                }
            ),
            "found slot 3, expected 0 to 2",
        ),
        (write_pt({"logical_count": torch.tensor([[1, 2]]), "code": Path("x")}), "brings code"),
    ],
)
def test_read_loads_refuses(tmp_path: Path, write: Callable[[Path], Path], said: str) -> None:
    path = write(tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        read_loads(path)
    assert path.name in str(caught.value)


def test_read_loads_refuses_files_of_another_kind(tmp_path: Path) -> None:
    for name in ("loads.csv", "loads"):
        with pytest.raises(InputError, match=r"found a file that ends in .*, expected a routing"):
            read_loads(tmp_path / name)
    for name in ("loads.json", "loads.pt", "loads.npz"):
        with pytest.raises(InputError, match="cannot be read"):
            read_loads(tmp_path / name)
    for name, said in (("loads.json", "is not JSON"), ("loads.pt", "no archive of torch.save")):
        (tmp_path / name).write_bytes(b"{garbage")
        with pytest.raises(InputError, match=said):
            read_loads(tmp_path / name)
    torch.save(torch.zeros(3), tmp_path / "loads.pt")
    torn = (tmp_path / "loads.pt").read_bytes().replace(b"data.pkl", b"data.pkx")
    (tmp_path / "loads.pt").write_bytes(torn)
    with pytest.raises(InputError, match="not plain tensors"):
        read_loads(tmp_path / "loads.pt")
