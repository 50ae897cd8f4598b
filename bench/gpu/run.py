"""Check every kernel's numbers on a GPU, then time layers, rivals and the open questions.

Needs torch, triton, numpy and sympy, and this repository; dovetail need not be installed. Two
parts, each within ten minutes: `--part 1`, then `--part 2`. What does not fit is left out and said
so.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Read the arguments, make the repository importable, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", type=int, choices=(1, 2), required=True)
    parser.add_argument("--out", type=Path, required=True, help="Markdown; JSON goes beside it")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin nothing after this")
    parser.add_argument("--only", default="", metavar="SECTION", help="of the part, as numbers")
    parser.add_argument("--dry", action="store_true", help="try it on tiny layers with no GPU")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    import torch

    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry tries the script without one")
    import sections

    sections.run(options)


if __name__ == "__main__":
    main()
