"""`torch.compile(model, backend="dovetail")`: found through an entry point, with no import of ours.

The graph runs as Dynamo traced it, except for the routed experts in it, which become regions: per
bucket of tokens they run as traced or as ``runtime.routed_experts``, whichever was measured to be
faster. So a model breaks into no more graphs than with any other backend.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dovetail.doors.region_choice import EAGER, Choice, ChoiceStore, bucket_of, measure
from dovetail.doors.regions import agrees
from dovetail.doors.traced_experts import match_experts
from dovetail.doors.traced_region import replace_region
from dovetail.ir.errors import InputError
from dovetail.tuning.staleness import Grade

log = logging.getLogger(__name__)
SCHEDULED = "dovetail"


def schedule(
    gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """The backend: a traced graph and examples of its inputs -> what runs in its place.

    Raises InputError for options, of which there are none.
    """
    if given := options.get("options") or options.get("mode"):
        raise InputError(
            f'torch.compile(backend="dovetail") takes no options, found {given!r}: leave them out; '
            "budgets and policies belong to dovetail.compile and dovetail.load"
        )
    found, notes = match_experts(gm.graph)
    for note in notes:
        log.warning("%s; it runs as it is", note)
    decide = _Decisions()
    for matched in found:
        replace_region(gm, matched, decide)
    if found:
        gm.graph.lint()
        gm.recompile()
        log.info("%d regions of routed experts are scheduled", len(found))
    forward: Callable[..., Any] = gm.forward
    return forward


class _Decisions:
    """Which way each region of a graph runs, by bucket of tokens."""

    def __init__(self) -> None:
        self._store = ChoiceStore()
        self._choices: dict[tuple[str, int], Choice] = {}

    def __call__(
        self,
        weights: tuple[Tensor, Tensor],
        tokens: int,
        own: Callable[[], Tensor],
        ours: Callable[[], Tensor],
    ) -> bool:
        """Whether ours is to be used for so many tokens."""
        shapes = " and ".join(str(list(weight.shape)) for weight in weights)
        dtype = str(weights[0].dtype).removeprefix("torch.")
        kind = f"traced experts {shapes}, {dtype}, {torch.get_num_threads()} threads"
        key = kind, bucket_of(tokens)
        if key not in self._choices:
            self._choices[key] = self._decided(*key, own, ours)
        return self._choices[key].winner == SCHEDULED

    def _decided(
        self, kind: str, tokens: int, own: Callable[[], Tensor], ours: Callable[[], Tensor]
    ) -> Choice:
        stored = self._store.get(kind, tokens)
        if stored is not None and stored[1] is Grade.SAME:
            return stored[0]
        with torch.no_grad():
            why = agrees(ours(), own())
            runs: dict[str, Callable[[], object]] = {EAGER: own}
            if why is None:
                runs[SCHEDULED] = ours
            choice = measure(kind, tokens, runs, {SCHEDULED: why} if why else {})
        self._store.put(choice)
        return choice
