"""CIFAR-10 from small files in the official formats, against numpy; unsafe ones."""

import hashlib
import importlib
import io
import os
import pickle
import re
import struct
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import unchecked

module = importlib.import_module("rodjax.problems._cifar10")
cifar10, CLASSES = module.cifar10, module.CLASSES

FOLDERS = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"}


class Python2Pickler(pickle._Pickler):
    """Writes texts and bytes as cPickle of Python 2 did, for which they were one."""

    def save_str(self, obj):
        raw = obj.encode() if isinstance(obj, str) else obj
        short = len(raw) < 256
        head = struct.pack("<cB" if short else "<ci", b"U" if short else b"T", len(raw))
        self.write(head + raw)
        self.memoize(obj)


Python2Pickler.dispatch = {
    **pickle._Pickler.dispatch,
    str: Python2Pickler.save_str,
    bytes: Python2Pickler.save_str,
}


def python2(obj, core=b"numpy.core"):
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(obj)
    return stream.getvalue().replace(b"numpy._core", core)


def batch(pixels, labels):
    names = [b"image_%d.png" % i for i in range(len(labels))]
    known = {b"labels": [int(label) for label in labels], b"data": pixels}
    return {b"batch_label": b"training batch 1 of 5", **known, b"filenames": names}


def records(pixels, labels):
    return np.column_stack([labels.astype(np.uint8), pixels]).tobytes()


@pytest.fixture(scope="module")
def samples():
    """Raw pixels and labels by split: five batches of six samples, and one."""
    rng = np.random.default_rng(0)

    def draw(n):
        return rng.integers(0, 256, (n, 3072), np.uint8), rng.permutation(n) % 10

    return {"train": draw(30), "test": draw(6)}


def official_files(kind, samples):
    """The files of a folder: their contents by name."""
    parts = list(zip(*(np.split(a, 5) for a in samples["train"]), strict=True))
    names = [f"data_batch_{i}" for i in range(1, 6)]
    parts = dict(zip(names, parts, strict=True), test_batch=samples["test"])
    if kind == "binary":
        return {f"{name}.bin": records(*part) for name, part in parts.items()}
    files = {name: python2(batch(*part)) for name, part in parts.items()}
    meta = {b"label_names": list(CLASSES), b"num_vis": 3072}
    return files | {"batches.meta": python2(meta)}


def write_folder(root, kind, samples):
    folder = root / FOLDERS[kind]
    folder.mkdir()
    for name, content in official_files(kind, samples).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(params=["python", "binary"])
def folder(request, tmp_path, samples):
    return write_folder(tmp_path, request.param, samples)


@pytest.fixture
def binary(tmp_path, samples):
    return write_folder(tmp_path, "binary", samples)


@pytest.fixture(params=["python", "binary"])
def unofficial(request, tmp_path, samples):
    kind = request.param
    path = tmp_path / f"cifar-10-{kind}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        # Backwards, as the official ones are not in order either.
        for name, content in reversed(official_files(kind, samples).items()):
            member = tarfile.TarInfo(f"{FOLDERS[kind]}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archive(unofficial, monkeypatch):
    md5 = hashlib.md5(unofficial.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(module.MD5, unofficial.name, md5)
    return unofficial


def check(data, samples, rows=slice(None), split="train", classes=range(10)):
    """Against the documented formula."""
    pixels, labels = (a[rows] for a in samples[split])
    raw = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / 255
    inputs = (raw - raw.mean(axis=(0, 1, 2))) / raw.std(axis=(0, 1, 2))
    targets = np.stack([labels == c for c in classes], axis=1)
    atol = 4 * float(jnp.finfo(data.inputs.dtype).eps)
    np.testing.assert_allclose(np.asarray(data.inputs, float), inputs, atol=atol)
    np.testing.assert_array_equal(data.targets, targets)


def test_the_pickles_here_are_what_numpy_reads(samples):
    content = python2(batch(*samples["test"]), core=b"numpy._core")
    read = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(read[b"data"], samples["test"][0])
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in python2(read)


@pytest.mark.parametrize("split", ["train", "test"])
def test_folders(folder, samples, split):
    check(cifar10(folder, split=split), samples, split=split)
    check(cifar10(str(folder.parent), split=split), samples, split=split)


def test_archives_are_read_without_unpacking(archive, samples):
    check(cifar10(archive), samples)
    check(cifar10(archive.parent, split="test"), samples, split="test")
    assert os.listdir(archive.parent) == [archive.name]


def test_pixel_layout(tmp_path):
    """Red grows downwards, green to the right, and one pixel is blue."""
    image = np.zeros((3, 32, 32), np.uint8)
    image[0] = np.arange(32)[:, None]
    image[1] = np.arange(32)
    image[2, 5, 20] = 255
    (tmp_path / "test_batch.bin").write_bytes(b"\x08" + image.tobytes())
    data = cifar10(tmp_path, split="test")
    red, green, blue = np.moveaxis(np.asarray(data.inputs[0]), -1, 0)
    ramp = (np.arange(32) - 15.5) / np.std(np.arange(32))
    np.testing.assert_allclose(red, np.tile(ramp[:, None], 32), atol=1e-12)
    np.testing.assert_allclose(green, np.tile(ramp, (32, 1)), atol=1e-12)
    assert np.argwhere(blue > 1).tolist() == [[5, 20]]
    assert data.targets[0].tolist().index(1.0) == CLASSES.index("ship")


@pytest.mark.parametrize(("n", "skip"), [(4, 0), (9, 5), (None, 17), (30, 0)])
def test_n_and_skip(binary, samples, n, skip):
    stop = None if n is None else skip + n
    check(cifar10(binary, n, skip=skip), samples, slice(skip, stop))


@pytest.mark.parametrize("classes", [["cat", "airplane"], (np.int64(3), 0)])
def test_classes_are_columns_in_the_order_given(binary, samples, classes):
    rows = np.flatnonzero(np.isin(samples["train"][1], [0, 3]))[1:5]
    data = cifar10(binary, 4, classes=classes, skip=1)
    check(data, samples, rows, classes=[3, 0])
    assert 0 < data.targets[:, 0].sum() < 4


def test_no_batch_is_read_after_the_last_sample(binary):
    (binary / "data_batch_3.bin").write_bytes(b"damaged")
    assert cifar10(binary, 12).inputs.shape == (12, 32, 32, 3)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin"):
        cifar10(binary, 13)


@pytest.mark.parametrize("dtype", ["float32", "float64", jnp.bfloat16])
def test_dtypes_and_blocks(binary, samples, dtype, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    data = cifar10(binary, dtype=dtype)
    assert data.inputs.dtype == data.targets.dtype == jnp.dtype(dtype)
    check(data, samples)


def test_home_is_expanded(folder, samples, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    check(cifar10(f"~/{folder.name}"), samples)


def test_newer_numpy_and_columns_first(tmp_path, samples):
    pixels, labels = samples["test"]
    content = python2(batch(np.asfortranarray(pixels), labels), core=b"numpy._core")
    (tmp_path / "test_batch").write_bytes(content)
    check(cifar10(tmp_path, split="test"), samples, split="test")


class Reduced:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


UNSAFE = {
    "system": lambda path: Reduced(os.system, (f"echo > {path}",)),
    "eval": lambda path: Reduced(eval, (f"open({str(path)!r}, 'w')",)),
    "fromregex": lambda path: Reduced(np.fromregex, (str(path), "", "u1")),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", UNSAFE)
def test_pickles_that_run_something_are_refused(tmp_path, name, protocol):
    file, touched = tmp_path / "test_batch", tmp_path / "touched"
    file.write_bytes(pickle.dumps(UNSAFE[name](touched), protocol))
    with pytest.raises(ValueError, match=rf"test_batch.*\.{name} is refused"):
        cifar10(tmp_path, split="test")
    assert not touched.exists()


PIXELS = np.zeros((2, 3072), np.uint8)
GOOD = batch(PIXELS, [1, 2])
DAMAGED = {
    "truncated": python2(GOOD)[:-500],
    "no pickle": b"<!DOCTYPE html>",
    "no dict": python2([1, 2]),
    "no data": python2({b"labels": [1, 2]}),
    "no labels": python2({b"data": PIXELS}),
    "text for data": python2(GOOD | {b"data": PIXELS.tobytes()}),
    "one row": python2(GOOD | {b"data": PIXELS[:1]}),
    "one column too few": python2(GOOD | {b"data": PIXELS[:, 1:]}),
    "signed bytes": python2(GOOD | {b"data": PIXELS.astype("i1")}),
    "floats": python2(GOOD | {b"data": PIXELS * 1.0}),
    "objects": python2(GOOD | {b"data": PIXELS.astype(object)}),
    "no array's state": python2(GOOD | {b"data": Reduced(np.ndarray, ((2, 3072),))}),
    "no samples": python2(batch(PIXELS[:0], [])),
    "label 10": python2(batch(PIXELS, [1, 10])),
    "label -1": python2(batch(PIXELS, [1, -1])),
    "label of text": python2(GOOD | {b"labels": [b"cat", 1]}),
    "half a label": python2(GOOD | {b"labels": [0.5, 1]}),
}


RECORDS = [bytes(3072), bytes(3074), b"\x0a" + bytes(3072)]
FAULTS = [("test_batch", content) for content in DAMAGED.values()]
FAULTS += [("test_batch.bin", content) for content in RECORDS]


@pytest.mark.parametrize(("file", "content"), FAULTS, ids=[*DAMAGED, *"123"])
def test_damaged_files_are_named(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(file)} in .* is damaged"):
        cifar10(tmp_path, split="test")


def test_too_large_files_are_not_read(binary, archive, monkeypatch):
    monkeypatch.setattr(module, "SIZE_LIMIT", 18437)
    for path in (binary, archive):
        with pytest.raises(ValueError, match=r"data_batch_1.* has \d+ bytes"):
            cifar10(path)


def test_archives_other_than_the_official_ones_are_refused(unofficial):
    message = rf"{re.escape(str(unofficial))}.*MD5.*broken.*toronto\.edu/~kriz/cifar"
    with pytest.raises(ValueError, match=message):
        cifar10(unofficial)


def test_a_truncated_archive_is_refused(archive):
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ValueError, match="broken"):
        cifar10(archive)


def test_a_missing_file_is_named(folder):
    (missing := next(folder.glob("data_batch_2*"))).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(missing.name)):
        cifar10(folder)


@pytest.mark.parametrize("name", ["", "absent", "absent/cifar-10-python.tar.gz"])
def test_an_absent_path_says_what_to_do(tmp_path, name):
    message = r"path=.*download .*python\.tar\.gz.*cs\.toronto\.edu.* give path="
    with pytest.raises(FileNotFoundError, match=message) as error:
        cifar10(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(("n", "skip"), [(31, 0), (1, 30), (None, 30)])
def test_too_few_samples(binary, n, skip):
    with pytest.raises(ValueError, match=f"n={n} and skip={skip}.* 30 samples"):
        cifar10(binary, n, skip=skip)


def test_a_constant_channel_is_refused(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(b"\x01" + bytes([7]) * 3072)
    with pytest.raises(ValueError, match="constant"):
        cifar10(tmp_path, split="test")


WRONG = {
    "n": [0, 1.0, True],
    "skip": [-1, None],
    "split": ["valid"],
    "dtype": ["int32"],
    "classes": ["cat", 3, [], ["cat", 3], ["kitten"], [10], [-1], [True], [3.0]],
    "path": [3, None],
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_are_checked_before_any_file(name):
    for value in WRONG[name]:
        refused = pytest.raises((ValueError, TypeError), match=f"{name}=")
        with unchecked(), refused:
            cifar10(**{"path": Path("absent"), name: value})
