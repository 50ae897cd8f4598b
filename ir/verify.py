"""The verifier: what makes a task graph and a program legal, as code.

Everything that makes or changes IR must give something that passes; a VerifyError says where, what
was found and what was expected.
"""

from dovetail.ir.verify_graph import verify_graph
from dovetail.ir.verify_program import verify_program

__all__ = ["verify_graph", "verify_program"]
