"""Export to LoRA: plain PEFT loads it and answers as the edited model, to the error that the report states."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_edit import EditConfig
from peft_edit.evaluation import recall
from peft_edit.export import export_lora
from peft_edit.tiny import load_tiny_model, tiny_model_path

from . import random_adapters
from .models import NUM_LAYERS, build_model
from .random_adapters import apart, deltas, logits


PROMPT = "The mother tongue of Danielle Darrieux is"
FACTS = 24


@pytest.fixture(scope="module")
def edited(tiny_statistics, facts):
    """The tiny model with facts in two of its layers, and its tokenizer; nothing here changes it."""
    base, tokenizer = load_tiny_model()
    config = EditConfig(
        task_type="CAUSAL_LM", target_modules=["mlp.down_proj"], layers_to_transform=[0, 1], num_contexts=1
    )
    model = get_peft_model(base, config).eval()
    model.set_statistics(tiny_statistics)
    model.edit_facts(facts[:FACTS], tokenizer, progress=False)
    return model, tokenizer


def products(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BA of every module, in float64."""
    start, end = "base_model.model.", ".lora_A.weight"
    names = [key.removeprefix(start).removesuffix(end) for key in tensors if key.endswith(end)]
    return {
        name: tensors[f"{start}{name}.lora_B.weight"].double() @ tensors[f"{start}{name}.lora_A.weight"].double()
        for name in names
    }


def random_adapter(family, **changes) -> PeftModel:
    """Random deltas in two of the four blocks."""
    return random_adapters.random_adapter(family, **{"layers_to_transform": [0, 2], **changes})


# --- the same answers --------------------------------------------------------------------------------------------


IN_A_FRESH_PROCESS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, tokens, *adapters = sys.argv[1:]
ids = torch.tensor([[int(token) for token in tokens.split(",")]])
for adapter in adapters:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        torch.save(model(ids).logits, adapter + "/logits.pt")
assert not any("peft_edit" in name for name in sys.modules)
"""


def test_plain_peft_in_a_fresh_process_answers_as_the_edited_model(edited, tmp_path):
    model, tokenizer = edited
    export_lora(model, output_dir=tmp_path / "exact")
    export_lora(model, rank=5, output_dir=tmp_path / "five")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    arguments = [str(tiny_model_path()), ",".join(map(str, ids[0].tolist())), tmp_path / "exact", tmp_path / "five"]
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, *map(str, arguments)], check=True, cwd=tmp_path)
    with model.disable_adapter():
        base = logits(model, ids)
    expected = logits(model, ids)
    exact = torch.load(tmp_path / "exact" / "logits.pt")
    assert apart(exact - base, expected - base) < 1e-4 and apart(exact, base) > 1e-2

    truncated, _ = load_tiny_model()
    for name, delta in deltas(model).items():
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        truncated.get_submodule(name).weight.data += (left[:, :5] * values[:5] @ right[:5]).float()
    five = torch.load(tmp_path / "five" / "logits.pt")
    assert apart(five - base, logits(truncated, ids) - base) < 1e-4 and apart(five, expected) > 1e-3


@pytest.mark.parametrize("rank, dtype", [(None, torch.float32), (5, torch.float32), (5, torch.bfloat16)])
def test_the_error_stated_is_that_of_the_files(edited, tmp_path, rank, dtype):
    model, _ = edited
    export = export_lora(model, rank=rank, dtype=dtype, output_dir=tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.dtype == dtype for tensor in stored.values())
    differences, norms = [], []
    for module in export.modules:
        delta, product = deltas(model)[module.name].double(), products(stored)[module.name]
        values = torch.linalg.svdvals(delta)
        best = float(values[module.rank :].norm() / values.norm())
        assert module.relative_error == pytest.approx(apart(product, delta), abs=1e-12)
        assert module.relative_error == pytest.approx(best, abs=1e-6 if dtype == torch.float32 else 5e-3)
        assert module.energy == pytest.approx(1 - best**2, abs=1e-9)
        assert module.norm == pytest.approx(float(delta.norm()))
        assert module.rank == (rank or FACTS) and module.exact_rank == FACTS
        differences.append((product - delta).norm())
        norms.append(delta.norm())
    assert export.relative_error == pytest.approx(float(torch.stack(differences).norm() / torch.stack(norms).norm()))
    assert export.relative_error < 1e-6 if rank is None else export.relative_error > 0.1
    assert export.rank == export.config.r == (rank or FACTS)
    assert export.parameters == sum(tensor.numel() for tensor in stored.values())


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_takes_the_smallest_rank_that_keeps_it(edited, energy):
    model, _ = edited
    for module in export_lora(model, energy=energy, uniform=False).modules:
        energies = torch.linalg.svdvals(deltas(model)[module.name].double()).square()
        kept = energies.cumsum(0) / energies.sum()
        assert kept[module.rank - 1] >= energy - 1e-12 and module.rank <= FACTS
        assert module.rank == 1 or kept[module.rank - 2] < energy
        assert module.energy == pytest.approx(float(kept[module.rank - 1]))


@pytest.mark.parametrize("family", ("gpt2", "llama", "opt"))
def test_merging_the_lora_is_merging_the_edits(family, tmp_path):
    """Conv1D and Linear, with and without bias: the same logits, and the same weights once merged."""
    model = random_adapter(family)
    expected = logits(model)
    export_lora(model, output_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as PEFT's about fan_in_fan_out
        lora = PeftModel.from_pretrained(build_model(family), tmp_path).eval()
    assert lora.peft_config["default"].fan_in_fan_out == (family == "gpt2")
    torch.testing.assert_close(logits(lora), expected, atol=1e-5, rtol=1e-5)
    merged, plain = lora.merge_and_unload().state_dict(), model.merge_and_unload().state_dict()
    base = build_model(family).state_dict()
    assert merged.keys() == plain.keys()
    assert sum(not torch.equal(plain[name], base[name]) for name in plain) == 2
    for name, weight in plain.items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-5)


def test_modules_wider_than_their_input(tmp_path):
    model = random_adapter("llama", target_modules=["up_proj"])
    export = export_lora(model, rank=7, output_dir=tmp_path)
    for module in export.modules:
        delta = deltas(model)[module.name].double()
        assert delta.shape == (64, 32)
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        best = left[:, :7] * values[:7] @ right[:7]
        assert apart(products(export.tensors)[module.name], best) < 1e-6


# --- ranks and modules -------------------------------------------------------------------------------------------


def test_ranks_of_their_own_are_in_the_config_and_scale_by_one(tmp_path):
    model = random_adapter("llama")
    first, second = model.base_model.edit_layers().values()
    second.set_delta("default", torch.outer(torch.randn(32), torch.randn(64)))
    expected = logits(model)
    names = ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    export = export_lora(model, uniform=False, output_dir=tmp_path / "own")
    assert [module.rank for module in export.modules] == [32, 1]
    written = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["target_modules"] == names
    assert written["r"] == written["lora_alpha"] == 32
    assert written["rank_pattern"] == written["alpha_pattern"] == {names[1]: 1}

    same = export_lora(model, output_dir=tmp_path / "same")
    assert [module.rank for module in same.modules] == [32, 32]
    assert [module.exact_rank for module in same.modules] == [32, 1]
    written = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == written["alpha_pattern"] == {} and written["lora_alpha"] == 32
    for folder in ("own", "same"):
        lora = PeftModel.from_pretrained(build_model("llama"), tmp_path / folder).eval()
        layers = [lora.base_model.model.get_submodule(name) for name in names]
        assert [layer.scaling["default"] for layer in layers] == [1.0, 1.0]
        torch.testing.assert_close(logits(lora), expected, atol=1e-5, rtol=1e-5)


class Uneven(nn.Module):
    """Two linear modules whose ranks have different limits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.narrow, self.wide = nn.Linear(4, 10), nn.Linear(10, 9)

    def forward(self, x):
        return self.wide(self.narrow(x).tanh())


def test_a_common_rank_past_the_width_of_a_module_is_filled_with_zeros(tmp_path):
    model = get_peft_model(Uneven(), EditConfig(target_modules=["narrow", "wide"], init_weights=False))
    export = export_lora(model, output_dir=tmp_path)
    assert {module.name: (module.rank, module.exact_rank) for module in export.modules} == {
        "narrow": (9, 4),
        "wide": (9, 9),
    }
    lora = PeftModel.from_pretrained(Uneven(), tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(lora(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_all_layers_gives_the_other_blocks_zeros(family, tmp_path):
    model = random_adapter(family)
    export = export_lora(model, rank=3, all_layers=True, output_dir=tmp_path)
    pattern = {"gpt2": "transformer.h.{}.mlp.c_proj", "llama": "model.layers.{}.mlp.down_proj"}[family]
    names = [pattern.format(index) for index in range(NUM_LAYERS)]
    assert export.config.target_modules == names and len(export.modules) == 2
    for index, name in enumerate(names):
        down, up = (export.tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert down.shape == (3, model.base_model.edit_layers()[names[0]].in_features) and up.shape == (32, 3)
        assert bool(down.any()) == bool(up.any()) == (index in (0, 2))
    few = export_lora(model, rank=3, output_dir=tmp_path / "few")
    assert few.config.target_modules == [names[0], names[2]]
    left, right = (
        PeftModel.from_pretrained(build_model(family), path).eval() for path in (tmp_path, tmp_path / "few")
    )
    assert torch.equal(logits(left), logits(right))


def test_an_unedited_module_is_left_out_and_a_lora_outside_is_not_in_the_way():
    model = random_adapter("llama", layers_to_transform=[0, 1, 2])
    layers = model.base_model.edit_layers()
    layers["model.layers.1.mlp.down_proj"].set_delta("default", torch.zeros(32, 64))
    before = export_lora(model)
    assert [module.name for module in before.modules] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ]
    get_peft_model(model.get_base_model(), LoraConfig(target_modules=["down_proj"]), adapter_name="lora")
    after = export_lora(model, adapter_name="default", all_layers=True)
    assert after.modules == before.modules
    assert after.config.target_modules == [f"model.layers.{index}.mlp.down_proj" for index in range(NUM_LAYERS)]
    assert all(torch.equal(after.tensors[key], tensor) for key, tensor in before.tensors.items())


def test_the_config_names_the_base_and_the_model_is_unchanged(edited, tmp_path):
    model, _ = edited
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export = export_lora(model, output_dir=tmp_path)
    assert export.config.base_model_name_or_path == str(tiny_model_path())
    assert LoraConfig.from_pretrained(tmp_path).task_type == "CAUSAL_LM"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.merge_adapter()
    try:
        while_merged = export_lora(model)
    finally:
        model.unmerge_adapter()
    assert all(torch.equal(while_merged.tensors[key], tensor) for key, tensor in export.tensors.items())


def test_a_quantised_base_plays_no_part(edited):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_model_path(),
        dtype=torch.float32,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        device_map="cpu",
    )
    model = get_peft_model(quantised, EditConfig(target_modules=["mlp.down_proj"], layers_to_transform=[0, 1])).eval()
    for name, delta in deltas(edited[0]).items():
        model.base_model.edit_layers()[name].set_delta("default", delta)
    expected = export_lora(edited[0], rank=5).tensors
    assert all(torch.equal(tensor, expected[key]) for key, tensor in export_lora(model, rank=5).tensors.items())


# --- the report --------------------------------------------------------------------------------------------------


def test_the_report_is_json_and_a_table(edited):
    model, _ = edited
    export = export_lora(model, rank=5)
    told = json.loads(export.to_json())
    assert told == export.to_dict()
    assert told["rank"] == 5 and told["modules"][0]["name"] == "model.layers.0.mlp.down_proj"
    assert told["modules"][1]["relative_error"] == export.modules[1].relative_error
    lines = str(export).splitlines()
    assert f"rank 5, {export.parameters:,} parameters" in lines[0]
    assert lines[3].split()[:3] == ["model.layers.0.mlp.down_proj", "5", str(FACTS)]
    assert f"{export.modules[0].relative_error:.2e}" in lines[3]


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rank": 4, "energy": 0.9}, "not both"),
        ({"rank": 0}, "rank must be a whole number >= 1"),
        ({"rank": 2.5}, "rank must be a whole number >= 1"),
        ({"rank": True}, "rank must be a whole number >= 1"),
        ({"energy": 0}, "energy must be"),
        ({"energy": 1.01}, "energy must be"),
        ({"energy": float("nan")}, "energy must be"),
        ({"all_layers": True, "uniform": False}, "uniform=True"),
        ({"dtype": torch.int8}, "floating-point"),
        ({"adapter_name": "absent"}, r"no edit adapter 'absent'; there are \['default'\]"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_lora(random_adapter("llama"), output_dir=tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be(tmp_path):
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        export_lora(build_model("llama"))
    with pytest.raises(TypeError, match="PeftModel.* around a LoraModel"):
        export_lora(get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="no delta to export: edit facts first"):
        export_lora(get_peft_model(build_model("llama"), EditConfig()))
    with pytest.raises(ValueError, match="modules_to_save"):
        export_lora(random_adapter("llama", modules_to_save=["lm_head"]))

    model = random_adapter("llama")
    model.add_adapter("second", EditConfig(layers_to_transform=[0], init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active edit adapters are \['default', 'second'\]"):
        export_lora(model)
    assert len(export_lora(model, adapter_name="second").modules) == 1
    layer = model.base_model.edit_layers()["model.layers.2.mlp.down_proj"]
    layer.set_delta("default", torch.full((32, 64), 1e12))
    with pytest.raises(ValueError, match="layers.2.mlp.down_proj.*float16"):
        export_lora(model, adapter_name="default", dtype=torch.float16)
    layer.set_delta("default", torch.full((32, 64), torch.nan))
    with pytest.raises(ValueError, match="layers.2.mlp.down_proj.*not finite"):
        export_lora(model, adapter_name="default")


def test_an_edit_adapter_is_not_overwritten(edited, tmp_path):
    model, _ = edited
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an edit adapter"):
        export_lora(model, output_dir=tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "EDIT"
    export_lora(model, output_dir=tmp_path / "lora")
    export_lora(model, rank=2, output_dir=tmp_path / "lora")  # a LoRA is
    assert LoraConfig.from_pretrained(tmp_path / "lora").r == 2


# --- merged and saved whole --------------------------------------------------------------------------------------


def test_a_merged_model_is_saved_in_shards_and_answers_the_same(edited, facts, tmp_path):
    model, tokenizer = edited
    pairs = [(fact.filled_prompt, fact.target) for fact in facts[:FACTS]]
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected, known = logits(model, ids), recall(model, tokenizer, pairs)
    model.save_pretrained(tmp_path / "edits")
    copy = PeftModel.from_pretrained(load_tiny_model()[0], tmp_path / "edits").eval()
    copy.merge_and_unload().save_pretrained(tmp_path / "merged", max_shard_size="2MB")
    shards = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and sorted(set(index["weight_map"].values())) == shards
    assert not list((tmp_path / "merged").glob("*.bin"))
    assert not any("edit" in name for name in index["weight_map"])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(reloaded, ids), expected, atol=1e-4, rtol=1e-4)
    assert recall(reloaded, tokenizer, pairs) == known > 50
