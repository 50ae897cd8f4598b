"""Runs with experts in fewer bits: what they compute, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.e2e.support import (
    Tiny,
    forced_logits,
    machine,
    plan_for,
    ragged_prompts,
    save_tiny,
    tiny_model,
)

import dovetail
from dovetail.checkpoint import ModelFolder
from dovetail.cli import main
from dovetail.codegen.kernels.quantise import pack, unpack
from dovetail.ir.errors import CheckpointError, InputError
from dovetail.ir.machine import Curve
from dovetail.ir.moves import ExpertFormat, Pack, precision_of
from dovetail.machine_files import save_machine
from dovetail.passes.expert_precision import weights_of, with_precision
from dovetail.precision.convert import convert
from dovetail.precision.folder import converted_folder, open_converted
from dovetail.runtime.quantised import int4_matrix
from dovetail.runtime.safetensors_index import CheckpointIndex

PROMPTS = ragged_prompts((5, 40, 1, 17, 9, 33), seed=0)
FORCED = ragged_prompts([5] * len(PROMPTS), seed=1)
BF16 = torch.bfloat16


def in_form(tiny: Tiny, form: ExpertFormat) -> Tiny:
    """The model with its experts converted."""
    folder = ModelFolder.open(tiny.folder)
    graph = tiny.captured.graph
    convert(folder, graph, form, converted_folder(tiny.folder, form))
    made = replace(tiny.captured, graph=with_precision(graph, form))
    return replace(tiny, captured=made, index=open_converted(folder, form))


def with_rounded_experts(tiny: Tiny, form: ExpertFormat, folder: Path) -> Tiny:
    """The model whose experts have, in its own type, the values that the format stands for."""
    folder.mkdir()
    (path,) = tiny.folder.glob("*.safetensors")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".experts." in name and tensor.dim() > 1:
            stored, scale = pack(tensor[None], weights_of(form))
            assert scale is not None
            if form == "int4":
                made = int4_matrix(stored[0], scale[0], tensor.dtype)
            else:
                made = unpack(stored, scale, weights_of(form))[0].to(tensor.dtype)
            tensors[name] = made.contiguous()
    save_file(tensors, folder / path.name, {"format": "pt"})
    return replace(tiny, folder=folder, index=CheckpointIndex.open(folder))


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("olmoe", "int8"),
        ("olmoe", "int4"),
        ("gpt_oss", "int8"),
        ("gpt_oss", "int4"),
        ("deepseek_v3", "int4"),
    ],
)
def test_logits_are_those_of_rounded_experts(
    family: str, form: ExpertFormat, tmp_path: Path
) -> None:
    """To the last bit for int4; int8 rounds an expert's rows too."""
    tiny = save_tiny(tiny_model(family, BF16), tmp_path / "checkpoint")
    here = in_form(tiny, form)
    budget = int(1.2 * here.weight_bytes) + (12 << 20)
    plan = plan_for(here, PROMPTS, 5, budget, "module_batch")
    found = forced_logits(here, plan, PROMPTS, FORCED)
    packed = replace(plan, moves=(*plan.moves, Pack("experts", 64)))
    for one, other in zip(found, forced_logits(here, packed, PROMPTS, FORCED), strict=True):
        assert torch.equal(one, other)
    rounded = tiny
    if family != "gpt_oss":  # whose experts are in one tensor, turned
        rounded = with_rounded_experts(tiny, form, tmp_path / "rounded")
    budget = int(1.2 * tiny.weight_bytes) + (12 << 20)
    plan = plan_for(rounded, PROMPTS, 5, budget, "module_batch")
    expected = torch.cat(forced_logits(rounded, plan, PROMPTS, FORCED))
    if form == "int4" and rounded is not tiny:
        assert torch.equal(torch.cat(found), expected)
    error = (torch.cat(found) - expected).norm() / expected.norm()
    assert error < {"int8": 0.1, "int4": 0.4}[form]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, prompts, and a machine whose disk makes fewer bits worth it."""
    folder = tmp_path_factory.mktemp("precision")
    save_tiny(tiny_model("olmoe", BF16), folder / "model")
    where = machine("bfloat16")
    slow = Curve((4096.0, 8e6), (1e5, 1e6))
    save_machine(replace(where, disk=slow), folder / "machine.json")
    lines = [json.dumps({"input_ids": ids}) for ids in PROMPTS]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def words(place: Path, command: str, *more: str) -> list[str]:
    """The arguments of a command on the place's checkpoint."""
    out = {"run": "out.jsonl", "plan make": "plan.json"}[command]
    source = ["--prompts", str(place / "in.jsonl"), "--max-new-tokens", "4"]
    own = ["--machine", str(place / "machine.json"), "--budget", "ram=24MiB"]
    option = "--out" if command == "run" else "-o"
    return [*command.split(), str(place / "model"), *source, *own, option, str(place / out), *more]


def test_permission_without_converted_experts_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(place, "run", "--allow", "int4")) == 1
    said = capsys.readouterr().err
    assert "no such folder" in said and "dovetail convert" in said and "--experts int4" in said
    assert not (place / "out.jsonl").exists()


def test_run_in_int8_needs_permission_throughout(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(place / "model"), "--experts", "int8"]) == 0
    assert main(words(place, "plan make", "--allow", "int8")) == 0
    assert "precision(experts, int8)" in capsys.readouterr().out
    assert main(["plan", "check", str(place / "plan.json")]) == 0
    plan = ["--plan", str(place / "plan.json")]
    assert main(words(place, "run", *plan)) == 1
    assert "runs experts in int8, which changes results; add --allow int8" in (
        capsys.readouterr().err
    )
    assert main(words(place, "run", *plan, "--allow", "int8", "--ignore-eos")) == 0
    lines = (place / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [len(json.loads(line)["tokens"]) for line in lines] == [4] * len(PROMPTS)
    assert "int8" in (place / "out.jsonl.dovetail" / "plan.json").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(words(place, "run", "--ignore-eos")) == 1
    assert "allow" in capsys.readouterr().err


def test_loaded_model_needs_permission_and_converted_experts(place: Path) -> None:
    folder = place / "model"
    options = {"budget": "ram=24MiB", "target": str(place / "machine.json")}
    with pytest.raises(InputError, match=r"allow int3: expected int8 or int4"):
        dovetail.load(folder, allow=["int3"], **options)  # type: ignore[list-item]
    with pytest.raises(CheckpointError, match=r"dovetail convert .* --experts int4"):
        dovetail.load(folder, allow=["int4"], **options)
    if not converted_folder(folder, "int8").exists():
        assert main(["convert", str(folder), "--experts", "int8"]) == 0
    with dovetail.load(folder, allow=["int8"], **options) as model:
        out = model.generate(PROMPTS[:3], max_new_tokens=3)
        assert model.plan is not None and precision_of(model.plan.moves) == "int8"
    for row, prompt in zip(out, PROMPTS, strict=False):
        assert row[: len(prompt)] == prompt and len(row) > len(prompt)
