"""Generation beside equality: ends, refill from the queue, sampling, padding, the context's end."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from tests.e2e.support import (
    CONTEXT,
    GREEDY,
    Knobs,
    Outcome,
    Tiny,
    forced_logits,
    generate,
    machine,
    plan_for,
    ragged_prompts,
    save_tiny,
    tiny_model,
    transformers_tokens,
)

from dovetail.ir.workload import Workload
from dovetail.passes.policies.common import Setting
from dovetail.passes.policies.module_batch import equal_batches
from dovetail.prompts import Prompt
from dovetail.run import requests_of
from dovetail.runtime.sampling import Sampling

NEW = 12
LENGTHS = (5, 40, 1, 17, 9, 33, 3, 22, 8, 8)
PROMPTS = ragged_prompts(LENGTHS)
SMALL_STEPS: Knobs = {
    "seqs": 8,
    "rows": 3,
    "attn_tokens": 64,
    "prefill_tokens": 80,
    "chunk": 4,
    "slots": 2,
    "workers": 2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """An OLMoE checkpoint."""
    return save_tiny(tiny_model("olmoe"), tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A gpt-oss checkpoint, with windowed attention and sinks."""
    return save_tiny(tiny_model("gpt_oss"), tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="module")
def greedy(tiny: Tiny) -> list[tuple[int, ...]]:
    """transformers' greedy tokens of the prompts."""
    return transformers_tokens(tiny.model, PROMPTS, NEW)


def run(
    tiny: Tiny,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
    policy: str = "auto",
    share: float = 4.0,
    knobs: Knobs | None = None,
    new_tokens: int = NEW,
) -> Outcome:
    """Plan and run prompts by their position."""
    budget = int(share * tiny.weight_bytes)
    plan = plan_for(tiny, prompts, new_tokens, budget, policy, knobs)
    return generate(tiny, plan, dict(enumerate(prompts)), new_tokens, sampling, stop)


def up_to_stop(tokens: tuple[int, ...], stop: Sequence[int]) -> tuple[int, ...]:
    """The tokens up to the first that stops, that one included."""
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


def test_end_token_ends_a_sequence_and_frees_its_row(
    tiny: Tiny, greedy: list[tuple[int, ...]]
) -> None:
    # Tokens from the middle of some continuations, so that some stop early and some do not.
    stop = (greedy[1][3], greedy[5][0], greedy[8][7])
    expected = [up_to_stop(tokens, stop) for tokens in greedy]
    ended = {i for i, tokens in enumerate(expected) if tokens[-1] in stop}
    assert 0 < len(ended) < len(PROMPTS)
    # One row: the steps of a prompt are as many as its tokens, so that a row held any longer than
    # its sequence needs it would show as more steps.
    one: Knobs = {**SMALL_STEPS, "seqs": 1, "rows": 1, "refill": True}
    for knobs in (one, SMALL_STEPS, None):
        policy = "module_batch" if knobs else "auto"
        outcome = run(tiny, PROMPTS, stop=stop, policy=policy, knobs=knobs)
        assert outcome.tokens == dict(enumerate(expected))
        reasons = {i: "stop" if i in ended else "length" for i in range(len(PROMPTS))}
        assert outcome.reasons == reasons
        if knobs is one:
            assert len(outcome.steps) == sum(map(len, expected))


def test_last_token_may_be_the_end_token(tiny: Tiny, greedy: list[tuple[int, ...]]) -> None:
    index = next(i for i, tokens in enumerate(greedy) if tokens[-1] not in tokens[:-1])
    outcome = run(tiny, [PROMPTS[index]], stop=[greedy[index][-1]])
    assert outcome.tokens == {0: greedy[index]}
    assert outcome.reasons == {0: "stop"}


def test_queue_refills_rows(tiny: Tiny) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 41, (200,), generator=generator).tolist()
    prompts, new = ragged_prompts(lengths, seed=5), 6
    wave = run(tiny, prompts, policy="module_batch", share=40.0, new_tokens=new, knobs={
        **SMALL_STEPS, "seqs": 200, "rows": 50, "attn_tokens": 8000, "prefill_tokens": 8000,
    })  # fmt: skip
    stop = [token for token, _ in Counter(t[1] for t in wave.tokens.values()).most_common(8)]
    outcome = run(
        tiny, prompts, stop=stop, policy="module_batch", new_tokens=new, knobs=SMALL_STEPS
    )
    assert outcome.tokens == {i: up_to_stop(t, stop) for i, t in wave.tokens.items()}
    assert max(step.seqs for step in outcome.steps) == SMALL_STEPS["seqs"]
    mixed = [step for step in outcome.steps if len({group.prefill for group in step.groups}) == 2]
    assert len(mixed) > 50, "new sequences join while others decode"
    full = sum(step.seqs == SMALL_STEPS["seqs"] for step in outcome.steps)
    assert full > 0.6 * len(outcome.steps)


SAMPLINGS = {
    "warm": Sampling(temperature=1.0, seed=7),
    "cut": Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=7),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_seeded_sampling_does_not_depend_on_the_schedule(tiny: Tiny, name: str) -> None:
    sampling = SAMPLINGS[name]
    first = run(tiny, PROMPTS, sampling).tokens
    assert first == run(tiny, PROMPTS, sampling, policy="weight_stream", share=0.4).tokens
    assert first == run(tiny, PROMPTS, sampling, policy="model_batch", share=0.5).tokens
    assert first == run(tiny, PROMPTS, sampling, policy="eager").tokens
    assert first == run(tiny, PROMPTS, sampling, policy="module_batch", knobs=SMALL_STEPS).tokens


def test_seeded_sampling_does_not_depend_on_what_ran_before(tiny: Tiny) -> None:
    sampling = SAMPLINGS["warm"]
    whole = run(tiny, PROMPTS, sampling)
    rest = {i: prompt for i, prompt in enumerate(PROMPTS) if i % 3}
    plan = plan_for(tiny, list(rest.values()), NEW, 4 * tiny.weight_bytes)
    continued = generate(tiny, plan, rest, NEW, sampling)
    assert continued.tokens == {i: whole.tokens[i] for i in rest}


def test_seeds_differ(tiny: Tiny) -> None:
    outcomes = [run(tiny, PROMPTS, Sampling(temperature=1.0, seed=seed)) for seed in (0, 1)]
    differing = [i for i in range(len(PROMPTS)) if outcomes[0].tokens[i] != outcomes[1].tokens[i]]
    assert len(differing) == len(PROMPTS)


def test_same_prompt_twice_is_sampled_twice(tiny: Tiny) -> None:
    outcome = run(tiny, [PROMPTS[0]] * 2, Sampling(temperature=1.0))
    assert outcome.tokens[0] != outcome.tokens[1]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-9)]
)
def test_sampling_from_one_token_is_greedy(
    tiny: Tiny, greedy: list[tuple[int, ...]], sampling: Sampling
) -> None:
    assert run(tiny, PROMPTS, sampling).tokens == dict(enumerate(greedy))


def test_samples_follow_the_distribution(tiny: Tiny) -> None:
    count, prompt = 2000, PROMPTS[2]
    with torch.inference_mode():
        logits = tiny.model(torch.tensor([prompt])).logits[0, -1]
    for sampling in (
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.6, top_k=12, seed=2),
        Sampling(temperature=1.3, top_p=0.5, seed=3),
    ):
        outcome = run(tiny, [prompt] * count, sampling, new_tokens=1, share=8.0)
        seen = Counter(tokens[0] for tokens in outcome.tokens.values())
        expected = distribution(logits, sampling)
        assert all(expected[token] > 0 for token in seen)
        # Pearson's statistic has the mean `freedom` and the variance twice that.
        statistic = sum(
            (seen[token] - count * p) ** 2 / (count * p) for token, p in expected.items() if p
        )
        freedom = sum(p > 0 for p in expected.values()) - 1
        assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def distribution(logits: torch.Tensor, sampling: Sampling) -> dict[int, float]:
    """What sampling means, in plain Python: temperature, then top-k, then top-p."""
    weights = (logits.double() / sampling.temperature).softmax(-1).tolist()
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
    ranked = ranked[: sampling.top_k or len(ranked)]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= sampling.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    return {t: weights[t] / mass if t in kept else 0.0 for t in range(len(weights))}


@pytest.mark.parametrize("model", ["tiny", "windowed"])
def test_padding_changes_nothing(model: str, request: pytest.FixtureRequest) -> None:
    tiny: Tiny = request.getfixturevalue(model)
    forced = ragged_prompts([NEW] * len(PROMPTS), seed=9)
    budget = 4 * tiny.weight_bytes
    knobs: Knobs = {**SMALL_STEPS, "seqs": 10, "rows": 10, "attn_tokens": 999, "workers": 1}
    plan = plan_for(tiny, PROMPTS, NEW, budget, "module_batch", {**knobs, "prefill_tokens": 999})
    together = forced_logits(tiny, plan, PROMPTS, forced)
    for i in (1, 2, 6):
        one = plan_for(tiny, [PROMPTS[i]], NEW, budget)
        alone = forced_logits(tiny, one, [PROMPTS[i]], [forced[i]])[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


def test_padding_tokens_are_never_read(tiny: Tiny) -> None:
    """What stands in the padding is anything at all: another prompt beside, another result not."""
    lengths = (3, 40)
    results = []
    for seed in (1, 2):
        prompts = [PROMPTS[6], ragged_prompts([40], seed)[0]]
        assert tuple(map(len, prompts)) == lengths
        knobs: Knobs = {**SMALL_STEPS, "seqs": 2, "rows": 2, "attn_tokens": 80, "workers": 1}
        results.append(run(tiny, prompts, policy="module_batch", knobs=knobs).tokens[0])
    assert results[0] == results[1]


def test_context_ends_a_prompt(tiny: Tiny) -> None:
    lengths = (CONTEXT - 1, CONTEXT - 5, 20)
    prompts, new = ragged_prompts(lengths, seed=4), 30
    outcome = run(tiny, prompts, new_tokens=new)
    assert [len(outcome.tokens[i]) for i in range(3)] == [1, 5, new]
    assert set(outcome.reasons.values()) == {"length"}
    expected = transformers_tokens(tiny.model, prompts, lambda n: min(new, CONTEXT - n))
    assert outcome.tokens == dict(enumerate(expected))


def test_requests_stop_at_the_context() -> None:
    prompts = [Prompt(4, "a", 1, None, (1,) * 90), Prompt(7, "b", 2, None, (1,) * 10)]
    requests = requests_of(prompts, context=100, new_tokens=30)
    assert [(r.index, r.length, r.new_tokens) for r in requests] == [(4, 90, 10), (7, 10, 30)]


@pytest.mark.parametrize("seqs", [1, 3, 10])
def test_module_batch_with_equal_batches_is_model_batch(tiny: Tiny, seqs: int) -> None:
    budget, workload = 4 * tiny.weight_bytes, Workload.of(LENGTHS, NEW)
    knobs: Knobs = {"seqs": seqs, "chunk": 4, "slots": 3}
    model_batch = plan_for(tiny, PROMPTS, NEW, budget, "model_batch", knobs)
    setting = Setting(tiny.captured.graph, machine(), budget, workload)
    equal = {**knobs, **equal_batches(setting, seqs), "embed": True}
    module_batch = plan_for(tiny, PROMPTS, NEW, budget, "module_batch", equal)
    assert module_batch.moves == model_batch.moves
    assert module_batch.prediction == model_batch.prediction
