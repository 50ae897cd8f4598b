"""A model whose weights are never all in memory: `dovetail.load(checkpoint)`."""

import json
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor

from dovetail.checkpoint import ModelFolder
from dovetail.doors.generate_arguments import Wanted, as_tensor, read_arguments
from dovetail.doors.plan_cache import Bucket, PlanCache
from dovetail.generation import GenerationEngine
from dovetail.ir.errors import InputError, ModelError
from dovetail.ir.plan import Plan
from dovetail.ir.timeline import Timeline
from dovetail.ir.units import format_bytes, format_duration
from dovetail.ir.workload import Workload
from dovetail.planning import Request, plan_apart
from dovetail.precision.of_plan import check_converted
from dovetail.runtime import calibrate_host as host

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

GENERATION_FILE = "generation_config.json"
DEFAULT_WORKLOAD = Workload(((64, 1),), 64)
"""What a plan is made for when it is looked at before anything was generated."""


class LoadedModel:
    """A causal language model on disk that generates under a plan.

    Made by ``dovetail.load``. It answers what ``transformers.pipeline("text-generation")`` asks of
    a model. Use it as a context manager, or call ``close``, to give its memory back.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)
    output_modalities = ("text",)
    device = torch.device("cpu")
    training = False
    framework = "pt"

    def __init__(self, folder: ModelFolder, request: Request, on_stale: str) -> None:
        self._folder, self._request = folder, request
        cache = PlanCache(
            folder.index.digest(),
            request,
            on_stale,
            lambda asked, place: plan_apart(asked, place, lambda text: None),
        )
        self._engine = GenerationEngine(cache, folder.index, folder.context, folder=folder)
        self._finalizer = weakref.finalize(self, self._engine.close)

    # What transformers asks of a model.

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The checkpoint's config, as transformers reads it."""
        from transformers import AutoConfig

        found: PretrainedConfig = AutoConfig.from_pretrained(self._folder.path)
        return found

    @cached_property
    def generation_config(self) -> "GenerationConfig":
        """The checkpoint's generation_config.json, or what follows from its config."""
        from transformers import GenerationConfig

        if (self._folder.path / GENERATION_FILE).exists():
            return GenerationConfig.from_pretrained(self._folder.path)
        return GenerationConfig.from_model_config(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        name = self.plan_for(DEFAULT_WORKLOAD)[1] if self._engine.planned is None else self._dtype
        found = getattr(torch, name)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def _dtype(self) -> str:
        planned = self._engine.planned
        assert planned is not None
        return planned[1].graph.dtype

    def can_generate(self) -> bool:
        """It can."""
        return True

    def eval(self) -> Self:
        """The model itself, which only ever runs inference."""
        return self

    def to(self, *places: object, **options: object) -> Self:
        """The model itself, for the CPU; raises ModelError for any other device or dtype."""
        for place in (*places, *options.values()):
            if isinstance(place, torch.dtype) or torch.device(place).type != "cpu":  # type: ignore[call-overload]
                raise ModelError(
                    f"a model from dovetail.load stays where its plan runs, on the cpu in "
                    f"{self._folder.path.name}'s own dtype; it cannot be moved to {place}: convert "
                    "the checkpoint for another dtype"
                )
        return self

    # Generation.

    def generate(
        self,
        inputs: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        input_ids: Tensor | Sequence[Sequence[int]] | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        **arguments: Any,
    ) -> Tensor | list[list[int]]:
        """Prompts and what follows them.

        ``inputs`` (or ``input_ids``) is a tensor ``[seqs, width]``, padded on the left, and the
        result a tensor ``[seqs, width + new]``; or it is a list of token lists of any lengths, and
        so is the result. Arguments are transformers' (``max_new_tokens``, ``do_sample``,
        ``temperature``, ``top_k``, ``top_p``, ``eos_token_id``, ``pad_token_id``,
        ``num_return_sequences``, ``generation_config``) and ``seed``. Raises InputError for others
        and for prompts that do not fit, BudgetError where the budget holds no schedule.
        """
        given = inputs if inputs is not None else input_ids
        if given is None or (inputs is not None and input_ids is not None):
            raise InputError("generate() takes prompts once: as inputs or as input_ids")
        wanted = read_arguments(
            given,
            attention_mask,
            arguments,
            self._generation_defaults,
            self._folder.context,
            self._folder.vocab,
        )
        made = self._generate(wanted, streamer, given)
        if not wanted.width:
            return [[*p, *new] for p, new in zip(wanted.prompts, made, strict=True)]
        return as_tensor(wanted, made)

    def complete(self, prompts: Sequence[str], **arguments: Any) -> list[str]:
        """The text that follows every prompt; ``arguments`` as of ``generate``. Raises
        CheckpointError if the checkpoint has no tokenizer.json."""
        if isinstance(prompts, str):
            raise InputError('complete() takes a list of prompts: give ["..."]')
        ids = [self._folder.encode(text) for text in prompts]
        rows = self.generate(ids, **arguments)
        copies = len(rows) // len(ids)
        texts = (row[len(ids[i // copies]) :] for i, row in enumerate(rows))
        return [self._folder.decode(tuple(text)) for text in texts]

    def _generate(self, wanted: Wanted, streamer: Any, given: object) -> list[list[int]]:
        if streamer is None:
            return self._engine.run(wanted)
        if len(wanted.prompts) != 1:
            raise InputError(
                f"a streamer takes one sequence, found {len(wanted.prompts)}; generate them one by "
                "one, or leave the streamer out"
            )
        streamer.put(given if isinstance(given, Tensor) else torch.tensor(wanted.prompts))
        made = self._engine.run(wanted, lambda _, token: streamer.put(torch.tensor([token])))
        streamer.end()
        return made

    @cached_property
    def _generation_defaults(self) -> Mapping[str, Any]:
        path = self._folder.path / GENERATION_FILE
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if found.get("eos_token_id") is None and self._folder.stop_tokens:
            found["eos_token_id"] = list(self._folder.stop_tokens)
        if found.get("pad_token_id") is None:
            found["pad_token_id"] = self._folder.text_config.get("pad_token_id")
        return {k: v for k, v in found.items() if v is not None}

    # The plan.

    def plan_for(self, workload: Workload) -> tuple[Plan, str]:
        """Plan for prompts and new tokens like these now, instead of at the first call; returns
        the plan and the dtype that the model computes in."""
        bucket = Bucket(workload.prompts, workload.longest, workload.new_tokens)
        return self._engine.prepare(bucket), self._dtype

    @property
    def plan(self) -> Plan:
        """The plan of the last call; before the first, one for the workload that ``load`` was
        given."""
        return self._engine.plan or self.plan_for(self._request.workload)[0]

    def explain(self) -> str:
        """Why the plan is as it is, in plain words: what binds it and what more would give."""
        from dovetail.plans.explain import explain
        from dovetail.plans.explain_text import explanation_text

        plan = self.plan
        planned = self._engine.planned
        assert planned is not None
        return explanation_text(explain(planned[1].graph, plan, lambda text: None))

    def timeline(self) -> Timeline:
        """What every engine did in the latest steps; before the first call, what is predicted."""
        from dovetail.passes.apply_moves import apply_moves
        from dovetail.passes.cost import Costs
        from dovetail.passes.simulate import Simulator, workload_steps

        measured = self._engine.timeline()
        if measured is not None and measured.spans:
            return measured
        plan = self.plan
        planned = self._engine.planned
        assert planned is not None
        layout = apply_moves(planned[1].graph, plan.moves)
        steps = list(workload_steps(layout, plan.workload))
        simulator = Simulator(layout, plan.machine, Costs(plan.machine))
        return simulator.steady(steps[len(steps) // 2])

    @property
    def executor(self) -> str:
        """The emitted executor of the last call, as Python that one can read."""
        return self._engine.source

    def __repr__(self) -> str:
        name, plan = type(self).__name__, self._engine.plan
        size = sum(entry.nbytes for entry in self._folder.index.entries.values())
        budget = ", ".join(f"{t}={format_bytes(n)}" for t, n in self._request.budget.items())
        first = f"{name}({self._folder.path.name}: {format_bytes(size)} of weights, budget {budget}"
        if plan is None:
            made = self._request.plan or "made at the first call"
            return f"{first}\n  plan: {made}\n  nothing has run yet)"
        expected = plan.prediction
        return (
            f"{first}\n"
            f"  plan {plan.digest()[:12]}: {plan.policy}, {plan.workload.prompts} prompts of up to "
            f"{plan.workload.longest} tokens, {plan.workload.new_tokens} new\n"
            f"  predicted {format_duration(expected.seconds)}, "
            f"{format_bytes(expected.peak_bytes)} of ram; bound "
            f"{format_duration(plan.bound.seconds)}, set by {plan.bound.resource})"
        )

    def close(self) -> None:
        """Stop the engines and give all memory back; the next ``generate`` starts them again."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What there is no honest answer to.

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raises ModelError: there are no logits to give."""
        raise ModelError(
            "a model from dovetail.load generates: its executor chooses tokens and never returns "
            "logits; call generate(), or load the model with transformers for logits"
        )

    forward = __call__

    def train(self, mode: bool = True) -> Self:
        """Raises ModelError: a streamed model is for inference."""
        if mode:
            raise ModelError(
                "a model from dovetail.load cannot be trained: its weights stream from the "
                "checkpoint and are never all in memory; train with transformers"
            )
        return self

    def state_dict(self, *_: object, **__: object) -> NoReturn:
        """Raises ModelError: the weights are on disk."""
        raise ModelError(
            f"a model from dovetail.load holds no weights: they are in {self._folder.path}; read "
            "them there with safetensors"
        )

    parameters = named_parameters = save_pretrained = state_dict

    def __reduce__(self) -> NoReturn:
        raise ModelError(
            "a model from dovetail.load cannot be pickled or copied: it holds open files, threads "
            "and memory pools; call dovetail.load with the same arguments where you need it"
        )


def default_budget() -> dict[str, int]:
    """Half of this machine's memory."""
    return {"ram": host.memory_bytes() // 2}


def load_model(folder: Path, request: Request, on_stale: str) -> LoadedModel:
    """The checkpoint's model, of a class that has its architecture's name.

    ``transformers.pipeline`` recognises models by the name of their class.
    """
    opened = ModelFolder.open(folder)
    check_converted(opened, request.allow)
    architectures = opened.config.get("architectures") or [LoadedModel.__name__]
    kind = type(str(architectures[0]), (LoadedModel,), {"__doc__": LoadedModel.__doc__})
    model = kind(opened, request, on_stale)
    assert isinstance(model, LoadedModel)
    return model
