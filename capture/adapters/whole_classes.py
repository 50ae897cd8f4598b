"""Modules that are known to run whole, besides those with a state of their own."""

WHOLE = {
    "DogeCDMoE": "its router mixes tokens, so that only a sequence alone gives its results",
    "JetMoeAttention": "its heads are experts with a router of their own",
    "LongcatFlashMLA": "a layer has two attentions, each with its own KV",
}
"""Class name -> why its modules stay whole."""
