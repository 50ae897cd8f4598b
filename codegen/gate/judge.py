"""Hold a compiled kernel against its budget: what the spec meant, what the architecture has."""

from dovetail.codegen.gate.compile import Compiled
from dovetail.codegen.kernels.arch import Arch, Matrix, matrix_instruction
from dovetail.codegen.kernels.cost import fit
from dovetail.ir.kernel_spec import GemmSpec, KernelSpec

REGISTER_LIMIT = {"cuda": 255, "hip": 512}
"""Registers of one thread: a hardware limit, at which a kernel need not spill yet."""

SPILL_BUDGET = 16
"""Bytes of stack per thread that pass: the assembler puts a word or two there at the entry even
with registers to spare; spills that cost time run to hundreds of bytes."""


def problems(
    spec: KernelSpec, arch: Arch, compiled: Compiled, meant: Matrix | None = None
) -> list[str]:
    """Everything that keeps a kernel from passing; empty when it passes.

    A kernel must not spill in earnest and must fit the architecture's shared memory. A GEMM must
    take the shared memory that the cost model said (other tiles were pruned by it) and run on the
    matrix instruction that was ``meant`` (by default the one that its tile should reach).
    """
    facts = compiled.facts
    found = []
    if facts.spill_bytes > SPILL_BUDGET:
        found.append(f"spills {facts.spill_bytes} bytes per thread")
    if facts.registers > REGISTER_LIMIT[arch.backend]:
        found.append(f"{facts.registers} registers per thread")
    if facts.shared_bytes > arch.shared_program:
        found.append(
            f"{facts.shared_bytes} bytes of shared memory, {arch.name} has {arch.shared_program}"
        )
    if isinstance(spec, GemmSpec):
        found += _gemm_problems(spec, arch, compiled, meant or matrix_instruction(spec, arch))
    return found


def _gemm_problems(spec: GemmSpec, arch: Arch, compiled: Compiled, meant: Matrix) -> list[str]:
    facts, taken = compiled.facts, fit(spec, arch)
    found = []
    if meant != "fma" and not facts.instructions.get(meant):
        have = ", ".join(facts.instructions) or "none"
        found.append(f"no {meant} instruction; found {have}")
    off = facts.shared_bytes - taken.shared
    # AMD's compiler keeps small tiles in registers: there the model is an upper bound.
    if off > taken.slack or (arch.backend == "cuda" and off < -taken.slack):
        found.append(
            f"{facts.shared_bytes} bytes of shared memory, the cost model says {taken.shared}"
        )
    if spec.loads == "tma" and not facts.instructions.get("bulk copy"):
        found.append("no bulk copy instruction, though weights are loaded by TMA")
    return found
