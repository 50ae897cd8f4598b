"""Plans for a model whose weights are on a GPU: everything in hbm, run by the GPU's executor.

The executor packs the weights anew, as its kernels read them, so hbm has to hold them a second
time. None of this has run on a GPU.
"""

import logging
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dovetail.doors.memory_planning import (
    AT_ONCE,
    check_model,
    context_of,
    experts_paths,
    plan_maker,
)
from dovetail.doors.plan_cache import Bucket, PlanCache
from dovetail.generation import GenerationEngine
from dovetail.gpu_run import with_gpu
from dovetail.ir import codec
from dovetail.ir.errors import ModelError
from dovetail.ir.machine import Machine
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_bytes
from dovetail.ir.workload import Workload
from dovetail.planning import Request, captured_in_memory, find_machine
from dovetail.runtime import calibrate_host as host
from dovetail.runtime.memory_weights import MemoryWeights

if TYPE_CHECKING:
    from dovetail.doors.compiled_module import Options

log = logging.getLogger(__name__)
RESIDENT = ("eager",)
"""The policy that ``auto`` stands for: nothing is copied while it runs."""
LEFT = 0.9
"""Share of a GPU's free memory that a plan may use; torch's allocator keeps some of the rest."""


def gpu_engine(model: Any, options: "Options") -> GenerationEngine:
    """An engine that generates on the GPU that ``model`` is on; ``options.stand_in`` takes the host
    device for it.

    Raises ModelError without such a GPU or enough of its memory, CaptureError if the model is not
    understood.
    """
    machine = _machine(options)
    dtype = str(model.dtype).removeprefix("torch.")
    captured = captured_in_memory(model.config, dtype, log.info)
    check_model(captured.graph, model)
    weights = MemoryWeights(captured.graph, model.state_dict(), experts_paths(model, captured))
    request = Request(
        checkpoint="",
        budget=_budget(captured.graph, options, machine),
        workload=options.workload or Workload(((64, 1),), 64),
        policy=options.policy,
        machine=options.target,
        plan=str(options.generation_plan) if options.generation_plan is not None else "",
        runs=True,
    )
    assert machine.accelerator is not None
    name = codec.digest([captured.graph, "in hbm", machine.accelerator.name])
    cache = PlanCache(name, request, options.on_stale, plan_maker(captured, machine, RESIDENT))
    target = "host" if options.stand_in else "cuda"
    engine = GenerationEngine(cache, weights, context_of(model), target)
    weakref.finalize(model, engine.close)
    if options.workload is not None:
        longest, prompts = options.workload.longest, options.workload.prompts
        engine.prepare(Bucket(prompts, longest, options.workload.new_tokens))
    return engine


def _machine(options: "Options") -> Machine:
    """The machine with its GPU, as the target describes it or else measured now."""
    found = find_machine(options.target, [], log.warning)
    if found.accelerator is None:
        if options.target:
            raise ModelError(
                f"the target {options.target} describes no GPU, but the model is on one: name a "
                "machine with a GPU, or leave target out to have this one measured"
            )
        found = with_gpu(found)
    return replace(found, disk=AT_ONCE)


def _budget(graph: TaskGraph, options: "Options", machine: Machine) -> dict[str, int]:
    """What hbm has beside the model's own weights, or what was given."""
    hbm = machine.tiers["hbm"]
    free = hbm if options.stand_in else int(LEFT * torch.cuda.mem_get_info(0)[0])
    ram = min(machine.tiers["ram"], host.memory_bytes() // 2)
    budget = {"ram": ram, "hbm": free} | (options.budget or {})
    found, needed = min(budget["hbm"], free), graph.weight_bytes
    if found <= needed:
        raise ModelError(
            f"the executor packs the weights anew for its kernels, {format_bytes(needed)}, but "
            f"beside the model hbm has {format_bytes(found)} for it: give more, or save the model "
            "and run it with dovetail run --target cuda"
        )
    return budget
