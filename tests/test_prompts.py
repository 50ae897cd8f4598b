"""Prompt files: what is read, what the digest is of, and each bad line by its number."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.ir.errors import InputError
from dovetail.prompts import BadLine, Prompt, PromptSet, read_prompts


def encode(text: str) -> list[int]:
    """One token a byte; a lone space has none, as in a tokenizer that strips."""
    return [] if text == " " else list(text.encode())


def read(path: Path, *, skip_bad: bool = False, vocab_size: int = 256) -> PromptSet:
    return read_prompts(path, encode, vocab_size, context=16, max_new_tokens=4, skip_bad=skip_bad)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


def test_read_prompts(file: Path) -> None:
    file.write_bytes(
        b'\xef\xbb\xbf{"prompt": "hi"}\r\n\n  \n{"id": "b", "input_ids": [1, 2]}\n'
        b'{"id": 7, "prompt": "\xc3\xa9\xe2\x80\xa8"}'
    )
    result = read(file)
    assert result.prompts == (
        Prompt(0, 0, 1, "hi", (104, 105)),
        Prompt(1, "b", 4, None, (1, 2)),
        Prompt(2, 7, 5, "é\u2028", (0xC3, 0xA9, 0xE2, 0x80, 0xA8)),
    )
    assert result.skipped == () and result.cut_short == 0


def test_digest_is_of_ids_and_token_ids(file: Path) -> None:
    def digest(text: str) -> str:
        file.write_text(text)
        return read(file).digest

    first = digest('{"id": 7, "prompt": "hi"}\n{"prompt": "a"}\n')
    assert first == digest('\n{"prompt":"hi","id":7}\n\n{"id": 1, "prompt": "\\u0061"}')
    assert first == digest('{"id": 7, "input_ids": [104, 105]}\n{"input_ids": [97]}')
    others = [
        '{"id": "7", "prompt": "hi"}\n{"prompt": "a"}\n',
        '{"id": 7, "prompt": "hia"}\n',
        '{"id": 1, "prompt": "a"}\n{"id": 7, "prompt": "hi"}\n',
    ]
    assert len({first, *map(digest, others)}) == 4


def test_prompts_that_the_context_cuts_short_are_counted(file: Path) -> None:
    file.write_text('{"prompt": "123456789012"}\n{"prompt": "1234567890123"}\n')
    assert read(file).cut_short == 1


BAD = [
    (b'{"prompt": "a"', "malformed JSON at column 15"),
    (b"hello", "malformed JSON at column 1"),
    (b'{"prompt": "a"} {"prompt": "b"}', "malformed JSON at column 17"),
    (b'"hello"', "the string 'hello'; expected a JSON object"),
    (b"[1]", "a list; expected a JSON object"),
    (b"null", "null; expected a JSON object"),
    (b'{"prompt": "a", "max_tokens": 3}', "the field 'max_tokens'; expected only id and one of"),
    (b'{"prompt": "a", "prompt": "b"}', "the field 'prompt' twice"),
    (b'{"prompt": "a", "input_ids": [1]}', "both prompt and input_ids"),
    (b'{"id": "a"}', "no prompt and no input_ids"),
    (b'{"id": 1.5, "prompt": "a"}', "the number 1.5 as id; expected a string or an integer"),
    (b'{"id": true, "prompt": "a"}', "true as id"),
    (b'{"id": null, "prompt": "a"}', "null as id"),
    (b'{"prompt": 3}', "the number 3 as prompt; expected a string"),
    (b'{"prompt": ""}', "an empty prompt; expected text"),
    (b'{"prompt": " "}', "no tokens in the tokenizer's output"),
    (b'{"prompt": "\xff"}', "the byte 0xff at column 13; expected UTF-8"),
    (b'{"prompt": "\\ud800"}', r"half of a surrogate pair \(U\+D800\) in prompt"),
    (b'{"id": "\\udc00", "prompt": "a"}', r"half of a surrogate pair \(U\+DC00\) in id"),
    (b'{"input_ids": "1 2"}', "the string '1 2' as input_ids; expected a list of integers"),
    (b'{"input_ids": [1, 2.0]}', r"the number 2.0 as input_ids\[1\]"),
    (b'{"input_ids": [true]}', r"true as input_ids\[0\]"),
    (b'{"input_ids": []}', "no tokens in input_ids"),
    (b'{"input_ids": [1, 256, 3]}', "the token id 256 in input_ids; expected ids from 0 to 255"),
    (b'{"input_ids": [-1]}', "the token id -1 in input_ids"),
    (
        b'{"prompt": "1234567890123456"}',
        "a prompt of 16 tokens; expected at most 15.*context of 16",
    ),
    (b'{"id": 0, "prompt": "a"}', "the id 0, which line 1 has"),
    (b'{"input_ids": [' + b"9" * 5000 + b"]}", "unusable JSON"),
    (b'{"prompt": ' + b"[" * 100_000, "unusable JSON"),
]


@pytest.mark.parametrize(("line", "found"), BAD, ids=range(len(BAD)))
def test_read_prompts_refuses(file: Path, line: bytes, found: str) -> None:
    file.write_bytes(b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(InputError, match=rf"in.jsonl, line 3: found {found}.*--skip-bad") as error:
        read(file)
    result = read(file, skip_bad=True)
    assert [prompt.text for prompt in result.prompts] == ["a", "b"]
    # The bad line counts for the ids given by position.
    assert [(prompt.index, prompt.id) for prompt in result.prompts] == [(0, 0), (1, 2)]
    (skipped,) = result.skipped
    assert isinstance(skipped, BadLine) and skipped.line == 3
    assert skipped.reason in str(error.value) and len(skipped.reason) < 300


def test_read_prompts_refuses_tokens_outside_of_the_models_vocabulary(file: Path) -> None:
    file.write_text('{"prompt": "az"}\n')
    with pytest.raises(InputError, match=r"the token id 122 in the tokenizer's output.*0 to 121"):
        read(file, vocab_size=122)


def test_read_prompts_refuses_a_file_without_prompts(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the prompts .*No such file.*check the path"):
        read(file)
    with pytest.raises(InputError, match=r"cannot read the prompts .*Is a directory"):
        read(tmp_path)
    file.write_text("\n \n")
    with pytest.raises(InputError, match=r"in.jsonl: found no prompts; expected one JSON object"):
        read(file)
    file.write_text("x\ny\n")
    with pytest.raises(InputError, match=r"each of its 2 lines is bad, the first, line 1: found"):
        read(file, skip_bad=True)


def test_read_prompts_refuses_zero_new_tokens(file: Path) -> None:
    with pytest.raises(InputError, match="max new tokens is 0; expected 1 or more"):
        read_prompts(file, encode, 256, 16, max_new_tokens=0, skip_bad=False)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FIELDS = st.dictionaries(st.sampled_from(["id", "prompt", "input_ids", "x"]), JSON_VALUES)


@given(st.lists(st.binary(max_size=20) | FIELDS.map(lambda value: json.dumps(value).encode())))
def test_any_line_is_a_prompt_or_a_named_bad_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    rows = [line.replace(b"\n", b" ") for line in lines]
    file.write_bytes(b'{"input_ids": [1]}\n' + b"\n".join(rows))
    result = read(file, skip_bad=True)
    used = [prompt.line for prompt in result.prompts] + [bad.line for bad in result.skipped]
    blank = [at for at, row in enumerate(rows, start=2) if not row.strip()]
    assert sorted(used + blank) == list(range(1, len(rows) + 2))
    assert [prompt.index for prompt in result.prompts] == list(range(len(result.prompts)))
    assert all(0 < len(prompt.input_ids) < 16 for prompt in result.prompts)
