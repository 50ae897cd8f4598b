"""What every test runs under: no network, one compute thread, its own cache, no second copies."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when the libraries are first imported, here and in the subprocesses of tests.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

# `import ir` would load a second copy of `dovetail.ir` under another name; None refuses it.
for _room in ("capture", "codegen", "ir", "passes", "runtime", "solvers", "tuning_db"):
    sys.modules[_room] = None  # type: ignore[assignment]

# The same examples in every run, and no timed failures on a busy machine.
hypothesis.settings.register_profile("dovetail", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dovetail")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`, which rewrites the files under tests/golden."""
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden from what the tests got"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's calibration and tuning facts out of the tests, and the tests' out of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOVETAIL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Undo what an earlier test set: sums in another order are other bits."""
    torch.set_num_threads(1)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with tests/golden/<file>/<test>.txt; `--update-golden` writes it instead."""
    test = re.sub(r"[^\w.-]+", "_", request.node.name).strip("_")
    path = GOLDEN / request.path.stem / f"{test}.txt"
    advice = f"to accept the new text: pytest '{request.node.nodeid}' --update-golden"

    def compare(text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"there is no {path}; {advice}")
        assert text == path.read_text(encoding="utf-8"), f"differs from {path}; {advice}"

    return compare
