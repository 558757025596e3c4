"""Tiny causal language models of every supported family, built from configs: no download; same seed, same weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


VOCAB_SIZE = 1024
HIDDEN_SIZE = 32
NUM_LAYERS = 4
NUM_HEADS = 4

_TOKENS = dict(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=1, pad_token_id=2)
_MODERN = dict(
    hidden_size=HIDDEN_SIZE,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=NUM_HEADS,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
)
_GPT2_NAMES = dict(n_embd=HIDDEN_SIZE, n_layer=NUM_LAYERS, n_head=NUM_HEADS, n_positions=128)
_HEAD_SIZE = dict(head_dim=HIDDEN_SIZE // NUM_HEADS)

# family: (model type, what its config needs beside the token ids)
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2_NAMES),
    "gptj": ("gptj", {**_GPT2_NAMES, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {key: value for key, value in _MODERN.items() if key != "num_key_value_heads"}),
    "opt": (
        "opt",
        dict(
            hidden_size=HIDDEN_SIZE,
            word_embed_proj_dim=HIDDEN_SIZE,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            ffn_dim=64,
            max_position_embeddings=128,
        ),
    ),
    "bloom": ("bloom", dict(hidden_size=HIDDEN_SIZE, n_layer=NUM_LAYERS, n_head=NUM_HEADS)),
    "falcon": (
        "falcon",
        dict(hidden_size=HIDDEN_SIZE, num_hidden_layers=NUM_LAYERS, num_attention_heads=NUM_HEADS),
    ),
    "llama": ("llama", _MODERN),
    "mistral": ("mistral", _MODERN),
    "qwen2": ("qwen2", _MODERN),
    "qwen3": ("qwen3", {**_MODERN, **_HEAD_SIZE}),
    "gemma2": ("gemma2", {**_MODERN, **_HEAD_SIZE, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**_MODERN, **_HEAD_SIZE, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "phi": ("phi", {**_MODERN, "num_key_value_heads": NUM_HEADS}),
    "phi3": ("phi3", _MODERN),
    "olmo2": ("olmo2", _MODERN),
    "stablelm": ("stablelm", _MODERN),
    "granite": ("granite", _MODERN),
}
FAMILIES: tuple[str, ...] = tuple(_SETTINGS)


def build_config(family: str, **changes: Any) -> Any:
    """The transformers config of a tiny model.

    Args:
        family (`str`): One of `FAMILIES`.
        changes: Config values to set differently.
    """
    model_type, settings = _SETTINGS[family]
    return AutoConfig.for_model(model_type, **{**_TOKENS, **settings, **changes})


def build_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model with random weights, in evaluation mode; the global random state is left as it was.

    Args:
        family (`str`): One of `FAMILIES`.
        dtype (`torch.dtype`): Dtype of the weights.
        seed (`int`): Same seed, same weights.
        changes: Config values to set differently.
    """
    config = build_config(family, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()
