"""A model folder as `dovetail run` sees it: weights index, tokenizer, limits, end-of-sequence."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dovetail.ir.errors import CheckpointError
from dovetail.runtime.safetensors_index import CheckpointIndex


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint folder in Hugging Face's layout."""

    path: Path
    config: Mapping[str, Any]
    index: CheckpointIndex

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Read config and weight headers; raises CheckpointError if something is missing."""
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: no such folder; expected a model folder with config.json and safetensors "
                "weights (`dovetail demo DIR` writes one)"
            )
        return cls(path, _read_json(path / "config.json"), CheckpointIndex.open(path))

    @property
    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor's dtype and shape by key."""
        return {key: (e.dtype, e.shape) for key, e in self.index.entries.items()}

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self._number("vocab_size")

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its continuation together."""
        return self._number("max_position_embeddings")

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Token ids that end a sequence: of generation_config.json, else of config.json."""
        generation = self.path / "generation_config.json"
        sources = [_read_json(generation)] if generation.exists() else []
        for source in [*sources, self.config, self.text_config]:
            found = source.get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (int(found),)
        return ()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer.json."""
        path = self.path / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(
                f"{path}: missing, so text prompts cannot be encoded; give prompts as input_ids, "
                "or save the tokenizer there with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        return _load_tokenizer(path)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens as the tokenizer adds them."""
        return list(self.tokenizer.encode(text).ids)

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Text of generated tokens without special ones; empty without a tokenizer."""
        if not (self.path / "tokenizer.json").exists():
            return ""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _number(self, name: str) -> int:
        value = self.text_config.get(name)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.path / 'config.json'}: {name} is {value!r}, expected a positive number"
            )
        return value


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable tokenizer: {error}") from None
    # A file may carry the padding and truncation of its last use; each prompt stands alone here.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the folder is not a complete model") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
