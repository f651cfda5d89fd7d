"""Examples with prompts coloured as such, on pages and in docstrings alike."""

import re

from markdown import Extension
from markdown.preprocessors import Preprocessor


class _Prompts(Preprocessor):
    """Names the language of fences that begin with a prompt, before they are read."""

    def run(self, lines: list[str]) -> list[str]:
        text = re.sub(
            r"^( *)```python\n(?=\1>>> )", r"\1```pycon\n", "\n".join(lines), flags=re.M
        )
        # The empty line that ends an example for doctest.
        return re.sub(r"\n\n( *)```$", r"\n\1```", text, flags=re.M).split("\n")


class Prompts(Extension):
    """Markdown whose examples with prompts are `pycon`."""

    def extendMarkdown(self, md) -> None:
        # Before the fences are taken out of the text, which has priority 25.
        md.preprocessors.register(_Prompts(md), "prompts", 40)


def on_config(config):
    """Beside the extensions that mkdocs.yml names."""
    config.markdown_extensions.append(Prompts())
    return config
