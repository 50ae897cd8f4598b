"""What a compiled module is: itself, with a forward that follows a plan and guards around it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from dovetail.doors.compiled_generate import CompiledGenerate, is_language_model
from dovetail.doors.module_plan_text import explain_module, three_lines
from dovetail.doors.module_schedule import ModuleSchedule
from dovetail.doors.region_choice import ModulePlan, save_module_plan
from dovetail.ir.errors import ModelError
from dovetail.ir.plan import Plan
from dovetail.ir.timeline import Timeline
from dovetail.ir.workload import Workload

Forward = Callable[..., Any]
STATE = "_dovetail_state"


@dataclass(frozen=True, slots=True)
class Options:
    """What `dovetail.compile` was told. ``plan`` is the plan file of a module, ``generation_plan``
    that of a model's ``generate``. With ``stand_in`` the model counts as one on a GPU, whose work
    the host device does: for tests."""

    budget: dict[str, int] | None = None
    workload: Workload | None = None
    policy: str = "auto"
    plan: Path | None = None
    generation_plan: Path | None = None
    target: str = ""
    on_stale: str = "verify"
    stand_in: bool = False


@dataclass(slots=True)
class State:
    """A compiled module's schedule of its forward, and that of its ``generate`` if it has one."""

    schedule: ModuleSchedule
    generation: CompiledGenerate | None

    @classmethod
    def of(cls, module: nn.Module, forward: Forward, options: Options) -> "State":
        """The state of a module whose own forward is ``forward``."""
        schedule = ModuleSchedule(module, forward, options.plan, options.on_stale)
        if not is_language_model(module):
            return cls(schedule, None)
        return cls(schedule, CompiledGenerate(module, options))


def compiled_class(kind: type[nn.Module], options: Options) -> type[nn.Module]:
    """``kind`` itself, changed so that its instances are compiled modules."""
    own: Forward = kind.forward

    def state_of(module: nn.Module) -> State:
        if STATE not in module.__dict__:
            module.__dict__[STATE] = State.of(module, own, options)
        found: State = module.__dict__[STATE]
        return found

    for name, value in _attributes(kind, state_of).items():
        setattr(kind, name, value)
    return kind


def compiled_instance(module: nn.Module, options: Options) -> nn.Module:
    """A compiled module that shares everything with ``module``, which stays as it is."""
    kind = type(module)
    own: Forward = kind.forward
    states: list[State] = []
    names = _attributes(kind, lambda _: states[0])
    names |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    own_kind = type(kind.__name__, (kind,), {**names, "__doc__": kind.__doc__})
    view: nn.Module = object.__new__(own_kind)
    # The same dictionary: a submodule or a flag that is set on one is set on the other.
    view.__dict__ = module.__dict__
    states.append(State.of(view, own, options))
    return view


def is_compiled(thing: object) -> bool:
    """Whether `dovetail.compile` made this module or class."""
    kind = thing if isinstance(thing, type) else type(thing)
    return hasattr(kind, "_dovetail_state_of")


def _attributes(kind: type[nn.Module], state_of: Callable[[nn.Module], State]) -> dict[str, Any]:
    """What a compiled class has that ``kind`` has not, or has otherwise."""
    own_forward, own_train = kind.forward, kind.train

    @functools.wraps(own_forward)
    def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if self.training:
            raise ModelError(_training(self, "is in training mode", "call .eval() first"))
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return own_forward(self, *arguments, **options)
        return state_of(self).schedule.run(arguments, options)

    @functools.wraps(own_train)
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode:
            raise ModelError(
                _training(self, "was asked to train", "train the module before it is compiled")
            )
        return own_train(self, False)

    def refuse_copy(self: nn.Module, *_: Any) -> NoReturn:
        raise ModelError(
            f"a compiled {type(self).__name__} cannot be pickled or copied: its plan holds "
            "measurements and executors of this process; save state_dict() and the plan "
            "(save_plan), or copy the module and compile the copy"
        )

    names = {
        "forward": forward,
        "train": train,
        "__reduce_ex__": refuse_copy,
        "__deepcopy__": refuse_copy,
        "__copy__": refuse_copy,
        "_dovetail_state_of": staticmethod(state_of),
        **_reports(state_of),
    }
    if hasattr(kind, "generate"):
        names["generate"] = _generate(kind, state_of)
    return names


def _training(module: nn.Module, found: str, do: str) -> str:
    return (
        f"{type(module).__name__} {found}, but a compiled module runs inference only (its plan "
        f"holds for eval mode): {do}"
    )


def _reports(state_of: Callable[[nn.Module], State]) -> dict[str, Any]:
    """Attributes that tell what was decided."""

    def plan(self: nn.Module) -> ModulePlan:
        """What was decided for the module's regions so far."""
        return state_of(self).schedule.plan()

    def generation_plan(self: nn.Module) -> Plan | None:
        """The plan of ``generate`` if it runs scheduled, else None."""
        generation = state_of(self).generation
        return None if generation is None else generation.plan

    def explain(self: nn.Module) -> str:
        """Every region with what was measured and why, and what runs as it is."""
        state = state_of(self)
        return explain_module(state.schedule.plan(), state.generation)

    def timeline(self: nn.Module) -> Timeline:
        """What ran when in the latest calls, of ``generate`` if that ran scheduled."""
        state = state_of(self)
        found = None if state.generation is None else state.generation.timeline()
        return found if found is not None else state.schedule.timeline()

    def save_plan(self: nn.Module, path: str | Path) -> None:
        """Write the plan to a file that ``dovetail.compile(plan=...)`` reads."""
        save_module_plan(state_of(self).schedule.plan(), Path(path))

    def text(self: nn.Module) -> str:
        state = state_of(self)
        return three_lines(self, state.schedule.plan(), state.generation)

    return {
        "plan": property(plan),
        "generation_plan": property(generation_plan),
        "explain": explain,
        "timeline": timeline,
        "save_plan": save_plan,
        "__repr__": text,
    }


def _generate(kind: type[nn.Module], state_of: Callable[[nn.Module], State]) -> Forward:
    own: Forward = getattr(kind, "generate")  # noqa: B009  # only some modules have it

    @functools.wraps(own)
    def generate(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if self.training:
            raise ModelError(_training(self, "is in training mode", "call .eval() first"))
        generation = state_of(self).generation
        if generation is None:
            return own(self, *arguments, **options)
        return generation.run(functools.partial(own, self), arguments, options)

    return generate
