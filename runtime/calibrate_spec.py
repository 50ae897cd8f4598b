"""What calibration measures: sizes and block lengths. Tests shrink them; people do not set them."""

from dataclasses import dataclass

KIB, MIB = 1024, 1024**2


@dataclass(frozen=True, slots=True)
class Spec:
    """Sizes of one calibration; bytes, rows, tokens. The defaults are what ``protocol`` names."""

    gemm_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    gemm_width: int = 2048
    """K and N of the matrix multiply."""
    quantised_rows: tuple[int, ...] = (8, 32, 128, 512)
    """Rows of products with matrices in fewer bits."""
    shared_rows: int = 64
    """Rows of the matrix multiply that runs when slowdowns are measured."""
    attention_lengths: tuple[int, ...] = (16, 64, 256, 1024)
    kv_lengths: tuple[int, ...] = (16, 64, 256, 1024)
    heads: int = 16
    head_dim: int = 128
    cold_bytes: int | None = None
    """So much is touched before an operand is used again; None: three times the last cache."""
    disk_blocks: tuple[int, ...] = (128 * KIB, 1 * MIB, 4 * MIB, 8 * MIB)
    fresh_bytes: int = 1024 * MIB
    """So much new memory is touched; a quarter of what is free at most."""
    scratch_bytes: int = 256 * MIB
    """Checkpoints smaller than this are not read; where nothing else is, a file of this size."""
