"""Where dovetail keeps what it can make again: the tuning database and captured models."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """DOVETAIL_CACHE_DIR, or ``~/.cache/dovetail``."""
    folder = os.environ.get("DOVETAIL_CACHE_DIR")
    return Path(folder) if folder else Path.home() / ".cache" / "dovetail"
