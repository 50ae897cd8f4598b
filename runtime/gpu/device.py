"""What an executor of GPU programs asks of a device, and torch's CUDA devices as one.

Nothing here has run on a GPU; the fake device checks the order of what is asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.ir.errors import ModelError
from dovetail.ir.gpu_program import HOST_ENGINES

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Buffer:
    """``nbytes`` bytes from ``start`` on of an allocation, or, of what the work itself keeps, its
    output number ``start``."""

    owner: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Launch:
    """An operation of a layer with the buffers that it reads, whose results it expects there (as
    in ``copy_dense[3]``), the buffer that it writes, and its engine."""

    op: str
    layer: int
    work: str
    reads: tuple[Buffer, ...]
    sources: tuple[str, ...]
    writes: Buffer
    engine: str = ""


@dataclass(slots=True)
class Event:
    """A point in an engine's work; ``mark`` is the device's."""

    name: str
    mark: Any = field(default=None)


class Device(Protocol):
    """Streams and host threads by engine name, events between them, and memory by tier."""

    def allocate(self, tier: str, nbytes: int, owner: str) -> None:
        """Set memory aside; ``owner`` is what buffers of it are of."""

    def launch(self, engine: str, launch: Launch) -> None:
        """Begin an operation once all before it on this engine has ended."""

    def record(self, engine: str, event: Event) -> None:
        """The event happens when all before it on this engine has ended."""

    def wait(self, engine: str, event: Event) -> None:
        """Nothing behind this on the engine begins before the event, which was recorded before
        this call."""

    def finish(self) -> None:
        """Block until everything has ended."""


class Graph(Protocol):
    """Work that was captured: the same operations on the same memory, whenever it is replayed."""

    def replay(self) -> None:
        """Do it again, on the stream that works now, in one launch."""


class ComputeDevice(Device, Protocol):
    """A device that does real work: memory as tensors."""

    memory: dict[str, "Tensor"]
    compute: "torch.device"
    timed: bool
    """Whether work has ended when its call has, so that the host's clock tells how long it took."""

    def bytes_of(self, buffer: Buffer) -> "Tensor":
        """The buffer's bytes as a tensor [nbytes] of uint8."""

    def host_tensor(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "Tensor":
        """Memory of the host from and to which streams copy without waiting."""

    def keep(self, tensor: "Tensor") -> None:
        """The tensor, made on another stream perhaps, is used by the stream that works now."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """What ``run`` does on the device, to be replayed; it is called twice, and does the same
        each time. Raises VerifyError or what torch raises for work that cannot be captured, such as
        what waits for the device."""

    def close(self) -> None:
        """Let all memory go."""


def require_gpu() -> None:
    """Raises ModelError, saying what was found, unless torch can use a GPU here."""
    import torch

    if not torch.cuda.is_available():
        raise ModelError(
            "this plan runs on a GPU, but torch finds none here "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}): run it "
            "on a machine with a GPU, or plan again for this machine's processor"
        )


class CudaDevice:
    """A GPU by torch: an engine is a stream, or, of the host, the thread that calls.

    ``work`` does what a launch says, on the current stream. Weights on their way through ram are in
    pinned memory, so that copies need not wait for the host. Raises ModelError without a GPU.
    """

    timed = False

    def __init__(self, work: Callable[[Launch, "CudaDevice"], None], index: int = 0) -> None:
        import torch

        require_gpu()
        # Untyped in torch's own sources.
        self._cuda: Any = torch.cuda
        self._torch, self._work = torch, work
        self._index = index
        self._streams: dict[str, Any] = {}
        self._pool: Any = None
        self.memory: dict[str, Tensor] = {}
        self.compute = torch.device("cuda", index)

    def allocate(self, tier: str, nbytes: int, owner: str) -> None:
        """Bytes in hbm, or pinned in ram."""
        torch = self._torch
        if tier == "hbm":
            made = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{self._index}")
        else:
            made = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.memory[owner] = made

    def bytes_of(self, buffer: Buffer) -> "Tensor":
        """The buffer's bytes as a tensor [nbytes] of uint8."""
        return self.memory[buffer.owner][buffer.start : buffer.start + buffer.nbytes]

    def host_tensor(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "Tensor":
        """Pinned memory."""
        return self._torch.empty(shape, dtype=dtype, pin_memory=True)

    def keep(self, tensor: "Tensor") -> None:
        """Torch's allocator gives a tensor's memory to others on the stream that made it, unless it
        is told who else uses it."""
        if tensor.is_cuda:
            tensor.record_stream(self._cuda.current_stream(self._index))

    def close(self) -> None:
        """Wait for all streams and let the memory go."""
        self.finish()
        self.memory.clear()

    def capture(self, run: Callable[[], None]) -> Graph:
        """A CUDA graph. As torch asks for, ``run`` warms up on a side stream before: what compiles,
        or allocates for good, does so there. All graphs share one pool of memory, since they are
        replayed one at a time, and what one leaves is read before the next."""
        cuda = self._cuda
        side = self._stream("graph")
        side.wait_stream(cuda.current_stream(self._index))
        with cuda.stream(side):
            run()
        side.synchronize()
        if self._pool is None:
            self._pool = cuda.graph_pool_handle()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=self._pool, stream=side):
            run()
        made: Graph = graph
        return made

    def launch(self, engine: str, launch: Launch) -> None:
        """Do the work: at once on the host, on the engine's stream otherwise."""
        if engine in HOST_ENGINES:
            self._work(launch, self)
            return
        with self._cuda.stream(self._stream(engine)):
            self._work(launch, self)

    def record(self, engine: str, event: Event) -> None:
        """A CUDA event behind the stream's work; of the host, all before it is over already."""
        if engine not in HOST_ENGINES:
            event.mark = self._cuda.Event()
            event.mark.record(self._stream(engine))

    def wait(self, engine: str, event: Event) -> None:
        """Order a stream behind an event, or block the host's thread until it has happened."""
        if event.mark is None:
            return
        if engine in HOST_ENGINES:
            event.mark.synchronize()
        else:
            self._stream(engine).wait_event(event.mark)

    def finish(self) -> None:
        """Wait for all streams."""
        for stream in self._streams.values():
            stream.synchronize()

    def _stream(self, engine: str) -> Any:
        if engine not in self._streams:
            self._streams[engine] = self._cuda.Stream(self._index)
        return self._streams[engine]
