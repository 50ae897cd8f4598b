"""The front doors: `compile`, `load`, torch.compile's backend and experts for transformers."""
