"""Prompts: the only place that knows how a fact becomes tokens, and where in them the subject ends."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .facts import PLACEHOLDER, Fact, FactError


# The essence prompt of ROME and MEMIT: what the subject *is* should stay as it was (arXiv 2202.05262, eq. 4).
ESSENCE_PROMPT = "{} is a"
_MESSAGE = "the message of the user"

# Openings from which the model writes its own context prefixes, as in MEMIT.
CONTEXT_OPENINGS = ("The", "Therefore", "Because", "I", "You")
CONTEXT_TOKENS = 10

_NO_SPACE_BEFORE = frozenset(",.;:!?%)]}'\u2019\u201d\u3001\u3002\uff0c\uff01\uff1f")
_SPACELESS_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass(frozen=True)
class TokenizedPrompt:
    """One sequence of the target search.

    Args:
        ids (`tuple[int, ...]`): Prompt tokens, then target tokens (none for a prompt that is only read).
        subject_index (`int`): Index of the subject's last token.
        prompt_length (`int`): Number of prompt tokens: `ids[prompt_length:]` is the target.
    """

    ids: tuple[int, ...]
    subject_index: int
    prompt_length: int

    @property
    def target_ids(self) -> tuple[int, ...]:
        return self.ids[self.prompt_length :]


@dataclass(frozen=True)
class FactPrompts:
    """All sequences of one fact: `rows[0]` is the bare prompt, then one per context; `essence` is read only."""

    rows: tuple[TokenizedPrompt, ...]
    essence: TokenizedPrompt


def join(prompt: str, target: str) -> tuple[str, str]:
    """Prompt and target as they stand in running text: white space at the seam belongs to the target.

    A space is added unless the target brings one, begins with closing punctuation, or both sides of the seam are of a
    script that is written without spaces.
    """
    bare = prompt.rstrip()
    if target[:1].isspace():
        return bare, target
    spaceless = is_spaceless(bare[-1:]) and is_spaceless(target[:1])
    if bare == prompt and (target[:1] in _NO_SPACE_BEFORE or spaceless):
        return bare, target
    return bare, " " + target


def is_spaceless(character: str) -> bool:
    return bool(character) and unicodedata.name(character, "").startswith(_SPACELESS_SCRIPTS)


def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """What a tokenizer's chat template writes before the user's message, and from there to the assistant's answer.

    Raises:
        ValueError: if there is no template, or it does not write the message as it is.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("The tokenizer has no chat template: edit without chat_template, or set one.")
    message = [{"role": "user", "content": _MESSAGE}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    if text.count(_MESSAGE) != 1:
        raise ValueError(
            "The tokenizer's chat template does not write the user's message once and as it is, so facts cannot be "
            "placed in it: edit without chat_template."
        )
    before, after = text.split(_MESSAGE)
    return before, after


class PromptEncoder:
    """Turns facts into token sequences for one model.

    Args:
        tokenizer: A fast tokenizer (character offsets are needed to find the subject).
        vocabulary_size (`int`): Rows of the model's input embedding.
        max_length (`int`, *optional*): The model's context window, in tokens.
        chat (`bool`): Prompts are the user's message in the tokenizer's chat template, targets the assistant's answer.

    Raises:
        ValueError: if the tokenizer is slow, or has no chat template where one is wanted.
    """

    def __init__(
        self, tokenizer: Any, vocabulary_size: int, max_length: int | None = None, chat: bool = False
    ) -> None:
        if tokenizer is None or not callable(tokenizer):
            raise ValueError(
                "edit_facts needs the model's tokenizer: pass AutoTokenizer.from_pretrained(<base model>)."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets, which locating the subject needs: "
                "load the fast tokenizer of this model (AutoTokenizer does so by default)."
            )
        self.tokenizer = tokenizer
        self.vocabulary_size = vocabulary_size
        self.max_length = max_length
        self.chat = chat_frame(tokenizer) if chat else None

    def encode_fact(self, fact: Fact, contexts: Sequence[str]) -> FactPrompts:
        """The bare prompt and one row per context, each with the target, and the essence prompt without.

        Raises:
            FactError: if the subject or the target has no tokens of its own, or a row exceeds the context window.
        """
        rows = tuple(self.encode(fact, fact.prompt, prefix, fact.target) for prefix in ("", *contexts))
        return FactPrompts(rows=rows, essence=self.encode(fact, ESSENCE_PROMPT, "", None))

    def encode(self, fact: Fact, prompt: str, prefix: str, target: str | None) -> TokenizedPrompt:
        """Tokenises `prefix + prompt with the subject + target` and locates the subject's last token."""
        before, after = prompt.split(PLACEHOLDER, 1)
        opening = self.chat[0] if self.chat else ""
        before = opening + prefix + before
        text = before + fact.subject + after
        subject_end = len(before) + len(fact.subject.rstrip())
        target_text = ""
        if target is not None:
            text, target_text = self._joined(text, target)
        ids, offsets = self.tokenize(text)
        subject_index = max(
            (i for i, (start, end) in enumerate(offsets) if start < min(subject_end, end)), default=None
        )
        if subject_index is None or offsets[subject_index][1] <= len(before):
            raise FactError(f"the tokenizer finds no token for the subject {fact.subject!r} in {text!r}.")
        target_ids = self._target_ids(text, ids, target_text) if target is not None else []
        sequence = tuple(ids + target_ids)
        self._check_ids(fact, sequence)
        return TokenizedPrompt(ids=sequence, subject_index=subject_index, prompt_length=len(ids))

    def continuation_ids(self, prompt: str, target: str) -> tuple[list[int], list[int]]:
        """Token ids of a full-text prompt and of the target that continues it."""
        text, target_text = self._joined(self.chat[0] + prompt if self.chat else prompt, target)
        ids, _ = self.tokenize(text)
        return ids, self._target_ids(text, ids, target_text)

    def _joined(self, text: str, target: str) -> tuple[str, str]:
        """The text up to where the answer begins, and the answer with the space that it needs there."""
        if self.chat is None:
            return join(text, target)
        text = text + self.chat[1]
        return (text, target.strip()) if text[-1:].isspace() else join(text, target)

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids with the special tokens that open a sequence, without those that would close it."""
        # A chat template writes the special tokens itself.
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=self.chat is None)
        ids, offsets = list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]
        special = set(self.tokenizer.all_special_ids)
        while ids and ids[-1] in special and offsets[-1][0] == offsets[-1][1]:
            ids.pop()
            offsets.pop()
        return ids, offsets

    def _target_ids(self, text: str, prompt_ids: list[int], target_text: str) -> list[int]:
        """The tokens with which the model would continue the prompt's own tokens."""
        whole, _ = self.tokenize(text + target_text)
        if whole[: len(prompt_ids)] == prompt_ids:
            ids = whole[len(prompt_ids) :]
        else:  # a token straddles the seam: generation continues the prompt's tokens, so the target stands alone
            ids = list(self.tokenizer(target_text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise FactError(f"the tokenizer finds no token for the target {target_text!r} after {text!r}.")
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            raise FactError(
                f"the tokenizer has no tokens for a part of the target {target_text!r}; spell it otherwise."
            )
        return ids

    def _check_ids(self, fact: Fact, ids: Sequence[int]) -> None:
        largest = max(ids)
        if largest >= self.vocabulary_size:
            raise ValueError(
                f"The tokenizer gives token {largest} for {fact.filled_prompt!r}, but the model embeds only "
                f"{self.vocabulary_size} tokens: this is not the tokenizer of this model."
            )
        if self.max_length is not None and len(ids) > self.max_length:
            raise FactError(
                f"{fact.filled_prompt[:80]!r} takes {len(ids)} tokens with its context and target, more than the "
                f"model's context window of {self.max_length}; shorten it."
            )


def context_window(config: Any) -> int | None:
    """The largest sequence the model takes, in tokens, or None where it has no fixed limit."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def generate_contexts(
    model: Any, tokenizer: Any, count: int, seed: int, max_tokens: int = CONTEXT_TOKENS
) -> tuple[str, ...]:
    """Short prefixes written by the model itself, behind which an edited prompt must hold too (MEMIT, section 4.3).

    Sampling (top 5, as in MEMIT) is seeded and leaves the global random state untouched.

    Args:
        model: The causal language model, adapters disabled.
        tokenizer: Its tokenizer.
        count (`int`): How many prefixes.
        seed (`int`): Seed of the sampling.
        max_tokens (`int`): Tokens that the model adds to each opening.

    Returns:
        `tuple[str, ...]`: prefixes that end in `". "`.
    """
    if count == 0:
        return ()
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        device = torch.device("cpu")
    devices = [device] if device.type == "cuda" else []
    special = set(tokenizer.all_special_ids)
    contexts = []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for index in range(count):
            opening = tokenizer(CONTEXT_OPENINGS[index % len(CONTEXT_OPENINGS)])["input_ids"]
            while len(opening) > 1 and opening[-1] in special:
                opening.pop()
            ids = torch.tensor([opening], device=device)
            for _ in range(max_tokens):
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
                if not bool(torch.isfinite(logits).all()):
                    raise ValueError(
                        "The model's outputs are not finite before anything is changed: the weights hold NaN or "
                        "infinite values, or overflow in this dtype (try bfloat16 or float32)."
                    )
                logits[[token for token in special if token < len(logits)]] = -torch.inf
                values, candidates = logits[: len(tokenizer)].topk(5)
                choice = torch.multinomial(values.softmax(-1).cpu(), 1).to(candidates.device)
                ids = torch.cat([ids, candidates[choice][None].to(ids.device)], dim=1)
            text = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
            contexts.append(text.rstrip(". ") + ". ")
    return tuple(contexts)
