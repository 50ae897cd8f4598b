"""The demo checkpoints: transformers loads them, the trained one is real, bad ones are refused."""

import functools
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerBase,
)

import dovetail
from dovetail import demo, demo_random
from dovetail.demo import SIZES, corpus, demo_prompts, sentence_starts, write_demo
from dovetail.demo_random import RANDOM_SPECS, DemoSpec, write_random_weights
from dovetail.ir.errors import InputError, OutputError

STORED = Path(dovetail.__file__).parent / "demo_data"
TINY = DemoSpec(
    hidden=32, layers=11, heads=2, experts=4, experts_per_token=2, intermediate=16, vocab=264
)


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(STORED)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo") / "checkpoint")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> OlmoeForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(loaded, OlmoeForCausalLM)
    return loaded


def greedy(checkpoint: Path, model: Any, prompts: list[str], new_tokens: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return list(texts)


@pytest.fixture
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(RANDOM_SPECS, "tiny", TINY)
    monkeypatch.setitem(SIZES, "tiny", "for tests")
    return "tiny"


def test_repository_holds_at_most_10_mb() -> None:
    assert sum(path.stat().st_size for path in STORED.iterdir()) <= 10_000_000


def test_demo_is_mostly_experts(model: OlmoeForCausalLM) -> None:
    total = model.num_parameters()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert 3_500_000 <= total <= 4_500_000
    assert experts >= 0.85 * total


def test_demo_weights_are_float32_of_what_is_stored(
    checkpoint: Path, model: OlmoeForCausalLM
) -> None:
    assert model.dtype == torch.float32
    stored = load_file(STORED / "model.safetensors")
    written = load_file(checkpoint / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, weight in written.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored[name].float())


def test_demo_in_bfloat16(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_demo(tmp_path, dtype="bfloat16"))
    assert model.dtype == torch.bfloat16


def test_prompts_are_held_out_openings_of_many_lengths(checkpoint: Path) -> None:
    lines = (checkpoint / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines]
    assert prompts == demo_prompts()
    assert len({prompt["id"] for prompt in prompts}) == len(prompts) == 48
    lengths = [len(prompt["prompt"].encode()) for prompt in prompts]
    assert (min(lengths), max(lengths)) == (5, 200)
    assert len(set(lengths)) >= 30
    trained, held_out = ("\n".join(paragraphs) for paragraphs in corpus())
    assert all(prompt["prompt"] in held_out for prompt in prompts)
    assert not any(p["prompt"] in trained for p in prompts if len(p["prompt"]) > 40)
    assert demo_prompts(seed=1) != prompts


def test_sentence_starts() -> None:
    text = 'Mr. Darcy bowed. "Indeed!" cried she. "You may. Mrs. Hill is in."'
    starts = [text[start : start + 8] for start in sentence_starts(text)]
    assert starts == ["Mr. Darc", '"Indeed!', '"You may', "Mrs. Hil"]


def test_greedy_text_is_printable_and_varied(checkpoint: Path, model: OlmoeForCausalLM) -> None:
    (text,) = greedy(checkpoint, model, ["Elizabeth was"], 60)
    assert text.isprintable()
    words = text.split()
    known = set(" ".join(corpus()[0]).split())
    assert len(set(words)) >= 5
    # The last word may be cut off.
    assert sum(word in known for word in words[:-1]) >= 0.8 * (len(words) - 1)


def test_held_out_loss_is_that_of_english(model: OlmoeForCausalLM) -> None:
    text = "\n".join(corpus()[1]).replace("\n", " ")[:2048]
    ids = torch.tensor(list(text.encode())).view(4, 512)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 1.5


def test_routing_is_real(model: OlmoeForCausalLM) -> None:
    """Over the prompts each layer uses all of its experts, and some more than others."""
    loads = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for prompt in demo_prompts():
        ids = torch.tensor([list(prompt["prompt"].encode())])
        with torch.no_grad():
            routers = model(input_ids=ids, output_router_logits=True).router_logits
        for layer, logits in enumerate(routers):
            chosen = logits.topk(model.config.num_experts_per_tok).indices.flatten()
            loads[layer] += torch.bincount(chosen, minlength=loads.shape[1])
    shares = loads / loads.sum(dim=1, keepdim=True)
    assert (loads > 0).all()
    assert (shares.amax(dim=1) > 1.2 / loads.shape[1]).all()
    assert (shares.amax(dim=1) < 0.3).all()


def test_some_greedy_texts_end_early(checkpoint: Path, model: OlmoeForCausalLM) -> None:
    prompts = [prompt["prompt"] for prompt in demo_prompts()]
    texts = greedy(checkpoint, model, prompts, 64)
    assert 0 < sum(len(text) < 64 for text in texts) < len(texts)


@given(st.text())
def test_tokenizer_round_trip(text: str) -> None:
    ids = byte_tokenizer()(text).input_ids
    if "<" not in text:
        assert ids == list(text.encode())
    assert byte_tokenizer().decode(ids) == text


def test_tokenizer_specials() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>"]) == [256, 257, 258]
    assert tokenizer.eos_token == "<eos>"
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.decode([97, 258, 300], skip_special_tokens=True) == "a"


def test_random_checkpoint_loads_with_sane_states(tmp_path: Path, tiny_size: str) -> None:
    seen: list[tuple[int, int]] = []
    write_demo(tmp_path, tiny_size, progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "prompts.jsonl").exists()
    assert seen[-1] == (2 * TINY.values(), 2 * TINY.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.num_parameters() == TINY.values()
    ids = torch.arange(256).view(4, 64)
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True, output_router_logits=True)
    deviations = torch.stack([state.std() for state in out.hidden_states])
    assert ((deviations > 0.5) & (deviations < 3.0)).all()
    for logits in out.router_logits:
        assert len(logits.topk(TINY.experts_per_token).indices.unique()) == TINY.experts


def test_random_files_are_as_save_pretrained_writes_them(tmp_path: Path, tiny_size: str) -> None:
    ours = write_demo(tmp_path / "ours", tiny_size)
    model = AutoModelForCausalLM.from_pretrained(ours)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "theirs")
    name = "model.safetensors"
    assert (ours / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_random_shards_hold_whole_layers(tmp_path: Path, tiny_size: str) -> None:
    whole = write_demo(tmp_path / "whole", tiny_size)
    (tmp_path / "parts").mkdir()
    parts = tmp_path / "parts"
    write_random_weights(parts, TINY, "bfloat16", max_shard_bytes=60_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * TINY.values()
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(shards) > 3
    for layer in range(TINY.layers):
        keys = [key for key in index["weight_map"] if key.startswith(f"model.layers.{layer}.")]
        assert len({index["weight_map"][key] for key in keys}) == 1
    weights = {key: w for name in shards for key, w in load_file(parts / name).items()}
    assert weights.keys() == load_file(whole / "model.safetensors").keys()


def test_random_tensors_larger_than_a_chunk(
    tmp_path: Path, tiny_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_random, "_CHUNK_VALUES", 100)
    write_demo(tmp_path, tiny_size, dtype="float32")
    weight = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert weight.shape == (264, 32)
    assert 0.9 < weight.std().item() * 32**0.5 < 1.1


def test_seed_decides_random_weights(tmp_path: Path, tiny_size: str) -> None:
    first, again, other = (
        (write_demo(tmp_path / f"{i}", tiny_size, seed=seed) / "model.safetensors").read_bytes()
        for i, seed in enumerate([0, 0, 1])
    )
    assert first == again != other


def test_sizes_say_what_they_are() -> None:
    assert SIZES.keys() == {"demo", *RANDOM_SPECS}
    for name, low, high in [("400MB", 0.38e9, 0.42e9), ("1GB", 0.95e9, 1.05e9)]:
        assert low <= 2 * RANDOM_SPECS[name].values() <= high
    # As published: 6.92 B parameters.
    assert round(RANDOM_SPECS["OLMoE-1B-7B"].values() / 1e7) == 692
    with torch.device("meta"):
        config = OlmoeConfig(**RANDOM_SPECS["OLMoE-1B-7B"].config())
        model = OlmoeForCausalLM(config)
    assert model.num_parameters() == RANDOM_SPECS["OLMoE-1B-7B"].values()


def test_an_older_demo_is_replaced(tmp_path: Path, tiny_size: str) -> None:
    write_demo(tmp_path, tiny_size)
    stale = tmp_path / "model-00001-of-00002.safetensors"
    stale.write_bytes(b"")
    (tmp_path / "out.jsonl").write_text("kept")
    write_demo(tmp_path)
    assert not stale.exists()
    assert (tmp_path / "out.jsonl").read_text() == "kept"
    assert json.loads((tmp_path / "config.json").read_text())["dovetail_demo"] == "demo"


def test_refuses_unknown_size_and_dtype(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown demo size '2GB'; choose one of demo, 400MB"):
        write_demo(tmp_path, "2GB")
    with pytest.raises(InputError, match=r"unknown dtype 'int8'; choose one of float32, bfloat16"):
        write_demo(tmp_path, dtype="int8")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("config", [None, "{}", "[]", "not JSON"])
def test_refuses_a_foreign_directory(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"not empty and holds no dovetail demo.*nothing was wri"):
        write_demo(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, expected a directory"):
        write_demo(tmp_path / "file")


def test_refuses_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 50_000_000))
    with pytest.raises(InputError, match=r"needs 12\.\d\dGiB in .*, and the disk has 47\.68 MiB"):
        write_demo(tmp_path / "new", "OLMoE-1B-7B")
    assert not (tmp_path / "new").exists()


def test_refuses_a_disk_that_fills_up(
    tmp_path: Path, tiny_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_random_weights", full)
    with pytest.raises(OutputError, match="No space left on device; a checkpoint there is incompl"):
        write_demo(tmp_path, tiny_size)
    monkeypatch.undo()
    write_demo(tmp_path)
