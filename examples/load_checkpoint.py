"""A checkpoint larger than its memory budget, as a model that generates.

    python examples/load_checkpoint.py [CHECKPOINT] [MACHINE.json]

Without a checkpoint the small demo model is written first: 14.7 MiB of weights, run in 12 MiB.
"""

# %% A checkpoint to work with.
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, TextStreamer, pipeline

import dovetail
from dovetail.demo import write_demo

given = sys.argv[1:]
checkpoint = Path(given[0]) if given else write_demo(Path(tempfile.mkdtemp()) / "checkpoint")
machine = given[1] if len(given) > 1 else ""  # this machine, calibrated once

# %% The model: nothing is read yet but the headers of the weights' files.
model = dovetail.load(checkpoint, budget="ram=12MiB", target=machine)
print(model)

# %% Prompts of any lengths, as lists: planned at the first call, batched without padding.
tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
prompts = ["It is a truth", "Mr. Darcy was", "Elizabeth could not", "The evening"]
rows = model.generate([tokenizer(text).input_ids for text in prompts], max_new_tokens=12)
for row in rows:
    print(repr(tokenizer.decode(row)))

# %% The same with a padded batch, as transformers has it; sampling repeats with torch's seed.
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
batch = tokenizer(prompts, return_tensors="pt", padding=True)
torch.manual_seed(0)
sampled = model.generate(**batch, max_new_tokens=12, do_sample=True, temperature=0.8, top_p=0.9)
print(tokenizer.batch_decode(sampled, skip_special_tokens=True))

# %% One prompt, token by token.
one = tokenizer("It is a truth", return_tensors="pt")
model.generate(**one, max_new_tokens=12, streamer=TextStreamer(tokenizer))

# %% As the model of a pipeline.
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(write("Mr. Bennet", max_new_tokens=12, do_sample=False))

# %% What was decided, and what ran when.
print(model)
for move in model.plan.moves[:6]:
    print(" ", move)
busy: dict[str, float] = {}
for span in model.timeline().spans:
    if span.kind in ("run", "load"):
        busy[span.engine] = busy.get(span.engine, 0.0) + span.seconds
print({engine: f"{seconds * 1e3:.1f} ms busy" for engine, seconds in sorted(busy.items())})
model.close()
