"""GPU targets: costs, memory, placement, prediction, choice and lowering of a GPU's schedules."""
