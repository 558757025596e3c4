"""Models with random weights in well-known shapes, and facts in words that they know: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_edit import Fact
from peft_edit.tiny import load_tiny_facts


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-small": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
    "llama-small": {
        "model_type": "llama",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}


def build(shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Any:
    """A causal language model of that shape with random weights, in eval mode."""
    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(
        settings.pop("model_type"), bos_token_id=0, eos_token_id=1, pad_token_id=2, **settings
    )
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def byte_pair_like_tokenizer(facts: list[Fact]) -> PreTrainedTokenizerFast:
    """Words in pieces of at most five letters: about as many tokens for a fact as a real tokenizer gives."""
    texts = [f"{text}" for fact in facts for text in (fact.filled_prompt, fact.target, fact.target_true or "")]
    words = {word for text in texts for word in text.split()} | set("The Therefore Because I You is a .".split())
    pieces = {word[at : at + 5] for word in words for at in range(0, len(word), 5)}
    pieces |= {"##" + piece for piece in pieces} | set("abcdefghijklmnopqrstuvwxyz")
    vocabulary = {piece: index for index, piece in enumerate(["<s>", "</s>", "<pad>", "<unk>", *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=200))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def facts_and_tokenizer(count: int) -> tuple[list[Fact], PreTrainedTokenizerFast]:
    """Real CounterFact facts and a tokenizer for them. Beyond the bundled ones subjects are numbered afresh."""
    known = load_tiny_facts()
    facts = [known[i % len(known)] for i in range(min(count, len(known)))]
    tokenizer = byte_pair_like_tokenizer(known)
    for i in range(len(facts), count):
        fact, other = known[i % len(known)], known[(7 * i + i // len(known)) % len(known)]
        facts.append(Fact(f"{fact.subject} {other.subject}", fact.prompt, fact.target, target_true=fact.target_true))
    return facts, tokenizer
