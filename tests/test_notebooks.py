"""The notebooks: valid, small, and run from the first cell to the last."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest


NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples" / "notebooks").glob("*.ipynb"))

# Fewer facts than a reader takes: what stands in the notebook, and what the test puts in its place.
SMALLER = {
    "quickstart": {"COUNT = 60": "COUNT = 6", "in known[COUNT:]": "in known[COUNT:400]"},
    "compare_methods": {
        "COUNT = 30": "COUNT = 2",
        "in known[COUNT:]": "in known[COUNT:400]",
        '("encore", "memit", "alphaedit", "rome")': '("encore", "memit")',
    },
}


def smaller(path: Path) -> dict[str, Any]:
    """The notebook with the test's counts."""
    text = path.read_text(encoding="utf-8")
    for old, new in SMALLER[path.stem].items():
        old, new = (json.dumps(part)[1:-1] for part in (old, new))
        assert old in text, f"{path.name} has no {old} any more: adapt SMALLER."
        text = text.replace(old, new)
    return json.loads(text)


def execute(notebook: dict[str, Any], folder: Path) -> str:
    """Runs all cells, in a kernel where nbclient is installed, else in one namespace; returns what was printed."""
    if importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel"):
        import nbclient
        import nbformat

        ran = nbformat.reads(json.dumps(notebook), as_version=4)
        nbclient.NotebookClient(ran, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
        outputs = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
        return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    printed: list[str] = []
    namespace: dict[str, Any] = {"__name__": "notebook"}
    namespace["print"] = lambda *values, **_: printed.append(" ".join(map(str, values)))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    return "\n".join(printed)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each notebook prints."""
    pytest.importorskip("matplotlib")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "agg")
        for path in NOTEBOOKS:
            folder = tmp_path_factory.mktemp(path.stem)
            patch.chdir(folder)
            found[path.stem] = execute(smaller(path), folder)
    return found


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SMALLER)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_small(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert path.stat().st_size < 100_000
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
    if importlib.util.find_spec("nbformat"):
        import nbformat

        nbformat.validate(nbformat.reads(json.dumps(notebook), as_version=4))


def test_quickstart_edits_undoes_and_edits_on(printed: dict[str, str]) -> None:
    text = printed["quickstart"]
    assert "6 of 6 facts written" in text
    assert "5 facts left" in text
    assert "6 facts after editing on" in text
    assert "LlamaForCausalLM" in text


def test_compare_methods_scores_each(printed: dict[str, str]) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in printed["compare_methods"].splitlines() if line.strip()}
    assert {"encore", "memit", "memit-forgetful", "rome"} <= set(rows)  # the list of methods comes first
    for name in ("encore", "memit"):
        efficacy, neighborhood, unedited = (float(rows[name][place]) for place in (0, 2, 4))
        assert 0 <= efficacy <= 100 and neighborhood > 90 and unedited > 90
    assert float(rows["encore"][6]) < float(rows["memit"][6])  # steps: MPES stops early
