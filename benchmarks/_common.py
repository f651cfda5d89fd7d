"""What the benchmarks share: arguments, timing, tables, files."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def arguments(doc: str | None, out: str = "") -> argparse.ArgumentParser:
    """A parser described by a script's first line, with `--out`."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(out), help="written to")
    return parser


def words(text: str) -> list[str]:
    """Those of a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def head(titles: Iterable[str]) -> str:
    """The two rows that begin a Markdown table."""
    titles = list(titles)
    return row(titles) + "\n" + row(["---"] * len(titles))


def write(file: Path, found: Any, indent: int | None = None) -> None:
    """As JSON, completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(_plain(found), indent=indent, allow_nan=False) + "\n")
    part.replace(file)


def _plain(value: Any) -> Any:
    """Numbers and lists of Python, `None` where a number is not finite."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
