"""NVIDIA's driver, as much of it as loading and launching a binary takes, by ctypes.

Nothing here has run on a GPU; tests stand in for the driver.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

from dovetail.ir.errors import ModelError

_MAX_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
PLAIN_SHARED = 48 << 10
"""Shared memory that a program may take without being allowed more."""


class Driver(Protocol):
    """What launches binaries on the current device and stream."""

    def device(self) -> int:
        """Number of the current device."""
        ...

    def load(self, binary: bytes, function: str, shared_bytes: int) -> Any:
        """The function of a binary on the current device, allowed that much shared memory."""
        ...

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
    ) -> None:
        """Launch on the current stream; ``arguments`` are ctypes values in the kernel's order."""
        ...


class CudaDriver:
    """libcuda on the device and stream that torch has as current. Raises ModelError without it."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch.cuda
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise ModelError(f"NVIDIA's driver cannot be loaded: {error}") from None
        self._do("cuInit", 0)

    def version(self) -> int:
        """The CUDA version that the driver speaks: 12080 is 12.8."""
        found = ctypes.c_int()
        self._do("cuDriverGetVersion", ctypes.byref(found))
        return found.value

    def device(self) -> int:
        """Number of the current device."""
        return int(self._torch.current_device())

    def load(self, binary: bytes, function: str, shared_bytes: int) -> Any:
        """See ``Driver``. Modules stay loaded for as long as the process lives."""
        self._torch.current_stream().synchronize()  # makes the device's context current
        module, found = ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(binary))
        self._do("cuModuleGetFunction", ctypes.byref(found), module, function.encode())
        if shared_bytes > PLAIN_SHARED:
            self._do("cuFuncSetAttribute", found, _MAX_SHARED, shared_bytes)
        return found

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
    ) -> None:
        """See ``Driver``."""
        addresses = [ctypes.addressof(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(arguments))(*addresses)
        stream = ctypes.c_void_p(self._torch.current_stream().cuda_stream)
        self._do(
            "cuLaunchKernel", function, *grid, threads, 1, 1, shared_bytes, stream, pointers, None
        )

    def _do(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            said = (text.value or b"unknown").decode()
            raise ModelError(f"NVIDIA's driver refuses {name}: {said} (error {code})")
