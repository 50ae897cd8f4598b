"""`plan check` on certificates: those of a plan agree with it, and others are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.plan_cases import few_policies, small_plan

from dovetail.ir.errors import PlanError
from dovetail.ir.plan import Certificate, Plan
from dovetail.plans.check import RESIDENCY, PlanCheck

few = pytest.fixture(autouse=True)(few_policies)


def check(checks: PlanCheck, plan: Plan, *certificates: Certificate) -> str:
    """What the check says of a plan with these certificates."""
    checks.plan = replace(plan, certificates=certificates)
    return checks.check_certificates().text


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan for the processor, which has no certificates of its own."""
    return small_plan("weight_stream")[1]


def test_certificates_that_agree_are_counted(plan: Plan, tmp_path: Path) -> None:
    checks = PlanCheck(tmp_path)
    seconds = plan.prediction.seconds
    one = Certificate(RESIDENCY, seconds, 0.9 * seconds, "feasible", 0.5)
    text = check(checks, plan, one, Certificate("period", 1.0, 1.0, "optimal"))
    assert text == "2 agree with the plan, largest gap 10.0%"
    assert check(checks, plan) == "none"


@pytest.mark.parametrize(
    ("certificate", "text"),
    [
        (Certificate("period", 1.0, 1.1, "feasible"), "reached 1 below its own bound of 1.1"),
        (Certificate("period", 1.0, 0.9, "optimal"), "is called optimal with a gap of 10.0%"),
        (Certificate(RESIDENCY, 1e-6, 1e-6, "optimal"), "the plan takes .* reached 1us"),
    ],
)
def test_check_refuses_certificates_that_cannot_be(
    plan: Plan, certificate: Certificate, text: str, tmp_path: Path
) -> None:
    checks = PlanCheck(tmp_path)
    with pytest.raises(PlanError, match=text):
        check(checks, plan, certificate)
