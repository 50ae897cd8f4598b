"""The names of ``generate``'s arguments: those that do something, and those of transformers that
may only be given where they ask for nothing."""

import difflib
from collections.abc import Mapping

from dovetail.ir.errors import InputError

KNOWN = frozenset(
    {
        "max_new_tokens",
        "max_length",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "eos_token_id",
        "pad_token_id",
        "num_return_sequences",
        "seed",
    }
)
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "use_cache": (True,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "early_stopping": (False,),
    "return_dict_in_generate": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "use_mtp": (False,),
    "low_memory": (False,),
    "synced_gpus": (False,),
    "disable_compile": (True, False),
    "is_assistant": (False,),
    "logits_processor": ([],),
    "stopping_criteria": ([],),
}
"""Values of other arguments of transformers that ask for nothing."""
_IGNORED = frozenset({"transformers_version", "bos_token_id", "_from_model_config", "tokenizer"})
"""Said in a generation config, or beside stop strings, without a bearing on what is made."""
_TRANSFORMERS = frozenset(
    {
        "assistant_model",
        "bad_words_ids",
        "begin_suppress_tokens",
        "cache_implementation",
        "constraints",
        "custom_generate",
        "diversity_penalty",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "guidance_scale",
        "inputs_embeds",
        "max_time",
        "min_p",
        "negative_prompt_ids",
        "past_key_values",
        "penalty_alpha",
        "position_ids",
        "prefix_allowed_tokens_fn",
        "prompt_lookup_num_tokens",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
        "token_type_ids",
        "top_h",
        "watermarking_config",
    }
)


def check_name(name: str, value: object) -> None:
    """Raise InputError unless the argument ``name`` may be ``value``."""
    if name in KNOWN or name in _IGNORED or value is None:
        return
    neutral = _NEUTRAL.get(name)
    if neutral is not None and value in neutral:
        return
    if neutral is not None or name in _TRANSFORMERS:
        raise InputError(
            f"generate({name}={value!r}): dovetail decodes greedily or by sampling with "
            f"temperature, top_k and top_p, and knows nothing of {name}: leave it out, or use "
            "transformers' own generate"
        )
    near = difflib.get_close_matches(name, sorted(KNOWN), 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(KNOWN))}"
    raise InputError(f"generate() has no argument {name!r}: {hint}")
