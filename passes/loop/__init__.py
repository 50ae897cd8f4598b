"""The loop body of one layer of a GPU's schedule: its operations, dependences and simulation."""
