"""What the Markdown of pages and of docstrings goes through before it is read.

Examples with prompts are coloured as such, and names of rodjax lead to the reference.
"""

import importlib
import re

from markdown import Extension
from markdown.preprocessors import Preprocessor
from reference import ROOMS, documented, names_of

#: A name in code, of `rodjax` or `rj`, that stands in no link yet.
NAME = re.compile(r"(?<![\[`])`(?:rodjax|rj)\.([A-Za-z_][\w.]*)`(?!`)")
FENCE = re.compile(r"^ *```")


def homes() -> dict[str, str]:
    """What a name is written as, after `rj.`, and where the reference has it."""
    top = importlib.import_module("rodjax").__all__
    found = {}
    for room in ROOMS:
        module = importlib.import_module(f"rodjax.{room}")
        for name in names_of(room):
            if not documented(getattr(module, name)):
                continue
            found[f"{room}.{name}"] = f"rodjax.{room}.{name}"
            if name in top and name not in ROOMS:
                found[name] = f"rodjax.{room}.{name}"
    return found


class _Text(Preprocessor):
    """Before the fences are taken out of the text."""

    def __init__(self, md, known: dict[str, str]):
        super().__init__(md)
        self.known = known

    def run(self, lines: list[str]) -> list[str]:
        inside = False
        for i, line in enumerate(lines):
            if FENCE.match(line):
                inside = not inside
            elif not inside and not line.startswith("#"):
                lines[i] = NAME.sub(self._link, line)
        text = re.sub(
            r"^( *)```python\n(?=\1>>> )", r"\1```pycon\n", "\n".join(lines), flags=re.M
        )
        # The empty line that ends an example for doctest.
        return re.sub(r"\n\n( *)```$", r"\n\1```", text, flags=re.M).split("\n")

    def _link(self, found: re.Match) -> str:
        home = self.known.get(found[1])
        return f"[{found[0]}][{home}]" if home else found[0]


class Text(Extension):
    """Markdown whose examples are `pycon`, and whose names are links."""

    def __init__(self, known: dict[str, str]):
        super().__init__()
        self.known = known

    def extendMarkdown(self, md) -> None:
        # Fences have priority 25.
        md.preprocessors.register(_Text(md, self.known), "text", 40)


def on_config(config):
    """Beside the extensions that mkdocs.yml names."""
    config.markdown_extensions.append(Text(homes()))
    return config
