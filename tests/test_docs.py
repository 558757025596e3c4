"""The documentation: every Python block runs, every link leads somewhere, and the site builds without a warning."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_edit import EditConfig, Fact, KeyStatistics
from peft_edit.evaluation import Probe, load_cases
from peft_edit.methods import METHODS
from peft_edit.tiny import load_tiny_facts, load_tiny_model, tiny_model_path
from peft_edit.updates import UPDATES


ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)
NOT_RUN = re.compile(r"<!-- *not run: *(?P<reason>.*?) *-->\s*\Z")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


# --- what pages take as given -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A prepared tiny model: statistics and an adapter of a few facts, on disk.

    Args:
        statistics (`Path`): Directory of the key statistics.
        edits (`Path`): Directory of the adapter.
    """

    statistics: Path
    edits: Path


def fresh(world: World) -> dict[str, Any]:
    """A base and its tokenizer, texts, facts; statistics and an adapter are in the page's directory."""
    shutil.copytree(world.statistics, "statistics")
    shutil.copytree(world.edits, "edits")
    base, tokenizer = load_tiny_model()
    known = load_tiny_facts()
    texts = [f"{fact.filled_prompt} {fact.target_true}." for fact in known[500:560]]
    return {"base": base, "tokenizer": tokenizer, "texts": texts, "facts": known[:6]}


def edited(world: World) -> dict[str, Any]:
    """The same, and a model that holds the first two of the facts."""
    given = fresh(world)
    return given | {"model": PeftModel.from_pretrained(given["base"], "edits").eval()}


def comparison(_world: World) -> dict[str, Any]:
    Path("downstream").mkdir()
    lines = [json.dumps({"sentence": f"Film {index}", "label": index % 2}) for index in range(6)]
    Path("downstream/sst2.jsonl").write_text("\n".join(lines))
    return {}


def distributed(world: World) -> dict[str, Any]:
    given = edited(world) | {"name": tiny_model_path(), "accelerator": Accelerator(cpu=True)}
    return given | {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "EditConfig": EditConfig,
        "get_peft_model": get_peft_model,
    }


def generation(world: World) -> dict[str, Any]:
    probes = {"subject_aliasing": (Probe("The birthplace of her is", ("Paris",)),)}
    cases = [replace(case, probes=probes) for case in load_cases("bundled", limit=2)]
    prompts = [[case.fact.filled_prompt] for case in cases]
    references = [[f"{case.fact.filled_prompt} {case.fact.target}."] for case in cases]
    return edited(world) | {"cases": cases, "generation_prompts": prompts, "reference_texts": references}


def lifelong(world: World) -> dict[str, Any]:
    given = edited(world)
    return given | {"stream": iter(given["facts"]), "accelerator": Accelerator(cpu=True)}


def metrics(world: World) -> dict[str, Any]:
    pairs = [(fact.filled_prompt, fact.target_true) for fact in load_tiny_facts()[20:24]]
    scores = {"log_probability_new": [-1.0, -3.0], "log_probability_true": [-2.0, -2.0], "fact_of_each_prompt": [0, 1]}
    return edited(world) | scores | {"pairs": pairs}


def evaluate(world: World) -> dict[str, Any]:
    pairs = [(fact.filled_prompt, fact.target_true) for fact in load_tiny_facts()[20:24]]
    return generation(world) | {"pairs": pairs, "statistics": KeyStatistics.load("statistics")}


def statistics(world: World) -> dict[str, Any]:
    given = edited(world)
    return given | {"other_texts": given["texts"][:9], "plain_model": load_tiny_model()[0]}


def undo(world: World) -> dict[str, Any]:
    given = edited(world)
    fact = Fact("Danielle Darrieux", "The mother tongue of {} is", "English")
    given["model"].edit_facts([fact], given["tokenizer"], progress=False)
    return given


def training(world: World) -> dict[str, Any]:
    given = fresh(world)
    rows = [given["tokenizer"](text)["input_ids"][:6] for text in given["texts"][:4]]
    return given | {
        "dataset": [{"input_ids": row, "labels": row} for row in rows],
        "new_facts": given["facts"][2:4],
    }


def nothing(_world: World) -> dict[str, Any]:
    return {}


# Each page that does not stand alone, and what its blocks take as given.
PRELUDES = {
    "README.md": fresh,
    "docs/comparison.md": comparison,
    "docs/distributed.md": distributed,
    "docs/downstream.md": edited,
    "docs/evaluation_datasets.md": edited,
    "docs/generation_metrics.md": generation,
    "docs/howto/evaluate.md": evaluate,
    "docs/howto/statistics.md": statistics,
    "docs/howto/undo.md": undo,
    "docs/lifelong.md": lifelong,
    "docs/metrics.md": metrics,
    "docs/serving.md": fresh,
    "docs/training.md": training,
}

# Fewer facts where a page takes many: what stands in the page, and what the test puts in its place.
SMALLER = {
    "docs/comparison.md": {
        'if __name__ == "__main__":': "if True:",
        "facts[:1000]": "facts[:4]",
        "facts[1000:-100]": "facts[500:700]",
        "facts[-100:]": "facts[-10:]",
        '["memit", "memit+mpes", "memit+norm", "encore", "alphaedit", "emmet"]': '["encore", "alphaedit"]',
        "workers=2": "workers=1",
    },
    "docs/evaluation_datasets.md": {'load_cases("bundled")': 'load_cases("bundled", limit=6)'},
    "docs/howto/evaluate.md": {"edit_facts(facts, tok": "edit_facts(facts[:2], tok"},
    "docs/index.md": {"[500:]": "[500:560]"},
    "docs/limits.md": {"facts[100:]": "facts[500:560]", "facts[:100]": "facts[:4]", "limit=100": "limit=2"},
    "docs/lifelong.md": {"edited_facts()[17]": "edited_facts()[1]"},
    "docs/locating.md": {"facts[100:]": "facts[500:700]", "facts[:20]": "facts[:4]", "facts[20:40]": "facts[20:22]"},
    "docs/methods/adding_a_method.md": {"facts[100:]": "facts[500:700]", "facts[:20]": "facts[:5]", "== 19": "== 4"},
    "docs/quickstart.md": {"facts[500:]": "facts[500:560]", "facts[:100]": "facts[:6]"},
    "docs/serving.md": {"facts[100:]": "facts[500:560]", "facts[:100]": "facts[:6]", "(64, 32, 16, 8, 4)": "(4,)"},
    "docs/training.md": {"checkpoint-500": "checkpoint-3"},
}


# Pages whose blocks another test runs, with what they need; it must name the page.
ELSEWHERE = {"docs/hub.md": "tests/test_hub.py"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("docs")
    world = World(folder / "statistics", folder / "edits")
    base, tokenizer = load_tiny_model()
    facts = load_tiny_facts()
    model = get_peft_model(base, EditConfig(task_type="CAUSAL_LM")).eval()
    model.collect_statistics([f"{fact.filled_prompt} {fact.target_true}." for fact in facts[500:750]], tokenizer)
    model.peft_config["default"].memory.statistics.save(world.statistics)
    model.edit_facts(facts[:2], tokenizer, progress=False)
    model.save_pretrained(world.edits)
    return world


# --- blocks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page (`str`): Path from the root.
        line (`int`): Line of its first line of code, counted from 1.
        language (`str`): What stands behind the fence.
        code (`str`): Its text, without the fence's indentation.
        reason (`str`, *optional*): Why it is not run.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def compiled(self) -> Any:
        """The code, at its own line of the page in tracebacks."""
        return compile("\n" * (self.line - 1) + self.code, str(ROOT / self.page), "exec")


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        mark = NOT_RUN.search(text[: match.start()])
        code = textwrap.dedent(match["code"])
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["language"], code, mark["reason"] if mark else None))
    return found


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def test_blocks_are_found_where_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    plain, indented = "```python\na = 1\n```\n", "  ```python\n  b = (\n\n      2)\n  ```\n"
    text = f"# A\n\n{plain}\n- b\n\n  <!-- not run: no GPU -->\n\n{indented}```bash\nls\n```\n"
    (tmp_path / "page.md").write_text(text)
    first, second, third = blocks("page.md")
    assert (first.line, first.code, first.reason) == (4, "a = 1\n", None)
    assert (second.line, second.code, second.reason) == (12, "b = (\n\n    2)\n", "no GPU")
    assert (third.language, third.reason) == ("bash", None)
    assert second.compiled().co_firstlineno == 1 and "page.md" in second.compiled().co_filename


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and python_blocks(page)])
def test_python_blocks_run(page: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # a page that asks the Hub fails at once
    torch.manual_seed(0)
    smaller = SMALLER.get(page, {})
    assert all(any(text in block.code for block in python_blocks(page)) for text in smaller), "adapt SMALLER"
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    vars(module).update(PRELUDES.get(page, nothing)(world))
    with patch.dict(UPDATES):  # a page may add a rule
        for block in python_blocks(page):
            code = block.code
            for text, replacement in smaller.items():
                code = code.replace(text, replacement)
            if block.reason is None:
                exec(replace(block, code=code).compiled(), vars(module))


@pytest.mark.parametrize("page", PAGES)
def test_blocks_that_are_not_run_say_why_and_name_what_exists(page: str) -> None:
    for block in blocks(page):
        assert block.language, f"{page}:{block.line - 1}: a block without a language"
        if block.language == "python":
            assert block.reason is None or len(block.reason) > 5, f"{page}:{block.line}: no reason"
            block.compiled()
            for module, name in imported(block.code):
                missing = f"{page}:{block.line}: {module} has no {name}"
                assert hasattr(importlib.import_module(module), name) or is_module(f"{module}.{name}"), missing
        for script in re.findall(r"(?:examples|benchmarks)/[\w/]+\.\w+", block.code):
            assert (ROOT / script).is_file(), f"{page}:{block.line}: there is no {script}"


def imported(code: str) -> list[tuple[str, str]]:
    """Module and name of what a block takes from this package."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft_edit":
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("page", ELSEWHERE)
def test_other_pages_are_run_by_another_test(page: str) -> None:
    assert page in (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")


def test_no_setup_is_left_of_pages_that_are_gone() -> None:
    assert not {*PRELUDES, *SMALLER, *ELSEWHERE} - set(PAGES)


def test_few_blocks_are_left_out() -> None:
    python = [block for page in PAGES for block in python_blocks(page)]
    assert sum(block.reason is not None for block in python) < 0.3 * len(python)


# --- links and tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page: str) -> None:
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        path = target.split("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            assert ((ROOT / page).parent / path).exists(), f"{page} links to {target}, which is not there"


def api(*pages: str) -> str:
    found = pages or [path.name for path in (ROOT / "docs" / "api").glob("*.md")]
    return "\n".join((ROOT / "docs" / "api" / name).read_text(encoding="utf-8") for name in found)


@pytest.mark.parametrize("module", ["peft_edit", "peft_edit.analysis", "peft_edit.evaluation"])
def test_every_public_name_is_in_the_api(module: str) -> None:
    text = api()
    for name in importlib.import_module(module).__all__:
        assert re.search(rf"^::: {module}\.([a-z_]+\.)*{name}$|`{name}`", text, re.MULTILINE), f"{module}.{name}"


def test_every_setting_is_in_the_table() -> None:
    inherited = {field.name for field in fields(PeftConfig)}
    rows = api("config.md").splitlines()
    for field in fields(EditConfig):
        if field.name not in inherited:
            default = field.default if field.default is not MISSING else field.default_factory()
            text = field.metadata["help"].replace("|", r"\|")
            row = f"| `{field.name}` | `{default!r}` | {text} |"
            assert row in rows, f"docs/api/config.md lacks the row\n{row}"


def test_every_method_and_update_is_in_the_api() -> None:
    text = api("updates.md")
    for name, method in METHODS.items():
        assert f"| `{name}` | {method.summary} | [{method.source}](" in text
    for update in UPDATES.values():
        assert f"::: {update.__module__}.{update.__name__}\n" in text


# --- the site -----------------------------------------------------------------------------------------------------


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="needs pip install 'peft-edit[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for page in PAGES[1:]:
        name = page.removeprefix("docs/").removesuffix(".md").removesuffix("index")
        assert (tmp_path / "site" / name / "index.html").is_file(), page
