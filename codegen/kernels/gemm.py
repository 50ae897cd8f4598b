"""Emit grouped GEMMs: gather, decode of quantised weights, gated activation, scatter, split k.

The main loop keeps the contract of every fused MoE kernel (sorted slots, one expert per row tile,
counts on the device); what differs between models is folded into the text, so that no emitted
kernel holds a branch that it does not take.
"""

from dovetail.codegen.kernels.gemm_rows import DTYPES, GemmRows, over
from dovetail.codegen.kernels.text import quotient, render, text_of, var
from dovetail.ir.kernel_parts import Activation
from dovetail.ir.kernel_spec import GemmSpec

_FP8_UNIT = 256.0
"""e4m3 bits shifted into float16's fields read as the value / 2^(15-7): the biases differ by 8."""


def emit_gemm(spec: GemmSpec) -> str:
    """Source of the module with the one kernel ``spec.name``."""
    writer = _Gemm(spec)
    for part in (writer.constants, writer.tile_of_program, writer.rows, writer.operands,
                 writer.main_loop, writer.epilogue, writer.store):  # fmt: skip
        part()
    options = {"num_warps": spec.tile.warps, "num_stages": spec.tile.stages}
    return render(writer.source, options)


class _Gemm(GemmRows):
    """Writes one kernel, part by part."""

    def main_loop(self) -> None:
        """Walk the k axis."""
        tile, source = self.spec.tile, self.source
        begin, end = "0", self.steps
        if tile.split_k > 1:
            source.line(
                "split = tl.program_id(1)",
                f"first_k = split * ({self.steps} // SPLIT_K)",
            )
            begin, end = "first_k", f"first_k + {self.steps} // SPLIT_K"
        source.line(f"for k0 in range({begin}, {end}, BLOCK_K):")
        if self.mask_k:
            source.line(f"k_ok = k0 + k < {self.steps}", depth=2)
        halves = (("x_low", ""), ("x_high", "HALF_K + ")) if self.int4 else (("x", ""),)
        for name, shift in halves:
            mask = "row_ok[:, None]" + (" & k_ok[None, :]" if self.mask_k else "")
            source.line(f"{name} = tl.load(x_at + {shift}k0, mask={mask}, other=0.0)", depth=2)
        for name in self.outputs:
            self._step(name)

    def _step(self, name: str) -> None:
        """One k block of one accumulator."""
        dtype, load = DTYPES[self.spec.x], self._weight_load(name)
        if not self.int4:
            self.source.line(f"w = {load}", *self._decode(), depth=2)
            self._dot(name, "x", "w", "")
            return
        self.source.line(f"packed = {load}", depth=2)
        self.source.line(f"w = ((packed & 15).to(tl.int8) - 8).to({dtype})", depth=2)
        self._dot(name, "x_low", "w", "")
        self.source.line(f"w = ((packed >> 4).to(tl.int8) - 8).to({dtype})", depth=2)
        self._dot(name, "x_high", "w", "HALF_K + ")

    def _weight_load(self, name: str) -> str:
        spec = self.spec
        if spec.loads == "tma":
            return f"w_desc.load([{name}_row, k0]){'' if spec.swap_ab else '.T'}"
        stride = "k0" if spec.weights.order == "nk" else f"k0 * {self.width}"
        over_k = "[None, :]" if spec.swap_ab else "[:, None]"
        masks = [f"{self.column_ok}{self.over_n}"] * self.mask_n + [f"k_ok{over_k}"] * self.mask_k
        zero = "0.0" if spec.weights.format == "plain" else "0"
        mask = f", mask={' & '.join(masks)}, other={zero}" if masks else ""
        return f"tl.load({name}_at + {stride}{mask})"

    def _decode(self) -> list[str]:
        """The loaded weight tile ``w`` in the activations' dtype."""
        cast = f".to({DTYPES[self.spec.x]})"
        match self.spec.weights.format:
            case "int8":
                return [f"w = w{cast}"]
            case "fp8":
                # e4m3's sign, exponent and mantissa moved to float16's places: exact, on any GPU.
                return [
                    "w = ((w & 128).to(tl.int16) << 8) | ((w & 127).to(tl.int16) << 7)",
                    f"w = w.to(tl.float16, bitcast=True){'' if self.spec.x == 'fp16' else cast}",
                ]
        return []

    def _dot(self, name: str, x: str, w: str, shift: str) -> None:
        left, right = (w, f"tl.trans({x})") if self.spec.swap_ab else (x, w)
        precision = ', input_precision="ieee"' if self.spec.x == "fp32" else ""
        if not self.grouped:
            text = f"{name} = tl.dot({left}, {right}, {name}{precision})"
            self.source.line(text, depth=2)
            return
        mask = f", mask={self.column_ok}, other=0.0" if self.mask_n else ""
        unit = f" * {_FP8_UNIT}" if self.spec.weights.format == "fp8" else ""
        at = f"({shift}k0)" if shift else "k0"
        self.source.line(
            f"scale = tl.load({name}_scale_at + {at} // SCALE_K{mask}){unit}",
            f"{name} += tl.dot({left}, {right}{precision}) * scale{self.over_n}",
            depth=2,
        )

    def epilogue(self) -> None:
        """Scales, biases, activation and routing weight, in float32."""
        spec, source = self.spec, self.source
        mask = f", mask={self.column_ok}, other=0.0" if self.mask_n else ""
        for name, output in self.outputs.items():
            if spec.weights.format != "plain" and not self.grouped:
                unit = f" * {_FP8_UNIT}" if spec.weights.format == "fp8" else ""
                source.line(f"scale = tl.load({name}_scale_at{mask}){unit}")
                source.line(f"{name} *= scale{self.over_n}")
            if spec.bias:
                start = f"bias_ptr + {text_of(self._expert_base(var('OUTPUTS')) + output)}"
                if spec.place:
                    start = f"w_ptr + {self.place_of(name, 'BIAS_AT')} + {text_of(output)}"
                source.line(f"bias = tl.load({start}{mask}).to(tl.float32)")
                once = "tl.where(split == 0, bias, 0.0)" if spec.tile.split_k > 1 else "bias"
                source.line(f"{name} += {once}{self.over_n}")
        if self.pairs:
            both = "tl.trans(acc)" if spec.swap_ab else "acc"
            source.line(f"gate, up = tl.split(tl.reshape({both}, (BLOCK_M, BLOCK_N, 2)))")
            self.over_m, self.over_n = "[:, None]", "[None, :]"
        if spec.activation:
            source.line(*activated(spec.activation))
        if spec.routed_weight:
            weight = "tl.load(routed_weight_ptr + slot, mask=row_ok, other=0.0)"
            source.line(f"acc *= {weight}{self.over_m}")

    def store(self) -> None:
        """Where the tile goes."""
        spec, source = self.spec, self.source
        to = {"row": var("row"), "slot": var("slot")}.get(spec.store)
        if to is None:
            to = quotient(var("slot"), var("TOP_K") if spec.top_k > 1 else 1)
        if spec.tile.split_k > 1:
            rows = {"row": "max_rows", "slot": "num_slots"}[spec.store]
            source.line(
                f"first = split.to(tl.int64) * {'num_rows' if spec.rows == 'dense' else rows}"
            )
            to = to + var("first")
        source.line(
            f"y_at = y_ptr + {over(to * var('N'), self.over_m)} + n{self.over_n}",
            f"ok = row_ok{self.over_m}" + (f" & n_ok{self.over_n}" if self.mask_n else ""),
        )
        value = f"acc.to({DTYPES[spec.out]})" if spec.out != "fp32" else "acc"
        if spec.store == "add":
            source.line('tl.atomic_add(y_at, acc, mask=ok, sem="relaxed")')
        else:
            source.line(f"tl.store(y_at, {value}, mask=ok)")


def activated(act: Activation) -> list[str]:
    """Source that computes ``acc`` from ``gate`` and ``up``, or without a gate from ``acc``, all
    float32.

    tanh(z) is written 2·sigmoid(2z) − 1, so gelu's tanh form is gate·sigmoid(2z).
    """
    match act.function:
        case "relu":
            return ["acc = tl.maximum(acc, 0.0)"]
        case "relu2":
            return ["acc = tl.maximum(acc, 0.0)", "acc *= acc"]
        case "reglu":
            return ["acc = tl.maximum(gate, 0.0) * up"]
        case "clamped":
            return [
                f"gate = tl.minimum(gate, {act.limit})",
                f"up = tl.minimum(tl.maximum(up, {-act.limit}), {act.limit})",
                f"acc = gate * tl.sigmoid({act.alpha} * gate) * (up + 1.0)",
            ]
    of, times = ("gate", " * up") if act.gated else ("acc", "")
    match act.function:
        case "swiglu" | "silu":
            return [f"acc = {of} * tl.sigmoid({of}){times}"]
        case "geglu" | "gelu":
            return [f"acc = 0.5 * {of} * (1.0 + tl.erf({of} * 0.7071067811865476)){times}"]
    return [
        f"z = 0.7978845608028654 * ({of} + 0.044715 * {of} * {of} * {of})",
        f"acc = {of} * tl.sigmoid(2.0 * z){times}",
    ]
