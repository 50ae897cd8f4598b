"""``weight_stream``: each layer is read while earlier ones compute; little or nothing stays.

AirLLM's and accelerate's disk offload with a window of prefetched loads: the smallest memory that
runs, and the base that the others improve on. Published variants are knobs:

* Superpipeline's two windows (arXiv 2410.08791): ``window`` loads have a buffer and ``loaders`` of
  them move at a time. With ``chunk`` all of a layer's experts, a load is a layer.
* Hermes' PIPELOAD: ``loaders`` = k parallel readers and a window of k + 1.
* FlexInfer's balanced locking (arXiv 2503.03777): ``locked`` percent of every layer's experts stay
  in ram. Without ``balanced`` as many stay, but all of the first layers'.
"""

from collections.abc import Iterator

from dovetail.ir.moves import Move, Place
from dovetail.ir.placement import experts_of
from dovetail.passes.policies import module_batch
from dovetail.passes.policies.common import Knobs, Ladders, Policy, Setting, powers

LOCKED = (0, 25, 50, 75)
"""Shares of the experts to keep in ram."""


def starts(setting: Setting) -> Iterator[Knobs]:
    """Batch sizes, doubling, each with small loads."""
    for seqs in powers(1, setting.workload.prompts):
        yield {"seqs": seqs, "chunk": 1, "window": 2, "loaders": 1, "locked": 0}
    yield module_batch.leanest(setting)


def ladders(setting: Setting) -> Ladders:
    """What the batch size, the loads, their window, the readers and the share kept may be."""
    shared = module_batch.ladders(setting)
    own = {"window": (1, 2, 3, 4), "loaders": (1, 2, 4), "locked": LOCKED}
    return {"seqs": shared["seqs"], "chunk": shared["chunk"]} | own


def moves(setting: Setting, knobs: Knobs) -> tuple[Move, ...] | None:
    """``model_batch`` with nothing resident but what is locked."""
    if "window" not in knobs:
        return module_batch.moves(setting, knobs)
    equal = module_batch.equal_batches(setting, int(knobs["seqs"]))
    chunk, loaders = int(knobs["chunk"]), int(knobs.get("loaders", 1))
    nothing = {"resident": 0, "embed": False, "slots": knobs["window"], "chunk": chunk}
    readers = {"readers": loaders, "dense_slots": max(2, loaders)}
    streamed = module_batch.moves(setting, {**equal, **nothing, **readers})
    if streamed is None:
        return None
    balanced = bool(knobs.get("balanced", True))
    return (*streamed, *lock(setting, int(knobs.get("locked", 0)), chunk, balanced=balanced))


def lock(setting: Setting, percent: int, chunk: int, *, balanced: bool) -> list[Place]:
    """``percent`` of the experts in ram, in whole chunks: as many of every layer, or all of the
    first layers."""
    specs = {i: e.count for i in setting.layers if (e := experts_of(setting.graph, i))}
    left = sum(specs.values()) * percent // 100
    found: dict[int, list[int]] = {}
    for layer, count in specs.items():
        share = count * percent // 100 if balanced else min(left, count)
        kept = share // chunk * chunk
        left -= kept
        found.setdefault(kept, []).append(layer)
    return [Place("experts", "ram", tuple(layers), kept) for kept, layers in found.items() if kept]


POLICY = Policy(
    name="weight_stream",
    source="AirLLM; accelerate disk offload; Superpipeline; Hermes; FlexInfer",
    starts=starts,
    ladders=ladders,
    moves=moves,
)
