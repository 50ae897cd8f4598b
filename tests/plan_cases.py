"""A plan on a small captured model beside its graph, for the tests of what is said about plans."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ir_cases import captured

from dovetail.ir import codec
from dovetail.ir.machine import Accelerator, Curve, Machine
from dovetail.ir.plan import Plan, save_plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.choose import choose, smallest_budget
from dovetail.passes.policies import POLICIES

RATE = Curve((1.0, 64.0, 1024.0), (1e9, 2e10, 5e10))
MACHINE = Machine(
    name="paper-2core",
    tiers={"ram": 1 << 30, "disk": 1 << 40},
    workers=2,
    gemm={"float32": RATE},
    attention={"float32": RATE},
    kv_bandwidth={"float32": Curve((1.0,), (1e10,))},
    memory_bandwidth=1e10,
    op_seconds=2e-6,
    disk=Curve((4096.0, 1e6), (1e7, 1e8)),
    slowdown={"cpu|cpu": 0.9, "cpu|disk": 0.95, "disk|cpu": 0.8},
)
GPU = Accelerator(
    name="paper-gpu",
    count=1,
    gemm={"float32": Curve((1.0, 1024.0), (1e11, 1e13))},
    attention={"float32": Curve((1.0,), (1e12,))},
    hbm_bandwidth=3e11,
    op_seconds=5e-6,
    h2d=Curve((4096.0, 1e6), (1e9, 1e10)),
    d2h=Curve((4096.0, 1e6), (1e9, 1e10)),
    peer_bandwidth=5e9,
)
WORKLOAD = Workload.of([24, 20, 9, 9, 3, 1], 6)


def few_policies() -> Iterator[None]:
    """Leave `choose` the policies that search for no more than a moment."""
    few = {name: POLICIES[name] for name in ("eager", "model_batch", "weight_stream")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dovetail.passes.choose.POLICIES", few)
        yield


def small_plan(policy: str = "auto", share: float = 1.5) -> tuple[TaskGraph, Plan]:
    """A graph and a plan that has to read weights in every step."""
    graph = captured("olmoe")
    budget = int(share * smallest_budget(graph, MACHINE, WORKLOAD))
    return graph, choose(graph, MACHINE, {"ram": budget}, WORKLOAD, policy)


def save_beside(graph: TaskGraph, plan: Plan, folder: Path) -> Path:
    """The plan in a folder with its graph; returns the plan's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.json").write_text(json.dumps(codec.encode(graph)))
    save_plan(plan, folder / "plan.json")
    return folder / "plan.json"
