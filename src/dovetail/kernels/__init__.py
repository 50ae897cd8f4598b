"""`dovetail kernels`: the Triton kernels of a checkpoint, written and checked as files."""
