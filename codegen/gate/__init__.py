"""Checks of emitted kernels that need no GPU: numbers in the interpreter, facts of the binary."""
