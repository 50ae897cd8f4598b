"""The arguments of ``generate`` as transformers' users know them, and what they ask for.

Names, defaults and precedence follow transformers' ``GenerationMixin.generate``: what is passed
stands above a ``generation_config``, which stands above the checkpoint's generation_config.json.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.doors.generate_names import check_name
from dovetail.ir.errors import InputError
from dovetail.runtime.sampling import Sampling

NEW_TOKENS, TOP_K = 20, 50
"""How many tokens are made, and from how many one is sampled, where nobody says."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a call of ``generate`` asks for. ``prompts`` are token ids without padding, every one
    as often as it is to be continued; ``width`` is the width of the tensor they came in, 0 for
    lists; ``pad`` fills rows that end early."""

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    sampling: Sampling
    stop: tuple[int, ...]
    pad: int
    width: int
    padded: tuple[tuple[int, ...], ...] = ()
    """The rows as they came, with their padding."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt."""
        return [len(prompt) for prompt in self.prompts]


def read_arguments(
    inputs: object,
    attention_mask: Tensor | None,
    arguments: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    context: int,
    vocab: int,
) -> Wanted:
    """What the call wants; ``checkpoint`` is the checkpoint's generation_config.json.

    ``inputs`` is a tensor ``[seqs, width]``, padded on the left where ``attention_mask`` is 0, or
    a list of token lists of any lengths. Raises InputError for what cannot be done.
    """
    options = _merged(arguments, checkpoint)
    stop = _tokens(options.get("eos_token_id"))
    pad = options.get("pad_token_id")
    rows, kept = _rows(inputs, attention_mask, pad, stop)
    for i, row in enumerate(kept):
        _check_row(i, row, vocab, context)
    copies = _whole(options, "num_return_sequences", 1)
    sampling = _sampling(options)
    if copies > 1 and sampling.greedy:
        raise InputError(
            f"num_return_sequences={copies} with greedy decoding would give {copies} equal "
            "sequences: add do_sample=True, or leave it out"
        )
    width = len(rows[0]) if isinstance(inputs, Tensor) else 0
    limit = _limit(options, width)
    prompts = [tuple(row) for row in kept for _ in range(copies)]
    new = [_new_tokens(options, limit, len(prompt), context) for prompt in prompts]
    pad_token = pad if isinstance(pad, int) else stop[0] if stop else 0
    padded = tuple(tuple(row) for row in rows for _ in range(copies)) if width else ()
    return Wanted(tuple(prompts), tuple(new), sampling, stop, pad_token, width, padded)


def _merged(arguments: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(arguments)
    config = given.pop("generation_config", None)
    if config is not None and not hasattr(config, "to_diff_dict"):
        raise InputError(
            f"generation_config is a {type(config).__name__}, expected a "
            "transformers.GenerationConfig"
        )
    layers = [checkpoint, config.to_diff_dict() if config is not None else {}]
    explicit = {name: value for name, value in given.items() if value is not None}
    for name, value in [*layers[1].items(), *explicit.items()]:
        check_name(name, value)
    merged: dict[str, Any] = {}
    for layer in (*layers, explicit):
        if "max_new_tokens" in layer or "max_length" in layer:
            merged = {k: v for k, v in merged.items() if k not in ("max_new_tokens", "max_length")}
        merged |= {name: value for name, value in layer.items() if value is not None}
    return merged


def _tokens(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, int):
        return (value,)
    if isinstance(value, Iterable):
        found = tuple(value)
        if all(isinstance(token, int) for token in found):
            return found
    raise InputError(f"eos_token_id is {value!r}, expected a token id or a list of them")


def _rows(
    inputs: object, mask: Tensor | None, pad: object, stop: tuple[int, ...]
) -> tuple[list[list[int]], list[list[int]]]:
    """The rows as given, and without their padding."""
    if isinstance(inputs, Tensor):
        if inputs.dim() != 2 or inputs.is_floating_point():
            raise InputError(
                f"input_ids has shape {list(inputs.shape)} and dtype {inputs.dtype}, expected "
                "whole numbers [sequences, tokens]"
            )
        if mask is None and isinstance(pad, int) and pad not in stop:
            mask = inputs.ne(pad)
        if mask is None:
            mask = torch.ones_like(inputs)
        if mask.shape != inputs.shape:
            raise InputError(
                f"attention_mask has shape {list(mask.shape)}, expected that of input_ids, "
                f"{list(inputs.shape)}"
            )
        return inputs.tolist(), _unpadded(inputs, mask)
    if mask is not None:
        raise InputError(
            "attention_mask goes with a tensor of input_ids; lists of tokens have no padding: "
            "leave it out"
        )
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        raise InputError(
            f"generate() got {type(inputs).__name__}, expected token ids: a tensor "
            "[sequences, tokens] or a list of lists; encode text with the checkpoint's tokenizer, "
            "or use complete()"
        )
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in inputs]
    if not rows or any(not isinstance(row, Sequence) or isinstance(row, str) for row in rows):
        raise InputError(
            "generate() got a list that is empty or not of token lists; for one prompt give "
            "[[1, 2, 3]]"
        )
    lists = [list(row) for row in rows]
    return lists, lists


def _unpadded(inputs: Tensor, mask: Tensor) -> list[list[int]]:
    kept = []
    for i, (row, seen) in enumerate(zip(inputs.tolist(), mask.bool().tolist(), strict=True)):
        if row and not seen[-1]:
            raise InputError(
                f"row {i} ends in padding (its attention_mask ends in 0): new tokens follow the "
                "last one, so pad on the left (tokenizer.padding_side = 'left'), or give lists"
            )
        kept.append([token for token, real in zip(row, seen, strict=True) if real])
    return kept


def _check_row(i: int, row: Sequence[object], vocab: int, context: int) -> None:
    if not row:
        raise InputError(f"prompt {i} is empty; give at least one token")
    odd = next((t for t in row if type(t) is not int or not 0 <= t < vocab), None)
    if odd is not None:
        raise InputError(f"prompt {i} has token {odd!r}, expected whole numbers below {vocab}")
    if len(row) >= context:
        raise InputError(
            f"prompt {i} has {len(row)} tokens, but the model's context is {context}: give at most "
            f"{context - 1}"
        )


def _whole(options: Mapping[str, Any], name: str, default: int) -> int:
    value = options.get(name, default)
    if type(value) is not int or value < 1:
        raise InputError(f"{name} is {value!r}, expected a whole number of at least 1")
    return value


def _limit(options: Mapping[str, Any], width: int) -> int | None:
    """``max_length`` for all rows of a tensor, whose padding counts; None where it is not given."""
    if "max_new_tokens" in options or "max_length" not in options:
        return None
    length = _whole(options, "max_length", NEW_TOKENS)
    if width and length <= width:
        raise InputError(
            f"max_length={length} leaves no new token after input_ids of {width}: give "
            "max_new_tokens"
        )
    return length - width if width else None


def _new_tokens(options: Mapping[str, Any], limit: int | None, length: int, context: int) -> int:
    if limit is not None:
        wanted = limit
    elif "max_length" in options and "max_new_tokens" not in options:
        wanted = max(1, _whole(options, "max_length", NEW_TOKENS) - length)
    else:
        wanted = _whole(options, "max_new_tokens", NEW_TOKENS)
    return min(wanted, context - length)


def _sampling(options: Mapping[str, Any]) -> Sampling:
    if not options.get("do_sample", False):
        return Sampling()
    temperature = float(options.get("temperature", 1.0))
    if temperature <= 0 or not math.isfinite(temperature):
        raise InputError(
            f"temperature must be above 0 to sample, found {temperature}; use do_sample=False for "
            "the likeliest tokens"
        )
    # From torch's generator, so that torch.manual_seed makes it repeatable.
    seed = options.get("seed")
    drawn = int(torch.randint(2**31, (1,))) if seed is None else int(seed)
    top_k, top_p = int(options.get("top_k", TOP_K)), float(options.get("top_p", 1.0))
    return Sampling(temperature, top_k, top_p, drawn)


def as_tensor(wanted: Wanted, made: list[list[int]]) -> Tensor:
    """``[seqs, width + new]``: the rows as they came, their new tokens, padding."""
    longest = max(len(tokens) for tokens in made)
    rows = [
        [*row, *tokens, *[wanted.pad] * (longest - len(tokens))]
        for row, tokens in zip(wanted.padded, made, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64)
