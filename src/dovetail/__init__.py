"""dovetail: make Mixture-of-Experts models run as fast as the machine allows.

Give it a model, a machine, a budget and a workload; it returns a plan one can read, and runs it.
"""

__version__ = "0.1.0"
