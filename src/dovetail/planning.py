"""Planning: `checkpoint, budget, workload -> plan`, with capture and calibration cached.

`dovetail run` plans in a process of its own, so that what planning needs (transformers, the
tracer, the search) is never in the memory of the process that runs.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.capture.captured import Captured, load_captured
from dovetail.checkpoint import ModelFolder
from dovetail.ir import codec
from dovetail.ir.errors import BudgetError, DovetailError, PlanError
from dovetail.ir.machine import Machine
from dovetail.ir.moves import ExpertFormat
from dovetail.ir.plan import Plan, load_plan, save_plan
from dovetail.ir.units import format_bytes
from dovetail.ir.workload import Workload
from dovetail.system_errors import as_output_error
from dovetail.tuning_db.database import Database, default_path
from dovetail.tuning_db.trials import Trials

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLAN_FILE = "plan.json"
CONFIG_FILE = "config.json"
WEIGHT_ENDINGS = (".safetensors", ".index.json", ".bin", ".pt", ".pth")
"""A folder with such a file holds weights, or should: that they cannot be read must be said."""
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan. ``checkpoint`` is a model folder, or a config.json or a folder with no weights
    beside it; ``machine`` names a machine file, "" for this machine; ``plan`` a plan file whose
    moves are to be used instead of a search. A plan that ``runs`` has nothing that is simulated
    only; its experts may be in the formats that ``allow`` lists."""

    checkpoint: str
    budget: Mapping[str, int]
    workload: Workload
    policy: str = "auto"
    knobs: Mapping[str, int | bool] | None = None
    machine: str = ""
    plan: str = ""
    runs: bool = False
    allow: tuple[ExpertFormat, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A captured model, the digest of its weights and their files; without weights "" and none."""

    captured: Captured
    digest: str = ""
    files: tuple[Path, ...] = ()

    @classmethod
    def open(cls, path: Path, note: Note) -> "Model":
        """Capture the model folder, or the config.json, at ``path``. Raises DovetailError."""
        config = _config_alone(path)
        if config is not None:
            return cls(captured_config(config, note))
        folder = ModelFolder.open(path)
        files = tuple(shard.file for shard in folder.index.shards)
        return cls(captured_model(folder, note), folder.index.digest(), files)


def _config_alone(path: Path) -> Path | None:
    """The config.json at ``path`` if no weights are to be read with it."""
    if path.name == CONFIG_FILE:
        return path
    if not (path / CONFIG_FILE).is_file():
        return None
    weights = any(entry.name.endswith(WEIGHT_ENDINGS) for entry in path.iterdir())
    return None if weights else path / CONFIG_FILE


def plan_here(request: Request, note: Note, model: Model | None = None) -> tuple[Plan, Captured]:
    """Plan in this process, ``model`` if it is open already. Raises DovetailError."""
    model = model or Model.open(Path(request.checkpoint), note)
    machine = find_machine(request.machine, model.files, note)
    if not request.machine:
        machine = corrected(machine, model.captured)
    return plan_model(request, model, machine)


def corrected(machine: Machine, captured: Captured) -> Machine:
    """This machine with what `dovetail tune` found its curves to be off by for this model."""
    from dovetail.runtime import calibrate_host as host

    graph = codec.digest(captured.graph)
    with Database.open() as database:
        found = Trials(database).latest_correction(host.silicon(), host.software(), graph)
    return machine if found is None else replace(machine, corrections=found.factors)


def plan_model(request: Request, model: Model, machine: Machine) -> tuple[Plan, Captured]:
    """Plan an open model for ``machine``, whatever machine ``request`` names. Raises
    DovetailError."""
    from dovetail.kernels.planned import with_kernels
    from dovetail.passes.choose_precision import choose_precision

    captured = model.captured
    if request.plan:
        given = load_plan(Path(request.plan))
        plan = with_kernels(_adopt(given, request, captured, machine, model.digest), captured.graph)
        _verify(plan, captured)
        return plan, captured
    plan = choose_precision(
        captured.graph,
        machine,
        request.budget,
        request.workload,
        policy=request.policy,
        knobs=request.knobs,
        checkpoint=model.digest,
        allow=request.allow,
        runs=request.runs,
    )
    plan = with_kernels(plan, captured.graph)
    _verify(plan, captured)
    return plan, captured


def _verify(plan: Plan, captured: Captured) -> None:
    """Hold the plan's program against the specification before anything runs on it."""
    from dovetail.ir.verify import verify_graph
    from dovetail.passes.apply_moves import apply_moves
    from dovetail.passes.predict import verify_layout

    verify_graph(captured.graph)
    layout = apply_moves(captured.graph, plan.moves)
    verify_layout(layout, plan.machine, plan.budget, plan.workload)


def _adopt(
    plan: Plan, request: Request, captured: Captured, machine: Machine, checkpoint: str
) -> Plan:
    """The given plan's schedule with predictions for this machine and workload."""
    from dovetail.passes.apply_moves import apply_moves
    from dovetail.passes.predict import least_time, predict

    graph = captured.graph
    if plan.graph != codec.digest(graph):
        raise PlanError(
            f"{request.plan}: the plan is for {_describe(plan.model)} (graph {plan.graph[:12]}), "
            f"found {_describe(graph.model)} (graph {codec.digest(graph)[:12]}) in "
            f"{request.checkpoint}; plan this model again"
        )
    layout = apply_moves(graph, plan.moves)
    if layout.precision and layout.precision not in request.allow:
        raise PlanError(
            f"{request.plan}: the plan runs experts in {layout.precision}, which changes results; "
            f"add --allow {layout.precision} to use it, or plan again"
        )
    if layout.device is not None and "hbm" not in request.budget:
        raise PlanError(
            f"{request.plan}: the plan is for the GPU of {plan.machine.name}; schedules for "
            "GPUs run there with --target cuda: do so, or plan again for this machine's processor"
        )
    if request.workload.longest > layout.dispatch.longest:
        raise PlanError(
            f"{request.plan}: its steps are laid out for prompts of up to "
            f"{layout.dispatch.longest} tokens, but the longest has {request.workload.longest}; "
            "plan again for this workload"
        )
    needed = min(graph.context, request.workload.longest + request.workload.new_tokens - 1)
    if needed > layout.dispatch.kv_tokens:
        raise PlanError(
            f"{request.plan}: its KV store holds {layout.dispatch.kv_tokens} tokens, but the "
            f"longest prompt needs {needed}; plan again for this workload"
        )
    prediction = predict(layout, machine, request.workload)
    for tier, peak in prediction.peaks.items():
        if peak > request.budget[tier]:
            raise BudgetError(
                f"{request.plan}: the plan needs {tier}={format_bytes(peak, up=True)}, the budget "
                f"is {format_bytes(request.budget[tier])}; raise the budget or plan again"
            )
    return replace(
        plan,
        checkpoint=checkpoint,
        machine=machine,
        budget=dict(request.budget),
        workload=request.workload,
        prediction=prediction,
        bound=least_time(layout.graph, machine, request.budget, request.workload),
        # What was proved held for the machine, budget and workload of the plan that was given.
        certificates=(),
        offsets={},
    )


def _describe(model: Mapping[str, str | int]) -> str:
    return f"{model.get('model_type', '?')} with {model.get('num_layers', '?')} layers"


def captured_model(folder: ModelFolder, note: Note) -> Captured:
    """The folder's task graph, from the cache if it was captured before."""

    def capture() -> Captured:
        from dovetail.capture.capture import capture_checkpoint

        return capture_checkpoint(folder.path, folder.entries)

    return _cached([dict(folder.config), folder.index.digest()], capture, note)


def captured_config(path: Path, note: Note) -> Captured:
    """The task graph of a config.json, with the checkpoint keys that transformers would save.

    Raises CheckpointError if there is no such file, CaptureError if it cannot be understood.
    """
    from dovetail.capture.build import read_config

    config = read_config(path.parent)

    def capture() -> Captured:
        from dovetail.capture.capture import capture_config

        return capture_config(config)

    return _cached([path.read_text(encoding="utf-8")], capture, note)


def captured_in_memory(config: "PretrainedConfig", dtype: str, note: Note) -> Captured:
    """The task graph of a model that is in memory in ``dtype``, by its config. Raises
    CaptureError."""
    own = copy.deepcopy(config)

    def capture() -> Captured:
        from dovetail.capture.capture import capture_config

        return capture_config(own, dtype)

    return _cached([own.to_json_string(use_diff=False), dtype], capture, note)


def _cached(key: Sequence[object], capture: Callable[[], Captured], note: Note) -> Captured:
    """What was captured for ``key`` before, with these versions, or else what ``capture`` gives."""
    import transformers

    name = codec.digest([*key, transformers.__version__, CAPTURE_VERSION])
    place = default_path().parent / "captured" / name
    if (place / "graph.json").exists():
        return load_captured(place)
    captured = capture()
    note(f"captured {_describe(captured.graph.model)} in {captured.seconds:.1f} s")
    captured.save(place)
    return captured


CAPTURE_VERSION = 1
"""Raised when capture changes what it makes, so that older cached graphs are left alone."""


def find_machine(name: str, weights: Sequence[Path], note: Note) -> Machine:
    """The machine file ``name``, or this machine with the disk that holds ``weights``, or without
    any that of torch: calibrated before, or calibrated now."""
    from dovetail.calibration import calibrate_and_store
    from dovetail.machine_files import load_machine
    from dovetail.runtime import calibrate_host as host
    from dovetail.runtime.calibrate import PROTOCOL

    if name:
        return load_machine(name)
    files = list(weights) or host.library_files()
    device = host.disk_device(files[0])
    with Database.open() as database:
        known = database.latest_calibration(host.silicon(), device, host.software(), PROTOCOL)
    if known is not None:
        return known
    note("calibrating this machine, once (about half a minute)")
    return calibrate_and_store(files)


def plan_apart(request: Request, out: Path, note: Note) -> tuple[Plan, Captured]:
    """Plan in a child process that leaves its results in the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    job = {"request": codec.encode(request), "out": str(out)}
    child = subprocess.run(
        [sys.executable, "-m", "dovetail.planning"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        # Ctrl-C in a terminal goes to a whole group: it is for us, and we end the child.
        process_group=0,
    )
    lines = child.stdout.splitlines()
    answer = json.loads(lines[-1]) if lines else {}
    if "error" in answer:
        raise ERRORS[answer["kind"]](answer["error"])
    if child.returncode != 0:
        raise DovetailError(f"planning ended with exit code {child.returncode}; see above")
    return load_plan(out / PLAN_FILE), load_captured(out)


def _all_errors(kind: type[DovetailError]) -> dict[str, type[DovetailError]]:
    found = {kind.__name__: kind}
    for child in kind.__subclasses__():
        found |= _all_errors(child)
    return found


ERRORS = _all_errors(DovetailError)


def main() -> int:
    """The child process: a request on standard input, its answer as the last line of output."""
    from dovetail.kernels.planned import save_kernels

    job = json.loads(sys.stdin.read())
    request = codec.decode(job["request"], Request)
    out = Path(job["out"])
    try:
        plan, captured = plan_here(request, lambda text: print(text, file=sys.stderr, flush=True))
        captured.save(out)
        save_kernels(plan, out)
        save_plan(plan, out / PLAN_FILE)
    except (DovetailError, OSError) as caught:
        error = as_output_error(caught) if isinstance(caught, OSError) else caught
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        return 1
    print(json.dumps({"plan": plan.digest()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
