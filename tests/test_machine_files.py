"""Machine files: the shipped ones are usable, and what is not a machine is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.ir import codec
from dovetail.ir.errors import InputError
from dovetail.machine_files import load_machine, save_machine, shipped_machines

FIGURES = (
    "tiers",
    "workers",
    "gemm",
    "attention",
    "kv_bandwidth",
    "memory_bandwidth",
    "op_seconds",
    "disk",
    "slowdown",
)


@pytest.mark.parametrize("name", shipped_machines())
def test_shipped_machines_name_the_source_of_each_figure(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert set(machine.sources) == set(FIGURES)
    assert {"bfloat16", "float32"} <= set(machine.gemm)
    assert set(machine.gemm) == set(machine.attention) == set(machine.kv_bandwidth)
    assert {"cpu|cpu", "cpu|disk", "disk|cpu"} <= set(machine.slowdown)


def test_shipped_machines_are_those_that_were_described() -> None:
    assert shipped_machines() == ["epyc-zen5-2core", "laptop-16gb"]


def test_saved_machine_loads_as_it_was(tmp_path: Path) -> None:
    machine = load_machine("laptop-16gb")
    save_machine(machine, tmp_path / "mine.json")
    assert load_machine(str(tmp_path / "mine.json")) == machine
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.json"]


def test_save_machine_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written: .*; name another place"):
        save_machine(load_machine("laptop-16gb"), tmp_path / "none" / "mine.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "laptop",
            "found no machine 'laptop', expected the path of a machine file .* or one of the "
            "shipped machines: epyc-zen5-2core, laptop-16gb",
        ),
        ("missing.json", "the machine file missing.json cannot be read: No such file.*laptop-16gb"),
        ("folder/laptop-16gb", "the machine file folder/laptop-16gb cannot be read"),
    ],
)
def test_load_machine_refuses_an_unknown_name(name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load_machine(name)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff\xfe", "can't decode byte"),
        (b"{", "Expecting property name"),
        (b"[]", r"\$: found \[\], expected an object"),
        (b"{}", r"field 'name' of Machine is missing"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_load_machine_refuses_what_is_no_machine(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"bad.json does not describe a machine: .*{text}"):
        load_machine(str(path))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"workers": 0}, r"\$.workers: found 0, expected at least 1"),
        ({"workers": "8"}, r"\$.workers: found '8', expected int"),
        ({"memory_bandwidth": 0}, r"\$.memory_bandwidth: found 0.0, expected a positive number"),
        ({"op_seconds": float("nan")}, r"\$.op_seconds: found nan"),
        ({"tiers": {"ram": 1}}, r"\$.tiers: the tier 'disk' is missing"),
        ({"tiers": {"ram": -1, "disk": 1}}, r"\$.tiers.ram: found -1, expected bytes above 0"),
        ({"slowdown": {"cpu|cpu": 1.5}}, r"\$.slowdown.cpu\|cpu: found 1.5, expected above 0"),
        ({"gemm": {}}, r"\$.gemm: found no dtype"),
        ({"disk": {"x": [2.0, 1.0], "y": [1.0, 1.0]}}, r"\$.disk: x of a curve must be positive"),
        ({"colour": "red"}, "unknown field 'colour' of Machine"),
    ],
)
def test_load_machine_refuses_impossible_figures(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    data = codec.encode(load_machine("laptop-16gb"))
    assert isinstance(data, dict)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data | change))
    with pytest.raises(InputError, match=text):
        load_machine(str(path))
