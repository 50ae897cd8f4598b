"""dovetail: make Mixture-of-Experts models run as fast as the machine allows.

Give it a model, a machine, a budget and a workload; it returns a plan one can read, and runs it.
"""

from typing import TYPE_CHECKING

from dovetail.doors.registration import register_when_imported

if TYPE_CHECKING:
    from dovetail.doors.compiling import compile as compile
    from dovetail.doors.loading import load as load

__version__ = "0.1.0"
__all__ = ["compile", "load"]

_HOMES = {"compile": "dovetail.doors.compiling", "load": "dovetail.doors.loading"}
"""Where the public functions are; imported when they are first used, since they need torch."""


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register_when_imported()
