"""Qwen 3.5 mixes the frequencies of three position grids, which are one for text."""

from typing import Any

import torch
from torch import Tensor, nn


def text_only(module: nn.Module) -> None:
    """Take the frequencies of the first grid: transformers writes the same ones over them."""
    own: Any = module

    def recomposition_frequencies(freq: Tensor) -> Tensor:
        return torch.cat((freq[0], freq[0]), dim=-1)

    own.recomposition_frequencies = recomposition_frequencies
