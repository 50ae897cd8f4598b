"""The errors a user can meet. Each message says what was found, what was expected and what to do.

Broken invariants of our own are plain ``assert``; everything a user can cause is one of these.
"""


class DovetailError(Exception):
    """Root of every error that dovetail raises on purpose."""


class InputError(DovetailError, ValueError):
    """A file, prompt, flag or size that cannot be used as given."""


class CheckpointError(InputError):
    """A model folder that is missing, incomplete, corrupt or of a kind we do not read."""


class BudgetError(InputError):
    """A budget too small for the model and workload; the message names the smallest that works."""


class PlanError(InputError):
    """A plan file that cannot be read, is malformed, or belongs to another model or machine."""


class CaptureError(DovetailError):
    """A model that could not be captured into a task graph; the message names the module."""


class VerifyError(DovetailError):
    """An IR object that breaks a rule of the verifier."""


class BoundError(DovetailError):
    """A schedule that beats what was proved that none beats: a defect of ours, never hidden."""


class ModelError(DovetailError, RuntimeError):
    """A model that is asked for what its plan or dovetail does not do: training, copies, moves."""


class OutputError(DovetailError):
    """Results could not be written; what was finished before is kept."""
