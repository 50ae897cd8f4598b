"""Experts in fewer bits: converted beside a checkpoint, and found again where a plan has them."""
