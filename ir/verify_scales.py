"""The scales of experts in fewer bits: every matrix has its own, and they fit."""

from math import prod

from dovetail.ir.errors import VerifyError
from dovetail.ir.task_graph import SCALE, Experts


def check_scales(where: str, experts: Experts) -> None:
    """Either no matrix has scales, or all are in one of the formats of fewer bits with theirs."""
    scales = {t.part: t for t in experts.tensors if t.part.endswith(SCALE)}
    matrices = [t for t in experts.tensors if t.parameters]
    if not scales:
        if any(t.dtype in ("int8", "uint8") for t in matrices):
            raise VerifyError(f"{where}: matrices of whole numbers, expected their scales too")
        return
    if {t.part + SCALE for t in matrices} != set(scales) or len({t.dtype for t in matrices}) > 1:
        raise VerifyError(
            f"{where}: scales {', '.join(scales)}, expected one for each of "
            f"{', '.join(t.part for t in matrices)}, all of one dtype"
        )
    for tensor in matrices:
        scale = scales[tensor.part + SCALE]
        outputs = tensor.shape[1] if tensor.dtype == "int8" else tensor.shape[0]
        groups = 1 if tensor.dtype == "int8" else prod(scale.shape[1:])
        fits = tensor.dtype in ("int8", "uint8") and tensor.parameters % (outputs * groups) == 0
        if not fits or scale.dtype != "float32" or scale.shape[0] != outputs:
            raise VerifyError(
                f"{where}: {tensor.part} is {tensor.dtype} {list(tensor.shape)} with scales "
                f"{scale.dtype} {list(scale.shape)}, expected int8 [in, out] with [out], or uint8 "
                "[out, in / 2] with [out, groups], in float32"
            )
