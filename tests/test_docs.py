"""The documentation: links, figures, pages; and the built site, where there is one."""

import ast
import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import CHROMIUM, chromium

import rodjax as rj

ROOT = Path(__file__).parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "site"
PAGES = sorted(DOCS.rglob("*.md"))
HOME = "https://rodjax.github.io/rodjax/"
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = [path.parent.name for path in (ROOT / "rodjax").glob("*/__init__.py")]
#: What the build adds to the pages that are written by hand.
MADE = {
    DOCS / "figures" / "rodjax-run.png",
    DOCS / "notebooks" / "index.md",
    *(DOCS / "notebooks" / f"{p.stem}.md" for p in ROOT.glob("notebooks/*.ipynb")),
    *(DOCS / "reference" / f"{room}.md" for room in [*ROOMS, "rodjax"]),
}


def links(text):
    """Targets of links and pictures of a page, outside of code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_of_a_page_lead_somewhere(page):
    for link in links(page.read_text(encoding="utf-8")):
        target = urlsplit(link)
        if target.scheme:
            assert target.scheme == "https", link
        elif target.path:
            file = (page.parent / target.path).resolve()
            assert file in MADE or file.exists(), link


def test_links_of_the_readme_are_absolute_and_lead_to_pages():
    found = links(README)
    assert found and all(link.startswith("https://") for link in found)
    pages = [link.removeprefix(HOME) for link in found if link.startswith(HOME)]
    assert len(pages) > 5
    for page in pages:
        file = DOCS / (page.removesuffix(".html") + ".md" if page else "index.md")
        assert file in MADE or file.exists(), page


def test_a_link_to_nowhere_is_found():
    text = "[a](b.md) `[c](d.md)` ![e](f.svg)\n```\n[g](h.md)\n```\n[i](https://j)"
    assert links(text) == ["b.md", "f.svg", "https://j"]


def test_the_readme_is_a_front_page():
    assert len(README.splitlines()) <= 150
    # What .ci/run takes from it.
    first, second = re.findall(r"```sh\n(.*?)```", README, re.S)[:2]
    assert "rodjax run" in first and "pytest" in second


@pytest.mark.parametrize("name", rj.flows.REGISTRY)
def test_a_flow_has_a_page_with_a_figure_and_what_the_registry_says(name):
    text = (DOCS / "explanation" / "flows" / f"{name}.md").read_text(encoding="utf-8")
    assert f"<!-- table: flow:{name} -->" in text
    assert f"(../../figures/{name}.svg)" in text and "$$" in text


def test_the_table_of_accuracy_has_medians_over_seeds_relative_to_the_stable_flow():
    spec = importlib.util.spec_from_file_location(
        "t", DOCS / "scripts" / "accuracy_tables.py"
    )
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)

    def seed(stable, own, limit):
        def model(pair):
            return dict(zip(("final_distance", "mean_distance"), pair, strict=True)) | {
                "diverged_at": None
            }

        flows = {"stable": model(stable), "edge": model(own)}
        return {"flows": flows, "limit": model(limit), "lr": 0.5} | {
            "share at threshold": 0.8
        }

    row = {
        "seeds": {
            "0": seed((1.0, 2.0), (0.1, 0.5), (0.01, 0.02)),
            "1": seed((2.0, 2.0), (0.6, 0.1), (0.02, 0.02)),
            "2": seed((4.0, 1.0), (0.8, 0.1), (0.04, 0.03)),
        }
    }
    # 0.1, 0.3, 0.2 at the end, 0.25, 0.05, 0.1 on average.
    assert tables.relative(row, "edge") == pytest.approx([0.2, 0.1])
    found = {
        "data": "digits",
        "n": {"mlp": 9},
        "dtype": "float32",
        "rows": {"m-gd": row},
    }
    said, _, table = tables.accuracy_of(found).partition("\n\n")
    assert said == "Data: digits, samples: 9 for mlp; float32; medians over 3 seeds."
    title, _, first, last = table.splitlines()
    assert title.split(" | ")[3:] == ["limit", "edge |"]
    assert first.split(" | ")[1:4] == ["0.5", "80%", "0.010&nbsp;/&nbsp;0.010"]
    assert last.endswith("0.20&nbsp;/&nbsp;0.10 |")
    row["seeds"]["1"]["flows"]["edge"]["diverged_at"] = 7.0
    row["seeds"]["2"]["flows"]["edge"]["diverged_at"] = 7.0
    assert "diverged&nbsp;/&nbsp;diverged" in tables.accuracy_of(found)


def other_dialects(text):
    """What a docstring in Markdown does not have: sections and roles of other kinds."""
    sections = r"^ *(?:Args|Arguments|Parameters|Returns|Raises|Examples?):$"
    roles = r":(?:func|class|mod|meth):`|(?<!`)``(?!`)|::$"
    return re.findall(f"{sections}|{roles}", text, re.M)


def test_docstrings_are_of_one_dialect():
    for file in (ROOT / "rodjax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found = other_dialects(ast.get_docstring(node) or "")
                assert not found, (file, getattr(node, "name", "the module"), found)


def test_another_dialect_is_seen():
    text = (
        "A.\n\nArgs:\n    x: ``None``, see :func:`f`.\n\n**Returns** `x`::\n```python"
    )
    assert other_dialects(text) == ["Args:", "``", "``", ":func:`", "::"]


class Page(HTMLParser):
    """The names, links and sources of a built page."""

    def __init__(self, file):
        super().__init__()
        self.names, self.components = set(), set()
        self.links, self.sources = [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        self.components.add(found.get("data-md-component"))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.sources.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.sources.append(found["href"])


@pytest.fixture(scope="module")
def site():
    """The pages of the built site, if they are newer than what they are made from."""
    index = SITE / "index.html"
    if not index.exists():
        pytest.skip("no site/: `mkdocs build --strict` makes it")
    made_of = [
        *DOCS.rglob("*.*"),
        *(ROOT / "rodjax").rglob("*.py"),
        ROOT / "mkdocs.yml",
    ]
    if max(file.stat().st_mtime for file in made_of) > index.stat().st_mtime:
        pytest.skip("site/ is older than what it is made from: mkdocs build --strict")
    return {file: Page(file) for file in SITE.rglob("*.html")}


def test_links_of_the_site_lead_to_pages_and_names(site):
    broken = []
    for file, page in site.items():
        # The page for what is not found knows no place of its own.
        for link in page.links if file.name != "404.html" else []:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            other = file
            if target.path:
                other = (file.parent / unquote(target.path)).resolve()
            name = unquote(target.fragment)
            if not other.exists() or (name and name not in site[other].names):
                broken.append((str(file.relative_to(SITE)), link))
    assert not broken


def test_the_site_is_read_without_a_network(site):
    for file, page in site.items():
        for source in page.sources:
            assert not urlsplit(source).netloc, f"{file}: {source}"
        # Which would ask GitHub about the repository.
        assert "source" not in page.components, file
    for style in SITE.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?https?:", style.read_text()), (
            style
        )
    # Without a server the search takes its index from a script.
    assert (SITE / "search" / "search_index.js").read_text().startswith("var __index")


def test_the_search_works_without_a_server(site):
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with chromium() as page:
        page.open((SITE / "index.html").as_uri())
        page.run("document.querySelector('input[name=query]').focus()")
        page.call("Input.insertText", text="modulated")
        titles = "[...document.querySelectorAll('.md-search-result__article h1')]"
        page.until(f"{titles}.length > 2")
        assert "Modulated flow" in page.run(f"{titles}.map((title) => title.innerText)")
        assert not [url for url in page.requests if url.startswith("http")]
        assert not page.console


def test_every_public_name_is_in_the_reference(site):
    names = set().union(
        *(page.names for file, page in site.items() if file.parent.name == "reference")
    )
    for room in set(ROOMS) - {"cli"}:
        for name in getattr(rj, room).__all__:
            assert f"rodjax.{room}.{name}" in names
