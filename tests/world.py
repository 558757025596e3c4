"""Words and facts for models with random weights: mechanics can be tested on any family without training it."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_edit import Fact


NAMES = tuple(
    f"{first} {last}" for first in ("Ada", "Ben", "Cleo", "Dan", "Eve") for last in ("Stone", "Marsh", "Vale")
)
CITIES = ("Rome", "Paris", "Oslo", "Lima", "Cairo", "Delhi")
OTHERS = tuple(f"word{index}" for index in range(40))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that opens every text with `<s>`; every word above is one token."""
    words = [*{part: None for name in NAMES for part in name.split()}, *CITIES, *OTHERS]
    words += ["The", "Therefore", "Because", "I", "You", "is", "a", "town", "of", "."]
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def town_facts(count: int) -> list[Fact]:
    """Facts whose prompt ends with the subject, so that even a random model can be made to answer."""
    return [Fact(name, "The town of {}", CITIES[i % 6]) for i, name in enumerate(NAMES[:count])]


def texts() -> list[str]:
    """Text of that vocabulary, for key statistics."""
    return [
        " ".join([*OTHERS[start:], *OTHERS[:start], f"The town of {name} is a"])
        for start in range(40)
        for name in NAMES
    ]
