"""What every notebook must be; each is run, and kept for the documentation."""

import importlib.util
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
COLAB = "https://colab.research.google.com/github/rodjax/rodjax/blob/main/notebooks/"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_the_readme_links_to_all_in_order():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(rf"^(\d)\. \[.+\]\({re.escape(COLAB)}(.+)\)$", text, re.M)
    expected = [(path.name[0], path.name) for path in NOTEBOOKS]
    assert links == expected and len(links) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_readme_has_its_title(path):
    title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0][2:]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{title}]({COLAB}{path.name})" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_valid_clean_and_installs_first(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for cell in code_of(path):
        assert not cell.outputs and cell.execution_count is None
    first = code_of(path)[0].source
    assert first == code_of(NOTEBOOKS[0])[0].source
    assert '%pip install -q "{SOURCE}"' in first


def test_what_they_install_exists():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    source = re.search(
        r'^SOURCE = "(\w+)\[(\w+)\]"', code_of(NOTEBOOKS[0])[0].source, re.M
    )
    assert source and source[1] == project["name"]
    assert source[2] in project["optional-dependencies"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_draws(path):
    file = ROOT / "docs" / "scripts" / "notebooks.py"
    spec = importlib.util.spec_from_file_location("executed", file)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    # Raises what a cell raises.
    text, figures = script.rendered(script.execute(path))
    assert script.kept(path).exists()
    assert text.startswith("# ") and figures
