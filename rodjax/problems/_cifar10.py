"""CIFAR-10 from the user's own disk, in either of its official formats."""

import contextlib
import hashlib
import io
import math
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int, UInt8

from rodjax.problems._base import Data, float_dtype
from rodjax.problems._checks import is_count

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer")
CLASSES += ("dog", "frog", "horse", "ship", "truck")
SPLITS = {"train": [f"data_batch_{i}" for i in "12345"], "test": ["test_batch"]}
MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
}
PIXELS = 3 * 32 * 32
SIZE_LIMIT = 2**26  # The largest official file has 31 MB.
BLOCK = 1000

Pixels = UInt8[np.ndarray, "n 3072"]
Labels = Int[np.ndarray, " n"]


class _Bytes:
    """Stands for `numpy.dtype` while a batch is unpickled: uint8, or refused."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it holds an array of dtype {code!r}")

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Stands for `numpy.ndarray`, so that no pickle reaches NumPy's internals."""

    def __init__(self, *_: object) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Bytes) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("it holds an array that is not of bytes")
        order = "F" if fortran else "C"
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order=order)


# All that the official batches name. The stand-ins need neither of NumPy's modules.
_PERMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Bytes,
}


class _Unpickler(pickle.Unpickler):
    """Runs nothing that a pickle asks for, but for reading an array of bytes."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _PERMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is refused as unsafe")
        return _PERMITTED[module, name]


def _from_pickle(raw: bytes) -> tuple[Pixels, list[int]]:
    batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise ValueError("it is not a dict with b'data' and b'labels'")
    data, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(data, _Array) or data.values.shape != (len(labels), PIXELS):
        raise ValueError(f"its data are no array [{len(labels)} labels, {PIXELS}]")
    return data.values, labels


def _from_records(raw: bytes) -> tuple[Pixels, list[int]]:
    if len(raw) % (1 + PIXELS):
        raise ValueError(f"{len(raw)} bytes are no records of {1 + PIXELS} bytes")
    records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0].tolist()


class _Format(NamedTuple):
    folder: str
    suffix: str
    parse: Callable[[bytes], tuple[Pixels, list[int]]]


_FORMATS = (  # In the order of MD5.
    _Format("cifar-10-batches-py", "", _from_pickle),
    _Format("cifar-10-batches-bin", ".bin", _from_records),
)


def _check_size(size: int, name: str | Path) -> None:
    if not 0 < size <= SIZE_LIMIT:
        raise ValueError(f"{name} has {size} bytes: it is not a file of CIFAR-10.")


def _read_file(folder: Path, name: str) -> bytes:
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: unpack the archive again.")
    _check_size(file.stat().st_size, file)
    return file.read_bytes()


def _read_member(tar: tarfile.TarFile, folder: str, name: str) -> bytes:
    # Not getmember, which would decompress all of the archive first.
    for member in tar:
        if member.name == f"{folder}/{name}" and (stream := tar.extractfile(member)):
            _check_size(member.size, name)
            with stream:
                return stream.read()
    raise FileNotFoundError(f"{folder}/{name} is missing in {tar.name}.")


def _check_md5(archive: Path, stream: io.BufferedReader) -> _Format:
    md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    form = dict(zip(MD5.values(), _FORMATS, strict=True)).get(md5.hexdigest())
    if form is None:
        raise ValueError(
            f"{archive} is not the official {' or '.join(MD5)}: its MD5 is"
            f" {md5.hexdigest()}. The download is broken: repeat it from {HOME}"
        )
    return form


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[_Format, Path, Callable[[str], bytes]]]:
    """The format, the folder or archive found, and a function that reads its files."""
    batches = SPLITS["train"] + SPLITS["test"]
    for form in _FORMATS:
        for folder in (path, path / form.folder):
            if any((folder / f"{name}{form.suffix}").is_file() for name in batches):
                yield form, folder, partial(_read_file, folder)
                return
    archive = next((p for p in (path, *map(path.joinpath, MD5)) if p.is_file()), None)
    if archive is None:
        raise FileNotFoundError(
            f"There is no CIFAR-10 at path={str(path)!r}: download"
            f" {' or '.join(MD5)} from {HOME} and give path= that file, the folder it"
            " unpacks to, or the folder that holds either."
        )
    with archive.open("rb") as stream:
        form = _check_md5(archive, stream)
        stream.seek(0)
        with tarfile.open(archive, fileobj=stream, mode="r:gz") as tar:
            yield form, archive, partial(_read_member, tar, form.folder)


def _parse(form: _Format, name: str, raw: bytes) -> tuple[Pixels, Labels]:
    try:
        pixels, labels = form.parse(raw)
        if not labels or not set(labels) <= set(range(10)):
            raise ValueError("a label is not one of 0, ..., 9")
        return pixels, np.array(labels, np.int64)
    # A damaged pickle can raise anything.
    except Exception as error:
        raise ValueError(f"{name} is damaged: {error}.") from error


def _select(
    path: Path, split: str, columns: Int[np.ndarray, "10"], skip: int, n: int | None
) -> tuple[Pixels, Labels]:
    """The pixels and columns of the samples; no batch is read after the last one."""
    stop = math.inf if n is None else skip + n
    parts, seen = [], 0
    with _open(path) as (form, place, read):
        for name in SPLITS[split]:
            file = f"{name}{form.suffix}"
            pixels, labels = _parse(form, f"{file} in {place}", read(file))
            matching = np.flatnonzero(columns[labels] >= 0)
            rank = seen + np.arange(len(matching))
            rows = matching[(rank >= skip) & (rank < stop)]
            parts.append((pixels[rows], columns[labels[rows]]))
            seen += len(matching)
            if seen >= stop:
                break
    if seen < skip + (n or 1):
        raise ValueError(
            f"n={n} and skip={skip}, but split={split!r} has only {seen} samples of"
            " these classes: lower n or skip, or give more classes."
        )
    return np.concatenate([p for p, _ in parts]), np.concatenate([c for _, c in parts])


def _columns(classes: Sequence[str | int | np.integer]) -> Int[np.ndarray, "10"]:
    """The column of the targets of each class; -1 for those left out."""
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise TypeError(f"classes={classes!r} must be a sequence, such as ['cat'].")
    chosen = [CLASSES.index(c) if c in CLASSES else c for c in classes]
    known = all(is_count(c) and c in range(10) for c in chosen)
    if not known or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"classes={classes!r} must be one or more different names out of"
            f" {', '.join(CLASSES)}, or their indices 0, ..., 9."
        )
    return np.array([chosen.index(c) if c in chosen else -1 for c in range(10)])


def _normalised(pixels: Pixels, dtype: np.dtype) -> Float[np.ndarray, "n 32 32 3"]:
    images = np.moveaxis(pixels.reshape(-1, 3, 32, 32), 1, -1)
    # In blocks, as double precision takes eight times the memory of the pixels.
    blocks = np.array_split(images, math.ceil(len(images) / BLOCK))
    # Of the raw pixels: the 255s of the formula cancel.
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64)
    squares = sum(np.sum((block - mean) ** 2, axis=(0, 1, 2)) for block in blocks)
    std = np.sqrt(squares / (images.size / 3))
    if not np.all(std > 0):
        raise ValueError("A channel is constant over the chosen samples: raise n.")
    inputs = np.empty(images.shape, dtype)
    for part, block in zip(np.array_split(inputs, len(blocks)), blocks, strict=True):
        part[...] = (block - mean) / std
    return inputs


def cifar10(
    path: str | os.PathLike[str],
    n: int | None = None,
    *,
    classes: Sequence[str | int | np.integer] = CLASSES,
    skip: int = 0,
    split: Literal["train", "test"] = "train",
    dtype: DTypeLike | None = None,
) -> Data:
    """The first `n` images of the chosen classes of CIFAR-10, read from disk.

    `inputs = (raw / 255 - mean) / std`, `mean` and `std` being those of
    `raw / 255` in each colour channel, over all pixels of the chosen samples.

    Nothing is downloaded: get `cifar-10-python.tar.gz` or `cifar-10-binary.tar.gz`
    from https://www.cs.toronto.edu/~kriz/cifar.html. The archives are read as they are
    and checked by their MD5; unpacked ones are read faster. The pickles of the Python
    version are read by an unpickler that refuses whatever is not an array of bytes.

    **Arguments**

    - `path`: one of the two archives, the folder it unpacks to (`cifar-10-batches-py`
      or `cifar-10-batches-bin`), or a folder that holds any of them.
    - `n`: number of samples, in the order of the files; None for all.
    - `classes`: names such as `"cat"`, or indices from 0 to 9, of the classes to
      keep; their order is that of the targets' columns.
    - `skip`: number of samples of these classes to leave out at the beginning.
    - `split`: `"train"` (50000 samples) or `"test"` (10000).
    - `dtype`: of the arrays; None for JAX's default float.

    **Returns** inputs of shape [n, 32, 32, 3] and one-hot targets of shape [n,
    len(classes)].

    **Raises** `FileNotFoundError` if there is no CIFAR-10 at `path`, or a file of it
    is missing; `TypeError` if `path` is not a path, or `classes` not a sequence;
    `ValueError` if an argument is out of range, there are fewer samples than asked for,
    a channel is constant over them, or a file is damaged.

    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images",
    technical report, University of Toronto, 2009.

    ```python
    >>> import pathlib, tempfile
    >>> cat = bytes([3]) + bytes(range(256)) * 12
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (pathlib.Path(folder) / "data_batch_1.bin").write_bytes(cat)
    ...     data = cifar10(folder, 1, classes=["dog", "cat"])
    >>> data.inputs.shape, data.targets.tolist()
    ((1, 32, 32, 3), [[0.0, 1.0]])

    ```
    """
    dtype, columns = float_dtype(dtype), _columns(classes)
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path={path!r} must be a str or a pathlib.Path.")
    if n is not None and (not is_count(n) or n < 1):
        raise ValueError(f"n={n} must be a positive whole number of samples, or None.")
    if not is_count(skip) or skip < 0:
        raise ValueError(f"skip={skip} must be a whole number of samples >= 0.")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: give one of {list(SPLITS)}.")
    pixels, labels = _select(Path(path).expanduser(), split, columns, skip, n)
    targets = np.eye(len(classes))[labels]
    return Data(jnp.asarray(_normalised(pixels, dtype)), jnp.asarray(targets, dtype))
