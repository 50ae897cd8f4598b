"""Checkpoints that need no download: a small trained one to try, larger random ones to measure.

All are OLMoE models (transformers' ``OlmoeForCausalLM``) with a byte-level tokenizer, in the layout
of published checkpoints: one tensor per expert and projection, sorted by name within a file.
"""

import json
import os
import random
import re
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from dovetail.demo_random import DTYPES, RANDOM_SPECS, Progress, write_random_weights
from dovetail.ir.errors import InputError, OutputError
from dovetail.ir.units import format_bytes

MARKER = "dovetail_demo"
TRAINED = "demo"

_HELD_OUT_PART = 0.08
_PROMPTS = 48
_SHORTEST, _LONGEST = 5, 200
# Room for config, tokenizer, prompts and index beside the weights.
_SMALL_FILES_BYTES = 4 << 20
_COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
# "Mr. Darcy" is not where a sentence begins.
_SENTENCE = re.compile(r"(?:^|(?<=[.!?] )|(?<=[.!?]\" ))(?<!Mr\. )(?<!Mrs\. )(?<!Dr\. )\"?[A-Z]")

SIZES = {
    TRAINED: "trained on a novel: 3.9 M parameters, 15 MB in float32, writes English-looking text",
    "400MB": "random weights: 198 M parameters, 0.40 GB in bfloat16, 32 experts, 4 per token",
    "1GB": "random weights: 493 M parameters, 0.99 GB in bfloat16, 32 experts, 4 per token",
    "OLMoE-1B-7B": "random weights with OLMoE-1B-7B's dimensions: 6.9 B parameters, 13.8 GB in "
    "bfloat16, 64 experts, 8 per token",
}


def write_demo(
    directory: Path,
    size: str = TRAINED,
    dtype: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a demo checkpoint and ``prompts.jsonl`` to ``directory``, and return that directory.

    ``size`` is a key of ``SIZES``; ``dtype`` is ``float32`` or ``bfloat16``, by default float32 for
    the trained one (so that tokens can be compared exactly) and bfloat16 for the random ones.
    ``seed`` chooses prompts and random weights. ``progress(done, total)`` is told the bytes of
    random weights as they are written. Raises InputError if the arguments, the directory or the
    free space do not fit, and OutputError if writing fails.
    """
    if size not in SIZES:
        raise InputError(f"unknown demo size {size!r}; choose one of {', '.join(SIZES)}")
    dtype = dtype or ("float32" if size == TRAINED else "bfloat16")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    spec = RANDOM_SPECS.get(size)
    config = _demo_config() | (spec.config() if spec else {}) | {"dtype": dtype, MARKER: size}
    trained = {} if spec else _load_trained(DTYPES[dtype])
    values = spec.values() if spec else sum(weight.numel() for weight in trained.values())
    try:
        _prepare(directory, values * DTYPES[dtype].itemsize)
        _write_small_files(directory, config, seed)
        if spec:
            write_random_weights(directory, spec, dtype, seed, progress)
        else:
            _write_whole(directory / "model.safetensors", save(trained, {"format": "pt"}))
    except OSError as error:
        raise OutputError(
            f"could not write the demo checkpoint to {directory}: {error}; a checkpoint there is "
            "incomplete: fix the cause and run the same command again"
        ) from error
    return directory


def corpus() -> tuple[list[str], list[str]]:
    """The paragraphs that the trained demo was trained on, and those held out from training."""
    text = files("dovetail").joinpath("demo_data", "corpus.txt").read_text(encoding="utf-8")
    paragraphs = text.splitlines()
    cut = len(paragraphs) - round(_HELD_OUT_PART * len(paragraphs))
    return paragraphs[:cut], paragraphs[cut:]


def sentence_starts(paragraph: str) -> list[int]:
    """Offsets, in characters, at which a sentence of ``paragraph`` begins."""
    return [match.start() for match in _SENTENCE.finditer(paragraph)]


def demo_prompts(seed: int = 0) -> list[dict[str, str]]:
    """48 openings of held-out sentences, 5 to 200 bytes each, as ``{"id", "prompt"}``."""
    shuffled = random.Random(seed)
    _, held_out = corpus()
    sentences = [text[start:] for text in held_out for start in sentence_starts(text)]
    shuffled.shuffle(sentences)
    growth = (_LONGEST / _SHORTEST) ** (1 / (_PROMPTS - 1))
    lengths = [round(_SHORTEST * growth**i) for i in range(_PROMPTS)]
    shuffled.shuffle(lengths)
    prompts = []
    for number, length in enumerate(lengths):
        # A prompt ends where a word does, so that the model continues with a space.
        fits = (i for i, text in enumerate(sentences) if text[length : length + 1] == " ")
        opening = sentences.pop(next(fits))[:length]
        prompts.append({"id": f"demo-{number:02d}", "prompt": opening})
    return prompts


def _load_trained(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with as_file(files("dovetail").joinpath("demo_data", "model.safetensors")) as path:
        return {name: weight.to(dtype) for name, weight in load_file(path).items()}


def _demo_config() -> dict[str, Any]:
    text = files("dovetail").joinpath("demo_data", "config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def _prepare(directory: Path, weight_bytes: int) -> None:
    """Check that ``directory`` may be written and has room, make it, and clear an older demo."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file, expected a directory to write; choose another")
    if directory.exists() and not _is_ours(directory):
        raise InputError(
            f"{directory} is not empty and holds no dovetail demo (a config.json with "
            f'"{MARKER}"); nothing was written: choose a new or empty directory'
        )
    old = sorted(directory.glob("model*.safetensors*"))
    needed = weight_bytes + _SMALL_FILES_BYTES
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free + sum(path.stat().st_size for path in old)
    if needed > free:
        raise InputError(
            f"the demo checkpoint needs {format_bytes(needed, up=True)} in {directory}, and the "
            f"disk has {format_bytes(free)} free; nothing was written: free some space, or choose "
            "another directory or a smaller size"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for path in old:
        path.unlink()


def _is_ours(directory: Path) -> bool:
    """Whether ``directory`` is empty or holds a demo, be it one whose writing was cut off."""
    if not {path.name for path in directory.iterdir()} - {"config.json.partial"}:
        return True
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(config, dict) and MARKER in config


def _write_small_files(directory: Path, config: dict[str, Any], seed: int) -> None:
    # The config comes first: it marks an interrupted demo as one that may be written again.
    _write_json(directory / "config.json", config)
    for name in _COPIED:
        _write_whole(directory / name, files("dovetail").joinpath("demo_data", name).read_bytes())
    lines = [json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in demo_prompts(seed)]
    _write_whole(directory / "prompts.jsonl", "".join(lines).encode())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_whole(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _write_whole(path: Path, content: bytes) -> None:
    """Write so that ``path`` is either complete or absent, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
