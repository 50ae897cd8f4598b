"""`dovetail.load`: a checkpoint as a model that generates in less memory than its weights."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.ir.errors import InputError
from dovetail.ir.moves import ExpertFormat
from dovetail.ir.units import parse_budget
from dovetail.ir.workload import Workload

if TYPE_CHECKING:
    from dovetail.doors.loaded_model import LoadedModel


def load(
    checkpoint: str | os.PathLike[str],
    *,
    plan: str | os.PathLike[str] | None = None,
    budget: str | Mapping[str, int] | None = None,
    policy: str = "auto",
    workload: str | Workload | None = None,
    target: str = "",
    on_stale: str = "verify",
    allow: Sequence[ExpertFormat] = (),
) -> "LoadedModel":
    """The causal language model in the folder ``checkpoint``, with its weights left on disk.

    ``budget`` is as ``ram=4GiB`` (half of this machine's memory where it is left out), ``plan`` a
    plan file to follow instead of a search, ``policy`` the search's, ``workload`` what is planned
    for ahead (``64x128+32``: 64 prompts of 128 tokens, 32 new ones each); other workloads are
    planned for when they come. ``target`` is a machine file, for this machine where it is left
    out. ``on_stale`` says what becomes of a plan of another machine: ``verify`` uses it if it is
    predicted to be faster here than a new one, ``error`` refuses it, ``default`` plans anew.
    ``allow`` lists formats of fewer bits (``int8``, ``int4``) that experts may be in, which changes
    results and needs `dovetail convert`.

    Raises CheckpointError, PlanError, InputError.
    """
    from dovetail.doors.loaded_model import DEFAULT_WORKLOAD, default_budget, load_model
    from dovetail.passes.choose_precision import check_allowed
    from dovetail.planning import Request

    request = Request(
        checkpoint=str(checkpoint),
        budget=read_budget(budget) or default_budget(),
        workload=read_workload(workload) or DEFAULT_WORKLOAD,
        policy=policy,
        machine=target,
        plan=str(plan) if plan is not None else "",
        allow=tuple(allow),
    )
    check_policy(policy)
    check_allowed(request.allow)
    if plan is not None:
        from dovetail.ir.plan import load_plan

        load_plan(Path(plan))
    model = load_model(Path(checkpoint), request, on_stale)
    if workload is not None:
        model.plan_for(request.workload)
    return model


def read_budget(budget: str | Mapping[str, int] | None) -> dict[str, int] | None:
    """``ram=4GiB`` or ``{"ram": 4 << 30}`` as bytes by tier; raises InputError."""
    if budget is None:
        return None
    found = parse_budget(budget) if isinstance(budget, str) else dict(budget)
    if "ram" not in found or any(type(size) is not int or size < 1 for size in found.values()):
        raise InputError(f"budget {budget!r}: expected bytes of ram, as 'ram=4GiB'")
    return found


def read_workload(workload: str | Workload | None) -> Workload | None:
    """A workload as such or as ``64x128+32``, a name or a file; raises InputError."""
    if isinstance(workload, str):
        from dovetail.workloads import load_workload

        return load_workload(workload)
    if workload is not None and not isinstance(workload, Workload):
        raise InputError(
            f"workload is a {type(workload).__name__}, expected a text such as '64x128+32' (64 "
            "prompts of 128 tokens, 32 new ones each) or a Workload"
        )
    return workload


def check_policy(policy: str) -> None:
    """Raise InputError unless ``policy`` is one of ours."""
    from dovetail.passes.policies import POLICIES

    if policy != "auto" and policy not in POLICIES:
        raise InputError(
            f"policy {policy!r} is not known; choose one of {', '.join(['auto', *POLICIES])}"
        )
