"""Kernels as files: written from a config, checked against their manifest, refused when altered."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.cli import main
from dovetail.codegen.gate.compile import triton_version
from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.choose import choose_layer
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_parts import Activation, Weights
from dovetail.ir.kernel_spec import RouteSpec
from dovetail.kernels.files import MANIFEST, check_kernels, write_kernels
from dovetail.kernels.layers import layer_of_config

CONFIGS = Path(__file__).parents[1] / "bench" / "configs"
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "hidden_size": 2880,
    "intermediate_size": 2880,
}


def config(name: str) -> dict[str, object]:
    """A published config."""
    data: dict[str, object] = json.loads((CONFIGS / name / "config.json").read_text())
    return data


def route_of(layer: LayerSpec) -> RouteSpec:
    """The layer's routing, which must be known."""
    assert layer.route is not None
    return layer.route


def test_a_config_says_what_its_layer_is() -> None:
    layer = layer_of_config(config("DeepSeek-V3"))
    assert (layer.experts, layer.hidden, layer.inter, layer.shared) == (256, 7168, 2048, 2048)
    route = route_of(layer)
    assert (route.score, route.bias, route.groups, route.top_groups) == ("sigmoid", True, 8, 4)
    assert (route.group_score, route.renormalise, route.scale) == ("top2", True, 2.5)
    assert route_of(layer_of_config(config("Mixtral-8x7B"))).renormalise
    assert not route_of(layer_of_config(config("OLMoE-1B-7B"))).renormalise
    v2 = route_of(layer_of_config(config("DeepSeek-V2")))
    assert (v2.groups, v2.top_groups, v2.group_score, v2.scale) == (8, 3, "max", 16.0)
    oss = layer_of_config(GPT_OSS)
    assert oss.activation == Activation("clamped", "interleaved") and oss.bias
    assert (oss.up.order, route_of(oss).renormalise) == ("kn", True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "llama"}, "model type 'llama' has no kernels"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2': kernels compute silu"),
        ({"torch_dtype": "float8"}, "dtype 'float8'"),
        ({"num_local_experts": 0}, "no positive n_routed_experts or num_local_experts"),
    ],
)
def test_a_config_without_kernels_is_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        layer_of_config(config("Mixtral-8x7B") | change)


def test_written_kernels_are_what_their_manifest_says(tmp_path: Path) -> None:
    layer = layer_of_config(config("Qwen3-30B-A3B"))
    made = write_kernels(layer, ARCHS["sm_90"], tmp_path)
    assert check_kernels(tmp_path) == made
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {reference.file for reference in made.kernels} | {MANIFEST}
    again = write_kernels(layer, ARCHS["sm_90"], tmp_path / "again")
    assert again == made


def test_altered_kernels_are_refused(tmp_path: Path) -> None:
    layer = layer_of_config(config("Qwen3-30B-A3B"))
    made = write_kernels(layer, ARCHS["sm_90"], tmp_path, ladder=(16,))
    source = tmp_path / made.kernels[-1].file
    text = source.read_text(encoding="utf-8")
    source.write_text(text + "import os\n", encoding="utf-8")
    with pytest.raises(PlanError, match="not what this version of dovetail emits"):
        check_kernels(tmp_path)
    source.unlink()
    with pytest.raises(PlanError, match="No such file or directory; write the kernels again"):
        check_kernels(tmp_path)
    manifest = tmp_path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"stages": 4', '"stages": 3'))
    with pytest.raises(PlanError, match="its spec belongs in"):
        check_kernels(tmp_path)
    manifest.write_text("{")
    with pytest.raises(PlanError, match="not a readable manifest"):
        check_kernels(tmp_path)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "kernels")
    model = str(CONFIGS / "Mixtral-8x7B")
    assert main(["kernels", "make", model, "--arch", "sm_80", "-o", out]) == 0
    assert "to  16384 tokens  up 128×" in capsys.readouterr().out
    assert main(["kernels", "check", out]) == 0
    assert "kernels for sm_80, as their specs say" in capsys.readouterr().out
    assert main(["kernels", "make", model, "--arch", "sm_75", "-o", out]) == 1
    assert "--arch sm_75: kernels are emitted for sm_80" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_gated_kernels_carry_what_their_binary_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    layer = replace(layer_of_config(config("OLMoE-1B-7B")), up=Weights("int8"))
    arch, out = ARCHS["sm_100"], tmp_path / "out"
    made = write_kernels(layer, arch, out, ladder=(1,), gate=True)
    assert all(0 < reference.registers <= 255 for reference in made.kernels)
    assert all(reference.compiler.startswith("triton ") for reference in made.kernels)
    assert check_kernels(out) == made
    # What the model likes best spills here; the gate took the next.
    first = choose_layer(layer, arch, (1, 1))
    if triton_version() == "3.7.1":
        assert made.ladder[0].up != first.up
    assert choose_layer(layer, arch, (1, 1), [first.up]).up != first.up
