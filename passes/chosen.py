"""A schedule with its prediction, and the plan that it makes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dovetail.ir.codec import digest
from dovetail.ir.machine import Machine
from dovetail.ir.moves import Move
from dovetail.ir.plan import VERSION, Bound, Candidate, Certificate, Plan, Prediction
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.policies.common import Knobs


@dataclass(frozen=True, slots=True)
class Chosen:
    """A policy's schedule, simulated."""

    policy: str
    knobs: Knobs
    moves: tuple[Move, ...]
    prediction: Prediction

    def plan(
        self,
        graph: TaskGraph,
        machine: Machine,
        budget: Mapping[str, int],
        workload: Workload,
        checkpoint: str,
        bound: Bound,
        candidates: Sequence[Candidate],
        certificates: Sequence[Certificate] = (),
    ) -> Plan:
        """The plan of this schedule, with what else was considered and what is proved."""
        return Plan(
            version=VERSION,
            model=graph.model,
            graph=digest(graph),
            checkpoint=checkpoint,
            machine=machine,
            budget=dict(budget),
            workload=workload,
            policy=self.policy,
            knobs=dict(self.knobs),
            moves=self.moves,
            prediction=self.prediction,
            bound=bound,
            candidates=tuple(candidates),
            certificates=tuple(certificates),
        )
