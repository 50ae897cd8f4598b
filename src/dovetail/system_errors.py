"""Errors of the operating system, said as our own are."""

from dovetail.ir.errors import OutputError


def as_output_error(error: OSError) -> OutputError:
    """The same error with the file's name and what to do."""
    place = f"{error.filename}: " if error.filename else ""
    return OutputError(
        f"{place}{error.strerror or error}; expected a place that can be read and written: check "
        "its name, permissions and free space, and run the same command again"
    )
