"""Workloads without prompts: shorthand, published ones, files, and plans from a config.json."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, OlmoeConfig, OlmoeForCausalLM

from dovetail.cli import main
from dovetail.ir.errors import InputError
from dovetail.ir.plan import Plan, load_plan
from dovetail.ir.workload import Workload
from dovetail.machine_files import load_machine, save_machine
from dovetail.planning import CONFIG_FILE, Model
from dovetail.workloads import (
    MOST_PROMPTS,
    WorkloadFile,
    check_context,
    load_workload,
    load_workload_file,
    shipped_workloads,
)

CONFIGS = Path(__file__).parent.parent / "bench" / "configs"


def quiet(text: str) -> None:
    """No notes."""


def test_shorthand() -> None:
    assert load_workload("1024x512+256") == Workload(((512, 1024),), 256)


def test_shipped_workloads_are_those_that_were_published() -> None:
    assert shipped_workloads() == [
        "chatbotarena",
        "flexgen",
        "gsm8k",
        "helm-reasoning",
        "helm-summarization",
        "mmlu",
        "mtbench",
    ]


@pytest.mark.parametrize("name", shipped_workloads())
def test_shipped_workloads_name_their_sources(name: str) -> None:
    file = load_workload_file(name)
    assert file.name == name
    assert set(file.sources) == {"lengths", "new_tokens"}
    assert load_workload(name) == file.workload()


@pytest.mark.parametrize(
    ("name", "mean", "longest", "new_tokens"),
    [
        ("mtbench", 77.0, 418, 128),
        ("mtbench+32", 77.0, 418, 32),
        ("helm-reasoning", 242.0, 256, 50),
        ("helm-summarization", 1693.1, 1984, 64),
        ("mmlu", 512.0, 512, 1),
    ],
)
def test_published_lengths(name: str, mean: float, longest: int, new_tokens: int) -> None:
    workload = load_workload(name)
    assert workload.prompt_tokens / workload.prompts == pytest.approx(mean, abs=0.05)
    assert (workload.longest, workload.new_tokens) == (longest, new_tokens)


def test_workload_file_adds_equal_lengths_up(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"lengths": [[5, 2], [9, 1], [5, 3]], "new_tokens": 4}')
    assert load_workload(str(path)) == Workload(((9, 1), (5, 5)), 4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "1024x512",
            "expected PROMPTSxLENGTH\\+NEW .* published workloads chatbotarena, .*mtbench",
        ),
        ("mt-bench", "workload 'mt-bench': expected"),
        ("mtbench+", "workload 'mtbench\\+': expected"),
        ("0x512+256", "'0x512\\+256': found 0 prompts of 512 tokens, expected at least 1"),
        ("8x0+256", "'8x0\\+256': a workload needs prompts of at least one token"),
        ("8x512+0", "new_tokens must be at least 1, found 0"),
        ("mtbench+0", "new_tokens must be at least 1, found 0"),
        (f"{MOST_PROMPTS + 1}x1+1", f"found {MOST_PROMPTS + 1} prompts, expected at most"),
        ("none.json", "the workload file none.json cannot be read: No such file.*mtbench"),
        ("folder/mtbench", "the workload file folder/mtbench cannot be read"),
    ],
)
def test_load_workload_refuses(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_workload(text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff", "can't decode byte"),
        (b"{", "Expecting property name"),
        (b"[" * 100_000, "recursion"),
        (b"{}", "field 'lengths' of WorkloadFile is missing"),
        (b'{"lengths": [[5]], "new_tokens": 1}', r"\$.lengths\[0\]: found 1 items, expected 2"),
        (b'{"lengths": [[5, 1.5]], "new_tokens": 1}', "expected int"),
        (b'{"lengths": [[5, 1]], "new": 1}', "unknown field 'new'"),
        (b'{"lengths": [], "new_tokens": 1}', "a workload needs prompts"),
        (b'{"lengths": [[5, -1]], "new_tokens": 1}', "found -1 prompts of 5 tokens"),
    ],
)
def test_load_workload_refuses_what_is_no_workload(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"bad.json.*{reason}"):
        load_workload(str(path))


def test_check_context() -> None:
    check_context(Workload(((60, 1),), 4), 64)
    with pytest.raises(InputError, match=r"60 tokens and 5 new ones, 65 together.*context is 64"):
        check_context(Workload(((60, 1),), 5), 64)


# What `dovetail plan make` makes of a configuration alone.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with weights."""
    folder = tmp_path_factory.mktemp("small")
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        dtype="float32",
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but that checkpoint's config.json."""
    folder = tmp_path_factory.mktemp("config")
    (folder / CONFIG_FILE).write_bytes((checkpoint / CONFIG_FILE).read_bytes())
    return folder


def make(model: Path, out: Path, *more: str) -> int:
    """Run `dovetail plan make` for the laptop, with these options more."""
    return main(["plan", "make", str(model), "--machine", "laptop-16gb", "-o", str(out), *more])


def made(model: Path, out: Path, *more: str) -> Plan:
    """The plan that it writes."""
    assert make(model, out, *more) == 0
    return load_plan(out)


@pytest.mark.parametrize("name", ["", CONFIG_FILE])
def test_a_config_is_enough(config: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "plan.json"
    plan = made(config / name, out, "--workload", "12x20+6", "--budget", "ram=64MiB")
    assert plan.workload == Workload(((20, 12),), 6)
    assert plan.budget == {"ram": 64 << 20}
    assert plan.machine.name == "laptop-16gb"
    assert plan.checkpoint == ""
    assert main(["plan", "check", str(out)]) == 0


def test_a_config_is_captured_as_its_checkpoint_is(checkpoint: Path, config: Path) -> None:
    assert Model.open(config, quiet).captured.graph == Model.open(checkpoint, quiet).captured.graph


def test_a_config_beside_weights_is_planned_without_them(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--workload", "12x20+6", "--budget", "ram=64MiB")
    with_weights = made(checkpoint, tmp_path / "with" / "plan.json", *options)
    without = made(checkpoint / CONFIG_FILE, tmp_path / "without" / "plan.json", *options)
    assert with_weights.checkpoint and not without.checkpoint
    assert replace(without, checkpoint=with_weights.checkpoint) == with_weights


def test_the_budget_is_half_of_the_named_machine_by_default(config: Path, tmp_path: Path) -> None:
    plan = made(config, tmp_path / "plan.json", "--workload", "12x20+6")
    assert plan.budget == {"ram": 8 << 30}


@pytest.mark.parametrize("ending", ["model.safetensors.index.json", "pytorch_model.bin"])
def test_a_folder_whose_weights_cannot_be_read_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    (tmp_path / CONFIG_FILE).write_bytes((config / CONFIG_FILE).read_bytes())
    (tmp_path / ending).write_text("{}")
    assert make(tmp_path, tmp_path / "plan.json", "--workload", "12x20+6") == 1
    assert ending in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--workload", "12x60+6"), "66 together; the model's context is 64"),
        (("--workload", "12x20"), "workload '12x20': expected"),
        (("--workload", "12x20+6", "--max-new-tokens", "6"), "go with --prompts"),
        (("--workload", "12x20+6", "--skip-bad"), "go with --prompts"),
        (("--workload", "12x20+6", "--budget", "ram=1GiB,hbm=1GiB"), "found the tier hbm, which"),
        (("--workload", "12x20+6", "--budget", "ram=17GiB"), "has 16.00 GiB: give at most that"),
    ],
)
def test_make_refuses(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    reason: str,
) -> None:
    assert make(config, tmp_path / "plan.json", *options) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_make_refuses_a_missing_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / CONFIG_FILE, tmp_path / "p.json", "--workload", "12x20+6") == 1
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [(), ("--workload", "12x20+6", "--prompts", "in.jsonl")], ids=["neither", "both"]
)
def test_make_takes_one_of_prompts_and_workload(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as caught:
        make(config, tmp_path / "plan.json", *more)
    assert caught.value.code == 2
    assert "--workload" in capsys.readouterr().err


def test_a_machine_file_of_ones_own_bounds_the_budget(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_machine(replace(load_machine("laptop-16gb"), name="small"), tmp_path / "small.json")
    options = ("--machine", str(tmp_path / "small.json"), "--workload", "12x20+6")
    assert make(config, tmp_path / "plan.json", *options, "--budget", "ram=20GiB") == 1
    assert "the machine small has 16.00 GiB" in capsys.readouterr().err


# The configurations of published models.

PARAMETERS = {
    "Mixtral-8x7B": 46.7e9,
    "Mixtral-8x22B": 140.6e9,
    "Qwen3-30B-A3B": 30.5e9,
    "DeepSeek-V2": 235.7e9,
    "DeepSeek-V3": 671.0e9,
    "OLMoE-1B-7B": 6.92e9,
}


def test_every_published_configuration_has_its_parameters_stated() -> None:
    assert {path.parent.name for path in CONFIGS.glob("*/config.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configurations(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = CONFIGS / name
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == pytest.approx(PARAMETERS[name], rel=2e-3)
    assert json.loads((path / CONFIG_FILE).read_text())["torch_dtype"] == "bfloat16"


def test_a_workload_file_is_a_record() -> None:
    assert WorkloadFile(((5, 2),), 3).workload() == Workload(((5, 2),), 3)
