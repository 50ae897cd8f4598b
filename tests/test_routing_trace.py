"""Routing traces: what they count, how they are cut, and that files are checked."""

import contextlib
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.ir.errors import InputError, OutputError
from dovetail.routing.trace import (
    RoutingTrace,
    load_trace,
    make_trace,
    save_trace,
    trace_arrays,
)


def drawn(
    seed: int, tokens: int = 40, layers: int = 3, size: int = 8, top_k: int = 2
) -> RoutingTrace:
    """A random trace: four prompts that take turns, steps of five tokens."""
    generator = np.random.default_rng(seed)
    ids = generator.random((tokens, layers, size)).argsort(axis=2)[:, :, :top_k]
    rows = np.arange(tokens)
    return make_trace(
        ids,
        size,
        prompt=rows % 4,
        position=rows // 4,
        step=rows // 5,
        decode=rows >= 24,
        layers=[1, 2, 3][:layers],
        model_layers=4,
        model="drawn",
    )


@given(st.integers(0, 1000))
def test_loads_count_every_choice(seed: int) -> None:
    trace = drawn(seed)
    loads = trace.loads()
    assert loads.shape == (3, 8)
    assert (loads.sum(axis=1) == trace.tokens * trace.top_k).all()
    for layer in range(3):
        for expert in range(8):
            assert loads[layer, expert] == (trace.experts[:, layer] == expert).sum()
    assert (np.sum(list(trace.step_loads()), axis=0) == loads).all()
    assert (np.sum(list(trace.batch_loads(7)), axis=0) == loads).all()
    assert trace.steps == len(list(trace.step_loads())) == 8


@given(st.integers(0, 1000))
def test_transitions_count_every_pair_of_neighbouring_choices(seed: int) -> None:
    trace = drawn(seed, tokens=20)
    pairs = np.zeros((2, 8, 8), int)
    for token in trace.experts:
        for layer in range(2):
            for before in token[layer]:
                for after in token[layer + 1]:
                    pairs[layer, before, after] += 1
    assert (trace.transitions() == pairs).all()
    assert trace.select(slice(None)).transitions().sum() == 20 * 2 * 2**2
    assert drawn(seed, layers=1).transitions().shape == (0, 8, 8)


def test_parts_hold_everything_once() -> None:
    trace = drawn(1)
    phases = trace.by_phase()
    assert {name: part.tokens for name, part in phases.items()} == {"prefill": 24, "decode": 16}
    assert (phases["prefill"].loads() + phases["decode"].loads() == trace.loads()).all()
    assert list(phases["prefill"].by_phase()) == ["prefill"]
    parts = trace.by_prompts(3)
    assert [sorted(set(part.prompt.tolist())) for part in parts] == [[0, 1], [2], [3]]
    assert (np.sum([part.loads() for part in parts], axis=0) == trace.loads()).all()


def test_by_prompts_refuses_more_parts_than_prompts() -> None:
    with pytest.raises(InputError, match=r"4 prompts, which cannot be cut into 5 parts"):
        drawn(1).by_prompts(5)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    trace, path = drawn(2), tmp_path / "trace.npz"
    save_trace(trace, path)
    first = path.read_bytes()
    loaded = load_trace(path)
    for name in RoutingTrace.__slots__:
        assert np.array_equal(getattr(trace, name), getattr(loaded, name)), name
    save_trace(loaded, path)
    assert path.read_bytes() == first, "the same trace gives the same bytes"
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]


def test_save_refuses_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        save_trace(drawn(1), tmp_path / "missing" / "trace.npz")


def arrays(**changes: object) -> dict[str, np.ndarray]:
    """The arrays of a good file with some of them changed, or left out where None."""
    good = trace_arrays(drawn(3))
    changed = {name: np.asarray(value) for name, value in changes.items() if value is not None}
    return {k: v for k, v in (good | changed).items() if changes.get(k, v) is not None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "expected one named format that says 'dovetail routing trace'"),
        ({"step": None}, "the array 'step' is missing"),
        ({"version": 2}, "found version 2, expected 1"),
        ({"experts": np.zeros((40, 3))}, "experts is float64 with 2 axes, expected whole numbers"),
        ({"experts": np.full((40, 3, 1), np.nan)}, "experts is float64 with 3 axes"),
        ({"experts": np.full((40, 3, 1), 8)}, "found expert 8, expected 0 to 7"),
        ({"experts": np.full((40, 3, 1), -1)}, "found expert -1, expected 0 to 7"),
        ({"experts": np.zeros((40, 3, 2), int)}, "chose the same expert twice"),
        ({"experts": np.zeros((0, 3, 2), int)}, "expected at least one token"),
        ({"experts": np.zeros((40, 2, 1), int)}, "3 layers have numbers and 2 have experts"),
        ({"prompt": np.zeros(39, int)}, "prompt has 39 rows and experts 40"),
        ({"prompt": np.full(40, -1)}, "prompt holds -1 to -1, expected 0 to"),
        ({"step": np.arange(40)[::-1].copy()}, "not in the order of their steps"),
        ({"layers": [1, 3, 2]}, r"layers \[1, 3, 2\] of 4: expected rising numbers"),
        ({"num_experts": 0}, "found 0 experts, expected 1 to 32768"),
        ({"num_experts": 40000}, "found 40000 experts, expected 1 to 32768"),
    ],
)
def test_load_refuses_files_that_do_not_fit(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays(**changes))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=said) as caught:
        load_trace(path)
    assert "bad.npz is not a routing trace" in str(caught.value)


def test_load_refuses_what_is_not_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with pytest.raises(InputError, match=r"cannot be read: No such file.*--record-routing"):
        load_trace(path)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_trace(tmp_path)
    for content in (b"", b"text", b"PK\x03\x04torn"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a routing trace"):
            load_trace(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="found one array"):
        load_trace(path)
    save_trace(drawn(1), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="is not a routing trace"):
        load_trace(path)


def test_load_refuses_pickled_objects(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    np.savez(path, experts=np.array([{"code": "runs"}], dtype=object))
    with pytest.raises(InputError, match="Object arrays cannot be loaded"):
        load_trace(path)


def test_load_refuses_a_header_that_promises_too_much(tmp_path: Path) -> None:
    """A file of a few bytes that says it holds an array of 2**60 numbers."""
    path = tmp_path / "trace.npz"
    np.savez(path, **arrays())  # type: ignore[arg-type]
    head = "{'descr': '<i2', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    block = head.ljust(117).encode() + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "experts.npy", b"\x93NUMPY\x01\x00" + len(block).to_bytes(2, "little") + block
        )
    with pytest.raises(InputError, match="is not a routing trace"):
        load_trace(path)


@given(st.integers(0, 2**32), st.integers(1, 255))
def test_load_refuses_damage_or_reads_a_sound_trace(at: int, change: int) -> None:
    """One byte of the file is another; nothing but InputError comes out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.npz"
        save_trace(drawn(1, tokens=10), path)
        data = bytearray(path.read_bytes())
        data[at % len(data)] ^= change
        path.write_bytes(data)
        with contextlib.suppress(InputError):
            load_trace(path)


def test_make_trace_fills_in_what_is_left_out() -> None:
    trace = make_trace(np.array([[[0], [1]], [[1], [0]]]), 2)
    assert (trace.layers, trace.model_layers, trace.steps, trace.tokens) == ((0, 1), 2, 1, 2)
    assert trace.position.tolist() == [0, 1]
    assert not trace.decode.any()
    with pytest.raises(InputError, match="experts has 2 axes, expected 3"):
        make_trace(np.zeros((2, 2), int), 2)
