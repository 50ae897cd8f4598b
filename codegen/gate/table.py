"""The table of what every kernel of the suite takes on every architecture, as Markdown."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dovetail.codegen.gate.compile import compile_kernel, triton_version
from dovetail.codegen.gate.judge import problems
from dovetail.codegen.gate.suite import gate_suite
from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.cost import fit
from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source
from dovetail.ir.kernel_spec import GemmSpec, KernelSpec
from dovetail.ir.kernel_text import tile_text


@dataclass(frozen=True, slots=True)
class Row:
    """One function on one architecture, and what the gate says about it."""

    arch: str
    label: str
    function: str
    spec: KernelSpec
    registers: int
    spill_bytes: int
    shared_bytes: int
    predicted_shared: int | None
    instructions: str
    problems: tuple[str, ...]


def compile_suite(archs: Iterable[Arch], folder: Path) -> Iterator[Row]:
    """Compile the suite and judge every function; modules are written to ``folder``."""
    for arch in archs:
        for label, spec in gate_suite(arch):
            yield from compile_rows(label, spec, arch, folder)


def compile_rows(label: str, spec: KernelSpec, arch: Arch, folder: Path) -> Iterator[Row]:
    """Compile one module and judge its functions."""
    module = load_source(emit_kernel(spec), folder, file_name(spec))
    for compiled in compile_kernel(module, spec, arch):
        facts = compiled.facts
        counts = ", ".join(f"{count} {name}" for name, count in facts.instructions.items())
        predicted = fit(spec, arch).shared if isinstance(spec, GemmSpec) else None
        yield Row(
            arch.name,
            label,
            compiled.function,
            spec,
            facts.registers,
            facts.spill_bytes,
            facts.shared_bytes,
            predicted,
            counts,
            tuple(problems(spec, arch, compiled)),
        )


def render_table(rows: Iterable[Row]) -> str:
    """The table; equal text for equal compilers."""
    lines = [
        "# Kernels of the gate, compiled ahead of time",
        "",
        f"Triton {triton_version()}. Registers and spills per thread, shared memory per program,",
        "as read from the binaries. Tile: rows × outputs × k, warps, stages. Made by",
        "`python -m dovetail.codegen.gate.table --out bench/results/kernels.md`; a test compares",
        "it.",
        "",
        "| arch | for | kernel | tile | registers | spilled bytes | shared bytes | predicted |"
        " instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        predicted = "" if row.predicted_shared is None else str(row.predicted_shared)
        cells = [
            row.arch,
            row.label,
            row.function,
            tile_text(row.spec) if isinstance(row.spec, GemmSpec) else "",
            str(row.registers),
        ]
        cells += [str(row.spill_bytes), str(row.shared_bytes), predicted, row.instructions]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile the whole suite, print what fails, write the table."""
    import argparse

    from dovetail.codegen.kernels.arch import ARCHS

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--arch", choices=ARCHS, action="append", help="default: all")
    options = parser.parse_args()
    archs = [ARCHS[name] for name in options.arch or ARCHS]
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(compile_suite(archs, Path(scratch)))
    options.out.write_text(render_table(rows), encoding="utf-8")
    failed = [row for row in rows if row.problems]
    for row in failed:
        print(f"{row.arch} {row.label} {row.function}: {'; '.join(row.problems)}")
    print(f"{len(rows)} functions compiled, {len(failed)} refused")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
