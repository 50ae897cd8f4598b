"""What the end-to-end tests share: tiny models of every family, a machine that no one measured, and
the path from a checkpoint to tokens in this process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dovetail.capture.capture import capture_checkpoint
from dovetail.capture.captured import Captured
from dovetail.codegen.executor import emit_executor
from dovetail.ir.batching import Batcher, Group, Request, Step
from dovetail.ir.machine import Curve, Machine
from dovetail.ir.plan import Plan
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.passes.lower import lower
from dovetail.runtime.executor import Runtime
from dovetail.runtime.generate import Generator
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.sampling import Sampling

VOCAB, CONTEXT = 160, 128
GREEDY = Sampling()
Prompts = Sequence[Sequence[int]]
Knobs = Mapping[str, int | bool]

# Wide experts and narrow everything else, as in real checkpoints, so that a quarter of the weights
# holds all that is not an expert.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": CONTEXT,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4}
_LOCAL_EXPERTS = {"num_local_experts": 16, "num_experts_per_tok": 4}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OPTIONS: dict[str, dict[str, Any]] = {
    "olmoe": _EXPERTS | {"num_key_value_heads": 4},
    "mixtral": _LOCAL_EXPERTS | {"sliding_window": None},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 96},
    "qwen3_moe": _EXPERTS | {"head_dim": 16},
    "deepseek_v2": _LATENT | {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": _LATENT | {"n_group": 4, "topk_group": 2},
    "gpt_oss": _LOCAL_EXPERTS | {"head_dim": 16, "sliding_window": 8, "rope_parameters": _ROPE},
}
FAMILIES = tuple(_OPTIONS)


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk, opened and captured, and the transformers model that wrote it."""

    folder: Path
    model: PreTrainedModel
    captured: Captured
    index: CheckpointIndex

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.captured.graph.weight_bytes


@dataclass(slots=True)
class Outcome:
    """What a run gave: tokens and why each prompt ended, by index, and what it took."""

    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    pools_peak: int = 0
    pools: dict[str, int] = field(default_factory=dict)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A random model, its weights scaled so that activations and routing keep their variety."""
    config = AutoConfig.for_model(family, **_COMMON | _OPTIONS[family] | options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    persistent = model.state_dict()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in persistent:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise * 1.8 / tensor.shape[-1] ** 0.5)
            else:
                tensor.copy_(noise * 0.1 + ("norm" in name))
    return model.train(False).to(dtype)  # type: ignore[no-any-return]


def save_tiny(model: PreTrainedModel, folder: Path) -> Tiny:
    """Write the checkpoint and capture it."""
    model.save_pretrained(folder)
    index = CheckpointIndex.open(folder)
    entries = {key: (entry.dtype, entry.shape) for key, entry in index.entries.items()}
    return Tiny(folder, model, capture_checkpoint(folder, entries), index)


def machine(dtype: str = "float32", workers: int = 2) -> Machine:
    """Made-up figures, so that plans do not depend on where the tests run."""
    rates = {dtype: Curve((1.0, 1024.0), (1e10, 1e11))}
    fewer_bits = dict.fromkeys(("int8", "int4"), rates[dtype])
    return Machine(
        name="made up",
        tiers={"ram": 1 << 34, "disk": 1 << 40},
        workers=workers,
        gemm=rates | fewer_bits,
        attention=rates,
        kv_bandwidth=rates,
        memory_bandwidth=1e10,
        op_seconds=3e-6,
        disk=Curve((4096.0, 8e6), (1e8, 1.4e9)),
        slowdown={"cpu|cpu": 0.9},
    )


def ragged_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths, without the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def plan_for(
    tiny: Tiny,
    prompts: Prompts,
    new_tokens: int,
    budget: int,
    policy: str = "auto",
    knobs: Knobs | None = None,
    workers: int = 2,
) -> Plan:
    """The plan that dovetail chooses on the made-up machine."""
    graph = tiny.captured.graph
    workload = Workload.of([len(prompt) for prompt in prompts], new_tokens)
    where = machine(graph.dtype, workers)
    return choose(graph, where, {"ram": budget}, workload, policy, knobs)


def generate(
    tiny: Tiny,
    plan: Plan,
    prompts: Mapping[int, Sequence[int]],
    new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
) -> Outcome:
    """Run the plan on prompts by index, in this process."""
    graph = tiny.captured.graph
    program = lower(apply_moves(graph, plan.moves), plan.budget)
    functions = _functions(tiny, plan)
    outcome = Outcome()
    requests = [Request(i, len(p), min(new_tokens, CONTEXT - len(p))) for i, p in prompts.items()]
    constants = tiny.captured.constants
    with Generator(graph, program, constants, tiny.index, functions, sampling, stop) as generator:
        for report in generator.steps(requests, prompts.__getitem__):
            outcome.steps.append(report.step)
            for done in report.finished:
                assert done.index not in outcome.tokens, f"prompt {done.index} finished twice"
                outcome.tokens[done.index] = done.tokens
                outcome.reasons[done.index] = done.reason
        outcome.pools_peak = generator.runtime.budget.peak
        outcome.pools = generator.runtime.budget.breakdown()
    return outcome


def forced_logits(
    tiny: Tiny, plan: Plan, prompts: Prompts, continuations: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits ``[new, vocab]`` of every prompt while its continuation is forced on the model."""
    graph = tiny.captured.graph
    program = lower(apply_moves(graph, plan.moves), plan.budget)
    found: list[dict[int, Tensor]] = [{} for _ in prompts]
    order: list[tuple[int, int]] = []

    def hook(logits: Tensor, places: range) -> Tensor:
        for row, place in zip(logits, places, strict=True):
            index, made = order[place]
            found[index][made] = row.float().clone()
        return torch.tensor([continuations[i][made] for i, made in (order[p] for p in places)])

    requests = [Request(i, len(p), len(continuations[i])) for i, p in enumerate(prompts)]
    batcher = Batcher(requests, program.settings.admission)
    made = [0] * len(prompts)
    constants = tiny.captured.constants
    with Runtime(graph, program, constants, tiny.index, _functions(tiny, plan), hook) as runtime:
        while (step := batcher.next_step()) is not None:
            order[:] = [(m.index, made[m.index]) for g in step.groups for m in g.members]
            runtime.run_step(step, [_inputs(g, prompts, continuations, made) for g in step.groups])
            for index, _ in order:
                made[index] += 1
            batcher.advance(step)
    return [torch.stack([rows[i] for i in range(len(rows))]) for rows in found]


def _inputs(
    group: Group, prompts: Prompts, continuations: Sequence[Sequence[int]], made: Sequence[int]
) -> dict[str, Tensor]:
    rows = []
    for member in group.members:
        if group.prefill:
            prompt = list(prompts[member.index])
            rows.append(prompt + [0] * (group.q_len - len(prompt)))
        else:
            rows.append([continuations[member.index][made[member.index] - 1]])
    starts = torch.tensor([[member.held] for member in group.members])
    return {"input_ids": torch.tensor(rows), "position_ids": starts + torch.arange(group.q_len)}


def _functions(tiny: Tiny, plan: Plan) -> dict[str, Any]:
    graph = tiny.captured.graph
    program = lower(apply_moves(graph, plan.moves), plan.budget)
    functions: dict[str, Any] = {}
    source = emit_executor(graph, program, {"policy": plan.policy})
    exec(compile(source, "executor.py", "exec"), functions)
    return functions


def transformers_tokens(
    model: PreTrainedModel, prompts: Prompts, new_tokens: int | Callable[[int], int]
) -> list[tuple[int, ...]]:
    """Greedy tokens of transformers' own ``generate``, one prompt at a time, no end token."""
    found = []
    for prompt in prompts:
        count = new_tokens if isinstance(new_tokens, int) else new_tokens(len(prompt))
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        found.append(tuple(out[0, len(prompt) :].tolist()))
    return found
