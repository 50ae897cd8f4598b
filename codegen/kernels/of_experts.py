"""Routed experts of a task graph as kernels see them, each lying in one piece in a slot."""

from collections.abc import Mapping

from dovetail.codegen.kernels.activation import recognise
from dovetail.codegen.kernels.gemm_rows import ALIGNED
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_parts import DTYPE_BYTES, Dtype, Place, Weights
from dovetail.ir.task_graph import ITEMSIZE, Experts, ExpertTensor

DTYPES: Mapping[str, Dtype] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def packed(experts: Experts) -> dict[str, int]:
    """Bytes from an expert's start to each of its tensors as the GPU runtime packs them, without
    gaps: first those of whole 16 bytes, so that they begin at such, then by falling size of an
    element, and else as they are listed."""
    found, at = {}, 0
    for tensor in sorted(
        experts.tensors, key=lambda one: (one.nbytes % ALIGNED > 0, -ITEMSIZE[one.dtype])
    ):
        found[tensor.part] = at
        at += tensor.nbytes
    return found


def layer_of_experts(
    name: str, experts: Experts, places: Mapping[str, int] | None = None
) -> LayerSpec:
    """The experts as a layer whose routing is computed elsewhere and whose shared expert, if any,
    is another task's.

    ``places`` are bytes from an expert's start to each tensor, ``packed`` by default. Raises
    InputError with the reason where no kernels run them.
    """
    tensors = {tensor.part: tensor for tensor in experts.tensors}
    places = packed(experts) if places is None else places
    kind = _dtype(name, experts)
    ups: list[str] = [part for part in ("gate_up", "gate", "up") if part in tensors]
    gated = ups != ["up"]
    activation = recognise(
        experts.activation, experts.intermediate, gated, gated and experts.split_gate
    )
    if ups == ["gate", "up"] and activation.pairs != "halves":
        raise InputError(f"{name}: gate and up are apart, but the activation takes them in pairs")
    orders = {_transposed(tensors[part], experts) for part in ups}
    if len(orders) > 1:
        raise InputError(f"{name}: of gate and up one is transposed, kernels take both alike")
    return LayerSpec(
        name=name,
        experts=experts.count,
        hidden=experts.hidden,
        inter=experts.intermediate,
        top_k=experts.top_k,
        route=None,
        x=kind,
        up=Weights(order="kn" if orders.pop() else "nk"),
        down=Weights(order="kn" if _transposed(tensors["down"], experts) else "nk"),
        activation=activation,
        bias=_biased(name, ups, tensors),
        up_place=_place(name, ups, tensors, places, kind),
        down_place=_place(name, ["down"], tensors, places, kind),
    )


def _dtype(name: str, experts: Experts) -> Dtype:
    kinds = {tensor.dtype for tensor in experts.tensors}
    if len(kinds) != 1 or not kinds <= set(DTYPES):
        raise InputError(
            f"{name}: its experts are stored as {' and '.join(sorted(kinds))}; kernels for experts "
            f"in slots take one of {', '.join(DTYPES)}"
        )
    return DTYPES[kinds.pop()]


def _transposed(tensor: ExpertTensor, experts: Experts) -> bool:
    """Whether a matrix is [inputs, outputs]."""
    return experts.transposed or tensor.transposed


def _biased(name: str, ups: list[str], tensors: Mapping[str, ExpertTensor]) -> bool:
    there = [f"{part}_bias" in tensors for part in (*ups, "down")]
    if any(there) and not all(there):
        raise InputError(f"{name}: some of its experts' products have a bias, kernels take all")
    return all(there)


def _place(
    name: str,
    parts: list[str],
    tensors: Mapping[str, ExpertTensor],
    places: Mapping[str, int],
    kind: Dtype,
) -> Place:
    """Elements from an expert's start to these parts and their biases."""
    wide = DTYPE_BYTES[kind]
    assert all(ITEMSIZE[tensors[part].dtype] == wide for part in parts)
    biases = [f"{part}_bias" for part in parts if f"{part}_bias" in tensors]
    for part in (*parts, *biases):
        if places[part] % wide:
            raise InputError(
                f"{name}: {part} begins at byte {places[part]} of an expert, kernels expect whole "
                f"elements of {wide} bytes, and loads are widest at multiples of {ALIGNED}"
            )
    matrices, added = (tuple(places[part] // wide for part in some) for some in (parts, biases))
    return Place(matrices, added)
