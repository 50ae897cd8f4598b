"""First half of an emitted GEMM: the tile of a program, its rows and the addresses it reads."""

import sympy

from dovetail.codegen.kernels.text import Source, quotient, text_of, var
from dovetail.ir.kernel_spec import GemmSpec

DTYPES = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}
ALIGNED = 16
"""Bytes that the address of an expert is a multiple of: the widest load of a thread."""


def gemm_arguments(spec: GemmSpec) -> list[str]:
    """Names of the kernel's pointers and descriptors, in order."""
    return [
        "x_ptr",
        "expert_at_ptr" if spec.place else "w_desc" if spec.loads == "tma" else "w_ptr",
        *(["scale_ptr"] if spec.weights.format != "plain" else []),
        *(["bias_ptr"] if spec.bias and not spec.place else []),
        *(["routed_weight_ptr"] if spec.routed_weight else []),
        "y_ptr",
        *(["slot_ptr", "tile_expert_ptr", "num_rows_ptr"] if spec.rows != "dense" else []),
    ]


def gemm_sizes(spec: GemmSpec) -> list[str]:
    """Names of the arguments that depend on the batch."""
    if spec.rows == "dense":
        return ["num_rows"]
    split_rows = spec.tile.split_k > 1 and spec.store == "row"
    return ["num_slots", *(["max_rows"] if split_rows else [])]


def _title(spec: GemmSpec) -> str:
    parts = [
        "Dense GEMM" if spec.rows == "dense" else "Grouped GEMM",
        *(["gather of tokens"] if spec.rows == "gather" else []),
        *([f"{spec.weights.format} weights"] * (spec.weights.format != "plain")),
        *([spec.activation.function] if spec.activation else []),
        *(["routing weight"] if spec.routed_weight else []),
        *({"slot": ["scatter to slots"], "add": ["add into tokens"]}.get(spec.store, [])),
        *(["k axis split"] if spec.tile.split_k > 1 else []),
        *(["operands swapped"] if spec.swap_ab else []),
        *(["weights by TMA"] if spec.loads == "tma" else []),
        *(["experts by address"] if spec.place else []),
    ]
    return ", ".join(parts) + "."


class GemmRows:
    """Writes the first half of a kernel: which tile, which rows, which addresses."""

    def __init__(self, spec: GemmSpec) -> None:
        self.spec = spec
        self.source = Source(spec, _title(spec))
        self.source.args(*gemm_arguments(spec))
        self.source.sizes(*gemm_sizes(spec))
        self.mask_n = spec.n % spec.tile.n != 0
        self.mask_k = spec.k_steps % spec.tile.k != 0
        self.int4 = spec.weights.per_byte == 2
        self.steps = "HALF_K" if self.int4 else "K"
        self.grouped = spec.weights.scale_k > 0
        # The accumulator is [m, n], or [n, m] where the weights are the left operand.
        self.over_m, self.over_n = (
            ("[None, :]", "[:, None]") if spec.swap_ab else ("[:, None]", "[None, :]")
        )
        # Interleaved pairs are computed side by side in one accumulator twice as wide.
        self.pairs = spec.interleaved
        self.wide = "2 * BLOCK_N" if self.pairs else "BLOCK_N"
        self.column, self.column_ok = ("out", "out_ok") if self.pairs else ("n", "n_ok")
        self.outputs: dict[str, sympy.Expr] = {"acc": var(self.column)}
        if spec.gated and not self.pairs:
            self.outputs = {"gate": var("n"), "up": var("n") + var("N")}
        apart = spec.place is not None and len(spec.place.matrices) == 2
        if apart:
            self.outputs = {"gate": var("n"), "up": var("n")}
        self.width = "N" if apart else "OUTPUTS"  # columns of a matrix in order kn

    def constants(self) -> None:
        """Sizes of the layer, then of the tile."""
        spec, tile = self.spec, self.spec.tile
        if spec.rows != "dense":
            self.source.const(EXPERTS=spec.experts, TOP_K=spec.top_k)
        self.source.const(N=spec.n, OUTPUTS=spec.outputs, K=spec.k)
        if self.int4:
            self.source.const(HALF_K=spec.k_steps)
        if self.grouped:
            self.source.const(SCALE_K=spec.weights.scale_k, SCALE_N=spec.weights.scale_n)
        if spec.place:
            for kind, places in (("AT", spec.place.matrices), ("BIAS_AT", spec.place.biases)):
                names = ("GATE", "UP") if len(places) == 2 else ("W",)
                found = zip(names, places, strict=False)
                self.source.const(**{f"{name}_{kind}": place for name, place in found})
        self.source.const(BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=tile.group)
        if tile.split_k > 1:
            self.source.const(SPLIT_K=tile.split_k)

    def tile_of_program(self) -> None:
        """Which row tile and which outputs this program computes."""
        source = self.source
        source.note("GROUP_M neighbouring row tiles run side by side: they share weights in L2.")
        source.line("pid = tl.program_id(0)")
        if self.spec.rows != "dense":
            source.line("num_rows = tl.load(num_rows_ptr)  # after padding; only the device knows")
        source.line(
            "tiles_m = tl.cdiv(num_rows, BLOCK_M)",
            "tiles_n = tl.cdiv(N, BLOCK_N)",
            "if pid >= tiles_m * tiles_n:",
            "    return",
            "first_m = pid // (GROUP_M * tiles_n) * GROUP_M",
            "group = min(tiles_m - first_m, GROUP_M)",
            "pid_m = first_m + pid % (GROUP_M * tiles_n) % group",
            "pid_n = pid % (GROUP_M * tiles_n) // group",
        )

    def rows(self) -> None:
        """The tile's rows: slots, tokens and their expert."""
        source, spec = self.source, self.spec
        expert = "expert = tl.load(tile_expert_ptr + pid_m).to(tl.int64)"
        if spec.place:
            source.line(expert)
            self._base()
        source.line("row = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)")
        if spec.rows == "dense":
            source.line("row_ok = row < num_rows")
        else:
            source.note("A padding row holds slot num_slots: it is neither read nor stored.")
            source.line(
                "slot = tl.load(slot_ptr + row).to(tl.int64)",
                "row_ok = slot < num_slots",
                *([] if spec.place else [expert]),
            )
        source.line("n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)")
        if self.mask_n:
            source.line("n_ok = n < N")
        if self.pairs:
            source.line("out = pid_n * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)")
            if self.mask_n:
                source.line("out_ok = out < OUTPUTS")

    def _base(self) -> None:
        """The expert's own address, or the end of the program where it is not in this launch."""
        pointer = f"at.to(tl.pointer_type({DTYPES[self.spec.x]}))"
        self.source.note("Address 0: the expert is not in this launch.")
        self.source.line(
            "at = tl.load(expert_at_ptr + expert)",
            "if at == 0:",
            "    return",
            f"w_ptr = tl.multiple_of({pointer}, [{ALIGNED}])",
        )

    def operands(self) -> None:
        """Addresses of the first k block, and the accumulators."""
        source, spec = self.source, self.spec
        source.line("k = tl.arange(0, BLOCK_K)")
        of_token = quotient(var("slot"), var("TOP_K") if spec.top_k > 1 else 1)
        x_row = of_token if spec.rows == "gather" else var("row")
        source.line(f"x_at = x_ptr + {over(x_row * var('K'), '[:, None]')} + k[None, :]")
        if spec.loads == "tma":
            width = (2 if self.pairs else 1) * var("BLOCK_N")
            first = self._expert_base(var("OUTPUTS")) + var("pid_n") * width
            for name, output in self.outputs.items():
                row = text_of(first + output - var(self.column))
                cast = "" if spec.rows == "dense" else ".to(tl.int32)"
                source.line(f"{name}_row = {f'({row}){cast}' if cast else row}")
        else:
            self._weight_addresses()
        if spec.weights.format != "plain":
            self._scale_addresses()
        shape = f"({self.wide}, BLOCK_M)" if spec.swap_ab else f"(BLOCK_M, {self.wide})"
        for name in self.outputs:
            source.line(f"{name} = tl.zeros({shape}, dtype=tl.float32)")

    def _expert_base(self, per_expert: sympy.Expr) -> sympy.Expr:
        if self.spec.rows == "dense":
            return sympy.Integer(0)
        return var("expert") * per_expert

    def _weight_addresses(self) -> None:
        # The weight tile is [k, n], or [n, k] where the weights are the left operand.
        over_k = "[None, :]" if self.spec.swap_ab else "[:, None]"
        steps, outputs, k = var(self.steps), var("OUTPUTS"), var(f"k{over_k}")
        for name, output in self.outputs.items():
            column = var(over(output, self.over_n))
            wide = k * var(self.width) + column
            inner = column * steps + k if self.spec.weights.order == "nk" else wide
            base = text_of(self._expert_base(outputs * steps))
            if self.spec.place:
                base = self.place_of(name, "AT")
            start = "w_ptr" if base == "0" else f"w_ptr + {base}"
            self.source.line(f"{name}_at = {start} + {text_of(inner)}")

    def place_of(self, output: str, kind: str) -> str:
        """The constant that says where in an expert an output's matrix or bias is."""
        return f"{'W' if self.width == 'OUTPUTS' else output.upper()}_{kind}"

    def _scale_addresses(self) -> None:
        weights, outputs = self.spec.weights, var("OUTPUTS")
        for name, output in self.outputs.items():
            if self.grouped:
                # [experts, outputs / SCALE_N, K / SCALE_K]
                tall = var("SCALE_N") if weights.scale_n > 1 else 1
                across = var("(K // SCALE_K)")
                rows = self._expert_base(quotient(outputs, tall)) + quotient(output, tall)
                index = text_of(
                    rows * across if rows.is_Atom else var(f"({text_of(rows)})") * across
                )
            else:
                index = text_of(self._expert_base(outputs) + output)
            self.source.line(f"{name}_scale_at = scale_ptr + {index}")


def over(index: sympy.Expr, broadcast: str) -> str:
    """A vector expression broadcast over the other axis."""
    text = text_of(index)
    return f"{text}{broadcast}" if index.is_Atom else f"({text}){broadcast}"
