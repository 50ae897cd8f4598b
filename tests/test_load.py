"""dovetail.load: transformers' tokens from less memory than the weights, and what it refuses."""

import copy
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.support import machine
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

import dovetail
from dovetail.capture.captured import Captured
from dovetail.demo import write_demo
from dovetail.doors.plan_cache import Bucket
from dovetail.ir.errors import BudgetError, InputError, ModelError, PlanError
from dovetail.ir.plan import Plan, save_plan
from dovetail.machine_files import load_machine, save_machine
from dovetail.planning import PLAN_FILE, Note, Request, plan_here

BUDGET = "ram=12MiB"
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [40], [90, 91, 92, 93, 94]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo") / "checkpoint")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    save_machine(machine(), path)
    return str(path)


def plan_in_process(request: Request, place: Path, note: Note) -> tuple[Plan, Captured]:
    """As in the process of its own that planning has, but without starting one."""
    plan, captured = plan_here(request, note)
    captured.save(place)
    save_plan(plan, place / PLAN_FILE)
    return plan, captured


@pytest.fixture(autouse=True, scope="module")
def _plan_in_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dovetail.doors.loaded_model.plan_apart", plan_in_process)
        yield


@pytest.fixture(scope="module")
def model(checkpoint: Path, target: str) -> Iterator[Any]:
    loaded = dovetail.load(checkpoint, budget=BUDGET, policy="chunked_prefill", target=target)
    # One plan for all tests: whatever fits below is run under it.
    loaded._engine.prepare(Bucket(4, 32, 16))
    with loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    found = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    found.pad_token = found.pad_token or found.eos_token
    return found


def test_ragged_lists_get_transformers_tokens(model: Any, reference: Any) -> None:
    made = model.generate(PROMPTS, max_new_tokens=9, eos_token_id=-1)
    for prompt, row in zip(PROMPTS, made, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=-1
        )
        assert row == expected[0].tolist()


def test_padded_tensors_get_transformers_tensor(model: Any, reference: Any, tokenizer: Any) -> None:
    inputs = tokenizer(["It is a truth", "Mr. Darcy"], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    expected = reference.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
    # The mask follows from the padding where it is left out.
    pad = dict(options, pad_token_id=0)
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    again = model.generate(ids, **pad)
    width = ids.shape[1]
    assert torch.equal(again[:, width:], expected[:, width:])


def test_stop_tokens_end_rows_and_pad_fills_them(model: Any, reference: Any) -> None:
    free = model.generate([PROMPTS[0]], max_new_tokens=8, eos_token_id=-1)[0]
    stop = free[len(PROMPTS[0]) + 2]
    ids = torch.tensor([[5, 6, 7], [90, 91, 92]])
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 8, "eos_token_id": stop, "pad_token_id": 1, "do_sample": False}
    expected = reference.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


def test_sampling_follows_its_seed_and_top_k_of_one_is_greedy(model: Any) -> None:
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "eos_token_id": -1}
    torch.manual_seed(3)
    first = model.generate(PROMPTS, **options)
    torch.manual_seed(3)
    assert model.generate(PROMPTS, **options) == first
    assert model.generate(PROMPTS, **options) != first
    assert model.generate(PROMPTS, seed=5, **options) == model.generate(PROMPTS, seed=5, **options)
    greedy = model.generate(PROMPTS, max_new_tokens=8, eos_token_id=-1)
    assert model.generate(PROMPTS, top_k=1, **options) == greedy
    several = model.generate([PROMPTS[0]], num_return_sequences=3, top_p=0.9, **options)
    assert len(several) == 3 and len({tuple(row) for row in several}) > 1


def test_streamer_sees_every_token(
    model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer("It is a truth", return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=8, streamer=TextStreamer(tokenizer))
    assert tokenizer.decode(made[0]) in capsys.readouterr().out


def test_is_the_model_of_a_pipeline(model: Any, reference: Any, tokenizer: Any) -> None:
    texts = ["It is a truth", "Mr. Darcy was"]
    options = {"max_new_tokens": 8, "do_sample": False, "batch_size": 2}
    found, expected = (
        pipeline("text-generation", model=one, tokenizer=tokenizer)(texts, **options)
        for one in (model, reference)
    )
    assert found == expected
    assert model.complete(texts, max_new_tokens=8) == [
        one[0]["generated_text"].removeprefix(text) for one, text in zip(found, texts, strict=True)
    ]


def test_generation_config_stands_below_arguments(model: Any) -> None:
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.do_sample = 3, False
    assert len(model.generate([[5, 6, 7]], generation_config=config)[0]) <= 6
    made = model.generate([[5, 6, 7]], generation_config=config, max_new_tokens=5, eos_token_id=-1)
    assert len(made[0]) == 8


def test_tells_its_plan(model: Any) -> None:
    model.generate(PROMPTS, max_new_tokens=4)
    lines = repr(model).splitlines()
    assert len(lines) == 3 and "12.00 MiB" in lines[0] and "chunked_prefill" in lines[1]
    assert type(model).__name__ == "OlmoeForCausalLM" and model.dtype == torch.float32
    assert model.plan.workload.prompts == 4 and model.plan.prediction.peak_bytes <= 12 << 20
    assert "def cpu" in model.executor
    assert {span.kind for span in model.timeline().spans} >= {"run", "load"}
    assert "what every engine does" in model.explain()
    assert model.eval() is model and model.to("cpu") is model and model.can_generate()


def test_a_bucket_is_planned_once(
    model: Any, checkpoint: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_planning(*_: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr("dovetail.doors.loaded_model.plan_apart", no_planning)
    other = dovetail.load(checkpoint, budget=BUDGET, policy="chunked_prefill", target=target)
    assert other._engine.prepare(Bucket(4, 32, 16)).digest() == model.plan.digest()


def test_a_plan_file_is_followed(model: Any, checkpoint: Path, target: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(model.plan, path)
    with dovetail.load(checkpoint, budget=BUDGET, plan=path, target=target) as other:
        made = other.generate(PROMPTS, max_new_tokens=5)
        assert made == model.generate(PROMPTS, max_new_tokens=5)
        assert other.plan.moves == model.plan.moves


def test_a_foreign_plan_is_refused_or_left_aside(
    model: Any,
    checkpoint: Path,
    target: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    elsewhere = replace(load_machine(target), name="elsewhere", silicon={"flags": "other"})
    path = tmp_path / "plan.json"
    save_plan(replace(model.plan, machine=elsewhere), path)
    options: dict[str, Any] = {"budget": BUDGET, "policy": "chunked_prefill", "target": target}
    strict = dovetail.load(checkpoint, plan=path, on_stale="error", **options)
    with pytest.raises(PlanError, match="different machine"):
        strict.generate(PROMPTS, max_new_tokens=4)
    loose = dovetail.load(checkpoint, plan=path, **options)
    assert loose._engine.prepare(Bucket(4, 32, 16)).digest() == model.plan.digest()
    assert "planned anew" in caplog.text


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([[1, 2]], {"num_beams": 4}, "greedily or by sampling"),
        ([[1, 2]], {"temprature": 1.0}, "did you mean temperature"),
        ([[1, 2]], {"stop_strings": ["x"]}, "knows nothing of stop_strings"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [99999]], {}, "prompt 1 has token 99999"),
        ([list(range(3, 250)) * 9], {}, "the model's context is"),
        ("text", {}, "expected token ids"),
        ([1, 2, 3], {}, "for one prompt give"),
        (torch.zeros(2, 3), {}, "expected whole numbers"),
        ([[1, 2]], {"max_new_tokens": 0}, "at least 1"),
        ([[1, 2]], {"do_sample": True, "temperature": 0.0}, "above 0 to sample"),
        ([[1, 2]], {"num_return_sequences": 2}, "2 equal sequences"),
        ([[1, 2]], {"attention_mask": torch.ones(1, 2)}, "lists of tokens have no padding"),
        (torch.tensor([[1, 2]]), {"max_length": 2}, "leaves no new token"),
    ],
)
def test_generate_refuses_what_it_cannot_do(
    model: Any, inputs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(inputs, **options)


def test_generate_refuses_padding_on_the_right(model: Any) -> None:
    ids, mask = torch.tensor([[5, 6, 1]]), torch.tensor([[1, 1, 0]])
    with pytest.raises(InputError, match="pad on the left"):
        model.generate(ids, attention_mask=mask)


def test_a_streamer_refuses_several_sequences(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="one sequence, found 2"):
        model.generate(PROMPTS[:2], streamer=TextStreamer(tokenizer))


def test_model_refuses_what_it_is_not(model: Any, tmp_path: Path) -> None:
    refusals: list[tuple[Any, str]] = [
        (lambda: model(torch.tensor([[1]])), "never returns logits"),
        (model.train, "cannot be trained"),
        (model.state_dict, "holds no weights"),
        (lambda: model.save_pretrained(tmp_path), "holds no weights"),
        (lambda: model.to("meta"), "cannot be moved"),
        (lambda: model.to(torch.float16), "cannot be moved"),
        (lambda: torch.save(model, io.BytesIO()), "cannot be pickled"),
        (lambda: copy.deepcopy(model), "cannot be pickled"),
    ]
    for call, message in refusals:
        with pytest.raises(ModelError, match=message):
            call()


def test_load_refuses_bad_arguments(checkpoint: Path, tmp_path: Path) -> None:
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"policy": "best"}, "policy 'best' is not known"),
        ({"budget": {"hbm": 3}}, "expected bytes of ram"),
        ({"workload": 3}, "expected a text such as"),
        ({"on_stale": "maybe"}, "expected one of verify"),
        ({"plan": tmp_path / "none.json"}, "no such plan file"),
    ]
    for options, message in refusals:
        with pytest.raises(InputError, match=message):
            dovetail.load(checkpoint, **options)
    with pytest.raises(InputError, match="no such folder"):
        dovetail.load(tmp_path / "nothing")


def test_a_budget_too_small_is_refused(checkpoint: Path, target: str) -> None:
    small = dovetail.load(checkpoint, budget="ram=100KiB", policy="eager", target=target)
    with pytest.raises(BudgetError, match=r"is too small|has no schedule that fits"):
        small.generate([[5, 6, 7, 8]], max_new_tokens=2)


def test_an_error_in_a_run_leaves_a_usable_model(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    expected = model.generate(PROMPTS, max_new_tokens=3)
    with pytest.raises(KeyboardInterrupt):
        model._engine.run(_wanted(model), interrupted)
    assert model.generate(PROMPTS, max_new_tokens=3) == expected


def _wanted(model: Any) -> Any:
    from dovetail.doors.generate_arguments import read_arguments

    return read_arguments(PROMPTS, None, {"max_new_tokens": 3}, {}, 512, 256)


def test_buckets_round_up_to_powers_of_two() -> None:
    bucket = Bucket.of([3, 17, 9], [5, 20, 5], 2048)
    assert bucket == Bucket(4, 32, 32)
    assert bucket.holds([32, 1], [32, 60]) and not bucket.holds([33], [1])
    assert Bucket.of([100], [20], 120) == Bucket(1, 119, 20)
