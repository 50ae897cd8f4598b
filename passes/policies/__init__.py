"""Policies: every published way to schedule is a function from a model, a machine, a budget, a
workload and its knobs to moves. One file each; ``POLICIES`` is the list of those there are."""

from dovetail.passes.policies import (
    chunked_prefill,
    eager,
    layered_prefill,
    model_batch,
    module_batch,
    weight_stream,
    zigzag,
)
from dovetail.passes.policies.common import Policy

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        eager.POLICY,
        model_batch.POLICY,
        weight_stream.POLICY,
        module_batch.POLICY,
        chunked_prefill.POLICY,
        layered_prefill.POLICY,
        zigzag.POLICY,
    )
}
