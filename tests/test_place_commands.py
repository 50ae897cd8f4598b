"""`dovetail place` and `dovetail place explain`, from files to files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dovetail.cli import main
from dovetail.ir.expert_placement import load_placement
from dovetail.place.files import read_slots
from dovetail.routing.trace import make_trace, save_trace

LAYERS, EXPERTS, TOP_K = 4, 16, 2


def write_trace(path: Path, seed: int, tokens: int = 600, experts: int = EXPERTS) -> None:
    """A skewed trace: some experts of each layer are chosen far more often."""
    generator = np.random.default_rng(seed)
    weight = generator.permuted(np.tile(1 / np.arange(1, experts + 1), (LAYERS, 1)), axis=1)
    noise = generator.gumbel(size=(tokens, LAYERS, experts))
    ids = (np.log(weight) + noise).argsort(axis=2)[:, :, -TOP_K:]
    rows = np.arange(tokens)
    trace = make_trace(
        ids,
        experts,
        prompt=rows % 6,
        position=rows // 6,
        step=np.maximum(0, rows // 6 - 50),
        decode=rows >= 300,
        layers=[1, 2, 3, 4],
        model_layers=5,
        model="olmoe",
    )
    save_trace(trace, path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with traces of two kinds of text, and the command running in it."""
    write_trace(tmp_path / "prose.npz", 1)
    write_trace(tmp_path / "code.npz", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: str) -> int:
    """Run the command with these words."""
    return main(["place", *words.split()])


def as_json(words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The command's report."""
    assert run(f"{words} --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_the_form_of_the_design_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dovetail place routing-trace --devices 8 --slots 72 -o placement.json`."""
    write_trace(folder / "wide.npz", 3, experts=64)
    assert run("wide.npz --devices 8 --slots 72 -o placement.json") == 0
    said = capsys.readouterr().out
    assert "placed        4 layers of 64 experts in 72 slots on 8 devices" in said
    placement = load_placement(folder / "placement.json")
    assert placement.slots == (9,) * 8
    assert "certificates  4 of 4 proved best" in said
    assert run("make wide.npz --devices 8 --slots 72 -o again.json") == 0
    assert (folder / "again.json").read_bytes() == (folder / "placement.json").read_bytes()


def test_the_report_is_what_the_placement_gives(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json("prose.npz --devices 4 --slots 20", capsys)
    assert found["policy"] == "balance"
    balance = found["balance"]
    assert isinstance(balance, list)
    assert balance[0]["after"]["worst"] > 0.99 > balance[0]["before"]["worst"]
    explained = as_json("explain placement.json prose.npz", capsys)
    assert explained == {k: v for k, v in found.items() if k != "out"}


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ("prose.npz code.npz", "robust"),
        ("prose.npz --split phase", "robust"),
        ("prose.npz --split 3", "robust"),
        ("prose.npz --affinity", "expert_placement_ilp"),
        ("prose.npz --policy eplb --nodes 2 --expert-groups 4", "eplb"),
        ("prose.npz --policy balance --knob split=even --knob work=0.1", "balance"),
        ("prose.npz --batch-tokens 64 --read-seconds 13e-6 --token-seconds 1.5e-7", "latency"),
        ("prose.npz --expert-bytes 1MiB --memory 1GiB", "balance"),
    ],
)
def test_auto_takes_the_policy_that_fits(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, policy: str
) -> None:
    found = as_json(f"{words} --devices 4 --slots 20", capsys)
    assert found["policy"] == policy
    placement = load_placement(folder / "placement.json")
    assert (placement.devices, len(placement.layers)) == (4, LAYERS)


@pytest.mark.parametrize("form", ["dovetail", "sglang", "vllm", "vllm-ascend"])
def test_moves_are_counted_from_the_current_placement(
    folder: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """Another domain needs few copies from where experts are, in any engine's form."""
    assert run(f"prose.npz --devices 4 --slots 20 --format {form} -o current.json") == 0
    capsys.readouterr()
    current = read_slots(folder / "current.json", 4, (1, 2, 3, 4))
    assert [len(layer) for layer in current] == [4] * LAYERS
    found = as_json("code.npz --devices 4 --slots 20 --current current.json", capsys)
    assert found["policy"] == "min_move"
    placement = load_placement(folder / "placement.json")
    copies = [
        sum(len(set(after) - set(before)) for before, after in zip(was, now.experts, strict=True))
        for was, now in zip(current, placement.layers, strict=True)
    ]
    assert found["copies_by_layer"] == copies
    assert sum(copies) < 20, "far fewer than all slots"


def test_forms_of_other_engines_say_what_they_lose(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prose.npz --devices 4 --slots 20 --format sglang -o sglang.json") == 0
    assert "sglang's form has no shares" in capsys.readouterr().err
    data = json.loads((folder / "sglang.json").read_text())
    assert [len(row) for row in data["physical_to_logical_map"]] == [20] * 5


def test_explain_draws_and_says_what_binds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prose.npz --devices 8 --slots 16 --policy eplb") == 0
    capsys.readouterr()
    for name in ("picture.svg", "picture.png"):
        assert run(f"explain placement.json prose.npz code.npz -o {name}") == 0
    said = capsys.readouterr().out
    assert "binds         layer" in said
    assert "devices' worth" in said or "no placement in these slots is below that" in said
    assert "in scenario code" in said
    svg = (folder / "picture.svg").read_text(encoding="utf-8")
    assert "prose, in order" in svg and "experts copied" in svg
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    first = (folder / "picture.svg").read_bytes()
    assert run("explain placement.json prose.npz code.npz -o picture.svg") == 0
    assert (folder / "picture.svg").read_bytes() == first, "the same answer, the same picture"
    assert run("explain placement.json") == 0, "words need no loads"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("prose.npz --devices 4 --slots 12", "16 experts do not fit in 12 slots"),
        ("prose.npz --devices 3 --slots 20", "do not divide over --devices 3"),
        ("prose.npz --devices 0", "--devices 0: expected at least 1"),
        ("prose.npz --devices 4 --nodes 3", "4 devices do not divide into 3 nodes"),
        ("nan.json --devices 2", "found a load that is NaN or infinite"),
        ("negative.json --devices 2", "found a load that is -1, expected counts"),
        ("flat.json --devices 2", r"found counts of the shape \[2\]"),
        ("prose.csv --devices 2", "found a file that ends in '.csv'"),
        ("missing.npz --devices 2", "cannot be read: No such file"),
        ("prose.npz other.npz --devices 4", "prose has loads of 4 layers and 16 experts, other"),
        ("prose.npz --devices 4 --max-moves 3", "--max-moves counts from a placement"),
        ("prose.npz --devices 4 --current nan.json", "the placement nan.json: found something"),
        ("prose.npz --devices 4 --current missing.json", "missing.json cannot be read"),
        ("prose.npz --devices 4 --policy best", "unknown placement policy 'best'"),
        ("prose.npz --devices 4 --policy balance --knob x=1", "has no knob 'x'"),
        ("prose.npz --devices 4 --knob x", "--knob 'x': expected NAME=VALUE"),
        ("prose.npz --devices 4 --knob x=[]", "expected a number, true, false or text"),
        ("prose.npz --devices 4 --format torch", "format 'torch': expected one of dovetail"),
        ("prose.npz --devices 4 --split halves", "expected files, phase or a number of parts"),
        ("prose.npz --devices 4 --split 9", "6 prompts, which cannot be cut into 9 parts"),
        ("good.json --devices 2 --split phase", "good has loads only"),
        ("good.json --devices 2 --affinity", "--affinity: found loads only"),
        ("prose.npz --devices 4 --batch-tokens 64", "go together"),
        (
            "good.json --devices 2 --batch-tokens 8 --read-seconds 1 --token-seconds 1",
            "--batch-tokens needs --top-k",
        ),
        ("prose.npz --devices 4 --memory 1GiB", "memory is given without expert_bytes"),
        ("prose.npz --devices 4 --expert-bytes 1GiB --memory 2GiB", "at most 0 slots fit"),
        ("explain nan.json", "expected an object of kind 'ExpertPlacement'"),
        ("explain placed.json -o picture.svg", "a picture needs loads"),
        ("explain placed.json prose.npz -o picture.pdf", "found the kind '.pdf'"),
        ("explain placed.json prose.npz -o missing/p.svg", "cannot be written"),
        ("explain placed.json good.json", "good has loads of 2 layers and 4 experts"),
    ],
)
def test_place_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    """Bad files, shapes and options end with what was found and what to do."""
    write_trace(folder / "other.npz", 4, experts=8)
    (folder / "nan.json").write_text("[[1, NaN], [1, 1]]")
    (folder / "negative.json").write_text("[[1, -1]]")
    (folder / "flat.json").write_text("[1, 2]")
    (folder / "good.json").write_text("[[1, 2, 3, 4], [4, 3, 2, 1]]")
    if words.startswith("explain placed"):
        assert run("prose.npz --devices 4 --slots 20 -o placed.json") == 0
    assert run(words) == 1
    found = capsys.readouterr().err
    assert re.search(said, found), found
    assert not (folder / "placement.json").exists()


def test_place_without_an_action_or_options_is_wrong_use(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (("", "ACTION"), ("prose.npz", "--devices"), ("make", "TRACE")):
        with pytest.raises(SystemExit) as caught:
            run(words)
        assert caught.value.code == 2
        assert said in capsys.readouterr().err
