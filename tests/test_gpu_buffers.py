"""Buffers of GPU plans have offsets whose peak is proved; the check finds those that overlap."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.ir_cases import captured
from tests.test_gpu_choose import plan

from dovetail.capture.captured import Captured
from dovetail.cli import main
from dovetail.ir.plan import Plan, save_plan
from dovetail.ir.printer import print_plan
from dovetail.passes.gpu.buffers import buffers_of, check_offsets

GRAPH = captured("olmoe")


@pytest.fixture(scope="module", params=["module_batch", "zigzag", "cgopipe", "hybrid_cpu_gpu"])
def made(request: pytest.FixtureRequest) -> Plan:
    found = plan("olmoe", 0.3, request.param)
    assert found is not None
    return found


def test_offsets_are_legal_and_their_peak_is_proved(made: Plan) -> None:
    tiers = buffers_of(GRAPH, made)
    assert tiers and not check_offsets(made, GRAPH)
    for tier, pools in tiers.items():
        (found,) = [c for c in made.certificates if c.name.startswith(f"buffers in {tier}:")]
        assert found.unit == "bytes" and 0 < found.bound <= found.objective
        assert found.status == "optimal" or found.bound > 0.8 * found.objective
        # Pages round every buffer up; apart from that rings never hold less than the peak.
        padding = sum(buffer.align for buffer in pools.buffers)
        assert found.objective <= pools.reserved + padding
        ends = [made.offsets[f"{tier}: {b.name}"] + b.size for b in pools.buffers]
        assert max(ends) == found.objective
    assert "buffers in hbm: peak of" in print_plan(made)


def test_plan_check_finds_buffers_that_share_bytes(
    made: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Captured(GRAPH).save(tmp_path)
    save_plan(made, tmp_path / "plan.json")
    assert main(["plan", "check", str(tmp_path / "plan.json")]) == 0
    assert "buffers do not overlap" in capsys.readouterr().out
    save_plan(replace(made, offsets=dict.fromkeys(made.offsets, 0)), tmp_path / "plan.json")
    code = main(["plan", "check", str(tmp_path / "plan.json")])
    out = capsys.readouterr().out
    assert code == 1 and "share bytes at time" in out, out
