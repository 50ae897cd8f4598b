"""`dovetail run` with a GPU's target: on the host device, and refused where there is no GPU."""

import json
from pathlib import Path

import pytest
import torch
from tests.e2e.support import ragged_prompts, save_tiny, tiny_model
from tests.test_gpu_choose import MACHINE

from dovetail.cli import main
from dovetail.gpu_run import with_gpu
from dovetail.ir.errors import ModelError, VerifyError
from dovetail.ir.gpu_settings import Dealing, ExpertLoad, LayerExperts, deal, expert_loads
from dovetail.ir.gpu_tasks import GpuTask, gpu_task
from dovetail.ir.token_space import TokenSpace
from dovetail.machine_files import save_machine

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_tiny(tiny_model("olmoe"), folder / "model")
    save_machine(MACHINE, folder / "gpu.json")
    lines = [json.dumps({"input_ids": ids}) for ids in ragged_prompts((20, 9, 5, 1))]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def command(place: Path, out: str, *more: str) -> list[str]:
    return [
        "run", str(place / "model"), "--prompts", str(place / "prompts.jsonl"), "--out",
        str(place / out), "--max-new-tokens", "4", "--ignore-eos", *more,
    ]  # fmt: skip


def tokens(path: Path) -> list[list[int]]:
    return [json.loads(line)["tokens"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_on_the_host_device_gives_the_processor_s_tokens(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = str(place / "gpu.json")
    host = ["--target", "host", "--machine", machine, "--policy", "weight_stream"]
    assert main(command(place, "gpu.jsonl", *host, "--budget", "ram=40MiB,hbm=12MiB")) == 0
    said = capsys.readouterr().out
    assert "peak hbm" in said and "budget 12.00 MiB" in said and "executor_*.py" in said
    assert main(command(place, "cpu.jsonl", "--machine", machine, "--policy", "weight_stream")) == 0
    assert tokens(place / "gpu.jsonl") == tokens(place / "cpu.jsonl")
    report = json.loads((place / "gpu.jsonl.dovetail" / "report.json").read_text())
    assert report["hbm"]["measured"] <= report["hbm"]["predicted"] <= report["hbm"]["budget"]
    assert report["measured_classes"]["copy:experts"] > 0


@needs_no_gpu
def test_a_machine_without_a_gpu_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, "no.jsonl", "--target", "cuda")) == 1
    said = capsys.readouterr().err
    assert "torch finds none here" in said and torch.__version__ in said
    assert "plan again for this machine's processor" in said
    assert not (place / "no.jsonl").exists()
    with pytest.raises(ModelError, match="torch finds none here"):
        with_gpu(MACHINE)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--target", "host"), "name that machine with --machine"),
        (("--target", "host", "--record-routing", "r.npz"), "routing is recorded on the processor"),
        (("--target", "host", "--graphs"), "steps are captured on a GPU only"),
        (("--target", "host", "--ray", "2"), "shards run on processors only"),
    ],
)
def test_what_a_target_does_not_do_is_refused(
    more: tuple[str, ...], text: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, "no.jsonl", *more)) == 1
    assert text in capsys.readouterr().err


def test_a_budget_without_hbm_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--target", "host", "--machine", str(place / "gpu.json"), "--budget", "ram=1MiB,hbm=0")
    assert main(command(place, "no.jsonl", *more)) == 1
    assert "the budget leaves no hbm on paper" in capsys.readouterr().err


def test_names_of_operations_are_read_and_others_refused() -> None:
    assert gpu_task("copy_experts12") == GpuTask("copy_experts", 12)
    assert gpu_task("cpu_cpu3") == GpuTask("cpu", 3, "cpu")
    assert gpu_task("cpu_experts") == GpuTask("cpu_experts")
    assert gpu_task("kv_in_copied0") == GpuTask("kv_in", 0, "copied")
    with pytest.raises(VerifyError, match="operation join_hbm0 is planned and simulated"):
        gpu_task("join_hbm0")


def test_experts_are_dealt_to_copies_and_to_the_cpu() -> None:
    assert expert_loads((4, 5, 6), (1, 2), 3, (1, 2)) == (
        ExpertLoad((4, 5), ()),
        ExpertLoad((6,), (1,)),
        ExpertLoad((), (2,)),
    )
    placed = LayerExperts((0,), (1, 2), (3, 4))
    few = Dealing(most=4, copy=1.0, base=0.1, per_row=0.1, reads=1)
    cpu, copied = deal(few, placed, (9, 5, 1, 2, 0))
    assert cpu == [2, 3] and copied == [1]
    slow = Dealing(most=4, copy=0.01, base=1.0, per_row=1.0, reads=1)
    assert deal(slow, placed, (9, 5, 1, 2, 0)) == ([], [2, 3, 1])


def test_no_row_of_kv_crosses_the_wall() -> None:
    space = TokenSpace(10, wall=4)
    assert space.largest() == 6
    assert space.take(3) == 0 and space.take(6) == 4 and space.take(2) is None
    space.give(0, 3)
    space.give(4, 6)
    assert space.largest() == 6
