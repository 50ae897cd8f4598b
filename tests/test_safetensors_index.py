"""The checkpoint index: what it reads is what safetensors wrote; what is wrong is named."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dovetail.ir.errors import CheckpointError
from dovetail.runtime.safetensors_index import CheckpointIndex, TensorEntry, adjacent_runs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]

tensors = st.dictionaries(
    st.text(st.characters(categories=["L", "N", "P"]), max_size=12).filter("__metadata__".__ne__),
    st.tuples(
        st.sampled_from([*DTYPES, torch.float8_e4m3fn, torch.complex64]),
        st.lists(st.integers(0, 5), max_size=3),
    ),
    max_size=8,
)


def write_raw(file: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header, right or wrong; bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def record(dtype: str, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        CheckpointIndex.open(folder)
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Four float32 tensors a..d of 16 bytes in two shards."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / names[0])
    save_file({"c": torch.zeros(4), "d": torch.ones(4)}, tmp_path / names[1])
    weight_map = dict(zip("abcd", [names[0], names[0], names[1], names[1]], strict=True))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def remap(folder: Path, **changes: object) -> None:
    index = folder / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    parsed["weight_map"].update(changes)
    index.write_text(json.dumps(parsed))


@given(tensors)
def test_index_finds_what_safetensors_wrote(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    written = {
        key: torch.randint(0, 2, shape, generator=generator).to(dtype)
        for key, (dtype, shape) in specs.items()
    }
    save_file(written, file, metadata={"format": "pt"})
    index = CheckpointIndex.open(folder)
    assert index.entries.keys() == written.keys()
    content = file.read_bytes()
    for key, entry in index.entries.items():
        tensor = written[key]
        assert entry.dtype == str(tensor.dtype).removeprefix("torch.")
        assert entry.shape == tuple(tensor.shape)
        assert (entry.nbytes, entry.itemsize) == (tensor.nbytes, tensor.itemsize)
        raw = content[entry.offset : entry.offset + entry.nbytes]
        assert raw == bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    shutil.rmtree(folder)


def test_index_reads_all_shards(sharded: Path) -> None:
    index = CheckpointIndex.open(sharded)
    assert sorted(index.entries) == ["a", "b", "c", "d"]
    assert index.entries["d"].file.name == "model-00002-of-00002.safetensors"
    assert [shard.size for shard in index.shards] == [s.file.stat().st_size for s in index.shards]


def test_digest_depends_on_headers_and_names_only(sharded: Path, tmp_path: Path) -> None:
    digest = CheckpointIndex.open(sharded).digest()
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy, ignore=shutil.ignore_patterns("copy"))
    assert CheckpointIndex.open(copy).digest() == digest
    shard = copy / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert CheckpointIndex.open(copy).digest() == digest
    save_file({"a": torch.zeros(4), "b": torch.ones(2, 2)}, shard)
    assert CheckpointIndex.open(copy).digest() != digest


def entry(key: str, offset: int, nbytes: int, dtype: str, file: str = "one") -> TensorEntry:
    return TensorEntry(key, Path(file), offset, nbytes, dtype, ())


def test_adjacent_runs_merge_neighbours_of_one_file() -> None:
    a, b = entry("a", 100, 8, "float32"), entry("b", 108, 4, "bfloat16")
    gap, other = entry("gap", 116, 8, "float32"), entry("other", 112, 4, "float32", "two")
    runs = adjacent_runs([gap, other, b, a, b])
    assert [(run.file.name, run.offset, run.nbytes, run.align) for run in runs] == [
        ("one", 100, 12, 4),
        ("one", 116, 8, 4),
        ("two", 112, 4, 4),
    ]
    assert runs[0].entries == (a, b)
    assert adjacent_runs([]) == []


def test_adjacent_runs_split_where_alignment_differs() -> None:
    runs = adjacent_runs([entry("a", 100, 3, "uint8"), entry("b", 103, 8, "float32")])
    assert [(run.offset, run.align) for run in runs] == [(100, 1), (103, 4)]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=12))
def test_adjacent_runs_cover_every_entry_once(places: list[tuple[int, int]]) -> None:
    entries = [entry(str(i), offset, size, "uint8") for i, (offset, size) in enumerate(places)]
    runs = adjacent_runs(entries)
    assert sorted(e.key for run in runs for e in run.entries) == sorted(e.key for e in entries)
    for run in runs:
        assert run.nbytes == sum(e.nbytes for e in run.entries)
        assert all(run.offset <= e.offset for e in run.entries)
        assert all(e.offset + e.nbytes <= run.offset + run.nbytes for e in run.entries)


def test_index_refuses_a_missing_folder(tmp_path: Path) -> None:
    assert "found no such folder" in refusal(tmp_path / "absent")


def test_index_refuses_an_empty_folder(tmp_path: Path) -> None:
    assert "found an empty folder; expected model.safetensors" in refusal(tmp_path)


def test_index_refuses_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    message = refusal(tmp_path)
    assert "'pytorch_model.bin'" in message
    assert "Pickle is never read: convert" in message


def test_index_refuses_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    message = refusal(sharded)
    assert "'model-00001-of-00002.safetensors'" in message
    assert "without an index" in message


def test_index_refuses_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    message = refusal(sharded)
    assert "model-00002-of-00002.safetensors: this shard, which should hold 'c', 'd'" in message


def test_index_refuses_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert "model.safetensors: this shard is missing" in refusal(tmp_path)


def test_index_refuses_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    remap(sharded, a="model-00002-of-00002.safetensors")
    message = refusal(sharded)
    assert "index says that it holds 'a'" in message
    assert "2 tensors, does not list it" in message


def test_index_refuses_a_tensor_in_two_shards(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    save_file({key: torch.zeros(4) for key in "bcd"}, shard)
    message = refusal(sharded)
    assert "tensor 'b' is also in model-00001-of-00002.safetensors" in message


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", 3, None, "a\0b", "\ud800"])
def test_index_refuses_names_outside_the_folder(sharded: Path, name: object) -> None:
    remap(sharded, a=name)
    assert f"tensor 'a' is mapped to {name!r}, expected the plain name" in refusal(sharded)


@pytest.mark.parametrize("name", ["", ".."])
def test_index_refuses_a_folder_as_shard(sharded: Path, name: str) -> None:
    remap(sharded, a=name)
    assert "expected a regular safetensors file" in refusal(sharded)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"weight_map": 1' + "0" * 5000 + "}"])
def test_index_refuses_an_index_that_is_not_json(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    message = refusal(sharded)
    assert "model.safetensors.index.json" in message
    assert "not JSON" in message


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_index_refuses_an_index_without_tensors(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "found no weight_map" in refusal(sharded)


def test_index_refuses_a_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    assert "run 'git lfs pull'" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 7])
def test_index_refuses_a_file_without_a_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\1" * size)
    assert f"truncated: expected at least 8 bytes, found {size}" in refusal(tmp_path)


def test_index_refuses_a_header_longer_than_the_limit(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert f"header length of {2**63} bytes, expected at most 100000000" in refusal(tmp_path)


def test_index_refuses_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 100) + b"{}")
    assert "truncated in its header: expected at least 108 bytes, found 10" in refusal(tmp_path)


GOOD = record("F32", [2], 0, 8)
NEXT = record("F32", [2], 8, 16)


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        (b"\xff\xfe{", 0, "not JSON"),
        (b"[1]", 0, "the JSON is a list, expected an object"),
        (b'{"a": 1, "a": 2}', 0, "lists 'a' twice"),
        ({"a": GOOD}, 7, "truncated: expected"),
        ({"a": GOOD}, 9, "too long for its header: expected"),
        ({"a": record("F32", [2], 0, 9)}, 9, "has 9 bytes of data, expected 8 for shape [2]"),
        ({"a": record("F31", [2], 0, 8)}, 8, "has dtype 'F31', expected one of BOOL"),
        ({"a": record("F32", [-2], 0, 8)}, 8, "has shape [-2], expected"),
        ({"a": record("F32", [True], 0, 4)}, 4, "has shape [True], expected"),
        ({"a": record("F32", [2**62] * 65, 0, 4)}, 4, "expected a list of sizes"),
        ({"a": record("F32", "2", 0, 8)}, 8, "has shape 2, expected"),
        ({"a": record("F32", [2], 8, 0)}, 8, "has data_offsets [8, 0], expected"),
        ({"a": record("F32", [2], -8, 0)}, 8, "has data_offsets [-8, 0], expected"),
        ({"a": record("F32", [2], 0.0, 8)}, 8, "has data_offsets [0.0, 8], expected"),
        ({"a": {**GOOD, "data_offsets": [0]}}, 8, "has data_offsets [0], expected"),
        ({"a": {"dtype": "F32"}}, 8, "has the record {'dtype': 'F32'}, expected"),
        ({"a": 3}, 8, "has the record 3, expected"),
        ({"a": NEXT}, 16, "expected"),
        ({"a": GOOD, "b": GOOD}, 8, "tensor 'b' overlaps 'a'"),
        ({"a": GOOD, "b": record("F32", [2], 4, 12)}, 12, "tensor 'b' overlaps 'a'"),
        ({"a": GOOD, "b": record("F32", [2], 12, 20)}, 20, "tensor 'b' leaves a hole to 'a'"),
        ({"a": record("F32", [2**40], 0, 2**42)}, 8, "truncated: expected"),
    ],
)
def test_index_refuses_headers(tmp_path: Path, header: object, size: int, expected: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, bytes(size))
    message = refusal(tmp_path)
    assert str(tmp_path / "model.safetensors") in message
    assert expected in message


@given(st.integers(0, 300), st.integers(0, 255), st.booleans())
def test_index_refuses_or_reads_any_damaged_file(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    file = folder / "model.safetensors"
    save_file({"a": torch.zeros(4, 4), "b": torch.zeros(3, dtype=torch.bfloat16)}, file)
    content = bytearray(file.read_bytes())
    at %= len(content)
    if cut:
        file.write_bytes(content[:at])
        assert file.name in refusal(folder)
    else:
        content[at] = value
        file.write_bytes(content)
        try:
            index = CheckpointIndex.open(folder)
        except CheckpointError as error:
            assert file.name in str(error)
        else:
            assert all(e.offset + e.nbytes <= len(content) for e in index.entries.values())
    shutil.rmtree(folder)
