"""Routing traces: which experts each token chose, recorded, kept and compared."""
