"""Plans for a model whose weights are in memory already: nothing streams, and no disk is read."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dovetail.capture.captured import Captured
from dovetail.doors.plan_cache import Bucket, PlanCache
from dovetail.generation import GenerationEngine
from dovetail.ir import codec
from dovetail.ir.errors import BudgetError, CaptureError
from dovetail.ir.machine import Curve, Machine
from dovetail.ir.plan import Plan, save_plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_bytes
from dovetail.ir.workload import Workload
from dovetail.planning import (
    PLAN_FILE,
    Model,
    Request,
    captured_in_memory,
    find_machine,
    plan_model,
)
from dovetail.runtime import calibrate_host as host
from dovetail.runtime.memory_weights import MemoryWeights

if TYPE_CHECKING:
    from dovetail.doors.compiled_module import Options

log = logging.getLogger(__name__)
AT_ONCE = Curve((1.0,), (1e15,))
"""Bytes per second at which weights "load" that are there."""
RESIDENT = ("eager", "module_batch", "chunked_prefill")
"""The policies that ``auto`` chooses from: those that keep every weight in memory if they can."""


def context_of(model: Any) -> int:
    """Most tokens of a prompt and its continuation together."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else 1 << 20


def memory_engine(model: Any, options: "Options") -> GenerationEngine:
    """An engine that generates with the weights of ``model`` where they are.

    Raises CaptureError if the model is not understood, BudgetError if ``options.budget`` is less
    than the weights.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    captured = captured_in_memory(model.config, dtype, log.info)
    check_model(captured.graph, model)
    weights = MemoryWeights(captured.graph, model.state_dict(), experts_paths(model, captured))
    request = Request(
        checkpoint="",
        budget=_budget(captured.graph, options),
        workload=options.workload or Workload(((64, 1),), 64),
        policy=options.policy,
        machine=options.target,
        plan=str(options.generation_plan) if options.generation_plan is not None else "",
    )
    machine = _machine(options.target)
    name = codec.digest([captured.graph, "in memory", machine.workers])
    cache = PlanCache(name, request, options.on_stale, plan_maker(captured, machine, RESIDENT))
    engine = GenerationEngine(cache, weights, context_of(model))
    weakref.finalize(model, engine.close)
    if options.workload is not None:
        longest, prompts = options.workload.longest, options.workload.prompts
        engine.prepare(Bucket(prompts, longest, options.workload.new_tokens))
    return engine


def places_of(model: Any) -> tuple[int, ...]:
    """Where the model's weights are in memory: other places are other weights."""
    return tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))


def contents_of(model: Any) -> tuple[int, ...]:
    """Where the model's weights are and how often they were changed in place: what was packed of
    others, or before, holds no more. Changes through ``.data`` are not seen."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple(n for t in tensors for n in (t.data_ptr(), 0 if t.is_inference() else t._version))


def check_model(graph: TaskGraph, model: Any) -> None:
    """Raise CaptureError for a model that cannot be scheduled from memory."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise CaptureError("the model is quantised, and plans read plain weights only")
    if graph.state_bytes_per_seq:
        raise CaptureError(
            f"{graph.model['model_type']} keeps a state in modules that run whole, which are "
            "scheduled from a checkpoint (dovetail.load) and not in memory so far"
        )


def _budget(graph: TaskGraph, options: "Options") -> dict[str, int]:
    """The budget for weights and everything beside them."""
    weights = graph.weight_bytes
    if options.budget is None:
        return {"ram": weights + weights // 8 + host.memory_bytes() // 2}
    if options.budget["ram"] <= weights:
        raise BudgetError(
            f"a budget of ram={format_bytes(options.budget['ram'])} is less than the weights, "
            f"{format_bytes(weights)}, that the model holds in memory: save the model and stream "
            "it with dovetail.load(folder, budget=...), or give more"
        )
    return dict(options.budget)


def _machine(target: str) -> Machine:
    """The machine with as many workers as torch may use threads, and weights that are there."""
    found = find_machine(target, [], log.warning)
    workers = min(found.workers, torch.get_num_threads())
    return replace(found, workers=workers, disk=AT_ONCE)


def plan_maker(
    captured: Captured, machine: Machine, resident: tuple[str, ...]
) -> Callable[[Request, Path], Any]:
    """Plans by the policy asked for, or by the best of ``resident`` where that is ``auto``."""

    def make(request: Request, place: Path) -> tuple[Plan, Captured]:
        names = resident if request.policy == "auto" and not request.plan else (request.policy,)
        plans = [
            plan_model(replace(request, policy=name), Model(captured), machine)[0] for name in names
        ]
        plan = min(plans, key=lambda plan: plan.prediction.seconds)
        place.mkdir(parents=True, exist_ok=True)
        captured.save(place)
        save_plan(plan, place / PLAN_FILE)
        return plan, captured

    return make


def experts_paths(model: Any, captured: Captured) -> Callable[[int], str]:
    """How the module with a layer's routed experts is called."""
    found: dict[int, str] = {}
    for path, child in model.named_modules():
        if hasattr(child, "_apply_gate") and hasattr(child, "is_transposed"):
            numbers = [int(part) for part in path.split(".") if part.isdigit()]
            if len(numbers) == 1:
                found[numbers[0]] = path

    def path_of(layer: int) -> str:
        if layer not in found:
            raise CaptureError(f"layer {layer} has no stacked experts that dovetail can find")
        return found[layer]

    return path_of
