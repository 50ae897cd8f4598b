"""Check kernels in Triton's interpreter: a process of its own, jobs in, verdicts out, as JSON.

Triton decides when it is first imported whether kernels are interpreted, so this runs beside the
process that compiles. A job may carry edits (old text, new text) of the emitted source: a gate that
lets a broken kernel pass is no gate.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.codegen.gate.layer_numbers import check_layer
from dovetail.codegen.gate.numbers import Case, Verdict, check
from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.choose import choose_layer
from dovetail.codegen.kernels.emit import emit_kernel
from dovetail.ir import codec
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_spec import KernelSpec


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to run on one case, its text edited first if ``edits`` say so; or a whole layer,
    on the kernels that are chosen for sm_90 and this many tokens."""

    spec: KernelSpec | LayerSpec
    case: Case
    edits: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Jobs:
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class _Verdicts:
    verdicts: tuple[Verdict, ...]


def interpret(jobs: Sequence[Job]) -> list[Verdict]:
    """Verdicts of the jobs, in order, from one interpreting process. Raises RuntimeError with the
    process's own words when it breaks off."""
    request = json.dumps(codec.encode(_Jobs(tuple(jobs))))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dovetail.codegen.gate.interpret"],
        input=request,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the interpreting process failed:\n{done.stderr[-4000:]}")
    answer = done.stdout.splitlines()[-1]
    return list(codec.decode(json.loads(answer), _Verdicts).verdicts)


def edited(job: Job) -> str:
    """The job's kernel text after its edits; raises ValueError where an edit finds nothing."""
    assert not isinstance(job.spec, LayerSpec), "edits are of one kernel"
    text = emit_kernel(job.spec)
    for old, new in job.edits:
        if old not in text:
            raise ValueError(f"kernel {job.spec.name} has no {old!r} to edit")
        text = text.replace(old, new)
    return text


def decode_bfloat16() -> None:
    """Teach the interpreter bfloat16.

    Up to Triton 3.9 it multiplies matrices of bit patterns as if they were numbers (triton#11584),
    converts integers to patterns as they are, and cuts float32 off instead of rounding it.
    """
    import numpy as np
    from triton.language import bfloat16, float32  # type: ignore[import-untyped]
    from triton.runtime import interpreter  # type: ignore[import-untyped]

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot, cast = builder.create_dot, builder.cast_impl

    def decoded(tensor: Any) -> Any:
        if tensor.dtype.scalar != bfloat16:
            return tensor
        return handle((tensor.data.astype(np.uint32) << 16).view(np.float32), float32)

    def rounded(tensor: Any, to: Any) -> Any:
        if to.scalar != bfloat16:
            return cast(None, decoded(tensor), to)
        values = decoded(tensor).data.astype(np.float32)
        bits = values.view(np.uint32)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = np.uint32(0x7FC0)
        return handle(np.where(np.isnan(values), nan, even).astype(np.uint16), bfloat16)

    builder.create_dot = lambda self, a, b, *rest: create_dot(self, decoded(a), decoded(b), *rest)
    builder.cast_impl = lambda self, tensor, to: rounded(tensor, to)


def _run(job: Job, folder: Path) -> Verdict:
    if isinstance(job.spec, LayerSpec):
        kernels = choose_layer(job.spec, ARCHS["sm_90"], (1, job.case.tokens))
        return check_layer(job.spec, [kernels], job.case, folder, "cpu")
    return check(job.spec, job.case, folder, "cpu", edited(job))


def main() -> None:
    """Read jobs from standard input, write verdicts to standard output."""
    import torch

    torch.set_num_threads(1)
    decode_bfloat16()
    jobs = codec.decode(json.loads(sys.stdin.read()), _Jobs).jobs
    with tempfile.TemporaryDirectory() as scratch:
        verdicts = [_run(job, Path(scratch)) for job in jobs]
    safe = [Verdict(1e30 if not v.error < 1e30 else v.error, v.note) for v in verdicts]
    print(json.dumps(codec.encode(_Verdicts(tuple(safe)))))


if __name__ == "__main__":
    main()
