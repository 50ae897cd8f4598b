"""`dovetail convert`; heavy imports wait until the command runs."""

import argparse
import sys
from pathlib import Path

from dovetail.ir.moves import FORMATS


def convert_parser(parser: argparse.ArgumentParser) -> None:
    """`dovetail convert`."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a model folder")
    parser.add_argument("--experts", required=True, choices=FORMATS, help="what to convert them to")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FOLDER",
        help="CHECKPOINT-experts-FORMAT beside it by default, which is where --allow looks",
    )
    parser.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> int:
    from dovetail.checkpoint import ModelFolder
    from dovetail.planning import captured_model
    from dovetail.precision.convert import convert, converted_before, target_of
    from dovetail.precision.folder import converted_folder
    from dovetail.precision.layout import converted_bytes
    from dovetail.progress import BytesProgress

    folder, form = ModelFolder.open(options.checkpoint), options.experts
    graph = captured_model(folder, lambda text: print(text, file=sys.stderr, flush=True)).graph
    out = options.out or converted_folder(options.checkpoint, form)
    total = converted_bytes(target_of(folder, graph, form))
    record = converted_before(folder, graph, form, out)
    verb = "are there already"
    if record is None:
        verb = "are written"
        try:
            with BytesProgress(total) as progress:
                record = convert(folder, graph, form, out, progress.count)
        except KeyboardInterrupt:
            print(f"dovetail: interrupted; nothing is left of {out}", file=sys.stderr)
            return 130
    print(f"{out}: {form} experts {verb}, {record.summary()}")
    if out != converted_folder(options.checkpoint, form):
        place = converted_folder(options.checkpoint, form)
        print(f"--allow {form} looks in {place}: move the folder there, or link it")
    return 0
