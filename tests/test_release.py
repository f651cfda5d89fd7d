"""What a release is made of: the version, its papers, the workflows."""

import re
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

import rodjax as rj

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_one_version_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.M) == [PROJECT["version"]]
    assert rj.__version__ == PROJECT["version"]
    assert str(Version(rj.__version__)) == rj.__version__


def test_the_version_costs_nothing_at_import():
    def seconds():
        began = time.perf_counter()
        version("rodjax")
        return time.perf_counter() - began

    # The import of JAX alone takes half a second.
    assert min(seconds() for _ in range(5)) < 0.05


def test_types_are_for_users_too():
    assert (Path(rj.__file__).parent / "py.typed").read_text() == ""


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
        ("vendor.github-workflows", WORKFLOWS),
        ("custom.github-workflows-require-timeout", WORKFLOWS),
        (
            "vendor.github-issue-forms",
            [ROOT / f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "idea")],
        ),
        ("vendor.github-issue-config", [ROOT / ".github/ISSUE_TEMPLATE/config.yml"]),
    ],
)
def test_files_are_of_their_schema(schema, files):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    found = subprocess.run(
        [*command, *files], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_citation_without_a_title_is_found(tmp_path):
    text = (ROOT / "CITATION.cff").read_text()
    wrong = tmp_path / "CITATION.cff"
    wrong.write_text(re.sub(r"^title: .+$", "", text, flags=re.M))
    with pytest.raises(AssertionError, match="title"):
        test_files_are_of_their_schema("vendor.citation-file-format", [wrong])


def test_workflows_run_what_is_supported():
    tests = (ROOT / ".github/workflows/tests.yml").read_text()
    pythons = re.search(r"python: \[(.+)\]", tests)
    assert pythons
    classifiers = [text.rpartition(" ")[2] for text in PROJECT["classifiers"]]
    supported = [text for text in classifiers if re.fullmatch(r"3\.\d+", text)]
    assert [word.strip('" ') for word in pythons[1].split(",")] == supported
    assert "mkdocs build --strict" in (ROOT / ".github/workflows/docs.yml").read_text()


def test_the_changelog_keeps_the_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert releases[0] == "Unreleased"
    kinds = set(re.findall(r"^### (.+)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for name in releases:
        assert f"\n[{name}]: https://" in text
