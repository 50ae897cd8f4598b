"""Staleness: each change of the environment has its grade, its action and a line that names it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.tuning.staleness import (
    ACTIONS,
    FIELDS,
    NAMES,
    Grade,
    code_digest,
    compare,
    environment_here,
)

HERE = {
    "processor": "Test 9000",
    "family": "25/17/1",
    "cores": "2",
    "flags": "avx2 avx512f",
    "l3_bytes": "33554432",
    "memory": "24.0 GiB",
    "kernel": "6.1.0",
    "python": "3.11.2",
    "torch": "2.13.0+cpu",
    "torch_cpu": "AVX512",
    "disk": "vda 254:0",
    "dovetail": "ab12",
}


@pytest.mark.parametrize(
    ("field", "value", "grade"),
    [
        ("processor", "Test 9000 Max-Q", Grade.SAME),
        ("kernel", "6.2.0", Grade.NEAR),
        ("torch", "2.13.1+cpu", Grade.NEAR),
        ("torch", "2.14.0+cpu", Grade.RECOMPILED),
        ("torch", "2.13.0+cu130", Grade.RECOMPILED),
        ("dovetail", "cd34", Grade.RECOMPILED),
        ("disk", "sdb 8:16", Grade.RECOMPILED),
        ("cores", "4", Grade.COUSIN),
        ("flags", "avx2", Grade.FOREIGN),
    ],
)
def test_each_change_has_its_grade(field: str, value: str, grade: Grade) -> None:
    found = compare(HERE, HERE | {field: value})
    assert found.grade is grade and found.action == ACTIONS[grade]
    if grade is not Grade.SAME:
        assert f"{field} {HERE[field]} -> {value}" in found.message("plan.json")


def test_message_is_one_line_with_the_gravest_first() -> None:
    found = compare(HERE, HERE | {"kernel": "6.2.0", "torch": "2.14.0+cpu"})
    assert found.message("plan.json") == (
        "plan.json was made for other software or another disk (torch 2.13.0+cpu -> 2.14.0+cpu; "
        "kernel 6.1.0 -> 6.2.0): tune again, which times its best 5 against the default first"
    )


def test_record_of_unknown_silicon_is_foreign() -> None:
    found = compare({"torch": "2.13.0"}, HERE)
    assert found.grade is Grade.FOREIGN
    assert "silicon not recorded -> " in found.message("it")
    assert "H100" in compare({"device_name": "H100"}, HERE).message("it")


def test_field_that_is_gone_counts_and_one_that_was_not_known_does_not() -> None:
    assert compare(HERE | {"driver": "580"}, HERE).grade is Grade.NEAR
    assert compare(HERE, HERE | {"driver": "580"}).grade is Grade.SAME


@given(st.dictionaries(st.sampled_from(sorted(HERE)), st.text(max_size=80)))
def test_grade_is_that_of_the_gravest_change(changes: dict[str, str]) -> None:
    found = compare(HERE, HERE | changes)
    changed = {f for f, v in changes.items() if v != HERE[f] and f not in NAMES}
    assert {each.field for each in found.differences} == changed
    distances = [each.grade.distance for each in found.differences]
    assert distances == sorted(distances, reverse=True)
    assert found.grade.distance == max(distances, default=0)
    for each in found.differences:
        assert each.field == "torch" or each.grade is FIELDS[each.field]
    assert len(found.message("plan").splitlines()) == 1


def test_here_is_the_same_as_here() -> None:
    here = environment_here([Path(__file__)])
    assert here["dovetail"] == code_digest() and "disk" in here
    assert compare(here, environment_here([Path(__file__)])).grade is Grade.SAME
