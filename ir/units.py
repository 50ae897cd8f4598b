"""Sizes, durations and budgets as people type and read them; no other module parses them.

Sizes are ints in bytes and durations are floats in seconds everywhere else in the code.
"""

import re
from fractions import Fraction

from dovetail.ir.errors import InputError

BUDGET_TIERS = ("ram", "hbm", "disk", "peer")

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_BYTES_PER_UNIT = {
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY_UNITS)},
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL_UNITS)},
}
# The digits are bounded so that no input makes the arithmetic slow.
_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{1,20})?"
_SIZE = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)")
_MAX_BYTES = 2**63 - 1

_SECONDS_PER_UNIT = {
    "d": Fraction(86400),
    "h": Fraction(3600),
    "m": Fraction(60),
    "s": Fraction(1),
    "ms": Fraction(1, 1000),
    "us": Fraction(1, 1_000_000),
}
_DURATION = re.compile(r"\s*".join(rf"(?:({_NUMBER}){unit})?" for unit in _SECONDS_PER_UNIT))


def parse_bytes(text: str) -> int:
    """Return the bytes that a size such as ``4GiB``, ``512MiB``, ``1.5GB`` or ``12345`` names.

    KiB, MiB, ... are powers of 1024; kB, MB, ... powers of 1000; case is ignored; a part of a byte
    is dropped. Raises InputError for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise _bad_size(text, "that is not a number and a unit")
    number, unit = match.groups()
    if not unit and "." in number:
        raise _bad_size(text, "that is a part of a byte")
    scale = _BYTES_PER_UNIT.get(unit.lower() or "b")
    if scale is None:
        raise _bad_size(text, f"{unit!r} is not a unit")
    size = int(Fraction(number) * scale)
    if size > _MAX_BYTES:
        raise _bad_size(text, "that is more than 2^63 bytes")
    return size


def _bad_size(text: str, why: str) -> InputError:
    return InputError(
        f"size {text!r}: {why}; expected a number followed by B, KiB, MiB, GiB, TiB or by kB, MB, "
        "GB, TB, or plain bytes: write for example 4GiB"
    )


def format_bytes(size: int, *, up: bool = False) -> str:
    """Return a size of ``size`` bytes for people, as in ``3.75 GiB``, to the nearest hundredth.

    With ``up`` the number is rounded up and the text has no space, as in ``3.76GiB``, so that it
    names at least ``size`` bytes and can be given back as a budget.
    """
    if size < 0:
        return "-" + format_bytes(-size)
    if size < 1024:
        return f"{size} B"
    for unit in _BINARY_UNITS[1:]:
        scale = _BYTES_PER_UNIT[unit.lower()]
        hundredths = -(-size * 100 // scale) if up else (size * 200 + scale) // (2 * scale)
        # Judged after rounding, so that 1023.999 KiB prints as 1.00 MiB.
        if hundredths < 1024 * 100:
            break
    return f"{hundredths // 100}.{hundredths % 100:02d}{'' if up else ' '}{unit}"


def parse_duration(text: str) -> float:
    """Return the seconds that a duration such as ``10m``, ``90s``, ``1h30m`` or ``250ms`` names.

    The units d, h, m, s, ms, us come in this order, each at most once; a plain number is seconds.
    Raises InputError for anything else.
    """
    stripped = text.strip()
    if re.fullmatch(_NUMBER, stripped):
        return float(stripped)
    match = _DURATION.fullmatch(stripped)
    if match is None or not stripped:
        raise InputError(
            f"duration {text!r}: expected numbers with the units d, h, m, s, ms, us in this order, "
            "or plain seconds: write for example 10m, 90s or 1h30m"
        )
    parts = zip(match.groups(), _SECONDS_PER_UNIT.values(), strict=True)
    return float(sum(Fraction(number) * scale for number, scale in parts if number))


def format_duration(seconds: float) -> str:
    """Return a duration for people, as in ``250ms``, ``12.3s``, ``2m05s``, ``1h30m``, ``2d03h``.

    ``seconds`` is finite and not negative. The text has two or three digits that count, and
    parse_duration reads it back.
    """
    assert 0 <= seconds < float("inf"), seconds
    # Each limit is where rounding would reach the next unit: 59.97 s is 1m00s, never 60s.
    if seconds < 1e-9:
        return "0s"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g}us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g}ms"
    if seconds < 59.95:
        return f"{seconds:.3g}s"
    if seconds < 3600 - 0.5:
        return "{}m{:02d}s".format(*divmod(round(seconds), 60))
    if seconds < 86400 - 30:
        return "{}h{:02d}m".format(*divmod(round(seconds / 60), 60))
    return "{}d{:02d}h".format(*divmod(round(seconds / 3600), 24))


def parse_budget(text: str) -> dict[str, int]:
    """Return the bytes per tier that a budget such as ``ram=4GiB,hbm=20GiB`` allows.

    The tiers are those of BUDGET_TIERS; a size without a tier means ram. Raises InputError for an
    unknown tier, a tier given twice, or a size that parse_bytes refuses.
    """
    budget: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        tier = name.strip().lower() if equals else "ram"
        if tier not in BUDGET_TIERS:
            raise _bad_budget(text, f"found the tier {name.strip()!r}")
        if tier in budget:
            raise _bad_budget(text, f"found the tier {tier} twice")
        try:
            budget[tier] = parse_bytes(size if equals else part)
        except InputError as error:
            raise _bad_budget(text, str(error)) from error
    return budget


def _bad_budget(text: str, found: str) -> InputError:
    return InputError(
        f"budget {text!r}: {found}; expected each of {', '.join(BUDGET_TIERS)} at most once, with "
        "a size: write for example ram=4GiB or ram=4GiB,hbm=20GiB"
    )
