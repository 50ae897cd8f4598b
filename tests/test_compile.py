"""dovetail.compile: the module itself, run by what was measured; eager is one of the candidates."""

import copy
import inspect
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.support import VOCAB, machine, tiny_model
from tests.test_gpu_choose import MACHINE as GPU_MACHINE
from torch import Tensor, nn

import dovetail
from dovetail.doors import compiled_generate, gpu_planning, module_schedule, regions
from dovetail.doors.compiled_function import CompiledFunction
from dovetail.doors.compiled_module import Options, compiled_instance
from dovetail.doors.region_choice import (
    EAGER,
    Choice,
    ModulePlan,
    bucket_of,
    load_module_plan,
    save_module_plan,
    winner,
)
from dovetail.ir.errors import BudgetError, InputError, ModelError, PlanError
from dovetail.machine_files import save_machine


@pytest.fixture(autouse=True)
def _own_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test measured is no other test's."""
    monkeypatch.setenv("DOVETAIL_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("olmoe")


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make measurements say that an implementation is the fastest."""

    def say(name: str) -> None:
        def measure(kind: str, tokens: int, runs: Any, refused: Any) -> Choice:
            for run in runs.values():
                run()
            samples = {each: (1.0 if each == name else 2.0,) for each in runs}
            return Choice(kind, tokens, winner(samples), samples, refused)

        monkeypatch.setattr(module_schedule, "measure", measure)
        monkeypatch.setattr("dovetail.doors.compiled_function.measure", measure)

    return say


def ids(seqs: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(seqs * 100 + tokens)
    return torch.randint(3, VOCAB, (seqs, tokens), generator=generator)


class Block(nn.Module):
    """Routed experts behind a Python loop, as many write them."""

    def __init__(self, hidden: int = 16, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(experts))
        self.top_k = top_k

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(self.top_k, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(index == number)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out * scale


class Plain(nn.Module):
    """Nothing to schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.linear(x).relu()
        return out


@pytest.mark.parametrize("name", ["dovetail", "batched_mm", EAGER])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (2, 40)])
def test_every_implementation_gives_eagers_result(
    model: Any, fastest: Callable[[str], None], name: str, shape: tuple[int, int]
) -> None:
    fastest(name)
    compiled = dovetail.compile(model)
    with torch.no_grad():
        expected, found = model(ids(*shape)).logits, compiled(ids(*shape)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tried = name != "batched_mm" or shape[0] * shape[1] <= regions.BATCHED_TOKENS
    assert {c.winner for c in compiled.plan.choices} == {name if tried else EAGER}


def test_is_the_module_itself(model: Any) -> None:
    compiled = dovetail.compile(model)
    assert isinstance(compiled, type(model)) and type(compiled).__name__ == type(model).__name__
    assert inspect.signature(compiled.forward) == inspect.signature(model.forward)
    own, theirs = compiled.state_dict(), model.state_dict()
    assert list(own) == list(theirs)
    assert all(own[name].data_ptr() == theirs[name].data_ptr() for name in own)
    compiled.generation_config.max_new_tokens = 3
    assert model.generation_config.max_new_tokens == 3
    model.generation_config.max_new_tokens = None
    # The module that was compiled works as before, also when it is copied.
    compiled(ids(1, 4))
    again = copy.deepcopy(model)
    assert type(again.model.layers[0].mlp.experts).__mro__[1] is nn.Module
    assert torch.equal(again(ids(1, 4)).logits, model(ids(1, 4)).logits)


def test_choices_are_of_a_dtype(model: Any, fastest: Callable[[str], None]) -> None:
    fastest("dovetail")
    own = copy.deepcopy(model)
    # transformers' grouped products have no float64.
    own.set_experts_implementation("eager")
    compiled = dovetail.compile(own)
    compiled(ids(1, 4))
    found = compiled.double()(ids(1, 4)).logits
    torch.testing.assert_close(found, own(ids(1, 4)).logits)
    assert {("float64" in c.region, c.winner) for c in compiled.plan.choices} == {
        (False, "dovetail"),
        (True, "dovetail"),
    }
    own.set_experts_implementation("dovetail")
    traced: Any = torch.compile(compiled, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(ids(1, 4)).logits, found)


def test_hooks_still_run(model: Any, fastest: Callable[[str], None]) -> None:
    fastest("dovetail")
    compiled = dovetail.compile(model)
    seen: list[int] = []
    hook = model.model.layers[1].mlp.experts.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output))
    )
    compiled(ids(2, 5))
    hook.remove()
    assert seen == [10]


def test_choices_are_kept_and_measured_once(
    model: Any, fastest: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest("dovetail")
    dovetail.compile(model)(ids(2, 5))

    def no_measuring(*_: object) -> Choice:
        raise AssertionError("measured again")

    monkeypatch.setattr(module_schedule, "measure", no_measuring)
    other = dovetail.compile(model)
    other(ids(2, 7))
    assert [(c.tokens, c.winner, c.source) for c in other.plan.choices] == [
        (16, "dovetail", "stored")
    ]


def test_plan_file_is_followed(model: Any, fastest: Callable[[str], None], tmp_path: Path) -> None:
    fastest("dovetail")
    compiled = dovetail.compile(model)
    compiled(ids(2, 5))
    path = tmp_path / "plan.json"
    compiled.save_plan(path)
    assert load_module_plan(path) == compiled.plan
    fastest(EAGER)
    other = dovetail.compile(model, plan=path)
    other(ids(2, 5))
    assert [(c.winner, c.source) for c in other.plan.choices] == [("dovetail", "given")]
    assert other.plan.digest() == compiled.plan.digest()


def test_foreign_plan_is_refused_or_left_aside(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plan.json"
    plan = dovetail.compile(model).plan
    save_module_plan(replace(plan, environment={"flags": "others"}), path)
    with pytest.raises(PlanError, match="different machine"):
        dovetail.compile(model, plan=path, on_stale="error")
    dovetail.compile(model, plan=path)(ids(1, 2))
    assert "regions are measured anew" in caplog.text
    save_module_plan(replace(plan, module="Other"), path)
    with pytest.raises(PlanError, match="is for a Other, found a OlmoeForCausalLM"):
        dovetail.compile(model, plan=path)
    path.write_text(path.read_text().replace("Other", "Some"))
    with pytest.raises(PlanError, match="was altered"):
        dovetail.compile(model, plan=path)


def test_an_implementation_that_differs_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return x

    monkeypatch.setattr(regions, "experts_forward", wrong)
    compiled = dovetail.compile(model)
    compiled(ids(2, 5))
    (choice,) = compiled.plan.choices
    assert "differs from eager" in choice.refused["dovetail"] and choice.winner != "dovetail"
    assert "differs from eager" in compiled.explain()


def test_tells_its_plan(model: Any, fastest: Callable[[str], None]) -> None:
    fastest("dovetail")
    compiled = dovetail.compile(model)
    assert "nothing has run yet" in repr(compiled)
    compiled(ids(2, 5))
    lines = repr(compiled).splitlines()
    assert len(lines) == 3 and "4 regions of 1 kinds" in lines[1] and "dovetail in 1" in lines[2]
    text = compiled.explain()
    assert "model.layers.0.mlp.experts and 3 more" in text and "0.50" in text
    spans = compiled.timeline().spans
    assert [span.layer for span in spans] == [0, 1, 2, 3, -1]
    assert spans[-1].seconds >= sum(span.seconds for span in spans[:-1])


def test_class_decorator_keeps_the_class() -> None:
    plain = Block().eval()

    @dovetail.compile(policy="auto")
    class Decorated(Block):
        """A user's own."""

        def __init__(self, hidden: int = 16) -> None:
            super(Decorated, self).__init__(hidden)  # noqa: UP008  # as older code says it

    assert Decorated.__doc__ == "A user's own."
    assert list(inspect.signature(Decorated).parameters) == ["hidden"]
    made = Decorated(hidden=16)
    with pytest.raises(ModelError, match=r"in training mode.*call .eval\(\) first"):
        made(torch.randn(3, 16))
    made = made.eval()
    made.load_state_dict(plain.state_dict())
    x = torch.randn(7, 16)
    assert torch.equal(made(x, scale=2.0), plain(x, 2.0))
    assert torch.equal(made.double()(x.double()), plain.double()(x.double()))


class Capped(Block):
    """An expert takes no more than three tokens: not what the router says alone."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(self.top_k, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = (found[:3] for found in torch.where(index == number))
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out * scale


@pytest.mark.parametrize("whole", [True, False])
def test_a_python_loop_over_experts_is_scheduled(
    fastest: Callable[[str], None], whole: bool
) -> None:
    fastest("dovetail")
    plain = (Block() if whole else nn.Sequential(nn.Linear(16, 16), Block())).eval()
    compiled: Any = dovetail.compile(plain)
    for tokens in (1, 9):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(compiled(x), plain(x))
    assert list(compiled.plan.regions) == ["" if whole else "1"]
    assert {choice.winner for choice in compiled.plan.choices} == {"dovetail"}
    assert "top 2 by softmax" in compiled.explain()
    if whole:
        # Arguments that the rule was not found with.
        torch.testing.assert_close(compiled(x, scale=3.0), plain(x, 3.0))


def test_what_is_not_recognised_runs_as_it_is_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = nn.Sequential(nn.Linear(16, 16), Capped()).eval()
    compiled: Any = dovetail.compile(plain)
    x = torch.randn(5, 16)
    assert torch.equal(compiled(x), plain(x))
    assert "1 (Capped) has 4 experts of one shape in 'experts' and a router" in caplog.text
    assert "tokens go to 0 to 2 experts" in compiled.explain()
    assert "nothing to schedule" in repr(compiled)


def test_buffers_may_change_where_nothing_is_scheduled() -> None:
    compiled: Any = dovetail.compile(Plain().eval())
    compiled(torch.randn(2, 8))
    compiled(torch.randn(2, 8))
    assert int(compiled.calls) == 2


def test_a_region_that_changes_its_buffers_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    own: Any = tiny_model("olmoe", num_hidden_layers=1)
    experts = own.model.layers[0].mlp.experts
    experts.register_buffer("seen", torch.zeros(()), persistent=False)
    first = type(experts).forward

    class Counting(type(experts)):  # type: ignore[misc]
        def forward(self, *arguments: Any) -> Any:
            self.seen += 1
            return first(self, *arguments)

    experts.__class__ = Counting
    compiled = dovetail.compile(own)
    compiled(ids(1, 4))
    assert "changes its own buffers" in caplog.text
    assert compiled.plan.choices[0].winner == EAGER


def test_compiled_modules_refuse_training_and_copies(model: Any) -> None:
    compiled = dovetail.compile(model)
    refusals: list[tuple[Callable[[], object], str]] = [
        (compiled.train, "was asked to train"),
        (lambda: torch.save(compiled, io.BytesIO()), "cannot be pickled or copied"),
        (lambda: copy.deepcopy(compiled), "compile the copy"),
        (lambda: dovetail.compile(compiled), "is compiled already"),
        (lambda: dovetail.compile(Plain()), "is in training mode"),
    ]
    for call, message in refusals:
        with pytest.raises(ModelError, match=message):
            call()


def test_compile_refuses_what_it_cannot_use(model: Any, tmp_path: Path) -> None:
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: dovetail.compile(3), "got int, expected a torch.nn.Module"),
        (lambda: dovetail.compile("folder"), "dovetail.load"),
        (lambda: dovetail.compile(model, policy="x"), "policy 'x' is not known"),
        (lambda: dovetail.compile(model, plan=tmp_path / "no"), "no such module plan file"),
        (lambda: dovetail.compile(model, on_stale="x"), "expected one of verify"),
        (lambda: dovetail.compile(model, budget="x"), "budget"),
    ]
    for call, message in refusals:
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        dovetail.compile(model, batch=3)  # type: ignore[call-overload]


# generate


@pytest.fixture
def target(tmp_path: Path) -> str:
    save_machine(machine(), tmp_path / "machine.json")
    return str(tmp_path / "machine.json")


def test_generate_is_scheduled_where_that_is_faster(
    model: Any, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.doors.compiled_generate.winner", lambda samples: "dovetail")
    compiled = dovetail.compile(model, target=target, policy="eager")
    prompts = ids(5, 9)
    prompts[0, :4] = prompts[1, :1] = 0
    inputs = {"input_ids": prompts, "attention_mask": prompts.ne(0).long()}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    expected = model.generate(**inputs, **options)
    assert torch.equal(compiled.generate(**inputs, **options), expected)
    assert compiled.generation_plan is not None and compiled.generation_plan.policy == "eager"
    assert {span.engine for span in compiled.timeline().spans} >= {"cpu0"}
    assert "scheduled by eager" in compiled.explain()
    # Weights that change in place are those that run.
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    try:
        expected = model.generate(**inputs, **options)
        assert torch.equal(compiled.generate(**inputs, **options), expected)
    finally:
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
    # Weights that are replaced are those that run.
    with torch.no_grad():
        own, model.lm_head.weight = model.lm_head.weight, nn.Parameter(-model.lm_head.weight)
    try:
        expected = model.generate(**inputs, **options)
        assert torch.equal(compiled.generate(**inputs, **options), expected)
    finally:
        model.lm_head.weight = own
    # Sampling, few prompts and hooks are transformers' own.
    torch.manual_seed(0)
    sampled = model.generate(**inputs, max_new_tokens=4, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(compiled.generate(**inputs, max_new_tokens=4, do_sample=True), sampled)
    seen: list[object] = []
    hook = model.model.norm.register_forward_hook(lambda *given: seen.append(given))
    compiled.generate(**inputs, **options)
    hook.remove()
    assert seen and "hooks on model.norm" in compiled.explain()


def test_generate_refuses_a_budget_below_the_weights(model: Any) -> None:
    compiled = dovetail.compile(model, budget="ram=64KiB")
    with pytest.raises(BudgetError, match=r"stream it with dovetail\.load"):
        compiled.generate(ids(4, 3), max_new_tokens=2)


def test_generate_on_a_gpu_is_planned_for_it_and_run_by_its_executor(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.doors.compiled_generate.winner", lambda samples: "dovetail")
    save_machine(GPU_MACHINE, tmp_path / "gpu.json")
    options = Options(target=str(tmp_path / "gpu.json"), stand_in=True)
    compiled: Any = compiled_instance(model, options)
    inputs = {"input_ids": ids(5, 9), "attention_mask": torch.ones(5, 9, dtype=torch.int64)}
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **asked)
    assert torch.equal(compiled.generate(**inputs, **asked), expected)
    plan = compiled.generation_plan
    assert plan.policy == "eager" and plan.machine.accelerator is not None
    assert {span.engine for span in compiled.timeline().spans} == {"gpu0"}
    # The executor packed a copy of the weights: what changes in place is packed again.
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    try:
        expected = model.generate(**inputs, **asked)
        assert torch.equal(compiled.generate(**inputs, **asked), expected)
    finally:
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("cuda:0", "torch finds none here"),
        ("cuda:1", "expected all of it on the cpu or on cuda:0"),
        ("mps", "plans run on the cpu and on cuda:0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_generate_says_why_it_does_not_run_where_a_model_is(
    model: Any, target: str, where: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device(where)
    found = device, where if device.index else ""
    monkeypatch.setattr(compiled_generate, "_device_of", lambda model: found)
    monkeypatch.setattr(gpu_planning, "find_machine", lambda *_: machine())
    compiled = dovetail.compile(model)
    expected = model.generate(ids(5, 4), max_new_tokens=2, do_sample=False)
    assert torch.equal(compiled.generate(ids(5, 4), max_new_tokens=2, do_sample=False), expected)
    assert text in compiled.explain() and compiled.generation_plan is None


def test_generate_on_a_gpu_says_what_hbm_lacks(model: Any, tmp_path: Path) -> None:
    small = replace(GPU_MACHINE, tiers={**GPU_MACHINE.tiers, "hbm": 1 << 16})
    save_machine(small, tmp_path / "gpu.json")
    options = Options(target=str(tmp_path / "gpu.json"), stand_in=True)
    compiled: Any = compiled_instance(model, options)
    compiled.generate(ids(5, 4), max_new_tokens=2, do_sample=False)
    assert "beside the model hbm has 64.00 KiB for it" in compiled.explain()


# functions


def test_function_is_called_as_it_is_or_traced(model: Any, fastest: Callable[[str], None]) -> None:
    fastest("traced")
    block = model.model.layers[0].mlp

    @dovetail.compile
    def twice(x: Tensor, times: int = 2) -> Tensor:
        """Doubles."""
        out: Tensor = block(x) * times
        return out

    assert isinstance(twice, CompiledFunction) and twice.__doc__ == "Doubles."
    assert list(inspect.signature(twice).parameters) == ["x", "times"]
    x = torch.randn(2, 6, 64)
    with torch.no_grad():
        torch.testing.assert_close(twice(x, times=3), block(x) * 3)
        torch.testing.assert_close(twice(x, times=3), block(x) * 3)
    assert [c.winner for c in twice.plan.choices] == ["traced"]
    assert "traced" in twice.explain() and len(repr(twice).splitlines()) == 3
    assert len(twice.timeline().spans) == 2
    with pytest.raises(ModelError, match="cannot be pickled"):
        torch.save(twice, io.BytesIO())


def test_function_that_writes_to_its_arguments_runs_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @dovetail.compile
    def add_one(x: Tensor) -> Tensor:
        return x.add_(1)

    x = torch.zeros(3)
    add_one(x)
    assert "it writes to its arguments; it runs as it is" in caplog.text


# the rule


def test_winner_needs_a_clear_gain() -> None:
    base = (1.0, 1.1, 0.9, 1.0)
    assert winner({EAGER: base, "b": (0.99, 1.09, 0.89, 0.99)}) == EAGER
    assert winner({EAGER: base, "b": (0.5, 0.5, 2.0, 2.0)}) == EAGER
    assert winner({EAGER: base, "b": (0.9, 1.0, 0.8, 0.9), "a": (0.9, 1.0, 0.8, 0.9)}) == "a"
    assert bucket_of(1) == 1 and bucket_of(5) == 8 and bucket_of(8) == 8


def test_module_plan_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text, message in (
        ("{", "not a readable module plan"),
        ('{"kind": "Machine"}', "not a dovetail module plan"),
        ('{"kind": "ModulePlan", "version": 1}', "make the module plan again"),
    ):
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            load_module_plan(path)
    save_module_plan(ModulePlan(1, "M", {}, {}, ()), path)
    assert load_module_plan(path).module == "M"
