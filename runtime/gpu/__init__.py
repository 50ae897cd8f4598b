"""Executors of GPU programs: devices, memory, and the work behind every operation."""
