"""`place`: its policies end to end, the checker of placements, the file, and bad input."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.ir.errors import InputError, PlanError, VerifyError
from dovetail.ir.expert_placement import (
    ExpertPlacement,
    PlacementProblem,
    StepModel,
    load_placement,
    save_placement,
)
from dovetail.ir.expert_slots import balance, contiguous, count_copies, slots_that_fit
from dovetail.ir.verify_expert_placement import verify_placement
from dovetail.passes.place import PLACEMENT_POLICIES, place
from dovetail.passes.policies.expert_latency import layer_seconds, step_tokens

STEP = StepModel(tokens=64, top_k=4, read_seconds=1e-5, token_seconds=1e-7)


def nested(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(nested, value)) if isinstance(value, list) else value


def zipf(power: float, layers: int = 3, experts: int = 32, seed: int = 0) -> Any:
    """Loads by Zipf's law in tokens, ``[layer][expert]``."""
    ranks = np.tile(1e4 / np.arange(1, experts + 1) ** power, (layers, 1))
    return nested(np.random.default_rng(seed).permuted(ranks, axis=1).round().tolist())


def problem(
    power: float = 1.2, slots: int = 5, devices: int = 8, **fields: Any
) -> PlacementProblem:
    """32 experts of 3 layers on 8 devices of 5 slots."""
    return PlacementProblem(loads=(zipf(power),), slots=(slots,) * devices, **fields)


def worst_balance(answer: ExpertPlacement, loads: Any) -> float:
    """Mean over heaviest device, of the worst layer."""
    pairs = zip(answer.layers, loads, strict=True)
    return min(balance(layer.device_loads(w)) for layer, w in pairs)


def with_everything() -> PlacementProblem:
    """A problem that every policy can answer."""
    rng = np.random.default_rng(0)
    return PlacementProblem(
        loads=(zipf(1.2, 2, 16), zipf(1.0, 2, 16, seed=5)),
        slots=(5,) * 4,
        scenarios=("day", "night"),
        nodes=2,
        expert_groups=4,
        transitions=nested(rng.integers(0, 9, (1, 16, 16)).astype(float).tolist()),
        token_groups=nested(rng.integers(0, 9, (2, 10, 16)).astype(float).tolist()),
        link_cost=3.0,
        current=(contiguous(16, (5,) * 4),) * 2,
        step=STEP,
    )


@pytest.mark.parametrize("policy", PLACEMENT_POLICIES)
def test_every_policy_answers_with_what_the_checker_accepts(policy: str) -> None:
    asked = with_everything()
    knobs = {"work": 0.3} if "work" in PLACEMENT_POLICIES[policy].knobs else {}
    answer = place(asked, policy, knobs)
    verify_placement(answer, asked)
    assert answer.policy == policy
    assert answer.certificates
    assert answer.digest() == place(asked, policy, knobs).digest()


def test_auto_takes_the_policy_that_the_problem_calls_for() -> None:
    moves = nested(np.ones((2, 32, 32)).tolist())
    for fields, expected in (
        ({}, "balance"),
        ({"step": STEP}, "latency"),
        ({"transitions": moves, "step": STEP}, "expert_placement_ilp"),
        ({"current": (contiguous(32, (5,) * 8),) * 3, "transitions": moves}, "min_move"),
    ):
        asked = problem(**fields)
        knobs = {"work": 0.0} if "work" in PLACEMENT_POLICIES[expected].knobs else {}
        assert place(asked, knobs=knobs).policy == expected
    mixed = PlacementProblem(loads=(zipf(1.2), zipf(1.2, seed=1)), slots=(5,) * 8)
    assert place(mixed).policy == "robust"


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_balance_is_even_where_eplb_is_not(power: float) -> None:
    asked = problem(power)
    loads = asked.loads[0]
    even = place(asked, "balance")
    assert worst_balance(even, loads) == pytest.approx(1.0)
    assert all(c.status == "optimal" and c.gap < 1e-6 for c in even.certificates)
    shared_evenly = place(asked, "balance", {"split": "even"})
    assert worst_balance(shared_evenly, loads) >= worst_balance(place(asked, "eplb"), loads)


def test_hierarchical_does_not_collapse_and_leaves_nodes_only_for_what_they_cannot_carry() -> None:
    loads = zipf(1.5, experts=64)
    asked = PlacementProblem(loads=(loads,), slots=(10,) * 8, nodes=4, expert_groups=8)
    published, ours = place(asked, "eplb"), place(asked, "balance")
    assert published.notes == ("EPLB in hierarchical mode",)
    assert worst_balance(published, loads) < 0.7
    assert worst_balance(ours, loads) == pytest.approx(1.0)
    served, needed = (float(part.split("%")[0].split()[-1]) for part in ours.notes[0].split(";"))
    assert needed <= served < needed + 5


def test_balance_proves_small_layers_with_few_spare_slots() -> None:
    loads = ((90.0, 132, 40, 61), (20.0, 107, 104, 64))
    asked = PlacementProblem(loads=(loads,), slots=(2, 2, 2))
    for split in ("weighted", "even"):
        answer = place(asked, "balance", {"split": split, "work": 1.0})
        verify_placement(answer, asked)
        assert {c.status for c in answer.certificates} == {"optimal"}


def test_devices_may_differ_in_slots() -> None:
    asked = PlacementProblem(loads=(zipf(1.0),), slots=(6, 3, 5, 5, 9, 4, 4, 4))
    for policy in ("balance", "robust"):
        answer = place(asked, policy)
        verify_placement(answer, asked)
        assert worst_balance(answer, asked.loads[0]) > 0.98
    with pytest.raises(InputError, match=r"same slots on every device.*use policy balance"):
        place(asked, "eplb")


def test_layers_without_load_and_single_devices_are_placed() -> None:
    idle = PlacementProblem(loads=(((0.0,) * 6, (1.0,) * 6),), slots=(4, 4))
    for policy in ("eplb", "balance", "robust"):
        verify_placement(place(idle, policy), idle)
    alone = PlacementProblem(loads=(((1.0, 2.0),),), slots=(3,))
    for policy in ("eplb", "balance", "robust"):
        answer = place(alone, policy)
        verify_placement(answer, alone)
        assert answer.layers[0].device_loads((1.0, 2.0)) == pytest.approx((3.0,))


def test_min_move_copies_less_than_a_new_plan() -> None:
    before = place(problem(1.2), "eplb")
    current = tuple(layer.experts for layer in before.layers)
    loads = nested(
        (np.array(zipf(1.2)) * np.random.default_rng(1).lognormal(0, 0.4, (3, 32))).tolist()
    )
    asked = PlacementProblem(loads=(loads,), slots=(5,) * 8, current=current)
    moved, planned = place(asked, knobs={"work": 5.0}), place(asked, "eplb")
    verify_placement(moved, asked)
    copies = [
        sum(map(count_copies, current, (layer.experts for layer in p.layers)))
        for p in (moved, planned)
    ]
    assert copies[0] * 5 < copies[1]
    assert copies[0] == sum(c.value for c in moved.certificates)
    assert worst_balance(moved, loads) >= 0.98 * (1 - 1e-4)
    fewer = replace(asked, max_copies=copies[0] - 1)
    limited = place(fewer, knobs={"work": 2.0})
    verify_placement(limited, fewer)
    assert "allows a balance of" in limited.notes[1]


def test_robust_is_better_in_its_worst_scenario_than_a_plan_for_the_mean() -> None:
    asked = PlacementProblem(
        loads=(zipf(1.0), zipf(1.0, seed=1), zipf(1.0, seed=2)), slots=(6,) * 8
    )
    worst = {
        policy: min(worst_balance(place(asked, policy), loads) for loads in asked.loads)
        for policy in ("robust", "balance", "eplb")
    }
    assert worst["robust"] > max(worst["balance"], worst["eplb"]) + 0.1


def test_latency_leaves_replicas_unused_where_they_cost_more_than_they_give() -> None:
    seconds = {}
    for tokens in (32, 65536):
        asked = problem(1.0, step=StepModel(tokens, 4, 1e-5, 1e-7))
        answer = place(asked)
        verify_placement(answer, asked)
        assert asked.step is not None
        load = step_tokens(np.array(asked.loads[0]), asked.step)
        for rival in ("eplb", "balance"):
            other = place(asked, rival)
            for n, layer in enumerate(answer.layers):
                ours = layer_seconds(layer, load[n], asked.step)
                assert ours <= layer_seconds(other.layers[n], load[n], asked.step) * (1 + 1e-3)
        seconds[tokens] = sum(
            s == 0 for layer in answer.layers for row in layer.shares for s in row
        )
    assert seconds[32] > seconds[65536]


def test_grouping_sends_token_groups_where_their_experts_are() -> None:
    """As predictions of who chooses what get worse, tokens that leave their device approach those
    of experts dealt round robin (Speculative MoE)."""
    rng = np.random.default_rng(0)
    topic, home = np.arange(24) % 4, rng.permutation(np.arange(16) % 4)
    crossing = []
    for accuracy in (1.0, 0.5, 0.0):
        same = topic[:, None] == home[None, :]
        choices = 400 * (accuracy * same / 4 + (1 - accuracy) / 16)
        asked = PlacementProblem(
            loads=(nested(choices.sum(0, keepdims=True).tolist()),),
            slots=(4,) * 4,
            token_groups=nested(choices[None].tolist()),
        )
        answer = place(asked, knobs={"work": 0.2})
        verify_placement(answer, asked)
        assert len(answer.group_devices) == 24
        crossing.append(answer.certificates[0].value / choices.sum())
    assert crossing == pytest.approx([0.0, 0.375, 0.75], abs=0.01)


Mutation = Callable[[ExpertPlacement], ExpertPlacement]


def _certificate(**fields: Any) -> Mutation:
    return lambda p: replace(p, certificates=(replace(p.certificates[0], **fields),))


@pytest.mark.parametrize(
    ("mutate", "said"),
    [
        (lambda p: replace(p, problem="0" * 64), "it answers problem 000000000000"),
        (lambda p: replace(p, layers=p.layers[:2]), "layers: found 2, expected 3"),
        (lambda p: replace(p, nodes=2), "nodes: found 2, expected 1"),
        (lambda p: replace(p, layers=(p.layers[1], *p.layers[1:])), "the certificate says"),
        (_certificate(value=1.0, bound=1.0), "the certificate says 1"),
        (_certificate(bound=1e9), "bound 1e+09 is above"),
        (_certificate(bound=1.0), "called optimal with a gap"),
        (_certificate(layer=7), "no such layer"),
        (_certificate(bound=float("nan")), "not finite"),
    ],
)
def test_checker_refuses_mutated_placements(mutate: Mutation, said: str) -> None:
    asked = problem()
    answer = place(asked)
    verify_placement(answer, asked)
    with pytest.raises(VerifyError, match=said.replace("+", r"\+")):
        verify_placement(mutate(answer), asked)


def test_checker_refuses_more_copies_than_allowed() -> None:
    current = (contiguous(32, (5,) * 8),) * 3
    asked = problem(current=current, max_copies=0)
    free = replace(asked, max_copies=None)
    answer = place(free, knobs={"work": 0.0})
    with pytest.raises(VerifyError, match="copies, the limit is 0"):
        verify_placement(replace(answer, problem=asked.digest()), asked)


def test_placement_file_is_read_back_and_altered_ones_are_refused(tmp_path: Path) -> None:
    answer = place(problem())
    path = tmp_path / "placement.json"
    save_placement(answer, path)
    assert load_placement(path) == answer
    data = json.loads(path.read_text())

    def refused(change: Callable[[Any], None], said: str) -> None:
        altered = json.loads(json.dumps(data))
        change(altered)
        path.write_text(json.dumps(altered))
        with pytest.raises(PlanError, match=said):
            load_placement(path)

    refused(lambda d: d.update(policy="other"), "does not match the content")
    refused(lambda d: d.update(version=9), "version 9, this dovetail reads 1")
    refused(lambda d: d.update(kind="Plan"), "expected an object of kind 'ExpertPlacement'")
    refused(lambda d: d.pop("layers"), "field 'layers' of ExpertPlacement is missing")
    refused(lambda d: d["layers"][0]["experts"][0].__setitem__(0, 99), r"layer 0: expert \[99\]")
    refused(lambda d: d["layers"][0]["shares"][0].__setitem__(0, 0.123), "shares of expert")
    path.write_text("{")
    with pytest.raises(PlanError, match="not a readable placement"):
        load_placement(path)
    with pytest.raises(PlanError, match="no such placement file"):
        load_placement(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"loads": ()}, "no layer to place"),
        ({"slots": ()}, "no devices"),
        ({"slots": (4, 0)}, "at least 1 each"),
        ({"slots": (2, 2)}, "6 experts do not fit in 4 slots"),
        ({"nodes": 3}, "2 devices do not divide into 3 nodes"),
        ({"expert_groups": 4}, "6 experts do not divide into 4 expert_groups"),
        ({"loads": (((1.0,) * 5 + (float("nan"),),),)}, "row 0, column 5 is nan"),
        ({"loads": (((1.0,) * 5 + (-2.0,),),)}, "column 5 is -2.0, expected finite counts"),
        ({"loads": (((1.0,) * 5 + (float("inf"),),),)}, "column 5 is inf"),
        ({"loads": (((1.0,) * 6, (1.0,) * 5),)}, "expected 2 of 6"),
        ({"scenarios": ("a", "b")}, "2 scenario names for 1 scenarios"),
        ({"transitions": (((1.0,) * 6,) * 6,)}, "1 transitions for 1 layers, expected one less"),
        ({"token_groups": ()}, "token_groups of 0 layers, expected 1"),
        ({"link_cost": -1.0}, "link_cost is -1.0"),
        ({"max_copies": 3}, "max_copies needs a current placement"),
        ({"current": (((0, 1, 2, 3), (0, 1, 2, 4)),)}, r"no device holds expert \[5\]"),
        ({"current": (((0, 1, 2, 3), (4, 5, 9, 9)),)}, r"expert \[9\] is not one of 6"),
        ({"current": (((0, 1, 2), (3, 4, 5)),)}, r"slots per device are \(3, 3\)"),
        ({"memory": (8, 8)}, "memory is given without expert_bytes"),
        ({"memory": (8, 6), "expert_bytes": 2}, "device 1: 4 slots .* at most 3 slots fit"),
    ],
)
def test_problem_refuses(fields: dict[str, Any], said: str) -> None:
    base: dict[str, Any] = {"loads": (((1.0,) * 6,),), "slots": (4, 4)}
    with pytest.raises(InputError, match=said):
        PlacementProblem(**base | fields)


@pytest.mark.parametrize(
    ("policy", "knobs", "said"),
    [
        ("best", {}, "unknown placement policy 'best', expected one of auto, eplb"),
        ("eplb", {"rounds": 1}, "policy eplb has no knob 'rounds'; its knobs: none"),
        ("balance", {"rounds": 1.5}, "knob rounds of policy balance is 1.5, expected int"),
        ("balance", {"split": "odd"}, "split is 'odd'"),
        ("robust", {"split": "odd"}, "split is 'odd'"),
        ("min_move", {}, "needs a current placement"),
        ("expert_placement_ilp", {}, "needs transitions or token groups"),
        ("latency", {}, "needs a step model"),
    ],
)
def test_place_refuses(policy: str, knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        place(problem(), policy, knobs)


def test_slots_that_fit_are_what_memory_holds_in_every_layer() -> None:
    assert slots_that_fit(100, 3, 4) == 8
