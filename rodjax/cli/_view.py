"""`rodjax view`: a result as one page for a browser."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rodjax.cli import _shared as shared
from rodjax.report import view as page

if TYPE_CHECKING:
    import xarray

#: Attributes of a result that are said above it.
TITLE = ("problem", "optimizer", "lr", "dtype")


def view(
    result: Annotated[
        Path,
        typer.Argument(help="A result.nc of rodjax run, sweep or inspect."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File written to.", show_default="result.html beside it"),
    ] = None,
) -> None:
    """Make one HTML page of a result: panels that zoom together, sliders for a sweep.

    The page opens in any browser, without a network.
    """
    with shared.refusing("view"):
        target = result.with_suffix(".html") if out is None else out
        if result.is_dir():
            raise ValueError(f"{result} is a directory: give {result / 'result.nc'}")
        if not result.is_file():
            raise ValueError(f"there is no file {result}")
        if target.is_dir() or target.resolve() == result.resolve():
            raise ValueError(f"--out {target}: give the name of a new HTML file")
        import xarray

        try:
            data = xarray.open_dataset(result, engine="h5netcdf")
        except OSError as error:
            raise ValueError(f"{result} is no netCDF file: {error}") from None
        with data:
            text = page(data, _title(data) or result.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    print(f"written: {target}, a page for a browser")


def _title(data: "xarray.Dataset") -> str:
    """What the result says of itself."""
    said = {key: str(data.attrs[key]) for key in TITLE if key in data.attrs}
    # A forecast is of other learning rates than the run's.
    if "lr" in data.dims:
        said.pop("lr", None)
    if "lr" in said:
        said["lr"] = f"lr {float(said['lr']):g}"
    return ", ".join(said.values())
