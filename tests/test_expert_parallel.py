"""Expert parallelism in several processes equals one process, and moves the bytes predicted.

Each group of processes does several jobs one after the other, since starting them takes longest.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.e2e.support import Tiny, ragged_prompts, save_tiny, tiny_model, transformers_tokens

from dovetail.cli import main
from dovetail.ir.errors import DovetailError, InputError
from dovetail.ir.expert_dispatch import ExpertDispatch, next_home, visited
from dovetail.ir.expert_placement import ExpertPlacement, LayerPlacement, save_placement
from dovetail.ir.expert_rows import ExpertRows
from dovetail.ir.routing_trace import RoutingTrace, make_trace
from dovetail.ir.workload import Workload
from dovetail.passes.expert_traffic import ExpertTraffic, RowSizes, Way, expert_traffic
from dovetail.place.expert_parallel import Job, RankResult, expert_program, run_ranks

NEW, EXPERTS = 4, 16
LENGTHS = [5, 14, 1, 9, 3]
PROMPTS = tuple(tuple(prompt) for prompt in ragged_prompts(LENGTHS))


def placed(layers: int, devices: int, seed: int, extra: int = 8) -> ExpertPlacement:
    """Random slots with ``extra`` replicas, their shares uneven, some spares among them."""
    generator, made = random.Random(seed), []
    for _ in range(layers):
        flat = [*range(EXPERTS), *(generator.randrange(EXPERTS) for _ in range(extra))]
        generator.shuffle(flat)
        each = len(flat) // devices
        rows = [flat[i : i + each] for i in range(0, len(flat), each)]
        weights = [[generator.choice([0.0, 1.0, generator.random()]) for _ in row] for row in rows]
        for expert in range(EXPERTS):
            if not sum(
                w
                for r, ws in zip(rows, weights, strict=True)
                for e, w in zip(r, ws, strict=True)
                if e == expert
            ):
                at = next(i for i, row in enumerate(rows) if expert in row)
                weights[at][rows[at].index(expert)] = 1.0
        totals = [0.0] * EXPERTS
        for row, values in zip(rows, weights, strict=True):
            for expert, value in zip(row, values, strict=True):
                totals[expert] += value
        shares = tuple(
            tuple(w / totals[e] for e, w in zip(row, values, strict=True))
            for row, values in zip(rows, weights, strict=True)
        )
        made.append(LayerPlacement(tuple(map(tuple, rows)), shares))
    return ExpertPlacement(1, "", "eplb", {}, EXPERTS, 1, tuple(made), ())


def job_of(tiny: Tiny, folder: Path, placement: ExpertPlacement, way: Way, seqs: int = 0) -> Job:
    """A job over the prompts; its files are in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.captured.save(folder)
    save_placement(placement, folder / "placement.json")
    return Job(
        str(tiny.folder), str(folder), str(folder / "placement.json"), PROMPTS, NEW, way, seqs
    )


def traced(tiny: Tiny, tokens: list[tuple[int, ...]], top_k: int) -> RoutingTrace:
    """The trace of the prompts and their continuations, all in step, by transformers' routers."""
    columns = []
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        ids = torch.tensor([[*prompt, *new[:-1]]])
        with torch.inference_mode():
            logits = tiny.model(ids, output_router_logits=True).router_logits
        columns.append(torch.stack([layer.topk(top_k, -1).indices for layer in logits], 1).numpy())
    rows = [(i, at) for i, column in enumerate(columns) for at in range(len(column))]
    step = np.array([max(0, at - len(PROMPTS[i]) + 1) for i, at in rows])
    order = step.argsort(kind="stable")
    return make_trace(
        np.concatenate(columns)[order],
        EXPERTS,
        prompt=np.array([i for i, _ in rows])[order],
        position=np.array([at for _, at in rows])[order],
        step=step[order],
        decode=np.array([at >= len(PROMPTS[i]) for i, at in rows])[order],
    )


def predicted(
    tiny: Tiny, trace: RoutingTrace, placement: ExpertPlacement, way: Way
) -> ExpertTraffic:
    """What the model says of a job."""
    graph = tiny.captured.graph
    program = expert_program(graph, Workload.of(LENGTHS, NEW), len(PROMPTS))
    return expert_traffic(trace, placement, RowSizes.of(graph, program.segments), way)


def check(
    tiny: Tiny,
    placement: ExpertPlacement,
    ways: list[Way],
    found: list[list[RankResult]],
    top_k: int,
) -> dict[Way, ExpertTraffic]:
    """Tokens are transformers' own on every rank, and so are the predicted bytes."""
    expected = transformers_tokens(tiny.model, PROMPTS, NEW)
    trace = traced(tiny, expected, top_k)
    traffic: dict[Way, ExpertTraffic] = {}
    for way, results in zip(ways, found, strict=True):
        traffic[way] = predicted(tiny, trace, placement, way)
        for rank, result in enumerate(results):
            assert list(result.tokens) == expected, (way, rank)
            sent = {kind: each[rank] for kind, each in traffic[way].sent.items()}
            assert {kind: result.sent.get(kind, 0) for kind in sent} == sent, (way, rank)
            assert set(result.sent) <= set(sent)
    return traffic


ROWS = ExpertRows(dispatch=100, combine=80, move=60)
WAYS: list[Way] = ["two", "one"]


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Four experts a token."""
    return save_tiny(tiny_model("olmoe"), tmp_path_factory.mktemp("olmoe"))


def test_two_processes_equal_one_and_move_the_bytes_predicted(olmoe: Tiny, tmp_path: Path) -> None:
    """Random placements with uneven replicas. Of the second model the first layer is dense and
    others have shared experts and latent attention; its sequences run one at a time, so that one
    process has none."""
    deepseek = save_tiny(tiny_model("deepseek_v2"), tmp_path / "model")
    placement, other = placed(4, 2, seed=2), placed(3, 2, seed=1)
    jobs = [job_of(olmoe, tmp_path / way, placement, way) for way in WAYS]
    jobs += [job_of(deepseek, tmp_path / f"d{way}", other, way, seqs=1) for way in WAYS]
    found = run_ranks(jobs, 2)
    check(olmoe, placement, WAYS, found[:2], top_k=4)
    two, one = (results[0].exchanges for results in found[:2])
    assert two["dispatch"] == two["combine"] == 4 * NEW, "two all-to-alls a layer and step"
    assert one["dispatch"] == one["combine"] == 4 * NEW, "sums of several experts come together"
    expected = transformers_tokens(deepseek.model, PROMPTS, NEW)
    for result in (each for results in found[2:] for each in results):
        assert list(result.tokens) == expected
        assert result.steps == len(PROMPTS) * NEW


def test_four_processes_with_one_expert_a_token_need_one_exchange(tmp_path: Path) -> None:
    """As in ExFlow: what decodes does not come back."""
    tiny = save_tiny(tiny_model("olmoe", num_experts_per_tok=1), tmp_path / "model")
    placement = placed(4, 4, seed=4)
    jobs = [job_of(tiny, tmp_path / way, placement, way) for way in WAYS]
    found = run_ranks(jobs, 4)
    traffic = check(tiny, placement, WAYS, found, top_k=1)
    one = found[1][0].exchanges
    assert one["dispatch"] == 4 * NEW and one["combine"] == 4, "prompts' sums alone come back"
    assert 0 < traffic["two"].crossed < 1
    assert sum(traffic["one"].sent["move"]) > 0


def test_the_command_runs_and_holds_bytes_against_the_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dovetail place run` in bfloat16: its own trace predicts the bytes of its own run."""
    tiny = save_tiny(tiny_model("olmoe", torch.bfloat16), tmp_path / "model")
    save_placement(placed(4, 2, seed=5), tmp_path / "placement.json")
    lines = [json.dumps({"input_ids": list(prompt)}) for prompt in PROMPTS]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = f"place run {tiny.folder} --placement {tmp_path}/placement.json --way one --ignore-eos"
    words += f" --prompts {tmp_path}/in.jsonl --max-new-tokens {NEW} -o {tmp_path}/out.jsonl --json"
    assert main(words.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["as_predicted"] and found["moved"] == found["predicted"]
    assert all(sum(found["moved"][kind]) > 0 for kind in ("dispatch", "combine", "move"))
    output = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = [tuple(json.loads(line)["tokens"]) for line in output]
    expected = transformers_tokens(tiny.model, PROMPTS, NEW)
    same = sum(a == b for a, b in zip(tokens, expected, strict=True))
    assert same >= len(PROMPTS) - 1, "rounding may turn one of them"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--way three", "--way 'three': expected one of two, one"),
        ("", "the placement is for 3 layers of 16 experts on 2 devices; found 4 layers"),
    ],
)
def test_the_command_refuses(
    olmoe: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    save_placement(placed(3, 2, seed=5), tmp_path / "placement.json")
    (tmp_path / "in.jsonl").write_text('{"input_ids": [5]}\n', encoding="utf-8")
    command = f"place run {olmoe.folder} --placement {tmp_path}/placement.json {words}"
    assert main([*command.split(), "--prompts", f"{tmp_path}/in.jsonl"]) == 1
    assert said in capsys.readouterr().err


def test_run_ranks_refuses_a_placement_of_another_shape(olmoe: Tiny, tmp_path: Path) -> None:
    """What one process says ends them all."""
    job = job_of(olmoe, tmp_path, placed(4, 4, seed=0), "two")
    said = r"process 0 of 1 .*the placement is for 4 layers of 16 experts on 4 devices; found"
    with pytest.raises(DovetailError, match=said):
        run_ranks([job], 1)


@given(st.integers(0, 10**6))
def test_dispatch_keeps_to_the_shares(seed: int) -> None:
    """Tokens go to devices that hold the expert, in the shares of the placement, however they are
    batched."""
    placement = placed(2, 4, seed)
    dispatch, generator = ExpertDispatch(placement), np.random.default_rng(seed)
    prompt, position = np.arange(64).repeat(64), np.tile(np.arange(64), 64)
    experts = generator.random((4096, EXPERTS)).argsort(axis=1)[:, :2]
    for layer, placed_layer in enumerate(placement.layers):
        serving = dispatch.serving(layer, experts, prompt, position)
        for expert in range(EXPERTS):
            counts = np.bincount(serving[experts == expert], minlength=4)
            shares = np.zeros(4)
            for device, _, share in placed_layer.homes(expert):
                shares[device] += share
            assert (counts[shares == 0] == 0).all()
            assert np.abs(counts / counts.sum() - shares).max() < 0.12
        some = generator.permutation(4096)[:100]
        again = dispatch.serving(layer, experts[some], prompt[some], position[some])
        assert (again == serving[some]).all()


def test_home_is_where_most_experts_are() -> None:
    serving = np.array([[0, 1, 1], [2, 0, 1], [2, 0, 1], [1, 1, 1], [0, 0, 2]])
    assert next_home(serving, np.array([2, 0, 2, 0, 2]), 3).tolist() == [1, 0, 2, 1, 0]
    assert visited(serving, 3).sum(axis=1).tolist() == [2, 3, 3, 1, 2]


def test_affinity_lowers_the_traffic_of_one_way() -> None:
    """Tokens that keep their group of experts: groups on one device move nothing but once."""
    generator = np.random.default_rng(0)
    group = generator.integers(0, 4, 200)
    ids = group[:, None, None] * 4 + generator.integers(0, 4, (200, 3, 1))
    trace = make_trace(ids, EXPERTS, prompt=np.arange(200), decode=np.ones(200, bool))
    together = [tuple(tuple(range(4 * d, 4 * d + 4)) for d in range(4))] * 3
    apart = [
        tuple(tuple((4 * i + d + layer) % 16 for i in range(4)) for d in range(4))
        for layer in range(3)
    ]
    ones = tuple((1.0,) * 4 for _ in range(4))
    sizes = RowSizes({i: replace(ROWS) for i in range(3)}, (8, 8, 8), 1)
    totals = {}
    for name, slots in (("together", together), ("apart", apart)):
        layers = tuple(LayerPlacement(s, ones) for s in slots)
        placement = ExpertPlacement(1, "", "eplb", {}, EXPERTS, 1, layers, ())
        totals[name] = expert_traffic(trace, placement, sizes, "one")
    assert sum(totals["together"].sent["combine"]) == 0
    assert totals["together"].crossed < 0.3 < 0.6 < totals["apart"].crossed
    assert totals["together"].total < totals["apart"].total


def test_traffic_refuses_a_trace_of_another_model() -> None:
    trace = make_trace(np.zeros((2, 3, 1), int), 8)
    sizes = RowSizes({i: ROWS for i in range(4)}, (8,) * 4, 1)
    with pytest.raises(InputError, match="4 layers of 16 experts and the trace has 3 of 8"):
        expert_traffic(trace, placed(4, 2, 0), sizes)
