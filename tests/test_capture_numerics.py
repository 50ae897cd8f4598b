"""Captured graphs compute what the transformers models compute.

A plain interpreter runs the task graph on padded batches with one KV store per sequence, weights
taken from the saved checkpoint by the graph's own keys; the reference is the model itself on each
sequence alone, without a cache.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.capture_cases import COMMON
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dovetail.capture.capture import capture_checkpoint
from dovetail.capture.captured import Captured
from dovetail.ir.expr import evaluate
from dovetail.ir.task_graph import Arg, Body, Const, Experts, ExpertTensor, Op, Ref, Size, Task

MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "head_dim": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
QWEN2: dict[str, Any] = EXPERTS | {
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 64,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", EXPERTS | {"num_key_value_heads": 4, "norm_topk_prob": True}),
    "olmoe_clipped": ("olmoe", EXPERTS | {"clip_qkv": 0.5, "attention_bias": True}),
    "mixtral": ("mixtral", LOCAL | {"sliding_window": None}),
    "mixtral_window": ("mixtral", LOCAL | {"sliding_window": 5, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", QWEN2),
    "qwen2_moe_mixed": (
        "qwen2_moe",
        QWEN2
        | {
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 48, "head_dim": 32}),
    "deepseek_v2": ("deepseek_v2", MLA | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "deepseek_v2_groups": (
        "deepseek_v2",
        MLA
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": None,
        },
    ),
    "deepseek_v3": ("deepseek_v3", MLA | {"n_group": 4, "topk_group": 2}),
    "deepseek_v3_yarn": (
        "deepseek_v3",
        MLA | {"n_group": 1, "topk_group": 1, "rope_parameters": YARN, "rope_interleave": False},
    ),
    "gpt_oss": ("gpt_oss", LOCAL | {"head_dim": 16, "sliding_window": 5}),
    "llama": ("llama", {}),
}
PROMPTS = (11, 4, 7)
STEPS = 3
TOLERANCE = 1e-5


def tiny_config(case: str) -> Any:
    """The tiny configuration of one case."""
    model_type, options = CASES[case]
    return AutoConfig.for_model(model_type, **COMMON | options)


def tiny_model(case: str) -> PreTrainedModel:
    """A float32 model with weights large enough that every part matters."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        tiny_config(case), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    state = [*model.named_parameters(), *model.named_buffers()]
    persistent = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in state:
            if name in persistent:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise * (tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.3))
                if "norm" in name:
                    tensor.add_(1.0)
    model.train(False)
    return model


class Interpreter:
    """Runs a captured graph on the CPU, one operator after the other."""

    def __init__(self, captured: Captured, checkpoint: dict[str, Tensor]) -> None:
        self.graph = captured.graph
        self.constants = captured.constants
        self.checkpoint = checkpoint
        self.store: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.lengths: list[int] = []

    def step(self, tokens: list[list[int]]) -> list[Tensor]:
        """Logits of every new token of every sequence; sequences are padded on the right."""
        seqs, q_len = len(tokens), max(map(len, tokens))
        self.lengths = self.lengths or [0] * seqs
        self.new = [len(t) for t in tokens]
        self.dims = {"seqs": seqs, "q_len": q_len, "past": max(self.lengths)}
        ids = torch.tensor([t + [0] * (q_len - len(t)) for t in tokens])
        self.positions = torch.tensor(self.lengths)[:, None] + torch.arange(q_len)
        outside = {"input_ids": ids, "position_ids": self.positions}
        env = self._run(self.graph.prologue, outside, None)
        carried = env[self.graph.prologue.outputs[0]]
        shared = {name: env[name] for name in self.graph.shared} | outside
        for layer in range(len(self.graph.layers)):
            body = self.graph.body(layer)
            env = self._run(body, shared | {body.inputs[0]: carried}, layer)
            carried = env[body.outputs[0]]
        tail = self.graph.epilogue
        logits = self._run(tail, shared | {tail.inputs[0]: carried}, None)[tail.outputs[0]]
        self.lengths = [n + new for n, new in zip(self.lengths, self.new, strict=True)]
        return [logits[b, :n] for b, n in enumerate(self.new)]

    def _run(self, body: Body, inputs: dict[str, Tensor], layer: int | None) -> dict[str, Tensor]:
        env = {name: inputs[name] for name in body.inputs}
        for task in body.tasks:
            local = {name: env[name] for name in task.reads} | self.constants
            local |= {w.fqn: self._weight(w.key, layer, w.shape) for w in task.weights}
            for op in task.ops:
                outs = self._call(op, local, task, layer)
                for name, out in zip(op.outs, outs, strict=True):
                    value = body.values[name]
                    sizes = tuple(int(evaluate(s, **self.dims)) for s in value.shape)
                    assert (tuple(out.shape), str(out.dtype)) == (sizes, f"torch.{value.dtype}")
                    local[name] = out
            env |= {name: local[name] for name in task.writes}
        return env

    def _weight(self, key: str, layer: int | None, shape: tuple[int, ...]) -> Tensor:
        weight = self.checkpoint[key.replace("{layer}", str(layer))]
        assert tuple(weight.shape) == shape
        return weight

    def _call(self, op: Op, env: dict[str, Tensor], task: Task, layer: int | None) -> list[Tensor]:
        args = [self._arg(a, env) for a in op.args]
        if op.target == "dovetail.kv_update":
            assert layer is not None and task.kv is not None
            return self._kv_update(layer, *args)
        if op.target == "dovetail.attention" and "latent" in op.kwargs:
            q, latents, rotary = args[:3]
            args[1:3] = self._expanded(q, latents, rotary, self._arg(op.kwargs["latent"], env))
        if op.target == "dovetail.attention":
            return [self._attention(*args)]
        if op.target == "dovetail.experts":
            assert layer is not None and task.experts is not None
            return [self._experts(task.experts, layer, *args)]
        return self._aten(op, args, env)

    def _aten(self, op: Op, args: list[Any], env: dict[str, Tensor]) -> list[Tensor]:
        namespace, packet, overload = op.target.split(".")
        function = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        out = function(*args, **{k: self._arg(v, env) for k, v in op.kwargs.items()})
        return [out] if isinstance(out, Tensor) else list(out)

    def _arg(self, arg: Arg, env: dict[str, Tensor]) -> Any:
        if isinstance(arg, Ref):
            return env[arg.name]
        if isinstance(arg, Size):
            return int(evaluate(arg.expr, **self.dims))
        if isinstance(arg, Const):
            special = {"cpu": torch.device("cpu"), "inf": float("inf"), "-inf": float("-inf")}
            return special.get(arg.name) or getattr(torch, arg.name.removeprefix("torch."))
        return [self._arg(a, env) for a in arg] if isinstance(arg, tuple) else arg

    def _kv_update(self, layer: int, k: Tensor, v: Tensor) -> list[Tensor]:
        outs = [
            x.new_zeros(*x.shape[:2], self.dims["past"] + x.shape[2], x.shape[3]) for x in (k, v)
        ]
        for b, (length, new) in enumerate(zip(self.lengths, self.new, strict=True)):
            held = self.store.get((layer, b), (k[b, :, :0], v[b, :, :0]))
            grown = [torch.cat([h, x[b, :, :new]], 1) for h, x in zip(held, (k, v), strict=True)]
            self.store[layer, b] = (grown[0], grown[1])
            for out, tensor in zip(outs, grown, strict=True):
                out[b, :, : length + new] = tensor
        return outs

    def _expanded(self, q: Tensor, latents: Tensor, rotary: Tensor, w: Tensor) -> list[Tensor]:
        """Keys and values of every head from latents."""
        heads, own = q.shape[1], q.shape[-1] - rotary.shape[-1]
        flat = latents[:, 0] @ w.T
        whole = flat.view(*flat.shape[:-1], heads, -1).transpose(1, 2)
        keys = torch.cat([whole[..., :own], rotary.expand(-1, heads, -1, -1)], -1)
        return [keys, whole[..., own:]]

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int
    ) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        at = self.positions[:, None, :, None]
        key = torch.arange(k.shape[2])
        seen = (key <= at) & (key > at - window if window else key >= 0)
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
        if sinks is not None:
            sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2).contiguous()

    def _experts(self, experts: Experts, layer: int, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in sorted(set(idx.flatten().tolist())):
            part = {t.part: self._expert_tensor(t, layer, expert) for t in experts.tensors}
            token, slot = torch.where(idx == expert)
            h = self._project(x[token], part, "gate_up", experts.transposed)
            a = self._activation(experts, h)
            y = self._project(a, part, "down", experts.transposed)
            out.index_add_(0, token, (y * w[token, slot, None]).to(out.dtype))
        return out

    def _project(self, x: Tensor, part: dict[str, Tensor], name: str, transposed: bool) -> Tensor:
        if name not in part:
            return torch.cat([x @ part["gate"].T, x @ part["up"].T], -1)
        y = x @ (part[name] if transposed else part[name].T)
        return y + part[f"{name}_bias"] if f"{name}_bias" in part else y

    def _activation(self, experts: Experts, h: Tensor) -> Tensor:
        g, u = h.chunk(2, -1)
        env = {"g": g, "u": u} if experts.split_gate else {"h": h}
        for op in experts.activation:
            outs = self._aten(op, [self._arg(a, env) for a in op.args], env)
            env |= dict(zip(op.outs, outs, strict=True))
        return env["a"]

    def _expert_tensor(self, tensor: ExpertTensor, layer: int, expert: int) -> Tensor:
        key = tensor.key.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        weight = self.checkpoint[key]
        weight = weight[expert] if tensor.stacked else weight
        assert tuple(weight.shape) == tensor.shape
        return weight


def read_checkpoint(directory: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {k: t for f in directory.glob("*.safetensors") for k, t in load_file(f).items()}


def entries_of(checkpoint: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a reader of safetensors headers would know."""
    return {k: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for k, t in checkpoint.items()}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_graph_computes_what_the_model_computes(case: str, tmp_path: Path) -> None:
    model = tiny_model(case)
    model.save_pretrained(tmp_path)
    check(model, tmp_path, read_checkpoint(tmp_path))


@torch.no_grad()
def test_checkpoint_with_stacked_experts(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path)
    stacked = {k: t for k, t in model.state_dict().items() if "inv_freq" not in k}
    assert "model.layers.0.mlp.experts.gate_up_proj" in stacked
    captured = check(model, tmp_path, stacked)
    experts = captured.graph.bodies[0].experts
    assert experts is not None and experts.experts is not None
    assert [(t.part, t.stacked, t.shape) for t in experts.experts.tensors] == [
        ("gate_up", True, (192, 64)),
        ("down", True, (64, 96)),
    ]


def check(model: PreTrainedModel, directory: Path, checkpoint: dict[str, Tensor]) -> Captured:
    """Assert that the captured graph gives the model's logits for every token."""
    captured = capture_checkpoint(directory, entries_of(checkpoint))
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 256, (n + STEPS,), generator=generator).tolist() for n in PROMPTS]
    expected = [model(torch.tensor([t])).logits[0] for t in texts]
    generate(Interpreter(captured, checkpoint), texts, expected, PROMPTS)
    # One sequence and one token are the sizes that tracing treats as special.
    generate(Interpreter(captured, checkpoint), texts[:1], expected[:1], (1,))
    return captured


def generate(
    interpreter: Interpreter,
    texts: list[list[int]],
    expected: list[Tensor],
    prompts: tuple[int, ...],
) -> None:
    """Assert the logits of prefill with ``prompts`` tokens each and of single steps after it."""
    done = [0] * len(texts)
    for step in range(STEPS + 1):
        new = [t[d : n + step] for t, d, n in zip(texts, done, prompts, strict=True)]
        for got, want, d in zip(interpreter.step(new), expected, done, strict=True):
            torch.testing.assert_close(got, want[d : d + len(got)], atol=TOLERANCE, rtol=TOLERANCE)
        done = [d + len(n) for d, n in zip(done, new, strict=True)]
    assert done == [n + STEPS for n in prompts]
