"""A peer's process: a PeerSpec on standard input, then Jobs, each a line of JSON; answers alike.

Nothing of dovetail is imported here.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import host
import torch
import transformers
from peers import DISK, Job, Outcome, PeerSpec, decode_job


def main() -> int:
    """Load, then run jobs until standard input ends."""
    answers = _claim_stdout()
    spec = PeerSpec(**json.loads(sys.stdin.readline()))
    baseline = host.resident_bytes()[0], host.resident_bytes()[1]
    with host.Window() as window, host.MemoryWatch() as memory:
        model = _load(spec)
        # Written pages cannot be dropped from the page cache before they are on disk.
        os.sync()
    _answer(answers, _loaded(model, window, memory, baseline))
    for line in sys.stdin:
        _answer(answers, asdict(_run(model, spec, decode_job(json.loads(line)), baseline)))
    return 0


def _claim_stdout() -> TextIO:
    """Standard output for answers alone: whatever else prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, data: dict[str, Any]) -> None:
    answers.write(json.dumps(data) + "\n")
    answers.flush()


def _load(spec: PeerSpec) -> Any:
    options: dict[str, Any] = {"dtype": getattr(torch, spec.dtype)}
    if spec.mode == DISK:
        options |= {
            "device_map": "auto",
            "max_memory": {"cpu": spec.budget},
            "offload_folder": spec.offload_folder,
        }
    # from_pretrained puts the model in evaluation mode.
    return transformers.AutoModelForCausalLM.from_pretrained(spec.checkpoint, **options)


def _loaded(
    model: Any, window: host.Window, memory: host.MemoryWatch, baseline: tuple[int, int]
) -> dict[str, Any]:
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())
    return {
        "seconds": window.seconds,
        "other_cores": window.other_cores,
        "peak_bytes": memory.peak_bytes - baseline[0],
        "anonymous_bytes": memory.anonymous_bytes - baseline[1],
        "modules_on_disk": places.count("disk"),
        "modules_in_ram": len(places) - places.count("disk"),
    }


def _run(model: Any, spec: PeerSpec, job: Job, baseline: tuple[int, int]) -> Outcome:
    torch.set_num_threads(job.threads)
    model.set_experts_implementation(job.experts)
    _give_memory_back()
    cold = [Path(spec.checkpoint), Path(spec.offload_folder)] if spec.mode == DISK else []
    clock = _StepClock(cold)
    answers: dict[int, list[int]] = {}
    read = host.read_bytes()
    with host.Window() as window, host.MemoryWatch() as memory, clock.attached(model):
        for numbers in _batches(list(job.prompts), job.batch):
            made = _generate(model, [job.prompts[i] for i in numbers], job.new_tokens)
            answers |= dict(zip(numbers, made, strict=True))
            clock.end_batch(len(numbers))
    return Outcome(
        batch=job.batch,
        threads=job.threads,
        experts=job.experts,
        tokens=sum(map(len, answers.values())),
        seconds=window.seconds - clock.evict_seconds,
        prefill_seconds=clock.prefill,
        decode_steps=clock.decode,
        peak_bytes=memory.peak_bytes - baseline[0],
        anonymous_bytes=memory.anonymous_bytes - baseline[1],
        read_bytes=host.read_bytes() - read,
        own_cores=window.own_cores,
        other_cores=window.other_cores,
        answers=answers,
    )


def _give_memory_back() -> None:
    """So that one job's garbage is not counted as the next one's memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _batches(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _generate(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens, always ``new_tokens`` of them; prompts are padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[list[int]] = made[:, width:].tolist()
    assert all(len(row) == new_tokens for row in tokens), "a sequence ended early"
    return tokens


@dataclass(slots=True)
class _StepClock:
    """Times every forward pass and drops the page cache of ``cold`` before it, off the clock."""

    cold: list[Path]
    prefill: list[float] = field(default_factory=list)
    decode: list[tuple[int, float]] = field(default_factory=list)
    evict_seconds: float = 0.0
    _marks: list[tuple[float, float]] = field(default_factory=list)

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Watch the model's forward passes."""
        handle = model.register_forward_pre_hook(lambda *_: self._begin_step())
        try:
            yield
        finally:
            handle.remove()

    def _begin_step(self) -> None:
        reached = time.perf_counter()
        host.evict(self.cold)
        begun = time.perf_counter()
        self.evict_seconds += begun - reached
        self._marks.append((reached, begun))

    def end_batch(self, sequences: int) -> None:
        """All passes since the last call were of one batch: a prefill and its decode steps."""
        ends = [reached for reached, _ in self._marks[1:]] + [time.perf_counter()]
        begins = [begun for _, begun in self._marks]
        steps = [end - begin for begin, end in zip(begins, ends, strict=True)]
        self.prefill.append(steps[0])
        self.decode += [(sequences, seconds) for seconds in steps[1:]]
        self._marks.clear()


if __name__ == "__main__":
    sys.exit(main())
