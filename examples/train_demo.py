"""Train the demo checkpoint that dovetail ships, on one CPU thread in about ten minutes.

    python examples/train_demo.py --out src/dovetail/demo_data

The model is a byte-level OLMoE of 3.9 M parameters, trained on one novel in the public domain. The
result is stored in bfloat16, so that it stays small enough for the repository.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from dovetail.demo import corpus, sentence_starts

PAD, BOS, EOS = 256, 257, 258
VOCAB = 264  # 256 bytes and three specials, rounded up to a multiple of 8
BALANCE_WEIGHT = 0.01
BATCH_BYTES = 2048
SHORT, LONG = 256, 512
LONG_PART = 0.2


@dataclass(frozen=True, slots=True)
class Stream:
    """Text as one row of byte ids, its parts ended by EOS, and where its sentences begin."""

    ids: torch.Tensor
    starts: list[int]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose id for a byte is that byte, with <pad>, <bos> and <eos> after them."""
    # The byte-level alphabet shows printable Latin-1 bytes as themselves, and numbers the others
    # from U+0100 on.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    vocab = {chr(byte): byte for byte in shown}
    vocab |= {chr(256 + place): byte for place, byte in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def demo_config() -> OlmoeConfig:
    """The demo's dimensions: 5 layers of 16 experts, 2 of them for each byte."""
    return OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=112,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LONG,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        initializer_range=0.05,
        router_aux_loss_coef=BALANCE_WEIGHT,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def encode(paragraphs: list[str], seed: int) -> Stream:
    """Join ``paragraphs``, which are ASCII, into one stream.

    EOS follows every paragraph, and replaces the space after every second sentence on average, so
    that the model ends its texts soon, but knows prompts of several sentences too.
    """
    chosen = random.Random(seed)
    ids: list[int] = []
    starts: list[int] = []
    for paragraph in paragraphs:
        part = [*paragraph.encode("ascii"), EOS]
        for start in sentence_starts(paragraph):
            starts.append(len(ids) + start)
            if start and chosen.random() < 0.5:
                part[start - 1] = EOS
        ids += part
    return Stream(torch.tensor(ids), starts)


def batches(stream: Stream, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Windows that begin where sentences do, as prompts will, ``[rows, window + 1]`` ids."""
    chosen = random.Random(seed)
    for step in range(steps):
        window = LONG if step >= (1 - LONG_PART) * steps else SHORT
        starts = [start for start in stream.starts if start + window < len(stream.ids)]
        rows = chosen.sample(starts, BATCH_BYTES // window)
        yield torch.stack([stream.ids[start : start + window + 1] for start in rows])


def cross_entropy(model: OlmoeForCausalLM, stream: Stream) -> float:
    """Mean nats per byte over ``stream``, in windows of the full context."""
    rows = stream.ids[: len(stream.ids) // LONG * LONG].view(-1, LONG)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in rows[:, None]]
    return float(sum(losses) / len(losses))


def imbalance(router_logits: torch.Tensor, per_token: int) -> torch.Tensor:
    """The load-balancing loss of one layer from ``[tokens, experts]``: 1 if all are used alike.

    transformers' own loss pools the layers, so that a layer may leave experts unused.
    """
    shares = router_logits.float().softmax(dim=-1)
    chosen = router_logits.topk(per_token).indices.flatten()
    used = torch.bincount(chosen, minlength=shares.shape[1]) / len(chosen)
    return shares.shape[1] * (used * shares.mean(dim=0)).sum()


def train(model: OlmoeForCausalLM, text: Stream, steps: int, peak_rate: float, seed: int) -> None:
    """AdamW with a short warm-up and a linear decay; bfloat16 products, float32 weights."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1 - 0.98 * step / steps)
    )
    began = time.perf_counter()
    for step, ids in enumerate(batches(text, steps, seed), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids[:, :-1], output_router_logits=True)
        text_loss = torch.nn.functional.cross_entropy(
            out.logits.float().flatten(0, 1), ids[:, 1:].flatten()
        )
        losses = [imbalance(layer, model.num_experts_per_tok) for layer in out.router_logits]
        balance = torch.stack(losses).mean()
        torch.autograd.backward(text_loss + BALANCE_WEIGHT * balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            seconds = time.perf_counter() - began
            print(
                f"step {step}/{steps}  nats/byte {text_loss.item():.3f}  "
                f"imbalance {balance.item():.3f}  {step * BATCH_BYTES / seconds:.0f} bytes/s",
                flush=True,
            )


def sample(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """``prompt`` and the model's greedy continuation, up to 200 bytes."""
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    return str(tokenizer.decode(out[0]))


def main() -> None:
    """Train, report the held-out loss and a sample, and write the checkpoint."""
    parser = argparse.ArgumentParser(description="Train dovetail's demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)

    text, held_out = (encode(paragraphs, arguments.seed) for paragraphs in corpus())
    model = OlmoeForCausalLM(demo_config())
    model.set_experts_implementation("grouped_mm")
    train(model, text, arguments.steps, arguments.rate, arguments.seed)
    # What the stored weights will give, not those before rounding.
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    print(f"held-out nats/byte {cross_entropy(model, held_out):.3f}")
    tokenizer = byte_tokenizer()
    print(sample(model, tokenizer, "Elizabeth was"))
    model.bfloat16().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
