"""`dovetail.compile`: a module, a class of modules or a function, run by a measured plan."""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import nn

from dovetail.doors.compiled_function import CompiledFunction
from dovetail.doors.compiled_module import Options, compiled_class, compiled_instance, is_compiled
from dovetail.doors.loading import check_policy, read_budget, read_workload
from dovetail.doors.plan_cache import check_on_stale
from dovetail.ir.errors import InputError, ModelError
from dovetail.ir.workload import Workload

T = TypeVar("T")
Budget = str | Mapping[str, int]
PathLike = str | os.PathLike[str]


@overload
def compile(
    module: T,
    /,
    *,
    budget: Budget | None = None,
    workload: str | Workload | None = None,
    policy: str = "auto",
    plan: PathLike | None = None,
    target: str = "",
    on_stale: str = "verify",
) -> T: ...


@overload
def compile(
    module: None = None,
    /,
    *,
    budget: Budget | None = None,
    workload: str | Workload | None = None,
    policy: str = "auto",
    plan: PathLike | None = None,
    target: str = "",
    on_stale: str = "verify",
) -> Callable[[T], T]: ...


def compile(
    module: Any = None,
    /,
    *,
    budget: Budget | None = None,
    workload: str | Workload | None = None,
    policy: str = "auto",
    plan: PathLike | None = None,
    target: str = "",
    on_stale: str = "verify",
) -> Any:
    """Compile a module, a class of modules or a function; without one, a decorator that does.

    A compiled module is the module itself (signature, ``state_dict``, attributes, hooks) with a
    forward in which routed experts run by the implementation that was measured to be the fastest
    for their number of tokens; the module's own, ``eager``, is always one of those measured. A
    language model of transformers also has its greedy ``generate`` for several prompts compared
    with dovetail's executor over the same weights. Both are measured at the first call of a bucket,
    and remembered.

    ``budget`` bounds weights and everything beside them in a scheduled ``generate`` (``ram=8GiB``);
    ``workload`` plans it ahead (``64x128+32``: 64 prompts of 128 tokens, 32 new ones each);
    ``policy`` and ``target`` (a machine file) are the search's; ``plan`` is a file of ``save_plan``
    or of ``dovetail plan make``. ``on_stale`` is ``verify``, ``error`` or ``default``.

    Raises InputError, PlanError or BudgetError for arguments that cannot be used, ModelError for a
    module in training mode.
    """
    check_policy(policy)
    plans = _plans(plan)
    options = Options(
        budget=read_budget(budget),
        workload=read_workload(workload),
        policy=policy,
        target=target,
        on_stale=check_on_stale(on_stale),
        plan=plans.get("plan"),
        generation_plan=plans.get("generation_plan"),
    )
    if module is None:
        return lambda given: _compiled(given, options)
    return _compiled(module, options)


def _plans(plan: PathLike | None) -> dict[str, Path]:
    """The plan file under the name of what it is a plan for. Raises PlanError."""
    if plan is None:
        return {}
    from dovetail.doors.region_choice import load_module_plan
    from dovetail.ir.plan import load_plan

    path = Path(plan)
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind == "Plan":
        load_plan(path)
        return {"generation_plan": path}
    load_module_plan(path)
    return {"plan": path}


def _compiled(thing: Any, options: Options) -> Any:
    if is_compiled(thing) or isinstance(thing, CompiledFunction):
        raise ModelError(
            f"{_name(thing)} is compiled already; compile the module it was made from for other "
            "options"
        )
    if isinstance(thing, type) and issubclass(thing, nn.Module):
        return compiled_class(thing, options)
    if isinstance(thing, nn.Module):
        if thing.training:
            raise ModelError(
                f"{type(thing).__name__} is in training mode, but a compiled module runs inference "
                "only (its plan holds for eval mode): call .eval() first"
            )
        return compiled_instance(thing, options)
    if inspect.isfunction(thing) or inspect.ismethod(thing):
        return CompiledFunction(thing)
    raise InputError(
        f"dovetail.compile got {_name(thing)}, expected a torch.nn.Module, a class of them or a "
        "function; for a checkpoint folder there is dovetail.load"
    )


def _name(thing: object) -> str:
    if isinstance(thing, str | os.PathLike):
        return repr(str(thing))
    return getattr(thing, "__name__", type(thing).__name__)
