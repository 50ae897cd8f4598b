"""What this machine is, in words and bytes: processor, memory, disk device, software."""

import os
import platform
import re
from pathlib import Path

import torch

from dovetail.runtime.calibrate_spec import MIB

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8")
"""The processor flags that decide which matrix kernels torch picks."""


def workers() -> int:
    """How many compute workers fit: the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory that the operating system manages."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def l3_bytes() -> int:
    """Bytes of the last cache level that one core sees; 0 where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_kib(path.read_text().strip()) * 1024 for path in sizes), default=0)


def cold_bytes() -> int:
    """Bytes that surely do not fit into the last cache (96 MiB to 1 GiB)."""
    return min(max(96 * MIB, 3 * l3_bytes()), 1024 * MIB)


def _kib(text: str) -> int:
    return int(text.rstrip("K")) if text.rstrip("K").isdigit() else 0


def silicon() -> dict[str, str]:
    """What decides speed and cannot be installed: processor, cores, flags, memory."""
    info = _first_processor(Path("/proc/cpuinfo"))
    present = set(info.get("flags", info.get("Features", "")).split())
    version = (info.get("cpu family"), info.get("model"), info.get("stepping"))
    return {
        "processor": info.get("model name", platform.processor() or platform.machine()),
        "family": "/".join(part or "?" for part in version),
        "cores": str(workers()),
        "flags": " ".join(flag for flag in FLAGS if flag in present),
        "l3_bytes": str(l3_bytes()),
        # Rounded, because a kernel update moves the reserved part by a few pages.
        "memory": f"{memory_bytes() / 1024**3:.1f} GiB",
    }


def software() -> dict[str, str]:
    """What decides speed and can be installed: kernel, torch and the kernels inside torch."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
    }


def disk_device(path: Path) -> str:
    """The block device that holds ``path``: name, numbers and size where the system says."""
    device = path.stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    block = Path("/sys/dev/block") / numbers
    if not block.exists():
        return f"device {numbers}"
    name = block.resolve().name
    size = int((block / "size").read_text()) * 512
    return " ".join(part for part in (name, numbers, f"{size} bytes", _model(block)) if part)


def _model(block: Path) -> str:
    # A partition has no model of its own: the whole disk is the folder above it.
    for folder in (block, block.resolve().parent):
        model = folder / "device" / "model"
        if model.exists():
            return model.read_text().strip()
    return ""


def library_files() -> list[Path]:
    """The large files of the torch installation: something to read where there is no checkpoint."""
    return sorted(Path(torch.__file__).parent.glob("lib/*.so"))


def machine_name() -> str:
    """A short name made of the processor and the number of workers, as ``amd-epyc-2core``."""
    words = re.sub(r"\(.*?\)|@.*|\bprocessor\b", " ", silicon()["processor"], flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return f"{slug or 'machine'}-{workers()}core"


def _first_processor(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    info: dict[str, str] = {}
    for line in path.read_text().splitlines():
        key, colon, value = line.partition(":")
        if colon:
            info.setdefault(key.strip(), value.strip())
    return info
