"""The notebooks with their figures.

They are kept without outputs, and executed here. What comes of it is kept in
.cache/notebooks, under a name that changes with the notebook and with the package, so
that a notebook is executed again whenever one of them has changed. The tests execute
all of them, and leave what they found there for the build.
"""

import base64
import hashlib
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
CACHE = ROOT / ".cache" / "notebooks"
#: What mkdocs was asked for.
ASKED = {"command": "build"}
COLAB = "https://colab.research.google.com/github/rodjax/rodjax/blob/main/notebooks/"


def kept(notebook: Path) -> Path:
    """Where the executed notebook is, or will be."""
    found = hashlib.sha256(notebook.read_bytes())
    for file in sorted((ROOT / "rodjax").rglob("*.py")):
        found.update(file.read_bytes())
    return CACHE / f"{notebook.stem}-{found.hexdigest()[:16]}.ipynb"


def execute(notebook: Path) -> Path:
    """Runs a notebook, and keeps it with its outputs; an error in a cell is raised."""
    out = kept(notebook)
    cells = nbformat.read(notebook, as_version=4)
    NotebookClient(
        cells, timeout=600, resources={"metadata": {"path": FOLDER}}
    ).execute()
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{notebook.stem}-*.ipynb"):
        old.unlink()
    nbformat.write(cells, out)
    return out


def on_startup(*, command, dirty):
    """Remembers what mkdocs was asked for."""
    ASKED["command"] = command


def on_files(files, *, config):
    """A page for every notebook, its figures, and the page that lists them."""
    from mkdocs.structure.files import File

    lines = [
        "# Notebooks",
        "",
        "They run on Colab as they are, or in Jupyter "
        '(`pip install -e ".[run]" jupyterlab`). The first cell installs rodjax where '
        "it is missing. The pages here have them with their outputs.",
        "",
    ]
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        text, figures = rendered(executed(notebook))
        badge = f"[Open in Colab]({COLAB}{notebook.name}){{ .md-button }}"
        title, _, rest = text.partition("\n")
        page = f"{title}\n\n{badge}\n{rest}"
        lines.append(f"1. [{title.lstrip('# ')}]({notebook.stem}.md)")
        files.append(
            File.generated(config, f"notebooks/{notebook.stem}.md", content=page)
        )
        for name, content in figures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    files.append(File.generated(config, "notebooks/index.md", content="\n".join(lines)))
    return files


def executed(notebook: Path) -> Path:
    """The notebook with its outputs, executed where it must be."""
    found = kept(notebook)
    if found.exists():
        return found
    # While one writes, what was executed last will do.
    serving = ASKED["command"] == "serve"
    older = sorted(CACHE.glob(f"{notebook.stem}-*.ipynb")) if serving else []
    return older[-1] if older else execute(notebook)


def rendered(file: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of an executed notebook, and its figures by name."""
    notebook = nbformat.read(file, as_version=4)
    stem = file.stem.rpartition("-")[0]
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        said, drawn = "", []
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}-{len(figures) + 1}.png"
                figures[name] = base64.b64decode(data["image/png"])
                drawn.append(f"![What the cell above draws]({name})")
            elif text := output.get("text") or data.get("text/plain"):
                said += text if text.endswith("\n") else f"{text}\n"
        if said:
            parts.append(f"```text\n{_plain(said)}\n```")
        parts += drawn
    return "\n\n".join(parts) + "\n", figures


def _plain(text: str) -> str:
    """Without the colours of a terminal, and without what a bar wrote over."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.rstrip("\n"))
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))
