"""A transformers model in memory, compiled: the same model, run by what was measured here.

python examples/compile_model.py [CHECKPOINT] [MACHINE.json]
"""

# %% A model as one loads it anyway.
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dovetail
from dovetail.demo import write_demo

given = sys.argv[1:]
checkpoint = Path(given[0]) if given else write_demo(Path(tempfile.mkdtemp()) / "checkpoint")
machine = given[1] if len(given) > 1 else ""  # this machine, calibrated once
model = AutoModelForCausalLM.from_pretrained(checkpoint)

# %% Compiled: it shares everything with the model, which stays as it is.
compiled = dovetail.compile(model, target=machine)
print(compiled)

# %% A forward pass. The first of a size measures every way to run the experts, eager included.
tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
one = tokenizer("It is a truth universally acknowledged", return_tensors="pt")
with torch.no_grad():
    logits, expected = compiled(**one).logits, model(**one).logits
print("largest difference from eager", (logits - expected).abs().max().item())

# %% generate with several prompts: transformers' loop or our executor, whichever is faster here.
prompts = ["It is a truth", "Mr. Darcy was", "Elizabeth could not", "The evening"]
batch = tokenizer(prompts, return_tensors="pt", padding=True)
options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
tokens = compiled.generate(**batch, **options)
assert torch.equal(tokens, model.generate(**batch, **options))
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))

# %% What was measured, and what was chosen.
print(compiled)
print(compiled.explain())

# %% The plan is a file; another process follows it without measuring.
plan = Path(tempfile.mkdtemp()) / "plan.json"
compiled.save_plan(plan)
again = dovetail.compile(model, plan=plan, target=machine)
with torch.no_grad():
    again(**one)
print([(choice.tokens, choice.winner, choice.source) for choice in again.plan.choices])
