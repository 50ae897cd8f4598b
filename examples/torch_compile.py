"""torch.compile with our backend: no import of dovetail is needed.

python examples/torch_compile.py [CHECKPOINT]
"""

# %% Any model; the backend is found by its name.
import logging
import sys

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

logging.basicConfig(level=logging.WARNING)
logging.getLogger("dovetail").setLevel(logging.INFO)
torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    config = OlmoeConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
compiled = torch.compile(model, backend="dovetail", dynamic=True)

# %% Sizes may change; the routed experts in the graph are regions that are measured and scheduled.
with torch.no_grad():
    for seqs, tokens in ((2, 7), (3, 12), (1, 40)):
        ids = torch.randint(3, 200, (seqs, tokens))
        difference = (compiled(ids).logits - model(ids).logits).abs().max().item()
        print(f"{seqs} x {tokens}: largest difference from eager {difference:.2g}")
