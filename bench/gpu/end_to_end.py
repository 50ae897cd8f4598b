"""Whole models with random weights: dovetail's executor, accelerate's offload, plain transformers.

All read one model in the host's memory. It has some of the published model's layers, so that it is
made and run in the time there is; layers are alike, so what a token takes scales with them.
"""

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runs import Run
from torch import Tensor

from dovetail.capture.capture import capture_config
from dovetail.capture.captured import Captured
from dovetail.doors.memory_planning import AT_ONCE, experts_paths
from dovetail.gpu_run import GpuExecution, with_gpu
from dovetail.ir.batching import Request
from dovetail.ir.errors import DovetailError
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Plan
from dovetail.ir.workload import Workload
from dovetail.machine_files import load_machine
from dovetail.planning import Model, plan_model
from dovetail.planning import Request as Asked
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.sampling import Sampling

HOST = "h100-1tb"
"""The machine file whose processor planning goes by: to measure this one takes half a minute."""
BESIDE = 6 << 30
"""Bytes of hbm beside a third of the weights in offloaded runs: KV, activations, buffers."""
FAILURES = (ImportError, AttributeError, RuntimeError, TypeError, ValueError, DovetailError)
"""What one way may fail with while the others go on: other versions, too little memory, no plan."""
FREE = 0.9
"""Share of the free hbm that resident runs may use."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model's dimensions with ``layers`` of its layers."""

    name: str
    family: str
    layers: int
    of: int
    options: dict[str, Any]

    def config(self, dry: bool) -> Any:
        """As transformers' config; in a dry run two tiny layers of the family."""
        from transformers import AutoConfig

        options = {**self.options, "num_hidden_layers": 2 if dry else self.layers}
        if dry:
            options |= {name: value for name, value in _TINY.items() if name in options}
        return AutoConfig.for_model(self.family, **options)


_ATTENTION = {"num_key_value_heads": 8, "max_position_embeddings": 4096}
SHAPES = (
    Shape("Mixtral-8x7B", "mixtral", 8, 32, {
        **_ATTENTION, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    }),
    Shape("Qwen3-30B-A3B", "qwen3_moe", 12, 48, {
        **_ATTENTION, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    }),
    Shape("DeepSeek-V2-Lite", "deepseek_v2", 9, 27, {
        "max_position_embeddings": 4096, "hidden_size": 2048, "intermediate_size": 10944,
        "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512,
        "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
        "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "vocab_size": 102400,
    }),
)  # fmt: skip
_TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "vocab_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_experts": 4,
    "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


class EndToEnd:
    """A model in the host's memory and everything that runs it."""

    def __init__(self, shape: Shape, dry: bool, folder: Path) -> None:
        self.shape, self.dry, self.folder = shape, dry, folder
        self.device = "cpu" if dry else "cuda"
        dtype = torch.float32 if dry else torch.bfloat16
        config = shape.config(dry)
        self.model = _random_model(config, dtype, self.device)
        self.captured: Captured = capture_config(config, str(dtype).removeprefix("torch."))
        prompts, length, self.new = (3, 5, 3) if dry else (32, 128, 16)
        torch.manual_seed(0)
        self.prompts = torch.randint(3, config.vocab_size, (prompts, length))
        self.expected: Tensor | None = None

    def transformers(self) -> Run:
        """The model as it is, all of it on the device; its tokens are what others are held to."""
        self.model.to(self.device)
        try:
            run, self.expected = self._generate("resident", "transformers")
        finally:
            self.model.to("cpu")
        return run

    def accelerate(self) -> Run:
        """What ``device_map="auto"`` does with a third of the weights in hbm. It is the last to
        run, since it leaves the model in pieces."""
        import accelerate

        if self.dry:
            accelerate.cpu_offload(self.model, execution_device=torch.device("cpu"))
        else:
            kept = {0: self._third(), "cpu": 2 * self.captured.graph.weight_bytes}
            split = self.model._no_split_modules
            where = accelerate.infer_auto_device_map(self.model, kept, split)
            accelerate.dispatch_model(self.model, where, main_device=0)
        return self._generate("offloaded", "accelerate")[0]

    def ours(self, place: str, machine: Machine, graphs: bool = False) -> Run:
        """dovetail's plan for this GPU, run by its executor. Raises RuntimeError where ``graphs``
        are asked for and no step was captured."""
        plan = self._plan(place, machine)
        execution, seconds, tokens, steps, resident = self._executed(plan, graphs)
        if graphs and not execution.captured:
            raise RuntimeError("no step was captured: not all experts are run by kernels")
        missing = self.captured.graph.weight_bytes - resident
        assert machine.accelerator is not None
        link = missing / max(machine.accelerator.h2d.y) if place == "offloaded" else 0.0
        how = f", {execution.captured} graphs" if graphs else ""
        return Run(
            self.shape.name,
            place,
            f"dovetail, {plan.policy}{how}",
            tokens.numel(),
            seconds,
            statistics.median(steps) if steps else 0.0,
            execution.programs.predicted(execution.steps_run),
            link,
            self._same(tokens),
        )

    def _plan(self, place: str, machine: Machine) -> Plan:
        weights = self.captured.graph.weight_bytes
        if place == "resident":
            hbm = int(FREE * machine.tiers["hbm"])
        else:
            hbm = self._third() + (1 << 18 if self.dry else BESIDE)
        seqs, length = self.prompts.shape
        asked = Asked(
            checkpoint="",
            budget={"ram": 2 * weights + (64 << 20), "hbm": hbm},
            workload=Workload(((length, seqs),), self.new),
            policy="eager" if place == "resident" else "auto",
            runs=True,
        )
        return plan_model(asked, Model(self.captured), machine)[0]

    def _executed(
        self, plan: Plan, graphs: bool
    ) -> tuple[GpuExecution, float, Tensor, list[float], int]:
        """The execution, all seconds but those of loading, the new tokens, the seconds of steps
        that only decode, and the bytes of weights that stay in hbm."""
        target = "host" if self.dry else "cuda"
        # Taken anew, since a model that was moved has its weights elsewhere.
        weights = MemoryWeights(
            self.captured.graph, self.model.state_dict(), experts_paths(self.model, self.captured)
        )
        folder = self.folder / f"{self.shape.name}-{plan.digest()[:12]}"
        folder.mkdir(exist_ok=True)
        execution = GpuExecution(
            plan, self.captured, weights, Sampling(), (), folder, target, graphs
        )
        rows, length = self.prompts.tolist(), self.prompts.shape[1]
        made: list[list[int]] = [[] for _ in rows]
        decodes = []
        with execution:
            begin = time.perf_counter()
            for report in execution.steps(
                [Request(i, length, self.new) for i in range(len(rows))], rows.__getitem__
            ):
                decodes.append(not any(group.prefill for group in report.step.groups))
                for index, token in zip(report.step.receivers, report.chosen, strict=True):
                    made[index].append(token)
            seconds = time.perf_counter() - begin
            resident = execution.held("hbm").get("resident", 0)
        steps = execution.measured.step_seconds
        taken = [s for s, decode in zip(steps, decodes, strict=True) if decode]
        return execution, seconds, torch.tensor(made), taken, resident

    def _generate(self, place: str, way: str) -> tuple[Run, Tensor]:
        """Greedy generate, first for one token, then for all."""
        ids = self.prompts.to(self.device)
        mask = torch.ones_like(ids)

        def run(new: int) -> tuple[float, Tensor]:
            begin = time.perf_counter()
            with torch.inference_mode():
                found = self.model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                    do_sample=False, pad_token_id=0,
                ).cpu()  # fmt: skip
            return time.perf_counter() - begin, found[:, ids.shape[1] :]

        run(1)
        first, (seconds, tokens) = run(1)[0], run(self.new)
        decode = max(0.0, seconds - first) / (self.new - 1)
        name = f"{way} {_version(way)}"
        made = Run(self.shape.name, place, name, tokens.numel(), seconds, decode)
        return dataclasses.replace(made, same=self._same(tokens)), tokens

    def _same(self, tokens: Tensor) -> float | None:
        if self.expected is None:
            return None
        return float((tokens == self.expected).float().mean())

    def _third(self) -> int:
        return self.captured.graph.weight_bytes // 3


def bench_machine(dry: bool) -> Machine:
    """The GPU as measured now beside the processor of ``HOST``; in a dry run all is HOST's."""
    found = load_machine(HOST)
    if not dry:
        found = with_gpu(found)
    return dataclasses.replace(found, disk=AT_ONCE)


def measure_model(
    shape: Shape, dry: bool, folder: Path, fits: Callable[[str, float], bool]
) -> Iterator[Run]:
    """Every way, as far as the time goes; what fails says why in its row."""
    if not fits(f"{shape.name}: making it", 1 if dry else 25):
        return
    try:
        made, machine = EndToEnd(shape, dry, folder), bench_machine(dry)
    except FAILURES as error:
        yield Run(shape.name, "", "all", skipped=_words(error))
        return
    for place, way, seconds, call in _ways(made, machine):
        if not fits(f"{shape.name}, {place}: {way}", 1 if dry else seconds):
            continue
        if dry and way == "dovetail, graphs":
            yield Run(shape.name, place, way, skipped="a dry run has no GPU to capture on")
            continue
        try:
            yield call()
        except FAILURES as error:
            yield Run(shape.name, place, way, skipped=_words(error))
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()


def _ways(made: EndToEnd, machine: Machine) -> Sequence[tuple[str, str, float, Callable[[], Run]]]:
    """Place, way, about how many seconds, and what runs it."""

    return (
        ("resident", "transformers", 20, made.transformers),
        ("resident", "dovetail", 25, lambda: made.ours("resident", machine)),
        ("offloaded", "dovetail", 40, lambda: made.ours("offloaded", machine)),
        ("resident", "dovetail, graphs", 25, lambda: made.ours("resident", machine, graphs=True)),
        ("offloaded", "accelerate", 70, made.accelerate),
    )


def _random_model(config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model in the host's memory, its matrices filled from one block of random numbers."""
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM
    with _no_init():
        model = made.from_config(config, dtype=dtype)
    torch.manual_seed(0)
    # An odd size, so that no two matrices are alike.
    block = (torch.randn((1 << 24) + 1, device=device) * 0.02).to("cpu", dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            flat = weight.view(-1)
            if weight.dim() == 1:
                flat.fill_(1.0 if "norm" in name else 0.0)
                continue
            for first in range(0, flat.numel(), block.numel()):
                flat[first : first + block.numel()] = block[: flat.numel() - first]
            block = block.roll(len(name))
    return model.eval()


def _no_init() -> contextlib.AbstractContextManager[object]:
    """Leaves weights as they are, where this transformers can: they are filled afterwards."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return contextlib.nullcontext()
    return no_init_weights()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
