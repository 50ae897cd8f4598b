"""`dovetail run --record-routing` writes what the router chose, once for every token."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.e2e.support import (
    GREEDY,
    Tiny,
    _functions,
    generate,
    machine,
    plan_for,
    ragged_prompts,
    save_tiny,
    tiny_model,
)

from dovetail.cli import main
from dovetail.ir.batching import Request
from dovetail.ir.errors import InputError, OutputError
from dovetail.ir.plan import Plan
from dovetail.machine_files import save_machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.lower import lower
from dovetail.routing.record import RoutingRecord, check_recorded, record_path
from dovetail.routing.trace import RoutingTrace, load_trace
from dovetail.runtime.generate import Generator

NEW = 5
LENGTHS = [5, 17, 1, 9, 30, 2, 12, 8]
RUN = {"checkpoint": "tiny", "seed": 0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A captured OLMoE."""
    return save_tiny(tiny_model("olmoe"), tmp_path_factory.mktemp("routing"))


def run(
    tiny: Tiny,
    plan: Plan,
    prompts: Mapping[int, Sequence[int]],
    record: RoutingRecord,
    stop: int,
    shorter: int = 1,
) -> tuple[dict[int, tuple[int, ...]], dict[int, int]]:
    """Run until ``stop`` prompts are finished: their tokens, and rows by prompt. Some prompts get
    up to ``shorter - 1`` tokens less than the others."""
    graph = tiny.captured.graph
    finished: dict[int, tuple[int, ...]] = {}
    program = lower(apply_moves(graph, plan.moves), plan.budget)
    requests = [Request(i, len(p), NEW - i % shorter) for i, p in prompts.items()]
    generator = Generator(
        graph, program, tiny.captured.constants, tiny.index, _functions(tiny, plan), GREEDY, ()
    )
    generator.runtime.routing_sink = record
    record.begin(graph)
    with generator:
        for report in generator.steps(requests, prompts.__getitem__):
            record.sync()
            finished |= {done.index: done.tokens for done in report.finished}
            if len(finished) >= stop:
                break
    return finished, {i: len(prompts[i]) + len(t) - 1 for i, t in finished.items()}


def check_against_transformers(
    trace: RoutingTrace, prompts: Sequence[Sequence[int]], tokens: Mapping[int, Sequence[int]]
) -> None:
    """Every token of every prompt is in the trace once, with the choices of the original."""
    model = tiny_model("olmoe")
    assert trace.tokens == sum(len(p) + len(tokens[i]) - 1 for i, p in enumerate(prompts))
    for index, prompt in enumerate(prompts):
        fed = [*prompt, *tokens[index][:-1]]
        with torch.inference_mode():
            logits = model(torch.tensor([fed]), output_router_logits=True).router_logits
        picks = [layer.topk(4, dim=-1).indices.sort(dim=-1).values for layer in logits]
        rows = np.flatnonzero(trace.prompt == index)
        rows = rows[trace.position[rows].argsort()]
        assert trace.position[rows].tolist() == list(range(len(fed)))
        choices = torch.stack(picks, dim=1).numpy()
        assert (np.sort(trace.experts[rows], axis=2) == choices).all(), index
        assert trace.decode[rows].tolist() == [at >= len(prompt) for at in range(len(fed))]
        assert (np.diff(trace.step[rows]) >= 0).all()


@pytest.mark.parametrize(
    "policy", ["module_batch", "chunked_prefill", "layered_prefill", "weight_stream"]
)
def test_recorded_choices_are_those_of_transformers(
    tiny: Tiny, tmp_path: Path, policy: str
) -> None:
    prompts = ragged_prompts(LENGTHS)
    plan = plan_for(tiny, prompts, NEW, 1 << 24, policy)
    with RoutingRecord.open(tmp_path / "t.npz", RUN, {}, restart=False) as record:
        tokens, rows = run(tiny, plan, dict(enumerate(prompts)), record, len(prompts))
        record.finish(rows)
        record.remove()
    check_against_transformers(load_trace(tmp_path / "t.npz"), prompts, tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
    plain = generate(tiny, plan, dict(enumerate(prompts)), NEW)
    assert plain.tokens == tokens, "recording changes nothing"


def test_a_run_cut_off_twice_has_every_row_once(tiny: Tiny, tmp_path: Path) -> None:
    prompts = dict(enumerate(ragged_prompts(LENGTHS)))
    done: dict[int, tuple[int, ...]] = {}
    rows: dict[int, int] = {}
    for stop in (1, 2, len(prompts)):
        left = {i: p for i, p in prompts.items() if i not in done}
        plan = plan_for(tiny, list(left.values()), NEW, 1 << 24, "weight_stream")
        with RoutingRecord.open(tmp_path / "t.npz", RUN, rows, restart=False) as record:
            finished, new_rows = run(tiny, plan, left, record, stop, shorter=NEW)
            done, rows = done | finished, rows | new_rows
            assert (len(done) == len(prompts)) == (stop == len(prompts))
            if stop == len(prompts):
                record.finish(rows)
        with record_path(record.path).open("ab") as file:
            file.write(b'{"layer":0,"tokens":9}torn')
    trace = load_trace(tmp_path / "t.npz")
    check_against_transformers(trace, list(prompts.values()), done)
    assert sorted(set(trace.step.tolist())) == list(range(trace.steps))


def test_layers_without_experts_are_told_apart(tmp_path: Path) -> None:
    tiny = save_tiny(tiny_model("deepseek_v2"), tmp_path / "model")
    prompts = ragged_prompts([3, 4])
    plan = plan_for(tiny, prompts, NEW, 1 << 24, "module_batch")
    with RoutingRecord.open(tmp_path / "t.npz", RUN, {}, restart=False) as record:
        trace = record.finish(run(tiny, plan, dict(enumerate(prompts)), record, 2)[1])
    assert (trace.layers, trace.model_layers, trace.model) == ((1, 2, 3), 4, "deepseek_v2")
    assert trace.loads().sum() == trace.tokens * 3 * 4 == (3 + 4 + 2 * (NEW - 1)) * 12


def test_killed_and_continued_by_the_same_command(tiny: Tiny, tmp_path: Path) -> None:
    prompts = ragged_prompts(LENGTHS * 4)
    save_machine(machine(), tmp_path / "machine.json")
    lines = [json.dumps({"input_ids": ids}) for ids in prompts]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = f"-m dovetail.cli run {tiny.folder} --prompts in.jsonl --out out.jsonl --budget 4MiB"
    words += f" --max-new-tokens {NEW} --ignore-eos --policy weight_stream --machine machine.json"
    command = [sys.executable, *words.split(), "--record-routing", "t.npz"]
    journal = tmp_path / "out.jsonl.journal"
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") <= 8:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(120)
    assert not (tmp_path / "t.npz").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    results = [json.loads(line) for line in output.splitlines()]
    tokens = {result["index"]: result["tokens"] for result in results}
    check_against_transformers(load_trace(tmp_path / "t.npz"), prompts, tokens)
    assert not (tmp_path / "t.npz.partial").exists()


def test_open_refuses_what_an_earlier_run_did_not_record(tiny: Tiny, tmp_path: Path) -> None:
    """Nothing recorded, recorded for another run, cut in the middle, damaged."""
    path, prompts = tmp_path / "t.npz", dict(enumerate(ragged_prompts([4, 7])))
    with pytest.raises(InputError, match=r"finished 1 prompts without recording all"):
        RoutingRecord.open(path, RUN, {0: 5}, restart=False)
    plan = plan_for(tiny, list(prompts.values()), NEW, 1 << 24, "module_batch")
    with RoutingRecord.open(path, RUN, {}, restart=False) as record:
        rows = run(tiny, plan, prompts, record, 2)[1]
    place = record_path(path)
    whole = place.read_bytes()
    with pytest.raises(InputError, match="without recording all"):
        RoutingRecord.open(path, RUN | {"seed": 1}, rows, restart=False)
    place.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"pass --restart to run all of them again"):
        RoutingRecord.open(path, RUN, rows, restart=False)
    place.write_bytes(whole.replace(b'"groups"', b'"grouse"', 1))
    with pytest.raises(InputError, match="found a damaged routing record"):
        RoutingRecord.open(path, RUN, rows, restart=False)
    place.write_bytes(b"other\n" + whole)
    with pytest.raises(InputError, match="not a routing record of version 1"):
        RoutingRecord.open(path, RUN, rows, restart=False)
    place.write_bytes(whole)
    with RoutingRecord.open(path, RUN, rows, restart=False) as record:
        assert record.finish(rows).tokens == sum(rows.values())
        with pytest.raises(InputError, match="in use by another process"):
            RoutingRecord.open(path, RUN, rows, restart=False)


def test_open_refuses_a_trace_that_is_there_or_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(b"someone's")
    with pytest.raises(InputError, match=r"t.npz: found a file, expected none"):
        RoutingRecord.open(path, RUN, {}, restart=False)
    RoutingRecord.open(path, RUN, {}, restart=True).close()
    with pytest.raises(OutputError, match="cannot keep the routing record"):
        RoutingRecord.open(tmp_path / "missing" / "t.npz", RUN, {}, restart=False)
    check_recorded(path)
    assert not record_path(path).exists(), "what a kill left is removed"
    with pytest.raises(InputError, match="the run is complete and this trace of it is not there"):
        check_recorded(tmp_path / "other.npz")


def test_run_refuses_to_record_over_its_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"run model --prompts in.jsonl --out {tmp_path}/o --record-routing {tmp_path}/o"
    assert main(words.split()) == 1
    assert "--out and --record-routing are both" in capsys.readouterr().err
