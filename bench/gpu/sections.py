"""The sections of the GPU bench, what they need in time, and what to do when it is short."""

import argparse
import dataclasses
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton  # type: ignore[import-untyped]
from clock import Clock, CudaClock, HostClock, measure_peaks
from layers import measure_layer
from questions import binaries_run, for_device, launch_floor
from report import Report
from tiles import GemmBench, ranked, spills, variants
from triton.errors import TritonError  # type: ignore[import-untyped]

from dovetail.codegen.gate.cases import KERNELS
from dovetail.codegen.gate.interpret import decode_bfloat16
from dovetail.codegen.gate.numbers import Case, Verdict, check
from dovetail.codegen.gate.suite import DEEPSEEK_V2_LITE, MIXTRAL_8X7B, OLMOE_INT4, QWEN3_30B
from dovetail.codegen.kernels.arch import ARCHS, Arch
from dovetail.ir.kernel_layer import LayerSpec

COUNTS = (1, 16, 64, 256, 4096, 16384)
TUNED_SECONDS = 200
"""For the search of a layer's kernels."""


class Bench:
    """One run of one part, with its deadline."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.dry: bool = options.dry
        self.out: Path = options.out
        self.folder = folder
        self.deadline = time.monotonic() + 60 * options.minutes
        self.clock: Clock = HostClock() if self.dry else CudaClock()
        self.report = Report(self._machine())
        self.arch: Arch = ARCHS["sm_90"]
        self._models = 0

    def _machine(self) -> dict[str, str]:
        device = "none (dry run: figures mean nothing)"
        if not self.dry:
            found = torch.cuda.get_device_properties(0)
            memory = found.total_memory / 1e9
            device = f"{found.name}, {found.multi_processor_count} processors, {memory:.0f} GB"
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        return {"device": device, "python": platform.python_version()} | versions

    def fits(self, what: str, seconds: float) -> bool:
        """Whether ``seconds`` are left; what does not fit is put down as left out."""
        left = self.deadline - time.monotonic()
        if left < seconds:
            self.report.skipped.append(f"{what}: {left:.0f} s left, about {seconds:.0f} s needed")
            return False
        print(f"{left:5.0f} s left: {what}", file=sys.stderr, flush=True)
        return True

    def small(self, layer: LayerSpec) -> LayerSpec:
        """The layer, or in a dry run one of its kind that the interpreter can run."""
        if not self.dry:
            return layer
        experts, top_k = min(layer.experts, 4), min(layer.top_k, 2)
        assert layer.route is not None
        route = dataclasses.replace(layer.route, experts=experts, top_k=top_k)
        return dataclasses.replace(
            layer, experts=experts, top_k=top_k, route=route, hidden=256, inter=128,
            shared=min(layer.shared, 64),
        )  # fmt: skip

    def peaks(self) -> None:
        """Measured peaks, and the architecture with them."""
        self.report.peaks = measure_peaks(self.clock, large=not self.dry)
        if not self.dry:
            peaks = self.report.peaks
            self.arch = for_device(ARCHS, peaks.bandwidth, peaks.flops)

    def numbers(self) -> None:
        """Every branch of the emitter against float64."""
        for name, spec in KERNELS.items():
            for case in (Case(13, "random", 1), Case(200, "skewed", 2), Case(1, "one_expert", 3)):
                if self.dry and case.tokens == 200:
                    continue
                if not self.fits(f"numbers of {name}, {case.tokens} tokens", 10):
                    continue
                verdict = self._verdict(spec, case)
                entry = {"kernel": name, "tokens": case.tokens, "error": verdict.error}
                self.report.numbers.append(entry | {"note": verdict.note, "right": verdict.right})

    def _verdict(self, spec: object, case: Case) -> Verdict:
        try:
            return check(spec, case, self.folder, self.clock.device)  # type: ignore[arg-type]
        except (RuntimeError, TritonError) as failure:
            words = str(failure).strip().splitlines()[0][:120]
            return Verdict(float("inf"), f"{type(failure).__name__}: {words}")

    def layers(self) -> None:
        """Layers against rivals."""
        counts = (1, 5) if self.dry else COUNTS
        for layer in (MIXTRAL_8X7B, QWEN3_30B, DEEPSEEK_V2_LITE, OLMOE_INT4):
            if self.fits(f"layer {layer.name}", 100 if not self.dry else 1):
                assert self.report.peaks is not None
                self.report.layers += measure_layer(
                    self.small(layer), counts, self.arch, self.clock, self.report.peaks, self.folder
                )
                self.report.write(self.out)
                self._free()

    def tiles(self) -> None:
        """The open questions that are about tiles."""
        asked: list[tuple[LayerSpec, int, int]] = [(QWEN3_30B, 16, 2048), (MIXTRAL_8X7B, 16, 4096)]
        for layer, decode, prefill in asked:
            if not self.fits(f"tiles of {layer.name}", 120 if not self.dry else 1):
                continue
            bench = GemmBench(self.small(layer), self.arch, self.clock, self.folder)
            few, many = (3, 6) if self.dry else (decode, prefill)
            for tokens in (1, few, 4 * few, many):
                self.report.tiles += variants(bench, tokens)
            if layer is MIXTRAL_8X7B:
                self.report.tiles += spills(bench, many)
            for tokens in (few, many):
                if self.fits(f"rank of tiles, {layer.name}, {tokens} tokens", 40):
                    self.report.tiles += ranked(bench, tokens, 4 if self.dry else 14)
            self.report.write(self.out)
            del bench
            self._free()

    def tuned(self) -> None:
        """Kernels found by measuring, in turn with those that the cost model chooses."""
        try:
            from tuned import tune_layer
        except ImportError as error:
            self.report.skipped.append(f"tuned kernels: {error}")
            return
        asked = ((QWEN3_30B, (16, 256)), (MIXTRAL_8X7B, (16, 4096)))
        for layer, counts in asked:
            seconds = TUNED_SECONDS if not self.dry else 2
            if self.fits(f"tuned kernels of {layer.name}", seconds):
                made, rows = self.small(layer), self.out.with_suffix(".db")
                few = counts[:1] if self.dry else counts
                self.report.tuned += tune_layer(made, few, self.arch, seconds, rows, self.dry)
                self.report.write(self.out)
                self._free()

    def launches(self) -> None:
        """Launch floor, and whether the driver loads binaries compiled ahead of time."""
        self.report.answers += launch_floor(self.clock, self.folder)
        if not self.dry and self.arch.backend == "cuda":
            self.report.answers += binaries_run(QWEN3_30B, self.arch, self.folder)

    def end_to_end(self) -> None:
        """Whole models with random weights, resident and offloaded, against their rivals: the first
        one, and when it is called again all others."""
        try:
            from end_to_end import SHAPES, measure_model
        except ImportError as error:
            self.report.skipped.append(f"whole models: {error}")
            return
        now = SHAPES[self._models :] if self._models else SHAPES[:1]
        self._models += len(now)
        for shape in now:
            for run in measure_model(shape, self.dry, self.folder, self.fits):
                self.report.runs.append(run)
                self.report.write(self.out)
            self._free()

    def _free(self) -> None:
        if not self.dry:
            torch.cuda.empty_cache()


def run(options: argparse.Namespace) -> None:
    """Run one part and write the report."""
    if options.dry:
        torch.set_num_threads(1)
        decode_bfloat16()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        bench.peaks()
        parts: dict[int, tuple[Callable[[], None], ...]] = {
            1: (bench.numbers, bench.layers),
            2: (bench.launches, bench.end_to_end, bench.tiles, bench.end_to_end, bench.tuned),
        }
        for section in parts[options.part]:
            if options.only and section.__name__ != options.only:
                continue
            section()
            bench.report.write(options.out)
    print(bench.report.text())
