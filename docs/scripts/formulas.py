"""Formulas as MathML, which browsers draw by themselves: no script and no web font."""

import html
import re

from math_core import LatexToMathML

# An unknown command is an error, which names it and ends the build.
CONVERTER = LatexToMathML()
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)
HEADING = re.compile(r"(?<=[ >])\\\([^<>]+?\\\)(?=[^<>]*</span>\s*</a>)")


def on_post_page(output: str, *, page, config) -> str:
    """Every formula of a page, those from docstrings included."""

    def convert(match: re.Match) -> str:
        source = html.unescape(match[3])
        try:
            formula = CONVERTER.convert_with_local_state(
                source, displaystyle=match[2] == "["
            )
        except Exception as error:
            raise ValueError(f"{page.file.src_uri}: {source}: {error}") from error
        # As accents dots touch their letters in some fonts; as what is over, in none.
        formula = formula.replace(' accent="true"', "")
        return f'<{match[1]} class="formula">{formula}</{match[1]}>'

    # The list of a page's headings has their text without the marks of formulas.
    listed = HEADING.sub(r'<span class="arithmatex">\g<0></span>', output)
    return FORMULA.sub(convert, listed)
