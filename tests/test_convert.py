"""Converted experts: what a folder holds, how near it is to the checkpoint, and how it is read."""

import json
import mmap
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.convert_cases import (
    LARGEST,
    Source,
    decoded,
    expert_layers,
    relative_error,
    source_tensor,
    stored,
    tiny_source,
)

from dovetail.checkpoint import ModelFolder
from dovetail.cli import main
from dovetail.ir import codec
from dovetail.ir.moves import FORMATS, ExpertFormat
from dovetail.ir.placement import expert_bytes
from dovetail.passes.expert_precision import with_precision
from dovetail.precision.convert import convert
from dovetail.precision.folder import ConvertedExperts, converted_folder, open_converted
from dovetail.runtime.direct_io import Reader
from dovetail.runtime.weight_store import WeightStore

# A tensor for every expert; all stacked; stacked, [in, out] and with biases; stacked on the first
# axis of a matrix, one of them [in, out]; besides a shared expert and a layer without experts.
LAYOUTS = ("olmoe", "granitemoe", "gpt_oss", "dbrx", "deepseek_v3")
WHOLE = "model.safetensors"


@pytest.fixture(scope="module", params=LAYOUTS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A checkpoint of each layout."""
    return tiny_source(tmp_path_factory.mktemp("sources"), request.param)


@pytest.fixture(scope="module", params=FORMATS)
def form(request: pytest.FixtureRequest) -> ExpertFormat:
    """Each format."""
    found: ExpertFormat = request.param
    return found


@pytest.fixture(scope="module")
def record(source: Source, form: ExpertFormat) -> ConvertedExperts:
    """The record of the experts, converted into the usual place."""
    return convert(source.folder, source.graph, form, converted_folder(source.path, form))


def test_all_that_the_graph_reads_is_there(
    source: Source, form: ExpertFormat, record: ConvertedExperts
) -> None:
    index = open_converted(source.folder, form, graph=codec.digest(source.graph))
    expected = {
        tensor.key.format(layer=layer, expert=expert): (tensor.dtype, tensor.shape)
        for layer, experts in expert_layers(with_precision(source.graph, form))
        for expert in range(experts.count)
        for tensor in experts.tensors
    }
    found = {key: (entry.dtype, entry.shape) for key, entry in index.entries.items()}
    assert {key: found[key] for key in expected} == expected
    # Routed experts alone are converted, and all of the checkpoint is as it was.
    assert found == dict(source.folder.entries) | expected
    assert index.directory == source.path
    assert index.digest() == source.folder.index.digest()
    place = converted_folder(source.path, form)
    assert {path.name for path in place.iterdir()} == {"experts.json", "model.safetensors"}


def test_weights_are_within_half_a_scale(
    source: Source, form: ExpertFormat, record: ConvertedExperts
) -> None:
    before = stored(source.path)
    after = stored(converted_folder(source.path, form))
    errors = {}
    for layer, experts in expert_layers(source.graph):
        found = []
        for expert in range(experts.count):
            name = f"dovetail.layers.{layer}.experts.{expert}."
            for tensor in experts.tensors:
                matrix = source_tensor(before, experts, tensor, layer, expert)
                if len(tensor.shape) == 1:
                    assert after[name + tensor.part].equal(matrix)
                    continue
                scales = after[name + tensor.part + "_scale"]
                rounded, scale = decoded(after[name + tensor.part], scales, form)
                assert ((matrix.double() - rounded).abs() <= scale * (0.5 + 1e-5)).all()
                # The largest weight of a scale's block is stored as the largest number.
                assert (rounded.abs() / scale).max().round() == LARGEST[form]
                found.append(relative_error(matrix, rounded))
        errors[layer] = found
    assert [layer.layer for layer in record.layers] == list(errors)
    for error, found in zip(record.layers, errors.values(), strict=True):
        assert error.body == source.graph.body(error.layer).name
        assert error.mean == pytest.approx(sum(found) / len(found), rel=1e-5)
        assert error.worst == pytest.approx(max(found), rel=1e-5)
    worst = max(max(found) for found in errors.values())
    assert record.worst.worst == pytest.approx(worst, rel=1e-5)


def test_neighbours_are_one_read(
    source: Source, form: ExpertFormat, record: ConvertedExperts
) -> None:
    graph = with_precision(source.graph, form)
    index = open_converted(source.folder, form)
    after = stored(converted_folder(source.path, form))
    with Reader() as reader:
        store = WeightStore(graph, index, reader)
        for layer, experts in expert_layers(graph):
            for chunk in (range(3, 4), range(2, 7), range(experts.count)):
                [run] = store.unit("experts", layer, chunk).runs
                assert run.nbytes == len(chunk) * experts.nbytes
            unit = store.unit("experts", layer, range(2, 4))
            view = memoryview(mmap.mmap(-1, unit.nbytes))
            for expert, tensors in zip((2, 3), store.read(unit, view, streamed=True), strict=True):
                for part, tensor in tensors.items():
                    assert tensor.equal(after[f"dovetail.layers.{layer}.experts.{expert}.{part}"])


def test_the_record_says_what_was_converted(
    source: Source, form: ExpertFormat, record: ConvertedExperts
) -> None:
    assert record.checkpoint == source.folder.index.digest()
    assert record.graph == codec.digest(source.graph)
    sizes = [
        sum(experts.count * experts.nbytes for _, experts in expert_layers(graph))
        for graph in (source.graph, with_precision(source.graph, form))
    ]
    assert [record.source_bytes, record.nbytes] == sizes
    data = json.loads((converted_folder(source.path, form) / "experts.json").read_text())
    assert data.pop("digest") == record.digest()
    assert codec.decode(data, ConvertedExperts) == record


def test_again_gives_the_same_bytes(source: Source) -> None:
    places = [source.out("once"), source.out("twice")]
    for place in places:
        convert(source.folder, source.graph, "int8", place)
    for name in ("model.safetensors", "experts.json"):
        assert (places[0] / name).read_bytes() == (places[1] / name).read_bytes()


def test_what_is_there_already_is_left_alone(
    source: Source, form: ExpertFormat, record: ConvertedExperts
) -> None:
    place = converted_folder(source.path, form)
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}

    def refuse(_: int) -> None:
        raise AssertionError("written again")

    assert convert(source.folder, source.graph, form, place, refuse) == record
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A checkpoint with a tensor for every expert."""
    return tiny_source(tmp_path_factory.mktemp("olmoe"), "olmoe")


def test_files_hold_whole_layers(olmoe: Source) -> None:
    place = olmoe.out("files")
    experts = [experts for _, experts in expert_layers(with_precision(olmoe.graph, "int8"))]
    layer_bytes = experts[0].count * experts[0].nbytes
    record = convert(olmoe.folder, olmoe.graph, "int8", place, file_bytes=3 * layer_bytes - 1)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert [file.name for file in record.files] == names
    assert [file.size // layer_bytes for file in record.files] == [2, 2]
    index = open_converted(olmoe.folder, "int8", place)
    layers: dict[str, set[str]] = {}
    for key, entry in index.entries.items():
        if key.startswith("dovetail."):
            layers.setdefault(entry.file.name, set()).add(key.split(".")[2])
    assert layers == {names[0]: {"0", "1"}, names[1]: {"2", "3"}}
    whole = olmoe.out("whole file")
    convert(olmoe.folder, olmoe.graph, "int8", whole)
    split, expected = stored(place), stored(whole)
    assert split.keys() == expected.keys()
    assert all(split[key].equal(expected[key]) for key in expected)
    # A layer that is larger than a file has one of its own.
    record = convert(olmoe.folder, olmoe.graph, "int8", olmoe.out("small"), file_bytes=1)
    assert len(record.files) == 4


def test_float32_files_of_a_bfloat16_model(olmoe: Source, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "config.json").write_bytes((olmoe.path / "config.json").read_bytes())
    wide = {key: tensor.float() for key, tensor in load_file(olmoe.path / WHOLE).items()}
    save_file(wide, folder / WHOLE)
    convert(ModelFolder.open(folder), olmoe.graph, "int8", tmp_path / "from wide")
    convert(olmoe.folder, olmoe.graph, "int8", tmp_path / "from narrow")
    from_wide, from_narrow = stored(tmp_path / "from wide"), stored(tmp_path / "from narrow")
    assert all(from_wide[key].equal(from_narrow[key]) for key in from_narrow)


def test_sizes_that_no_alignment_divides(tmp_path: Path) -> None:
    sizes = {"hidden_size": 66, "moe_intermediate_size": 33, "num_hidden_layers": 1}
    source = tiny_source(tmp_path, "qwen3_moe", **sizes)
    graph = with_precision(source.graph, "int8")
    [(layer, experts)] = expert_layers(graph)
    assert experts.nbytes % 4 == 2
    convert(source.folder, source.graph, "int8", tmp_path / "int8")
    after = stored(tmp_path / "int8")
    with Reader() as reader:
        store = WeightStore(graph, open_converted(source.folder, "int8", tmp_path / "int8"), reader)
        # An expert is still one read; a neighbour that would not be aligned with it is its own.
        assert len(store.unit("experts", layer, range(1)).runs) == 1
        unit = store.unit("experts", layer, range(3))
        assert unit.nbytes <= 3 * expert_bytes(experts)
        view = memoryview(mmap.mmap(-1, unit.nbytes))
        for expert, tensors in enumerate(store.read(unit, view, streamed=True)):
            for part, tensor in tensors.items():
                assert tensor.equal(after[f"dovetail.layers.0.experts.{expert}.{part}"])


def test_the_usual_place_is_beside_the_checkpoint(tmp_path: Path) -> None:
    assert converted_folder(tmp_path / "model", "int8") == tmp_path / "model-experts-int8"
    assert converted_folder(Path("model"), "int4") == Path("model-experts-int4")
    here = Path(os.getcwd())
    assert converted_folder(Path("."), "int4") == here.parent / f"{here.name}-experts-int4"


def test_the_command(olmoe: Source, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(olmoe.path), "--experts", "int4"]
    place = converted_folder(olmoe.path, "int4")
    assert main(arguments) == 0
    written = capfd.readouterr().out
    assert main(arguments) == 0
    again = capfd.readouterr().out
    assert written.startswith(f"{place}: int4 experts are written, ")
    assert again == written.replace("are written", "are there already")
    assert " of it); the weights are off by " in written
    assert open_converted(olmoe.folder, "int4").digest() == olmoe.folder.index.digest()
    other = olmoe.out("elsewhere")
    assert main([*arguments, "-o", str(other)]) == 0
    assert f"--allow int4 looks in {place}" in capfd.readouterr().out
    assert (other / WHOLE).read_bytes() == (place / WHOLE).read_bytes()
