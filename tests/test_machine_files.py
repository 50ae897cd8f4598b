"""Machine files: the shipped ones are usable, and what is not a machine is refused by name."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.ir import codec
from dovetail.ir.errors import InputError
from dovetail.ir.machine import Machine
from dovetail.machine_files import (
    load_machine,
    machine_budget,
    save_machine,
    shipped_machines,
)

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
    "process_bytes",
)
GPU_FIGURES = ("count", "gemm", "attention", "hbm_bandwidth", "op_seconds", "h2d", "d2h")
WITH_GPU = [name for name in shipped_machines() if load_machine(name).accelerator is not None]
GIB = 1 << 30


def figures(machine: Machine) -> Iterator[str]:
    """The figures that a machine gives and that need a source."""
    yield from FIGURES
    if machine.fresh_bandwidth:
        yield "fresh_bandwidth"
    if machine.accelerator is not None:
        yield from (f"accelerator.{name}" for name in GPU_FIGURES)
        if machine.accelerator.peer_bandwidth:
            yield "accelerator.peer_bandwidth"
        if machine.accelerator.processors:
            yield "accelerator.processors"


@pytest.mark.parametrize("name", shipped_machines())
def test_shipped_machines_name_the_source_of_each_figure(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert set(machine.sources) == set(figures(machine))
    assert all(machine.sources.values())
    assert {"bfloat16", "float32"} <= set(machine.gemm)
    assert set(machine.gemm) == set(machine.attention) == set(machine.kv_bandwidth)
    assert {"cpu|cpu", "cpu|disk", "disk|cpu", "op|op"} <= set(machine.slowdown)


@pytest.mark.parametrize("name", WITH_GPU)
def test_shipped_machines_name_the_architecture_of_their_gpu(name: str) -> None:
    gpu = load_machine(name).accelerator
    assert gpu is not None
    assert re.fullmatch(r"sm_\d+|gfx\w+", gpu.arch)
    assert gpu.processors > 0


def test_shipped_machines_are_those_that_were_described() -> None:
    assert shipped_machines() == [
        "8xh100",
        "a5000-512gb",
        "epyc-zen5-2core",
        "h100-1tb",
        "l4-192gb",
        "laptop-16gb",
        "rtx4090-64gb",
        "t4-192gb",
        "t4-208gb",
    ]


# By the specification of the memory: channels x transfers/s x 8 bytes, or what a paper states.
SOCKET_BANDWIDTH = {
    "8xh100": 614e9,
    "a5000-512gb": 204.8e9,
    "h100-1tb": 460.8e9,
    "l4-192gb": 76e9,
    "laptop-16gb": 89.6e9,
    "rtx4090-64gb": 89.6e9,
    "t4-192gb": 76e9,
    "t4-208gb": 128e9,
}


@pytest.mark.parametrize("name", SOCKET_BANDWIDTH)
def test_all_workers_together_read_no_more_than_their_memory_gives(name: str) -> None:
    machine = load_machine(name)
    together = machine.workers * machine.keeps("cpu", "cpu")
    # Rounding to three digits may lie half a percent over.
    most = SOCKET_BANDWIDTH[name] * 1.005
    for curve in machine.kv_bandwidth.values():
        assert together * curve.peak <= most
    assert together * machine.memory_bandwidth <= most
    # A product of one row reads a weight for every two FLOPs.
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        assert together * machine.gemm[dtype].at(1) * size / 2 <= most


@pytest.mark.parametrize("name", WITH_GPU)
def test_described_gpus_are_consistent(name: str) -> None:
    machine = load_machine(name)
    gpu = machine.accelerator
    assert gpu is not None
    assert set(gpu.gemm) == set(gpu.attention) == set(machine.gemm)
    assert all(list(curve.y) == sorted(curve.y) for curve in gpu.gemm.values())
    # Reading the weights sets the rate of few rows, so arithmetic must not.
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        assert gpu.gemm[dtype].at(1) * size / 2 >= gpu.hbm_bandwidth
    assert gpu.gemm["bfloat16"].peak > gpu.gemm["float32"].peak
    assert machine.tiers["hbm"] < machine.tiers["ram"]
    assert (gpu.count > 1) == (gpu.peer_bandwidth > 0)


def test_machine_budget_of_a_gpu_machine() -> None:
    machine = load_machine("h100-1tb")
    whole = {"ram": 512 * GIB, "hbm": machine.tiers["hbm"]}
    assert machine_budget(None, machine) == whole
    assert machine_budget("ram=512GiB", machine) == whole
    assert machine_budget("ram=8GiB,hbm=20GiB", machine) == {"ram": 8 * GIB, "hbm": 20 * GIB}
    assert machine_budget("ram=8GiB,hbm=0", machine) == {"ram": 8 * GIB}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hbm=1GiB", "names no ram, which every plan needs: add ram=SIZE, up to 16.00 GiB"),
        ("ram=1GiB,hbm=1GiB", "the tier hbm, which the machine laptop-16gb has not.*ram, disk"),
        ("ram=1GiB,peer=1GiB", "the tier peer, which the machine laptop-16gb has not"),
        ("ram=16.1GiB", "found ram=16.10GiB, but the machine laptop-16gb has 16.00 GiB"),
        ("vram=1GiB", "found the tier 'vram'"),
    ],
)
def test_machine_budget_refuses(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        machine_budget(text, load_machine("laptop-16gb"))


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
            "shipped machines: 8xh100, .*, laptop-16gb",
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
        ({"fresh_bandwidth": -1.0}, r"\$.fresh_bandwidth: found -1.0, expected a number of at le"),
        ({"process_bytes": -1}, r"\$.process_bytes: found -1, expected a number of at least 0"),
        ({"tiers": {"ram": 2, "disk": 1, "hbm": 1}}, r"\$.tiers.hbm: found a tier of a GPU, exp"),
    ],
)
def test_load_machine_refuses_impossible_figures(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    refuses("laptop-16gb", tmp_path, change, text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"count": 0}, r"\$.accelerator.count: found 0, expected at least 1"),
        ({"hbm_bandwidth": 0}, r"\$.accelerator.hbm_bandwidth: found 0.0, expected a positive"),
        ({"op_seconds": float("inf")}, r"\$.accelerator.op_seconds: found inf, expected"),
        ({"peer_bandwidth": -1}, r"\$.accelerator.peer_bandwidth: found -1.0, expected a number"),
        ({"gemm": {}}, r"\$.accelerator.gemm: found no dtype, expected one curve at least"),
        ({"attention": {}}, r"\$.accelerator.attention: found no dtype"),
        ({"h2d": {"x": [1.0], "y": [0.0]}}, r"\$.accelerator.h2d: rates of a curve must be posi"),
    ],
)
def test_load_machine_refuses_impossible_gpus(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    data = codec.encode(load_machine("8xh100"))
    assert isinstance(data, dict) and isinstance(data["accelerator"], dict)
    refuses("8xh100", tmp_path, {"accelerator": data["accelerator"] | change}, text)


def test_load_machine_refuses_a_gpu_without_its_memory(tmp_path: Path) -> None:
    tiers = {"ram": 2, "disk": 1}
    refuses("h100-1tb", tmp_path, {"tiers": tiers}, "the tier 'hbm' is missing, expected the acc")


def refuses(name: str, folder: Path, change: dict[str, Any], text: str) -> None:
    """Loading that machine with these figures changed fails with this text."""
    data = codec.encode(load_machine(name))
    assert isinstance(data, dict)
    path = folder / "bad.json"
    path.write_text(json.dumps(data | change))
    with pytest.raises(InputError, match=text):
        load_machine(str(path))
