"""A device of host memory and threads, which does on a CPU what a CUDA device does on a GPU.

Streams of the GPU are threads that take what they are told to do in order; events are set when such
a thread gets to them. So the programs, the executors emitted for them and the work behind each
operation run, tokens included, where there is no GPU. "hbm" is memory of its own, filled with NaN,
so that what is read before it is written does not go unseen.
"""

import mmap
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dovetail.ir.gpu_program import HOST_ENGINES
from dovetail.runtime.gpu.device import Buffer, Event, Graph, Launch
from dovetail.runtime.gpu.host_graph import HostGraph

NAN_BYTE = 0xFF
"""Bytes that make NaN of every floating-point type."""


class HostDevice:
    """``work`` does what a launch says, on the thread of its engine.

    A stream that raised does nothing more; ``finish`` raises what it raised.
    """

    compute = torch.device("cpu")
    timed = True

    def __init__(self, work: Callable[[Launch, "HostDevice"], None]) -> None:
        self._work = work
        self._streams: dict[str, _Stream] = {}
        self._error: BaseException | None = None
        self.memory: dict[str, Tensor] = {}

    def allocate(self, tier: str, nbytes: int, owner: str) -> None:
        """Page-aligned bytes of this process."""
        with torch.inference_mode(False):
            made = torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]
            if tier == "hbm":
                made.fill_(NAN_BYTE)
        self.memory[owner] = made

    def bytes_of(self, buffer: Buffer) -> Tensor:
        """The buffer's bytes as a tensor [nbytes] of uint8."""
        return self.memory[buffer.owner][buffer.start : buffer.start + buffer.nbytes]

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host from and to which streams copy."""
        return torch.empty(shape, dtype=dtype)

    def keep(self, tensor: Tensor) -> None:
        """Nothing to do: memory is kept as long as someone refers to it."""

    def launch(self, engine: str, launch: Launch) -> None:
        """Do a host engine's work at once; leave a stream's to its thread."""
        if self._error is not None:
            raise self._error
        if engine in HOST_ENGINES:
            self._work(launch, self)
        else:
            self._stream(engine).put(lambda: self._work(launch, self))

    def record(self, engine: str, event: Event) -> None:
        """The event is set when all before it on the engine has ended."""
        mark = event.mark = threading.Event()
        if engine in HOST_ENGINES:
            mark.set()
        else:
            self._stream(engine).put(mark.set)

    def wait(self, engine: str, event: Event) -> None:
        """Let a stream, or the host's thread that calls, wait for an event."""
        mark: threading.Event = event.mark
        if engine in HOST_ENGINES:
            self._await(mark)
        else:
            self._stream(engine).put(lambda: self._await(mark))

    def finish(self) -> None:
        """Wait for all streams. Raises what one of them raised."""
        for stream in self._streams.values():
            stream.finish()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def capture(self, run: Callable[[], None]) -> Graph:
        """The tensor operations of the second ``run``, on the thread that calls. Raises VerifyError
        for what a CUDA graph could not capture; see ``HostGraph``."""
        run()
        graph = HostGraph()
        with graph:
            run()
        return graph

    def close(self) -> None:
        """End the threads and let the memory go."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self.memory.clear()

    def _await(self, mark: threading.Event) -> None:
        # An engine that failed sets no more events.
        while not mark.wait(0.05):
            if self._error is not None:
                return

    def _failed(self, error: BaseException) -> None:
        self._error = self._error or error

    def _stream(self, engine: str) -> "_Stream":
        if engine not in self._streams:
            self._streams[engine] = _Stream(engine, self._failed, lambda: self._error is not None)
        return self._streams[engine]


class _Stream:
    """A thread that does what it is given in order, until something failed anywhere."""

    def __init__(
        self, name: str, failed: Callable[[BaseException], None], stopped: Callable[[], bool]
    ) -> None:
        self._queue: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._failed, self._stopped = failed, stopped
        self._thread = threading.Thread(target=self._run, name=f"dovetail-{name}", daemon=True)
        self._thread.start()

    def put(self, do: Callable[[], Any]) -> None:
        """Do this after all before it."""
        self._queue.put(do)

    def finish(self) -> None:
        """Wait until the thread has come to the end of what it was given."""
        done = threading.Event()
        self._queue.put(done.set)
        done.wait()

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (do := self._queue.get()) is not None:
            # Events are set even then, so that nobody waits for them for ever.
            if self._stopped() and not _is_event(do):
                continue
            try:
                do()
            except BaseException as error:
                # Whatever stops one engine stops all of them, and is raised by finish.
                self._failed(error)


def _is_event(do: Callable[[], Any]) -> bool:
    return isinstance(getattr(do, "__self__", None), threading.Event)
