"""Facts of a compiled kernel, read from the binary: registers, stack, shared memory, instructions.

An NVIDIA cubin is an ELF file whose ``.nv.info`` section lists attributes per function (the layout
that ``cuobjdump`` and ``readelf`` show); its instructions come from ``nvdisasm``, which Triton
carries. AMD's facts stand in the assembly's metadata.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FRAME_SIZE, _REGISTERS = 0x11, 0x2F
_PARAMETER, _THREADS = 0x17, 0x10
_WITH_BODY = 0x04
_CUDA_13_ABI = 8
"""From this ABI version on, an ELF header has the architecture in another byte of its flags."""
_OPCODES = {
    "wgmma": r"\bHGMMA\.|\bIGMMA\.|\bQGMMA\.",
    "mma.sync": r"\bHMMA\.|\bIMMA\.|\bDMMA\.",
    "tcgen05": r"\bUTC\w*MMA",
    "bulk copy": r"\bUTMALDG",
    "async copy": r"\bLDGSTS",
    "spill store": r"\bSTL\b",
}
_AMD_OPCODES = {"mfma": r"\bv_mfma", "spill store": r"\bscratch_store"}


@dataclass(frozen=True, slots=True)
class BinaryFacts:
    """What the binary says. ``registers`` per thread (vector registers on AMD), ``spill_bytes`` the
    stack frame per thread (Triton kernels have no other use for one), ``shared_bytes`` per program,
    ``instructions`` how often each family occurs."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]


@dataclass(frozen=True, slots=True)
class Parameter:
    """Where a parameter lies among the bytes of a launch, and its size."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class CudaInterface:
    """What a cubin says of launching one of its kernels: parameters in order, threads per program,
    the architecture and ELF version that it needs."""

    parameters: tuple[Parameter, ...]
    threads: int
    arch: str
    elf: tuple[int, int]


def cuda_interface(cubin: bytes, kernel: str) -> CudaInterface:
    """The launch interface of ``kernel``. Raises ValueError for another file, or without it."""
    parameters: dict[int, Parameter] = {}
    threads, found = 0, False
    for name, body in _sections(cubin):
        if name != f".nv.info.{kernel}":
            continue
        found = True
        for attribute, payload in _attributes(body):
            if attribute == _PARAMETER and len(payload) == 12:
                _, ordinal, offset, word = struct.unpack("<IHHI", payload)
                parameters[ordinal] = Parameter(offset, word >> 18)
            if attribute == _THREADS and len(payload) == 12:
                x, y, z = struct.unpack("<III", payload)
                threads = x * y * z
    if not found:
        raise ValueError(f"cubin: no kernel {kernel}")
    (flags,) = struct.unpack_from("<I", cubin, 0x30)
    number = (flags >> 8 if cubin[8] >= _CUDA_13_ABI else flags) & 0xFF
    ordered = tuple(parameters[ordinal] for ordinal in sorted(parameters))
    return CudaInterface(ordered, threads, f"sm_{number}", (cubin[7], cubin[8]))


def cuda_facts(cubin: bytes, shared_bytes: int, nvdisasm: Path) -> BinaryFacts:
    """Facts of a cubin with one kernel. Raises ValueError when it is no such file."""
    attributes = dict(_function_attributes(cubin))
    if _REGISTERS not in attributes:
        raise ValueError("cubin: no register count in .nv.info")
    return BinaryFacts(
        registers=attributes[_REGISTERS],
        spill_bytes=attributes.get(_FRAME_SIZE, 0),
        shared_bytes=shared_bytes,
        instructions=_counts(_disassemble(cubin, nvdisasm), _OPCODES),
    )


def amd_facts(assembly: str, shared_bytes: int) -> BinaryFacts:
    """Facts of an AMD kernel's assembly."""
    spilled = _amd_field(assembly, "vgpr_spill_count")
    return BinaryFacts(
        registers=_amd_field(assembly, "vgpr_count"),
        spill_bytes=4 * spilled,
        shared_bytes=shared_bytes,
        instructions=_counts(assembly, _AMD_OPCODES),
    )


def _amd_field(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", assembly)
    if found is None:
        raise ValueError(f"assembly: no .{name} in its metadata")
    return int(found.group(1))


def _counts(text: str, patterns: dict[str, str]) -> dict[str, int]:
    counted = {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}
    return {name: count for name, count in counted.items() if count}


def _disassemble(cubin: bytes, nvdisasm: Path) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvdisasm), "--no-dataflow", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _function_attributes(cubin: bytes) -> Iterator[tuple[int, int]]:
    """(attribute, value) of the ``.nv.info`` section whose body is (function, value)."""
    for name, body in _sections(cubin):
        if name == ".nv.info":
            for attribute, payload in _attributes(body):
                if len(payload) >= 8:
                    yield attribute, struct.unpack_from("<II", payload)[1]


def _attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, payload) of an information section, of those that have one."""
    at = 0
    while at + 4 <= len(body):
        form, attribute, size = struct.unpack_from("<BBH", body, at)
        at += 4
        if form == _WITH_BODY:
            yield attribute, body[at : at + size]
            at += size


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every section of a 64-bit little-endian ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    try:
        (table,) = struct.unpack_from("<Q", elf, 0x28)
        size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
        headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
        strings = headers[names][4]
        for name, kind, _, _, offset, length in headers:
            end = elf.index(b"\0", strings + name)
            content = b"" if kind == 8 else elf[offset : offset + length]
            yield elf[strings + name : end].decode(), content
    except (struct.error, IndexError) as error:
        raise ValueError(f"not a whole ELF file: {error}") from None
