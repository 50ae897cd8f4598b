"""`generate` of a compiled language model in memory: transformers' own loop or our executor.

Both read the same weights; for every bucket the one is used that was measured to be faster.

The executor batches by module (attention in groups of like length without padding, experts over all
tokens), so it gains where there are many prompts. It takes over greedy calls with the plain
arguments; every other call is transformers' own.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dovetail.doors.generate_arguments import Wanted, as_tensor, read_arguments
from dovetail.doors.memory_planning import contents_of, context_of, memory_engine, places_of
from dovetail.doors.plan_cache import Bucket
from dovetail.doors.region_choice import EAGER, Choice, ChoiceStore, winner
from dovetail.generation import GenerationEngine
from dovetail.ir.errors import CaptureError, DovetailError, InputError, ModelError
from dovetail.ir.plan import Plan
from dovetail.ir.timeline import Timeline
from dovetail.tuning.staleness import Grade

if TYPE_CHECKING:
    from dovetail.doors.compiled_module import Options

log = logging.getLogger(__name__)
LEAST_PROMPTS = 4
"""With fewer prompts there is nothing to batch, and the executor is not tried."""
PROBE_TOKENS, PROBE_ROUNDS = 4, 4
"""New tokens and rounds of pairs with which the two are compared; the first is not counted."""
SCHEDULED = "dovetail"
Generate = Callable[..., Any]


def is_language_model(module: nn.Module) -> bool:
    """Whether this is a transformers model that generates."""
    import sys

    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return False
    return bool(module.can_generate())


def _hooked(model: nn.Module) -> list[str]:
    """Paths of submodules with hooks on their forward."""
    return [
        path
        for path, child in model.named_modules()
        if path and (child._forward_hooks or child._forward_pre_hooks)
    ]


def _device_of(model: nn.Module) -> tuple[torch.device, str]:
    """Where a model's weights are; where that is in several places, or on a GPU that is not the
    first, these in words."""
    found = sorted({str(p.device) for p in model.parameters()}) or ["cpu"]
    device = torch.device(found[0])
    fits = len(found) == 1 and not device.index
    return device, "" if fits else ", ".join(found)


class CompiledGenerate:
    """Runs ``generate`` for ``model``, scheduled where that pays."""

    def __init__(self, model: nn.Module, options: "Options") -> None:
        self._model: Any = model
        self._options = options
        self._engine: GenerationEngine | None = None
        self._store = ChoiceStore()
        self._kind = ""
        self._ran_scheduled = False
        self._places: tuple[int, ...] = ()
        self._unfit = ""
        self.choices: dict[Bucket, Choice] = {}
        self.why_not = ""
        """Why the executor cannot run this model, if it cannot."""

    def run(self, own: Generate, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """The result of ``own(*arguments, **options)``, transformers' generate."""
        self._ran_scheduled = False
        wanted = self._wanted(arguments, options)
        if wanted is None:
            return own(*arguments, **options)
        before, self.why_not = self.why_not, self._objection()
        if self.why_not:
            if self.why_not != before:
                log.warning("generate runs as it is: %s", self.why_not)
            return own(*arguments, **options)
        bucket = Bucket.of(wanted.lengths, wanted.new_tokens, context_of(self._model))
        choice = self.choices.get(bucket)
        if choice is None:
            choice = self._decide(own, arguments, options, wanted, bucket)
            self.choices[bucket] = choice
        if choice.winner == EAGER:
            self.close()
            return own(*arguments, **options)
        self._ran_scheduled = True
        return self._scheduled(wanted)

    def _wanted(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Wanted | None:
        """What a plain greedy call wants; None for any other."""
        given = dict(options)
        inputs = arguments[0] if arguments else given.pop("inputs", None)
        ids = given.pop("input_ids", None)
        mask = given.pop("attention_mask", None)
        inputs = ids if inputs is None else inputs
        if (
            len(arguments) > 1
            or not isinstance(inputs, Tensor)
            or given.get("streamer") is not None
        ):
            return None
        if len(inputs) < LEAST_PROMPTS and self._options.workload is None:
            return None
        given.pop("streamer", None)
        defaults = self._model.generation_config.to_diff_dict()
        defaults.pop("transformers_version", None)
        text = self._model.config.get_text_config()
        try:
            wanted = read_arguments(
                inputs,
                mask,
                # A seed, so that nothing is drawn from torch's generator.
                given | {"seed": 0},
                {k: v for k, v in defaults.items() if not k.startswith("_")},
                context_of(self._model),
                text.vocab_size,
            )
        except InputError as error:
            log.info("generate runs as it is: %s", error)
            return None
        return wanted if wanted.sampling.greedy else None

    def _objection(self) -> str:
        """Why the executor cannot run this model now; "" if it can."""
        device, several = _device_of(self._model)
        if several:
            return f"the model is on {several}, expected all of it on the cpu or on cuda:0"
        on_gpu = device.type == "cuda" or self._options.stand_in
        if not on_gpu and device.type != "cpu":
            return f"the model is on {device}, and plans run on the cpu and on cuda:0"
        if hooks := _hooked(self._model):
            return (
                f"hooks on {', '.join(hooks[:3])} would not be called by the executor, which runs "
                "operators and no modules: remove the hooks for the scheduled way"
            )
        places = (contents_of if on_gpu else places_of)(self._model)
        if places != self._places:
            # Weights that moved, or are others: what was made of them holds no more.
            self.close()
            self._engine, self._places, self._unfit = None, places, ""
            self.choices.clear()
            try:
                self._engine = self._make_engine(on_gpu)
            except CaptureError as error:
                self._unfit = str(error)
        return self._unfit

    def _make_engine(self, on_gpu: bool) -> GenerationEngine:
        """Raises CaptureError with why no engine runs this model."""
        if not on_gpu:
            return memory_engine(self._model, self._options)
        from dovetail.doors.gpu_planning import gpu_engine

        try:
            return gpu_engine(self._model, self._options)
        except ModelError as error:
            raise CaptureError(str(error)) from error

    def _scheduled(self, wanted: Wanted) -> Tensor:
        assert self._engine is not None
        return as_tensor(wanted, self._engine.run(wanted)).to(self._model.device)

    # Choosing.

    def _decide(
        self,
        own: Generate,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        wanted: Wanted,
        bucket: Bucket,
    ) -> Choice:
        assert self._engine is not None
        kind = f"generate of {self._engine_name()}, {bucket}"
        stored = self._store.get(kind, bucket.prompts)
        if stored is not None and stored[1] is Grade.SAME:
            return stored[0]
        try:
            choice = self._compare(own, arguments, options, wanted, kind, bucket)
        except DovetailError as error:
            if self._options.generation_plan is not None or self._options.budget is not None:
                raise
            log.warning("generate runs as it is: %s", error)
            return Choice(kind, bucket.prompts, EAGER, {EAGER: (0.0,)}, {SCHEDULED: str(error)})
        self._store.put(choice)
        return choice

    def _engine_name(self) -> str:
        if not self._kind:
            count = sum(p.numel() for p in self._model.parameters())
            dtype = str(self._model.dtype).removeprefix("torch.")
            threads = torch.get_num_threads()
            self._kind = (
                f"{type(self._model).__name__} of {count} weights, {dtype}, {threads} threads"
            )
            if self._model.device.type != "cpu":
                self._kind += f", {torch.cuda.get_device_name(self._model.device)}"
        return self._kind

    def _compare(
        self,
        own: Generate,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        wanted: Wanted,
        kind: str,
        bucket: Bucket,
    ) -> Choice:
        """Run both ways for a few tokens, in turn, and choose."""
        new = min(PROBE_TOKENS, *wanted.new_tokens)
        short = {k: v for k, v in options.items() if k not in ("max_length", "max_new_tokens")}
        short |= {"max_new_tokens": new, "min_new_tokens": None}
        assert self._engine is not None
        self._engine.cover(wanted)
        probe = Wanted(
            wanted.prompts,
            tuple(new for _ in wanted.prompts),
            wanted.sampling,
            wanted.stop,
            wanted.pad,
            wanted.width,
            wanted.padded,
        )
        runs: dict[str, Callable[[], Tensor]] = {
            EAGER: lambda: own(*arguments, **short),
            SCHEDULED: lambda: self._scheduled(probe),
        }
        samples: dict[str, list[float]] = {name: [] for name in runs}
        results: dict[str, Tensor] = {}
        for number in range(PROBE_ROUNDS):
            for name, run in runs.items():
                begin = time.perf_counter()
                results[name] = run()
                if number:
                    samples[name].append(time.perf_counter() - begin)
        refused = {}
        if self._model.dtype in (torch.float32, torch.float64) and not torch.equal(
            results[EAGER], results[SCHEDULED]
        ):
            refused[SCHEDULED] = "its greedy tokens differ from eager's"
            log.warning("generate runs as it is: the executor's tokens differ from eager's")
        kept = {name: tuple(seconds) for name, seconds in samples.items()}
        chosen = EAGER if refused else winner(kept)
        return Choice(kind, bucket.prompts, chosen, kept, refused)

    # What is known.

    @property
    def plan(self) -> Plan | None:
        """The plan that the executor follows, if it runs any bucket."""
        scheduled = any(choice.winner == SCHEDULED for choice in self.choices.values())
        return self._engine.plan if self._engine is not None and scheduled else None

    def timeline(self) -> Timeline | None:
        """The executor's latest steps, if the last call was its."""
        if self._engine is None or not self._ran_scheduled:
            return None
        return self._engine.timeline()

    def close(self) -> None:
        """Give the executor's memory back; the next call starts it again."""
        if self._engine is not None:
            self._engine.close()
