"""Key statistics: equal to a plain computation, early stop, files, merging, checks."""

import json
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from peft_edit import EditConfig, KeyStatistics, collect_statistics, collecting
from peft_edit.collecting import sample_texts
from peft_edit.hooks import on_input

from .models import build_model
from .world import texts, word_tokenizer


MODULES = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def model():
    return build_model("llama")


def remember(seen, name, _module, args):
    seen[name] = args[0][0]


def plain(model, tokenizer, lines):
    """Second moments from one text at a time and the whole forward pass."""
    sums, count = dict.fromkeys(MODULES, 0.0), 0
    for line in lines:
        seen = {}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(partial(remember, seen, name)) for name in MODULES
        ]
        with torch.no_grad():
            model(**tokenizer(line, return_tensors="pt"))
        for handle in handles:
            handle.remove()
        for name, keys in seen.items():
            sums[name] = sums[name] + keys.double().T @ keys.double()
        count += len(keys)
    return {name: total / count for name, total in sums.items()}, count


def test_equals_the_plain_computation_and_ignores_padding(model):
    tokenizer = word_tokenizer()
    lines = [" ".join(texts()[0].split()[:length]) for length in (3, 17, 9, 30, 5)]
    expected, count = plain(model, tokenizer, lines)
    found = collect_statistics(model, tokenizer, lines, MODULES, batch_tokens=40, max_tokens=10**6)
    assert found.tokens == count
    for name in MODULES:
        assert torch.allclose(found.second_moments[name].double(), expected[name], rtol=1e-5, atol=1e-10)


def uneven_texts(seed=0):
    """Token ids of very different lengths, in no order."""
    lengths = [1, 90, 2, 47, 100, 3, 1, 61, 12, 100, 5, 29, 7, 80, 2]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1024, (length,), generator=generator).tolist() for length in lengths]


def looped(model, sequences):
    """Second moments in float64 from one sequence at a time, without any batching."""
    sums = dict.fromkeys(MODULES, 0.0)
    for sequence in sequences:
        seen = {}
        with ExitStack() as stack, torch.no_grad():
            for name in MODULES:
                stack.enter_context(on_input(model.get_submodule(name), partial(seen.__setitem__, name)))
            model(torch.tensor([sequence]))
        for name, keys in seen.items():
            sums[name] = sums[name] + keys[0].double().T @ keys[0].double()
    return {name: total / sum(map(len, sequences)) for name, total in sums.items()}


def relative_error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("batch_tokens", [1, 64, 300, 4096])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 2e-3)]
)
def test_equals_a_loop_in_float64_however_it_is_batched(model, dtype, tolerance, batch_tokens):
    model, sequences = model.to(dtype), uneven_texts()
    wanted = looped(model, sequences)
    found = collect_statistics(model, None, sequences, MODULES, batch_tokens=batch_tokens, max_tokens=10**6)
    assert found.tokens == sum(map(len, sequences))
    for name in MODULES:
        assert found.second_moments[name].dtype == torch.float32
        assert torch.equal(found.second_moments[name], found.second_moments[name].T)
        # In bfloat16 the model itself rounds differently in batches of different shapes.
        assert relative_error(found.second_moments[name], wanted[name]) < tolerance


def test_products_by_blocks_equal_the_whole(monkeypatch):
    monkeypatch.setitem(collecting._BLOCK_ROWS, "cpu", 24)
    keys = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(64, 64, dtype=torch.float64)
    for part in (keys[:20], keys[20:].bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            collecting._add_products(total, part)
    rounded = torch.cat([keys[:20], keys[20:].bfloat16().float()]).double()
    assert relative_error(collecting._mean(total, 50), rounded.T @ rounded / 50) < 1e-6


def test_stops_at_the_limit_in_the_order_of_the_texts(model):
    sequences = uneven_texts()
    found = collect_statistics(model, None, sequences, MODULES, max_tokens=100, source="a")
    assert found.tokens == 1 + 90 + 2 + 47
    wanted = looped(model, sequences[:4])
    assert all(relative_error(found.second_moments[name], wanted[name]) < 1e-6 for name in MODULES)
    many = [sequence for seed in range(12) for sequence in uneven_texts(seed)]
    assert 1920 <= collect_statistics(model, None, many, MODULES).tokens < 1920 + 100


def test_batches_hold_every_sequence_within_the_budget_and_little_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 400, (3000,), generator=generator).tolist()
    sequences = [[index] * length for index, length in enumerate(lengths)]
    batches = list(collecting._batches(sequences, 4096))
    sizes = [len(batch) * max(map(len, batch)) for batch in batches]
    assert max(sizes) <= 4096
    assert sorted(sequence for batch in batches for sequence in batch) == sorted(sequences)
    assert sum(sizes) < 1.02 * sum(lengths)
    assert list(collecting._batches([[1] * 9, [2]], 4)) == [[[1] * 9], [[2]]]


def test_reads_ahead_within_bounds(monkeypatch):
    monkeypatch.setattr(collecting, "READ_AHEAD", 2)
    read = []
    next(collecting._batches((read.append(index) or [index] * 10 for index in range(1000)), 40))
    assert len(read) == 8


def test_runs_no_more_of_the_model_than_needed(model):
    calls = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _module, _args, index=index: calls.append(index))
    collect_statistics(model, word_tokenizer(), texts(), MODULES)
    assert set(calls) == {0, 1}


def test_takes_datasets_generators_and_token_ids(model):
    tokenizer, lines = word_tokenizer(), texts()[:30]
    wanted = collect_statistics(model, tokenizer, lines, MODULES)
    for source in (
        Dataset.from_dict({"text": lines}),
        (line for line in lines),
        [tokenizer(line)["input_ids"] for line in lines],
    ):
        found = collect_statistics(model, tokenizer, source, MODULES)
        assert all(torch.equal(found.second_moments[name], wanted.second_moments[name]) for name in MODULES)


def test_merging_halves_gives_the_whole(model):
    tokenizer, lines = word_tokenizer(), texts()[:40]
    whole = collect_statistics(model, tokenizer, lines, MODULES, max_tokens=10**6)
    first, second = (
        collect_statistics(model, tokenizer, part, MODULES, max_tokens=10**6, source=source)
        for part, source in ((lines[:15], "a"), (lines[15:], "b"))
    )
    merged = first.merge(second)
    assert merged.tokens == whole.tokens and merged.source == "a + b"
    assert all(torch.allclose(merged.second_moments[name], whole.second_moments[name], rtol=1e-5) for name in MODULES)
    with pytest.raises(ValueError, match="different modules"):
        first.merge(second.subset(MODULES[:1]))


def test_saves_and_loads(model, tmp_path):
    found = collect_statistics(model, word_tokenizer(), texts(), MODULES, source="the little world")
    found.save(tmp_path)
    loaded = KeyStatistics.from_pretrained(tmp_path)
    assert (loaded.tokens, loaded.source, loaded.fingerprint) == (found.tokens, found.source, found.fingerprint)
    assert all(torch.equal(loaded.second_moments[name], found.second_moments[name]) for name in MODULES)
    loaded.check(model, MODULES)
    loaded.check(build_model("llama").bfloat16(), MODULES)


def test_damaged_files_are_named(model, tmp_path):
    collect_statistics(model, word_tokenizer(), texts(), MODULES).save(tmp_path)
    tensors, about = tmp_path / "key_statistics.safetensors", tmp_path / "key_statistics.json"
    whole, described = tensors.read_bytes(), json.loads(about.read_text())
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="key_statistics.safetensors.*cannot be used"):
        KeyStatistics.load(tmp_path)
    tensors.write_bytes(whole)
    about.write_text(json.dumps({**described, "modules": {**described["modules"], MODULES[0]: 7}}))
    with pytest.raises(ValueError, match="no triangle of 7 rows"):
        KeyStatistics.load(tmp_path)
    about.write_text(json.dumps({**described, "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        KeyStatistics.load(tmp_path)
    about.unlink()
    with pytest.raises(ValueError, match="key_statistics.json"):
        KeyStatistics.load(tmp_path)


def test_another_models_statistics_are_refused(model):
    found = collect_statistics(model, word_tokenizer(), texts(), MODULES)
    with pytest.raises(ValueError, match="weights of .* differ by"):
        found.check(build_model("llama", seed=5), MODULES)
    with pytest.raises(ValueError, match="model_type is 'llama' there and 'qwen2' here"):
        found.check(build_model("qwen2"), MODULES)
    with pytest.raises(ValueError, match="not 'model.layers.2.mlp.down_proj'"):
        found.check(model, ["model.layers.2.mlp.down_proj"])


def test_no_text_too_little_text_and_broken_models(model):
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="every text given is empty"):
        collect_statistics(model, tokenizer, ["", "  "], MODULES)
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        collect_statistics(model, tokenizer, texts(), ["nowhere"])
    with pytest.raises(ValueError, match="without a 'text' field"):
        collect_statistics(model, tokenizer, [{"body": "x"}], MODULES)
    with pytest.warns(UserWarning, match="at least 640, better 1920 tokens are advised"):
        collect_statistics(model, tokenizer, ["The town of Ada"], MODULES)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        collect_statistics(model, tokenizer, texts(), MODULES)


@pytest.mark.parametrize(
    ("slip", "said"),
    [
        ("The town of Ada is Rome.", r"One str was given .* pass a list, \[text\]"),
        (b"The town of Ada is Rome.", r"One bytes was given .* pass a list, \[text\]"),
        ({"text": ["The town of Ada is Rome."]}, r"One mapping \(\['text'\]\) was given"),
        ([b"The town of Ada is Rome."], "of the type bytes: decode it"),
    ],
)
def test_one_text_in_place_of_several_is_refused(model, slip, said):
    with pytest.raises(ValueError, match=said):
        collect_statistics(model, word_tokenizer(), slip, MODULES)
    edited = get_peft_model(model, EditConfig(task_type="CAUSAL_LM", layers_to_transform=[0]))
    with pytest.raises(ValueError, match=said):
        edited.collect_statistics(slip, word_tokenizer())
    assert edited.peft_config["default"].memory is None


def test_sampled_text_is_seeded_and_leaves_the_global_state_alone(model):
    tokenizer = word_tokenizer()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, same, other = (sample_texts(model, tokenizer, 200, seed, batch_size=4, length=20) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == same != other and sum(map(len, one)) >= 200
    tokenizer.bos_token = None
    assert sample_texts(model, tokenizer, 50, 0, batch_size=4, length=10)
