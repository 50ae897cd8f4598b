"""Pure optimisation: a problem in plain data, an answer as ``Solved``. No torch, no model words."""
