"""Which checkpoint tensors hold a model's weights.

The only file that touches transformers' private key-conversion machinery: version 5 keeps the
experts of a layer fused and renames some families' weights while it loads them.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dovetail.capture.build import DTYPES
from dovetail.ir.errors import CaptureError, CheckpointError

Entries = Mapping[str, tuple[str, tuple[int, ...]]]
"""Checkpoint key -> (dtype name, shape)."""

_CHANGED = (
    "this version of transformers no longer maps checkpoint names the way dovetail knows ({}); "
    "install the version named in constraints.txt"
)

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        Interleave,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
        revert_weight_conversion,
    )
except ImportError as _error:
    raise CaptureError(_CHANGED.format(_error)) from _error


@dataclass(frozen=True, slots=True)
class Source:
    """Where a weight comes from: checkpoint key templates with ``{layer}`` and ``{expert}``.

    One key without ``{expert}`` is the weight as it is; keys with ``{expert}`` are stacked over
    experts, and several are concatenated on axis 1 in their order; without it, several are
    concatenated on axis 0. ``interleaved`` if rows of two halves take turns in it.
    """

    keys: tuple[str, ...]
    interleaved: bool = False


class CheckpointNames:
    """Answers where each weight of ``model`` is, for the ``layers`` of ``stack`` that were traced.

    Without ``entries`` it assumes the layout that transformers' save_pretrained writes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stack: str,
        layers: tuple[int, ...],
        entries: Entries | None,
    ) -> None:
        self._model = model
        self._stack = stack
        self._state: dict[str, Tensor] = model.state_dict()
        self._tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._given = entries is not None
        self.entries = entries if entries is not None else self._published(layers)
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._found = self._invert(set(layers))

    def _published(self, layers: tuple[int, ...]) -> Entries:
        kept = tuple(f"{self._stack}.{i}." for i in layers)
        state = {
            k: v
            for k, v in self._state.items()
            if (k.startswith(kept) or not k.startswith(f"{self._stack}.")) and k not in self._tied
        }
        saved: Mapping[str, Tensor] = revert_weight_conversion(self._model, state)
        return {k: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for k, t in saved.items()}

    def _invert(self, layers: set[int]) -> dict[str, dict[str | None, str]]:
        """Model name -> converter pattern (None for plain) -> one checkpoint key of it."""
        found: dict[str, dict[str | None, str]] = defaultdict(dict)
        prefix = self._model.base_model_prefix
        for key in self.entries:
            if not _is_sample(key, layers):
                continue
            try:
                name, pattern = rename_source_key(
                    key, self._renamings, self._converters, prefix, self._state
                )
            except TypeError as error:
                raise CaptureError(_CHANGED.format(error)) from error
            if name not in self._state and key in self._state:
                name, pattern = key, None
            found[name].setdefault(pattern, key)
        return found

    def source(self, fqn: str, layer: int | None) -> Source:
        """The templates of ``fqn``; raises CheckpointError when the checkpoint lacks it."""
        # A tied weight is that of its source, even where the checkpoint also holds a copy.
        sources = [self._tied.get(fqn), fqn, *(t for t, s in self._tied.items() if s == fqn)]
        name = next((s for s in sources if s in self._found), fqn)
        by_pattern = self._found.get(name)
        if by_pattern is None:
            raise CheckpointError(
                f"the checkpoint has no tensor for {fqn}; expected "
                f"{' or '.join(self._expected(fqn))}: the folder is incomplete or belongs to "
                "another model"
            )
        if None in by_pattern:
            return Source((_template(by_pattern[None], layer),))
        operations, keys = self._converted(name, by_pattern)
        if operations in ([Concatenate], [Interleave]):
            whole = tuple(_template(key, layer) for _, key in keys)
            return Source(whole, interleaved=operations == [Interleave])
        return Source(tuple(_template(_expert_template(k, p), layer) for p, k in keys))

    def _expected(self, fqn: str) -> list[str]:
        saved = revert_weight_conversion(self._model, {fqn: self._state[fqn]})
        return sorted(saved)[:2]

    def _converted(
        self, fqn: str, by_pattern: Mapping[str | None, str]
    ) -> tuple[list[type], list[tuple[str, str]]]:
        """The operations that make ``fqn``, and its sources as (pattern, key)."""
        converter = next(
            c for c in self._converters if any(p in by_pattern for p in c.source_patterns)
        )
        operations = [type(o) for o in converter.operations]
        axes = [getattr(o, "dim", None) for o in converter.operations]
        patterns = list(converter.source_patterns)
        known = (
            operations == [MergeModulelist, Concatenate][: len(operations)]
            and axes == [0, 1][: len(axes)]
            and operations
            and all("*" in p for p in patterns)
            and len(operations) == min(len(patterns), 2)
        )
        joined = operations == [Concatenate] and axes == [0]
        turns = operations == [Interleave] and axes == [1]
        if not (known or joined or turns):
            key = next(iter(by_pattern.values()))
            raise CaptureError(
                f"checkpoint tensor {key} becomes {fqn} through "
                f"{', '.join(o.__name__ for o in operations)}, which dovetail cannot read piecewise"
            )
        missing = [p for p in patterns if p not in by_pattern]
        if missing:
            raise CheckpointError(
                f"the checkpoint has {next(iter(by_pattern.values()))} but nothing like "
                f"{missing[0]!r}; both are needed for {fqn}: the folder is incomplete"
            )
        return operations, [(p, by_pattern[p]) for p in patterns]

    def check(
        self,
        template: str,
        shape: tuple[int, ...],
        layers: list[int],
        experts: int,
        expected: str = "",
    ) -> None:
        """Raise CheckpointError unless every layer's (and expert's) tensor has ``shape``."""
        if not self._given:
            return
        for layer in layers if "{layer}" in template else [0]:
            for expert in range(experts if "{expert}" in template else 1):
                key = template.replace("{layer}", str(layer)).replace("{expert}", str(expert))
                if key not in self.entries:
                    raise CheckpointError(
                        f"the checkpoint has no tensor {key}; expected one of shape {list(shape)}: "
                        "the folder is incomplete or belongs to another model"
                    )
                dtype = self.entries[key][0].removeprefix("torch.")
                if dtype not in DTYPES and dtype != expected:
                    raise CheckpointError(
                        f"tensor {key} is stored as {dtype}, expected one of {', '.join(DTYPES)}; "
                        "convert the checkpoint first"
                    )
                found = tuple(self.entries[key][1])
                flat = (shape[0] * shape[1], *shape[2:]) if experts > 1 and len(shape) > 1 else ()
                if found not in (shape, flat):
                    raise CheckpointError(
                        f"tensor {key} has shape {list(self.entries[key][1])}, expected "
                        f"{list(shape)} from config.json: the two do not belong together"
                    )


def _is_sample(key: str, layers: set[int]) -> bool:
    """Whether ``key`` is of one of ``layers`` or of none, and of expert 0 or of none."""
    parts = key.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), None)
    expert = next((b for a, b in itertools.pairwise(parts) if a == "experts" and b.isdigit()), "0")
    return (layer is None or layer in layers) and expert == "0"


def _template(key: str, layer: int | None) -> str:
    if layer is None:
        return key
    parts = key.split(".")
    at = next((i for i, part in enumerate(parts) if part == str(layer)), None)
    if at is None:
        raise CaptureError(
            f"checkpoint tensor {key} does not name its layer {layer}, so that one body cannot "
            "stand for all layers of a kind; expected the layer's number among its parts"
        )
    return ".".join([*parts[:at], "{layer}", *parts[at + 1 :]])


def _expert_template(key: str, pattern: Any) -> str:
    """``key`` of expert 0 with ``{expert}`` where the converter's ``pattern`` has its star."""
    plain = re.escape(pattern.replace("\\.", "."))
    match = re.search(plain.replace(r"\*", r"(\d+)"), key)
    if match is None:
        raise CaptureError(f"checkpoint tensor {key} does not have the form {pattern!r}")
    return f"{key[: match.start(1)]}{{expert}}{key[match.end(1) :]}"
