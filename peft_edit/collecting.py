"""Collecting key statistics: text in batches through the model, up to the last edited module, and k kᵀ summed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .fingerprint import model_fingerprint
from .hooks import StopForward, evaluating, on_input
from .prompts import context_window
from .sharded import runnable, until_stopped
from .solve import solve_dtype
from .statistics import KeyStatistics
from .workers import Workers


# Keys per input dimension: ten hold a method's scores (arXiv 2506.04226), thirty keep more of what is not edited
# (docs/benchmarks.md). The model's own samples take far longer to write than to read.
TOKENS_PER_INPUT = 30
SAMPLED_PER_INPUT = 10

# Batches' worth of tokens that are read before batches are formed.
READ_AHEAD = 64

# The share of a sequence's row that may be padding where there are texts enough of other lengths.
MAX_PADDING = 0.1

# Rows of k kᵀ per product. Few rows save more of the half below the diagonal, but a GPU is busy only with many.
_BLOCK_ROWS = {"cpu": 256}
_BLOCK_ROWS_ELSEWHERE = 2048

_HALF = (torch.float16, torch.bfloat16)


def collect_statistics(
    model: Any,
    tokenizer: Any,
    texts: Iterable[Any],
    module_names: Sequence[str],
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    max_length: int = 512,
    source: str = "",
    progress: bool = False,
) -> KeyStatistics:
    """Runs texts through the model up to the last of the modules and averages k kᵀ over all tokens.

    Args:
        model: The base model, adapters disabled.
        tokenizer: Its tokenizer.
        texts (`Iterable`): Strings, mappings with a "text" field (a `datasets.Dataset` is an iterable of such), or
            sequences of token ids.
        module_names (`Sequence[str]`): Modules whose input is the key.
        max_tokens (`int`, *optional*): Where to stop, at the end of a sequence; by default after thirty tokens per
            input dimension of the widest module.
        batch_tokens (`int`): Tokens per forward pass at most, padding included; a longer sequence is run alone.
        max_length (`int`): Tokens per sequence at most; longer texts are cut into several.
        source (`str`): What the text is, stored with the statistics.
        progress (`bool`): Show a progress bar.

    Returns:
        `KeyStatistics`

    Raises:
        ValueError: if there is no text, or a single one instead of a list; if a module does not exist, or a key is not
            finite.
    """
    _check_several(texts)
    modules = _find_modules(model, module_names)
    length = min(max_length, context_window(model.config) or max_length)
    widest = max(_key_width(name, module) for name, module in modules.items())
    limit = TOKENS_PER_INPUT * widest if max_tokens is None else max_tokens
    sequences = _up_to(_token_sequences(tokenizer, texts, length), limit)
    bar = tqdm(total=limit, desc="Key statistics", unit="tokens", disable=not progress)
    with evaluating(model), runnable(model), torch.no_grad(), bar:
        sums, tokens = _sum_of_all(Workers.of(model), model, modules, _batches(sequences, batch_tokens), bar)
    if tokens == 0:
        raise ValueError("There is no text to collect key statistics from: every text given is empty.")
    moments = {name: _mean(sums[name], tokens) for name in module_names}
    for name, moment in moments.items():
        if not bool(moment.isfinite().all()):
            raise ValueError(
                f"The keys of '{name}' are not finite numbers: the weights hold NaN or overflow in this dtype."
            )
    if tokens < widest:
        warnings.warn(
            f"Key statistics from {tokens} tokens for {widest} input dimensions: at least "
            f"{SAMPLED_PER_INPUT * widest}, better {TOKENS_PER_INPUT * widest} tokens are advised.",
            stacklevel=2,
        )
    return KeyStatistics(moments, tokens, source, model_fingerprint(model, module_names))


def _find_modules(model: nn.Module, module_names: Sequence[str]) -> dict[str, nn.Module]:
    modules = {}
    for name in module_names:
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"The model has no module '{name}' to collect statistics of.") from error
    return modules


def _key_width(name: str, module: nn.Module) -> int:
    width = getattr(module, "in_features", None) or getattr(module, "nx", None)
    if width is None:
        raise ValueError(f"'{name}' is a {type(module).__name__}: key statistics are of linear modules' inputs.")
    return int(width)


# --- sums over batches -----------------------------------------------------------------------------------------


def _sum_products(
    model: Any, modules: Mapping[str, nn.Module], batches: Iterable[list[list[int]]], bar: tqdm
) -> tuple[dict[str, torch.Tensor], int]:
    """The sum of k kᵀ over all tokens of the batches (upper triangles, see `_add_products`), and their number."""
    device = _input_device(model)
    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    for batch in batches:
        _add_batch(model, modules, batch, device, sums)
        count = sum(map(len, batch))
        tokens += count
        bar.update(count)
    return sums, tokens


def _sum_of_all(
    workers: Workers, model: Any, modules: Mapping[str, nn.Module], batches: Iterable[list[list[int]]], bar: tqdm
) -> tuple[dict[str, torch.Tensor], int]:
    """As `_sum_products`, of every process together: each runs its share of the batches."""
    sums, tokens = workers.together(lambda: _sum_products(model, modules, workers.every_own(batches), bar))
    if workers.splits:
        device = _input_device(model)
        for name, module in modules.items():
            if name not in sums:  # fewer batches than processes
                size = _key_width(name, module)
                sums[name] = torch.zeros(size, size, dtype=solve_dtype(device), device=device)
            sums[name] = workers.sum(sums[name])
        tokens = int(workers.sum(torch.tensor(tokens, device=device)))
    return sums, tokens


def _input_device(model: Any) -> torch.device:
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _add_batch(
    model: Any,
    modules: Mapping[str, nn.Module],
    batch: list[list[int]],
    device: torch.device,
    sums: dict[str, torch.Tensor],
) -> None:
    """Adds one batch's k kᵀ to `sums`; the forward pass ends as soon as every module has been seen."""
    ids, mask = _padded(batch)
    # Found here and not on the device, where the host would wait for the count.
    rows = None if bool(mask.all()) else mask.flatten().nonzero().flatten()
    seen: set[str] = set()

    def add(name: str, hidden: torch.Tensor) -> None:
        keys = hidden.reshape(ids.numel(), hidden.shape[-1])
        if rows is not None:
            keys = keys.index_select(0, rows.to(keys.device))
        if name not in sums:
            size = keys.shape[1]
            sums[name] = torch.zeros(size, size, dtype=solve_dtype(keys.device), device=keys.device)
        _add_products(sums[name], keys)
        seen.add(name)
        if len(seen) == len(modules):
            raise StopForward

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(on_input(module, partial(add, name)))
        with until_stopped(model):
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)


def _padded(batch: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded on the right, and the attention mask."""
    width = max(map(len, batch))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
    lengths = torch.tensor([len(row) for row in batch])
    return ids, (torch.arange(width) < lengths[:, None]).long()


def _add_products(total: torch.Tensor, keys: torch.Tensor) -> None:
    """Adds the keys' k kᵀ to the upper triangle of `total`, by blocks of rows; below the diagonal it is undefined."""
    if keys.dtype in _HALF and not _sums_half_in_float32(keys.device, keys.dtype):
        keys = keys.float()
    block = _BLOCK_ROWS.get(keys.device.type, _BLOCK_ROWS_ELSEWHERE)
    # Under an autocast of the caller the products would be rounded to 16 bit.
    with torch.autocast(keys.device.type, enabled=False):
        for start in range(0, keys.shape[1], block):
            total[start : start + block, start:] += _product(keys[:, start : start + block], keys[:, start:])


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ right, in float32 if they are in 16 bit."""
    if left.dtype in _HALF:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T @ right


@cache
def _sums_half_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype there into a float32 result: on CUDA, from torch 2.8."""
    if device.type != "cuda":
        return False
    probe = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return torch.mm(probe, probe, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):
        return False


def _mean(total: torch.Tensor, tokens: int) -> torch.Tensor:
    """The whole mean in float32 on the CPU, from the upper triangle of the sum."""
    upper = (total / tokens).float().cpu().triu_()
    return upper + upper.triu(1).T


# --- texts to batches ------------------------------------------------------------------------------------------


def _check_several(texts: Any) -> None:
    """Refuses what would be iterated over by its characters, bytes or field names."""
    if isinstance(texts, (str, bytes, bytearray)):
        raise ValueError(
            f"One {type(texts).__name__} was given in place of several texts, and would be read character by "
            "character: pass a list, [text]."
        )
    if isinstance(texts, Mapping):
        raise ValueError(
            f"One mapping ({sorted(map(str, texts))}) was given in place of several texts: pass a list of records, "
            "or one split of a DatasetDict."
        )


def _token_sequences(tokenizer: Any, texts: Iterable[Any], length: int) -> Iterator[list[int]]:
    for text in texts:
        if isinstance(text, Mapping):
            if "text" not in text:
                raise ValueError(
                    f"A record without a 'text' field ({sorted(text)}): pass texts, or a dataset with one."
                )
            text = text["text"]
        if isinstance(text, (bytes, bytearray)):
            raise ValueError(f"A text is of the type {type(text).__name__}: decode it, or pass token ids as a list.")
        if isinstance(text, str):
            ids = list(tokenizer(text)["input_ids"]) if text.strip() else []
        else:
            ids = [int(token) for token in text]
        for start in range(0, len(ids), length):
            yield ids[start : start + length]


def _up_to(sequences: Iterable[list[int]], limit: int) -> Iterator[list[int]]:
    """The first sequences, until they hold `limit` tokens."""
    tokens = 0
    for sequence in sequences:
        yield sequence
        tokens += len(sequence)
        if tokens >= limit:
            return


def _batches(sequences: Iterable[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Batches of sequences of about the same length, at most `batch_tokens` with the padding.

    Sequences are read ahead and sorted by length, so that hardly anything is padding.
    """
    buffer: list[list[int]] = []
    buffered = 0
    for sequence in sequences:
        buffer.append(sequence)
        buffered += len(sequence)
        if buffered >= READ_AHEAD * batch_tokens:
            yield from _batches_by_length(buffer, batch_tokens)
            buffer, buffered = [], 0
    yield from _batches_by_length(buffer, batch_tokens)


def _batches_by_length(sequences: list[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if batch and not _joins(batch, sequence, batch_tokens):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _joins(batch: list[list[int]], sequence: list[int], batch_tokens: int) -> bool:
    """Whether the next shorter sequence fits in the batch: by size, and by length once the batch is worth a pass."""
    width = len(batch[0])
    size = width * (len(batch) + 1)
    if size <= batch_tokens // 4:
        return True
    return size <= batch_tokens and width - len(sequence) <= MAX_PADDING * width


def sample_texts(
    model: Any, tokenizer: Any, num_tokens: int, seed: int, batch_size: int = 32, length: int = 128
) -> list[list[int]]:
    """Text that the model itself writes, as token ids: what to fall back on where no text is at hand.

    Sampling is seeded and leaves the global random state untouched.

    Args:
        model: The causal language model, adapters disabled.
        tokenizer: Its tokenizer; without a BOS token each text starts with a random token.
        num_tokens (`int`): Tokens wanted in all.
        seed (`int`): Seed.
        batch_size (`int`): Texts written at a time.
        length (`int`): Tokens per text at most.
    """
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    length = min(length, context_window(model.config) or length)
    texts: list[list[int]] = []
    written = 0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(model):
        torch.manual_seed(seed)
        while written < num_tokens:
            if tokenizer.bos_token_id is not None:
                start = torch.full((batch_size, 1), tokenizer.bos_token_id)
            else:
                start = plain[torch.randint(len(plain), (batch_size, 1))]
            ids = start.to(device)
            cache = None
            step = ids
            for _ in range(length - 1):
                output = model(input_ids=step, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits = output.logits[:, -1, : len(tokenizer)].float()
                logits[:, sorted(token for token in special if token < logits.shape[1])] = -torch.inf
                step = torch.multinomial(logits.softmax(-1), 1)
                ids = torch.cat([ids, step], dim=1)
            texts += ids.tolist()
            written += ids.numel()
    return texts
