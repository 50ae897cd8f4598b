"""Many machines: tuners and shards on a local Ray cluster of two workers, with one merge."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.support import machine, ragged_prompts, tiny_model

from dovetail.cli import main
from dovetail.ir.errors import InputError
from dovetail.ir.plan import load_plan
from dovetail.machine_files import save_machine
from dovetail.tuning.ray_fleet import run_on_ray
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.maintain import check
from dovetail.tuning_db.trials import Trials


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, prompts and a machine file."""
    folder = tmp_path_factory.mktemp("ray")
    tiny_model("olmoe").save_pretrained(folder / "checkpoint")
    save_machine(machine(), folder / "machine.json")
    lines = [json.dumps({"input_ids": ids}) for ids in ragged_prompts([5, 9, 3, 12, 7])]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def cluster() -> Iterator[None]:
    """A local cluster of two workers."""
    ray = pytest.importorskip("ray", reason="Ray, an optional extra, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # A worker without a GPU is what we ask for; newer releases warn of a default that changes.
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
        yield
        ray.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_two_shards_give_what_one_run_gives(
    place: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(place / "checkpoint"), "--prompts", str(place / "in.jsonl")]
    words += ["--max-new-tokens", "6", "--budget", "8MiB", "--policy", "module_batch"]
    words += ["--machine", str(place / "machine.json")]
    assert main([*words, "--out", str(place / "one.jsonl")]) == 0
    assert main([*words, "--out", str(place / "two.jsonl"), "--ray", "2"]) == 0
    assert "5 prompts from 2 shards" in capsys.readouterr().out
    assert (place / "two.jsonl").read_bytes() == (place / "one.jsonl").read_bytes()
    assert main([*words, "--out", str(place / "two.jsonl"), "--ray", "2"]) == 0


@pytest.mark.filterwarnings("ignore")
def test_two_tuners_are_merged_into_one_database(place: Path, cluster: None) -> None:
    words = ["tune", str(place / "checkpoint"), "--workload", "8x12+3", "--budget", "5MiB"]
    words += ["--machine", str(place / "machine.json"), "--policy", "module_batch"]
    words += ["--time", "12s", "--db", str(place / "tuning.db"), "-o", str(place / "plan.json")]
    assert main([*words, "--ray", "2"]) == 0
    with Database.open(place / "tuning.db") as db:
        assert check(db) == []
        seeds = [tuning.seed for tuning in Trials(db).tunings()]
        assert sorted(seeds) == [0, 0, 1], "two on the cluster and the gate here"
        (protocols,) = db.rows("SELECT count(DISTINCT protocol) FROM trial")
        assert protocols == (1,), "all timed the same sample"
    found = load_plan(place / "plan.json").tuning
    assert found is not None and found.outcome in ("tuned", "untuned")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--ray", "0"], "expected at least 1 shard"),
        (["--ray", "2", "--temperature", "1"], "run without --ray, or greedily"),
        (["--ray", "2", "--record-routing", "r.npz"], "leave --ray out"),
    ],
)
def test_run_on_ray_refuses(
    place: Path, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(place / "checkpoint"), "--prompts", str(place / "in.jsonl")]
    assert main([*words, "--out", str(place / "no.jsonl"), *options]) == 1
    assert complaint in capsys.readouterr().err


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"not installed: pip install 'dovetail\[ray\]'"):
        run_on_ray(len, [("",)])
