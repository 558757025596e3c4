"""The wheel and the source distribution: what is in them, what they say of themselves, and what importing loads."""

from __future__ import annotations

import email.message
import email.parser
import importlib
import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import peft_edit


ROOT = Path(__file__).resolve().parents[1]
VERSION = peft_edit.__version__

# Packages of the extras, and large ones that others would bring along.
LAZY = {"matplotlib", "datasets", "evaluate", "lm_eval", "rich", "typer", "gradio", "pandas", "bitsandbytes"}
SUBPACKAGES = ("baselines", "analysis", "card", "evaluation", "export", "hub", "tiny")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the source distribution and the wheel that is made of it, as an index gets them."""
    for name in ("build", "hatchling"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    [path] = built.glob("*.whl")
    assert path.name == f"peft_edit-{VERSION}-py3-none-any.whl"
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    text = wheel.read(f"peft_edit-{VERSION}.dist-info/METADATA").decode("utf-8")
    return email.parser.Parser().parsestr(text)


def package_files() -> set[str]:
    """All files of the package in the tree, caches left out."""
    found = [path.relative_to(ROOT) for path in (ROOT / "peft_edit").rglob("*") if path.is_file()]
    return {path.as_posix() for path in found if not any(part.startswith((".", "__pyc")) for part in path.parts)}


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    info = {name for name in names if name.startswith(f"peft_edit-{VERSION}.dist-info/")}
    assert names - info == package_files()
    assert f"peft_edit-{VERSION}.dist-info/licenses/LICENSE" in info
    assert {
        "peft_edit/py.typed",
        "peft_edit/tiny_model/config.json",
        "peft_edit/tiny_model/facts.json",
        "peft_edit/tiny_model/model.safetensors",
        "peft_edit/tiny_model/tokenizer.json",
        "peft_edit/evaluation/modules/edit_score/edit_score.py",
        "peft_edit/evaluation/modules/token_accuracy/token_accuracy.py",
    } <= names


def test_wheel_is_not_damaged(wheel: zipfile.ZipFile) -> None:
    assert wheel.testzip() is None
    for name in ("peft_edit/tiny_model/model.safetensors", "peft_edit/__init__.py"):
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_sdist_holds_all_that_tests_and_docs_need(built: Path) -> None:
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "constraints.txt", "mkdocs.yml"} <= names
    for folder, pattern in (("tests", "*.py"), ("docs", "**/*.md"), ("examples", "*.py"), ("benchmarks", "*.py")):
        for file in (ROOT / folder).glob(pattern):
            assert file.relative_to(ROOT).as_posix() in names
    assert not [name for name in names - {".gitignore"} if "__pycache__" in name or name.startswith(".")]


def test_metadata(metadata: email.message.Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("peft-edit", VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Lifelong knowledge editing" in metadata.get_payload()
    required, optional = requirements(metadata)
    assert required == {"torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "tqdm"}
    assert not {name.replace("-", "_") for name in required} & LAZY
    assert {"test", "docs", "eval", "harness", "plots", "quant"} <= set(optional)


def requirements(metadata: email.message.Message) -> tuple[set[str], dict[str, set[str]]]:
    """Names of the packages that are always needed, and of those of each extra."""
    optional: dict[str, set[str]] = {name: set() for name in metadata.get_all("Provides-Extra", [])}
    required = set()
    for requirement in map(Requirement, metadata.get_all("Requires-Dist", [])):
        name = requirement.name.replace("-", "_") if requirement.name == "huggingface-hub" else requirement.name
        extras = [extra for extra in optional if requirement.marker and requirement.marker.evaluate({"extra": extra})]
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required.add(name)
        for extra in extras:
            optional[extra].add(name)
    return required, optional


def test_commands_exist(wheel: zipfile.ZipFile) -> None:
    parser = ConfigParser()
    parser.read_string(wheel.read(f"peft_edit-{VERSION}.dist-info/entry_points.txt").decode("utf-8"))
    for target in parser["console_scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), target


# --- importing ----------------------------------------------------------------------------------------------------


def loaded_by(*modules: str) -> set[str]:
    """Third-party packages that a fresh process has loaded after importing some modules."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split()) - set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def loaded_by_peft() -> set[str]:
    return loaded_by("peft")


def test_importing_loads_no_package_that_peft_does_not_load(loaded_by_peft: set[str]) -> None:
    assert loaded_by("peft_edit") - loaded_by_peft == {"peft_edit"}


def test_subpackages_load_nothing_optional(loaded_by_peft: set[str]) -> None:
    found = loaded_by(*[f"peft_edit.{name}" for name in SUBPACKAGES])
    assert "peft_edit" in found
    assert not found & LAZY - loaded_by_peft
