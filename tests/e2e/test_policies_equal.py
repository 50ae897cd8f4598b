"""The policies that ``test_equality`` leaves out, and other knobs: the same greedy tokens."""

from dataclasses import dataclass

import pytest
from tests.e2e.support import (
    Knobs,
    Tiny,
    generate,
    plan_for,
    ragged_prompts,
    save_tiny,
    tiny_model,
    transformers_tokens,
)

from dovetail.ir.verify import verify_program
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.lower import lower

# Keys that are views and such that are made of the store for every step; windows and sinks.
FAMILIES = ("gpt_oss", "deepseek_v2")
NEW = 6
PROMPTS = ragged_prompts((70, 40, 33, 33, 17, 9, 5, 1), seed=3)
STREAMED = {"chunk": 2, "slots": 2, "resident": 0, "embed": False}
SCHEDULES: dict[str, tuple[str, Knobs | None]] = {
    "pieces as searched": ("chunked_prefill", None),
    "pieces of a token": ("chunked_prefill", {
        "seqs": 3, "rows": 2, "chunk_tokens": 1, **STREAMED}),
    "pieces of 7": ("chunked_prefill", {"seqs": 8, "rows": 3, "chunk_tokens": 7, **STREAMED}),
    "pieces of 32": ("chunked_prefill", {"seqs": 5, "rows": 8, "chunk_tokens": 32, **STREAMED}),
    "pieces in waves": ("module_batch", {
        "seqs": 4, "rows": 4, "attn_tokens": 50, "prefill_tokens": 60, "chunk_tokens": 20,
        "workers": 3, "refill": False, **STREAMED}),
    "groups of layers as searched": ("layered_prefill", None),
    "a layer a step": ("layered_prefill", {
        "seqs": 3, "rows": 2, "prefill_tokens": 70, "layer_groups": 4, **STREAMED}),
    "two groups of layers": ("layered_prefill", {
        "seqs": 5, "rows": 2, "prefill_tokens": 100, "layer_groups": 2, "workers": 3, **STREAMED}),
    "three groups of layers": ("layered_prefill", {
        "seqs": 4, "rows": 4, "prefill_tokens": 80, "layer_groups": 3, **STREAMED}),
    "two loaders": ("weight_stream", {"seqs": 8, "chunk": 2, "window": 3, "loaders": 2}),
    "loaders without turns to spare": ("weight_stream", {
        "seqs": 4, "chunk": 4, "window": 1, "loaders": 3}),
    "layers moved two at a time": ("weight_stream", {
        "seqs": 8, "chunk": 16, "window": 3, "loaders": 2}),
    "balanced locks": ("weight_stream", {
        "seqs": 8, "chunk": 2, "window": 2, "locked": 50, "loaders": 2}),
    "first layers locked": ("weight_stream", {
        "seqs": 8, "chunk": 2, "window": 2, "locked": 50, "balanced": False}),
    "blocks as searched": ("zigzag", None),
    "block of batches": ("zigzag", {
        "seqs": 8, "batches": 4, "percent": 25, "chunk": 4, "slots": 2, "embed": False}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A family's checkpoint and what transformers makes of the prompts."""

    tiny: Tiny
    expected: list[tuple[int, ...]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Captured once for all tests of a family."""
    tiny = save_tiny(tiny_model(request.param), tmp_path_factory.mktemp(request.param))
    return Case(tiny, transformers_tokens(tiny.model, PROMPTS, NEW))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_equal_transformers(case: Case, schedule: str) -> None:
    policy, knobs = SCHEDULES[schedule]
    tiny = case.tiny
    plan = plan_for(tiny, PROMPTS, NEW, 4 * tiny.weight_bytes, policy, knobs)
    verify_program(lower(apply_moves(tiny.captured.graph, plan.moves), plan.budget),
                   tiny.captured.graph)  # fmt: skip
    outcome = generate(tiny, plan, dict(enumerate(PROMPTS)), NEW)
    assert outcome.tokens == dict(enumerate(case.expected))
    assert outcome.pools_peak <= plan.prediction.peak_bytes
    assert len(outcome.steps) == plan.prediction.steps


def test_an_end_token_ends_a_prompt_of_several_pieces(case: Case) -> None:
    """Only the step that takes the last piece of a prompt makes a token of it."""
    knobs = {"seqs": 8, "rows": 3, "chunk_tokens": 7, **STREAMED}
    plan = plan_for(case.tiny, PROMPTS, NEW, 4 * case.tiny.weight_bytes, "chunked_prefill", knobs)
    stop = case.expected[0][0]
    outcome = generate(case.tiny, plan, dict(enumerate(PROMPTS)), NEW, stop=[stop])
    for index, expected in enumerate(case.expected):
        ends = expected.index(stop) + 1 if stop in expected else NEW
        assert outcome.tokens[index] == expected[:ends]
    assert outcome.reasons[0] == "stop" and outcome.tokens[0] == (stop,)
