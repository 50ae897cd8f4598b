"""Sizes, durations and budgets: what is read, what is refused, and that texts read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.ir.errors import InputError
from dovetail.ir.units import (
    BUDGET_TIERS,
    format_bytes,
    format_duration,
    parse_budget,
    parse_bytes,
    parse_duration,
)

SIZES = st.integers(0, 2**62)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("12345", 12345),
        (" 2 kib ", 2048),
        ("7B", 7),
        ("0", 0),
        ("1.0001KiB", 1024),
        ("2TiB", 2 << 40),
    ],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "4G",
        "-1GiB",
        "1.5",
        "4 GiB B",
        "1e9",
        "٤GiB",
        "nan",
        "9" * 30,
        "9999999PB",
        "1.GB",
    ],
)
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(InputError, match=r"size .*expected a number.*write for example 4GiB"):
        parse_bytes(text)


@given(SIZES)
def test_bytes_round_trip(size: int) -> None:
    assert parse_bytes(str(size)) == size
    assert abs(parse_bytes(format_bytes(size)) - size) <= size * 0.005
    assert size <= parse_bytes(format_bytes(size, up=True)) <= size * 1.01


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (15 << 28, "3.75 GiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10m", 600.0),
        ("90s", 90.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        ("2m5ms", 120.005),
        ("3us", 3e-6),
        ("2d", 172800.0),
        ("45", 45.0),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "  ", "m", "10 minutes", "30m1h", "5m5m", "-3s", "inf", "1:30"]
)
def test_parse_duration_refuses(text: str) -> None:
    with pytest.raises(InputError, match=r"duration .*expected numbers.*write for example 10m"):
        parse_duration(text)


@given(st.floats(0, 1e8))
def test_duration_round_trip(seconds: float) -> None:
    assert abs(parse_duration(format_duration(seconds)) - seconds) <= 0.021 * seconds + 1e-9


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.00025, "250us"),
        (0.9996, "1s"),
        (12.34, "12.3s"),
        (59.97, "1m00s"),
        (125, "2m05s"),
        (3599.6, "1h00m"),
        (5400, "1h30m"),
        (86399, "1d00h"),
        (183600, "2d03h"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_parse_budget() -> None:
    assert parse_budget("ram=4GiB,hbm=20GiB") == {"ram": 4 << 30, "hbm": 20 << 30}
    assert parse_budget("4GiB") == {"ram": 4 << 30}
    assert parse_budget(" RAM = 1.5 GB , disk=1TB") == {"ram": 1_500_000_000, "disk": 10**12}


@given(st.dictionaries(st.sampled_from(BUDGET_TIERS), SIZES, min_size=1))
def test_budget_round_trip(budget: dict[str, int]) -> None:
    text = ",".join(f"{tier}={size}" for tier, size in budget.items())
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("vram=4GiB", "the tier 'vram'"),
        ("ram=4GiB,ram=5GiB", "the tier ram twice"),
        ("4GiB,ram=5GiB", "the tier ram twice"),
        ("ram=", "size ''"),
        ("", "size ''"),
        ("ram=4GiB,", "size ''|ram twice"),
        ("ram=lots", "size 'lots'"),
    ],
)
def test_parse_budget_refuses(text: str, found: str) -> None:
    with pytest.raises(InputError, match=rf"budget .*(?:{found}).*expected.*ram, hbm, disk, peer"):
        parse_budget(text)
