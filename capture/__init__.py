"""Hugging Face causal language models to task graphs, without their weights."""
