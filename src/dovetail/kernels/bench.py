"""What a search over kernels asks of a device, whichever it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from dovetail.ir.kernel_layer import LayerKernels

Failed = Literal["compile_error", "out_of_memory", "wrong_result"]


class KernelFailure(Exception):
    """Kernels that cannot be timed: ``state`` as of a trial, ``error`` as of ``Loaded``. ``lost``
    says that the GPU's context is gone with them, so that nothing can run in this process."""

    def __init__(
        self, state: Failed, why: str, error: float | None = None, *, lost: bool = False
    ) -> None:
        super().__init__(why)
        self.state, self.error, self.lost = state, error, lost


@dataclass(frozen=True, slots=True)
class Loaded:
    """Kernels that gave right results: the largest ``error`` against the default's as a share of
    the largest output, and what takes a sample, in seconds of one pass."""

    error: float
    seconds: Callable[[], float]


class Bench(Protocol):
    """Runs kernels of one rung."""

    def load(self, kernels: LayerKernels) -> Loaded:
        """Compile, check and get ready to time. Raises KernelFailure."""
        ...
