"""The prompts of a batch run: a file with one JSON object a line, in UTF-8.

A line is ``{"prompt": "text"}`` or ``{"input_ids": [1, 2, 3]}``, each with an optional ``"id"``, a
string or an integer that comes back in the output. Without one, the id is the prompt's position
among the lines that are not blank, counted from 0; lines that are left out as bad count too, so
that correcting one later gives no other prompt a new id. Ids must differ (1 and "1" do). Blank
lines are ignored. Token ids are taken as they are; text goes through the tokenizer.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dovetail.ir.errors import InputError

_FIELDS = frozenset({"id", "prompt", "input_ids"})
_SURROGATE = re.compile("[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt that will run: ``index`` counts from 0 over these, ``line`` from 1 in the file.

    ``text`` is None where the line gave token ids.
    """

    index: int
    id: str | int
    line: int
    text: str | None
    input_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that was left out; ``reason`` says what was found and what was expected."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a file in its order, and the lines left out of it.

    ``digest`` is the SHA-256 of the ids and token ids, so it does not change with the file's
    spacing, or with text given as its token ids. ``cut_short`` counts the prompts that the context
    stops before ``max_new_tokens``.
    """

    prompts: tuple[Prompt, ...]
    skipped: tuple[BadLine, ...]
    digest: str
    cut_short: int


class _BadLineError(Exception):
    """What is wrong with one line; becomes an InputError with the line's place, or a BadLine."""


@dataclass(frozen=True, slots=True)
class _Fields:
    """One well-formed line: exactly one of ``text`` and ``input_ids`` is set."""

    id: str | int | None
    text: str | None
    input_ids: list[int] | None


def read_prompts(
    path: Path,
    encode: Callable[[str], list[int]],
    vocab_size: int,
    context: int,
    max_new_tokens: int,
    skip_bad: bool,
) -> PromptSet:
    """Read a prompt file; every prompt leaves room for at least one new token in ``context``.

    Raises InputError at the first bad line, with its number; with ``skip_bad`` bad lines are
    collected instead. Raises InputError also for a file that cannot be read or has no prompt left,
    and for ``max_new_tokens`` below 1.
    """
    if max_new_tokens < 1:
        raise InputError(f"max new tokens is {max_new_tokens}; expected 1 or more: pass at least 1")
    prompts: list[Prompt] = []
    skipped: list[BadLine] = []
    line_of_id: dict[str | int, int] = {}
    # Sharing one int object per token id keeps a prompt at 8 bytes a token.
    token_ids = list(range(vocab_size))
    for position, (line, raw) in enumerate(_lines(path)):
        try:
            fields = _parse_line(raw)
            prompt_id = position if fields.id is None else fields.id
            if prompt_id in line_of_id:
                raise _BadLineError(
                    f"found the id {prompt_id!r}, which line {line_of_id[prompt_id]} has; expected "
                    "ids that differ (without an id, it is the position from 0)"
                )
            ids = _input_ids(fields, encode, vocab_size, context)
        except _BadLineError as error:
            if not skip_bad:
                raise InputError(
                    f"{path}, line {line}: {error}; correct the line, or pass --skip-bad to leave "
                    "it out"
                ) from error
            skipped.append(BadLine(line, str(error)))
            continue
        line_of_id[prompt_id] = line
        shared = tuple([token_ids[i] for i in ids])
        prompts.append(Prompt(len(prompts), prompt_id, line, fields.text, shared))
    if not prompts:
        raise _no_prompts(path, skipped)
    cut_short = sum(len(prompt.input_ids) + max_new_tokens > context for prompt in prompts)
    return PromptSet(tuple(prompts), tuple(skipped), _digest(prompts), cut_short)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and bytes of each line that is not blank."""
    try:
        # Bytes, because text mode would stop at the first bad byte and cannot name its line.
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                content = (raw.removeprefix(_BOM) if line == 1 else raw).rstrip()
                if content:
                    yield line, content
    except OSError as error:
        raise InputError(
            f"cannot read the prompts {path}: {error.strerror}; expected a file with one JSON "
            'object a line, such as {"prompt": "Once upon a time"}: check the path'
        ) from error


def _parse_line(raw: bytes) -> _Fields:
    try:
        value: object = json.loads(raw.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _BadLineError(
            f"found the byte 0x{raw[error.start]:02x} at column {error.start + 1}; expected UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise _BadLineError(
            f"found malformed JSON at column {error.colno} ({error.msg}); expected one JSON object"
        ) from error
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits and nesting thousands deep are no JSONDecodeError.
        raise _BadLineError(f"found unusable JSON ({error}); expected one JSON object") from error
    if not isinstance(value, dict):
        raise _BadLineError(f"found {_kind(value)}; expected a JSON object")
    if unknown := sorted(value.keys() - _FIELDS):
        raise _BadLineError(
            f"found the field {unknown[0]!r}; expected only id and one of prompt, input_ids"
        )
    if ("prompt" in value) == ("input_ids" in value):
        both = "both prompt and input_ids" if "prompt" in value else "no prompt and no input_ids"
        raise _BadLineError(f"found {both}; expected exactly one of them")
    return _Fields(_checked_id(value), _checked_text(value), _checked_ids(value))


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build an object, refusing a repeated name, of which json would keep the last unsaid."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _BadLineError(f"found the field {twice!r} twice; expected it once")
    return value


def _checked_id(value: dict[str, object]) -> str | int | None:
    if "id" not in value:
        return None
    found = value["id"]
    if isinstance(found, str):
        _refuse_surrogates("id", found)
        return found
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    raise _BadLineError(f"found {_kind(found)} as id; expected a string or an integer")


def _checked_text(value: dict[str, object]) -> str | None:
    if "prompt" not in value:
        return None
    found = value["prompt"]
    if not isinstance(found, str):
        raise _BadLineError(f"found {_kind(found)} as prompt; expected a string")
    if not found:
        raise _BadLineError("found an empty prompt; expected text")
    _refuse_surrogates("prompt", found)
    return found


def _checked_ids(value: dict[str, object]) -> list[int] | None:
    if "input_ids" not in value:
        return None
    found = value["input_ids"]
    if not isinstance(found, list):
        raise _BadLineError(f"found {_kind(found)} as input_ids; expected a list of integers")
    # By exact type: JSON's true is an int to isinstance.
    if not set(map(type, found)) <= {int}:
        at = next(at for at, item in enumerate(found) if type(item) is not int)
        raise _BadLineError(
            f"found {_kind(found[at])} as input_ids[{at}]; expected a list of integers"
        )
    return found


def _refuse_surrogates(name: str, text: str) -> None:
    # JSON can spell half of a pair, which no tokenizer or UTF-8 file takes.
    if half := _SURROGATE.search(text):
        raise _BadLineError(
            f"found half of a surrogate pair (U+{ord(half.group()):04X}) in {name}; expected "
            "characters that UTF-8 can hold"
        )


def _input_ids(
    fields: _Fields, encode: Callable[[str], list[int]], vocab_size: int, context: int
) -> list[int]:
    if fields.text is not None:
        ids, source = encode(fields.text), "the tokenizer's output"
    else:
        assert fields.input_ids is not None
        ids, source = fields.input_ids, "input_ids"
    if not ids:
        raise _BadLineError(f"found no tokens in {source}; expected at least one")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        outside = min(ids) if min(ids) < 0 else max(ids)
        raise _BadLineError(
            f"found the token id {_short(outside)} in {source}; expected ids from 0 to "
            f"{vocab_size - 1}, the model's vocabulary"
        )
    if len(ids) >= context:
        raise _BadLineError(
            f"found a prompt of {len(ids)} tokens; expected at most {context - 1}, so that one new "
            f"token fits in the model's context of {context}"
        )
    return ids


def _no_prompts(path: Path, skipped: Sequence[BadLine]) -> InputError:
    if not skipped:
        return InputError(
            f"{path}: found no prompts; expected one JSON object a line, such as "
            '{"prompt": "Once upon a time"}: check the path'
        )
    return InputError(
        f"{path}: each of its {len(skipped)} lines is bad, the first, line {skipped[0].line}: "
        f"{skipped[0].reason}; correct the file"
    )


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.input_ids]).encode() + b"\n")
    return digest.hexdigest()


def _kind(value: object) -> str:
    """Name a JSON value for a message, as in ``the number 1.5``."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"the string {_short(value)}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"the number {_short(value)}"


def _short(value: object) -> str:
    return reprlib.repr(value)
