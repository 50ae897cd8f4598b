"""Makes ``experts_implementation="dovetail"`` known to transformers, without importing it.

If transformers' registry of experts is there when dovetail is imported, ours goes in at once;
otherwise as soon as something imports that registry.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.integrations.moe"
"""The module of transformers that knows experts implementations by name."""


class _RegisteringLoader(Loader):
    """Loads the registry as its own loader does, then registers our experts."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The inner loader's module."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register in it."""
        self._inner.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> object:
        # Sources for tracebacks and inspect come from the inner loader.
        return getattr(self._inner, name)


class _Finder(MetaPathFinder):
    """Waits for the registry to be imported, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's own spec with our loader around its; None for every other module."""
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_when_imported() -> None:
    """Register our experts now if transformers' registry is loaded, else when it is."""
    module = sys.modules.get(REGISTRY)
    if module is not None:
        _register(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(module: ModuleType) -> None:
    def experts(*arguments: object, **options: object) -> object:
        from dovetail.doors.hf_experts import experts_forward

        return experts_forward(*arguments, **options)  # type: ignore[arg-type]

    module.ALL_EXPERTS_FUNCTIONS.register("dovetail", experts)
