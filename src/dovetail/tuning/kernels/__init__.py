"""`dovetail kernels tune`: kernels of a GPU plan, searched by measuring."""
