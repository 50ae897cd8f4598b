"""Direct and buffered reads: the same bytes, at every offset, from every file system."""

import errno
import logging
import mmap
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dovetail.ir.errors import CheckpointError
from dovetail.runtime.direct_io import ALIGNMENT, DirectFile, Reader, direct_span
from dovetail.runtime.pools import tensor_view, torch_dtype
from dovetail.runtime.safetensors_index import CheckpointIndex, adjacent_runs

SIZE = 5 * ALIGNMENT + 123  # ends inside a page


_BYTES = random.Random(0).randbytes(SIZE)


def content(size: int = SIZE) -> bytes:
    return _BYTES[:size]


def pages(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, max(nbytes, ALIGNMENT)))


def read(reader: Reader, file: Path, offset: int, nbytes: int, align: int = 1) -> bytes:
    buffer = pages(direct_span(offset, nbytes))
    delta = reader.read_into(buffer, file, offset, nbytes, align)
    assert delta % align == 0
    return bytes(buffer[delta : delta + nbytes])


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "odd"
    file.write_bytes(content())
    return file


@pytest.mark.parametrize("direct", [True, False])
@given(data=st.data())
def test_every_range_reads_back(odd_file: Path, direct: bool, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, SIZE))
    nbytes = data.draw(st.integers(0, SIZE - offset))
    align = data.draw(st.sampled_from([1, 2, 4, 8, 64]))
    blocks = data.draw(st.integers(1, 3))
    with Reader(direct, block_bytes=blocks * ALIGNMENT) as reader:
        got = read(reader, odd_file, offset, nbytes, align)
    assert got == content()[offset : offset + nbytes]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1])
def test_small_files_read_to_their_end(tmp_path: Path, direct: bool, size: int) -> None:
    file = tmp_path / "small"
    file.write_bytes(content(size))
    with Reader(direct) as reader:
        assert read(reader, file, 0, size) == content(size)
        assert read(reader, file, size - 1, 1) == content(size)[-1:]


@given(st.integers(0, 10**13), st.integers(1, 10**9))
def test_direct_span_is_the_aligned_superset(offset: int, nbytes: int) -> None:
    span, start = direct_span(offset, nbytes), offset // ALIGNMENT * ALIGNMENT
    assert span % ALIGNMENT == 0
    assert start + span >= offset + nbytes > start + span - ALIGNMENT


def test_buffered_mode_is_kept_when_asked_for(odd_file: Path) -> None:
    file = DirectFile(odd_file, direct=False)
    assert file.mode == "buffered"
    assert file.size == SIZE
    file.close()


def test_direct_mode_falls_back_when_open_refuses(
    odd_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open = os.open

    def without_direct(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", without_direct)
    with caplog.at_level(logging.WARNING), Reader() as reader:
        assert read(reader, odd_file, 5000, 100) == content()[5000:5100]
        assert reader.open(odd_file).mode == "buffered"
    assert "does not support direct reads" in caplog.text


def test_direct_mode_falls_back_when_the_probe_fails(
    odd_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_preadv = os.open, os.preadv
    probes: list[int] = []

    def refuse_first(fd: int, buffers: list[memoryview], offset: int) -> int:
        probes.append(fd)
        if len(probes) == 1:
            raise OSError(errno.EINVAL, "wants larger blocks")
        return real_preadv(fd, buffers, offset)

    # Opened without O_DIRECT, so that there is a probe to fail on any file system.
    monkeypatch.setattr(os, "open", lambda path, _: real_open(path, os.O_RDONLY))
    monkeypatch.setattr(os, "preadv", refuse_first)
    with Reader() as reader:
        assert read(reader, odd_file, 5000, 100) == content()[5000:5100]
        assert reader.open(odd_file).mode == "buffered"


@pytest.mark.parametrize("most", [100, ALIGNMENT + 100])
def test_reads_cut_short_go_on_from_a_whole_page(
    odd_file: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real_preadv = os.preadv
    file = DirectFile(odd_file)
    starts: list[int] = []

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        starts.append(offset)
        return min(most, real_preadv(fd, buffers, offset))

    monkeypatch.setattr(os, "preadv", short)
    buffer = pages(direct_span(0, SIZE))
    if most < ALIGNMENT:
        with pytest.raises(CheckpointError, match="truncated: expected at least"):
            file.read_into(buffer, 0, SIZE)
    else:
        delta = file.read_into(buffer, 0, SIZE)
        assert bytes(buffer[delta : delta + SIZE]) == content()
        assert all(start % ALIGNMENT == 0 for start in starts)
    file.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("offset", [0, SIZE - 10, SIZE + 5, 10 * SIZE])
def test_read_refuses_a_short_file(odd_file: Path, direct: bool, offset: int) -> None:
    end = offset + SIZE + 1
    with Reader(direct) as reader, pytest.raises(CheckpointError) as caught:
        read(reader, odd_file, offset, SIZE + 1)
    assert f"{odd_file}: truncated: expected at least {end} bytes" in str(caught.value)


@pytest.mark.parametrize("direct", [True, False])
def test_read_refuses_a_file_cut_after_it_was_opened(tmp_path: Path, direct: bool) -> None:
    file = tmp_path / "cut"
    file.write_bytes(content())
    with Reader(direct) as reader:
        reader.open(file)
        os.truncate(file, ALIGNMENT)
        with pytest.raises(CheckpointError, match=f"found {ALIGNMENT};"):
            read(reader, file, 0, SIZE)


def test_read_refuses_a_failing_disk(odd_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader() as reader:
        reader.open(odd_file)

        def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(CheckpointError, match=f"{odd_file}: reading .* Input/output error"):
            read(reader, odd_file, 0, 10)


def test_open_refuses_a_missing_file(tmp_path: Path) -> None:
    with Reader() as reader, pytest.raises(CheckpointError, match="No such file or directory"):
        reader.open(tmp_path / "absent")


def test_several_threads_share_one_handle(odd_file: Path) -> None:
    results: list[bool] = []

    def work(seed: int) -> None:
        for step in range(40):
            offset = (seed * 997 + step * 577) % (SIZE - 100)
            results.append(read(reader, odd_file, offset, 100) == content()[offset : offset + 100])

    with Reader() as reader:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reader.open(odd_file) is reader.open(odd_file)
    assert results == [True] * 160


@pytest.mark.parametrize("direct", [True, False])
def test_tensors_of_a_run_equal_safetensors_own(tmp_path: Path, direct: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    written = {
        f"t{i}": torch.randn(7 * i + 1, 11, generator=generator).to(dtype)
        for i, dtype in enumerate([torch.bfloat16, torch.float32, torch.float16, torch.int8] * 3)
    }
    save_file(written, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    [run] = adjacent_runs(index.entries.values())
    buffer = pages(direct_span(run.offset, run.nbytes))
    with Reader(direct) as reader:
        delta = reader.read_into(buffer, run.file, run.offset, run.nbytes, run.align)
    for entry in run.entries:
        start = delta + entry.offset - run.offset
        got = tensor_view(buffer, start, torch_dtype(entry.dtype), entry.shape)
        assert torch.equal(got, expected[entry.key])
