"""dovetail's experts in a plain transformers model.

python examples/hf_experts.py [CHECKPOINT]
"""

# %% Importing dovetail makes the name known.
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import dovetail  # noqa: F401  # registers experts_implementation="dovetail"
from dovetail.demo import write_demo

given = sys.argv[1:]
checkpoint = Path(given[0]) if given else write_demo(Path(tempfile.mkdtemp()) / "checkpoint")
model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="dovetail")

# %% Everything else is transformers.
ids = torch.arange(40, 60)[None]
with torch.no_grad():
    found = model(ids).logits
    model.set_experts_implementation("eager")
    expected = model(ids).logits
print("largest difference from eager", (found - expected).abs().max().item())
