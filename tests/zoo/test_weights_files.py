"""The table language and the file format, each against an independent implementation."""

import importlib
import json

import ml_dtypes
import numpy as np
import pytest

from hackle.zoo import UserError, registry
from hackle.zoo.weights.table import Row, by_path
from hackle.zoo.weights.tensor_file import read_header, write_file


def test_a_row_regroups_and_transposes_as_written():
    row = Row("a", "x", "o (j p)", "p j o")
    p, j, o = 3, 4, 5
    published = np.arange(o * j * p).reshape(o, j * p)
    ours = row.read(published, (p, j, o), ((0, p), (0, j), (0, o)))
    for index in np.ndindex(p, j, o):
        assert ours[index] == published[index[2], index[1] * p + index[0]]
    np.testing.assert_array_equal(row.to_published(ours), published)
    assert row.published_shape((p, j, o)) == published.shape


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_any_part_of_any_row_is_that_part_of_the_whole(family):
    rng = np.random.default_rng(0)
    for row in by_path(registry.FAMILIES[family].params.ROWS).values():
        shape = tuple(rng.integers(2, 6, len(row.ours.split())))
        ours = rng.normal(size=shape)
        published = row.to_published(ours)
        stacked_shape = (7, *shape) if row.stacked else shape
        assert row.published_shape(stacked_shape) == published.shape
        for _ in range(20):
            cuts = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
            bounds = tuple((int(a), int(b)) for a, b in cuts)
            part = ours[tuple(slice(*b) for b in bounds)]
            np.testing.assert_array_equal(row.read(published, stacked_shape, bounds), part)


def test_a_row_whose_sides_differ_is_refused():
    with pytest.raises(ValueError, match="'a b' and 'a c' differ"):
        Row("x", "y", "a b", "a c")
    with pytest.raises(ValueError, match="table lists name y twice"):
        by_path([Row("x", "y", "a", "a"), Row("z", "y", "a", "a")])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_files_are_those_of_the_safetensors_package(tmp_path, dtype):
    package = importlib.import_module("safetensors.numpy")
    tensors = {
        "one": np.arange(6).reshape(2, 3).astype(dtype),
        "two": np.ones((5,), dtype),
        "three": np.zeros((1, 2, 1), dtype),
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_file(ours, shapes, np.dtype(dtype), tensors.items())
    package.save_file(tensors, theirs)
    read = package.load_file(ours)
    for path in (ours, theirs):
        header = read_header(path)
        assert header.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(header[name].map(), tensor)
            assert header[name].map().dtype == tensor.dtype
            np.testing.assert_array_equal(read[name], tensor)
    assert (8 + int.from_bytes(ours.read_bytes()[:8], "little")) % 8 == 0


def test_the_writer_checks_what_it_is_given(tmp_path):
    shapes = {"a": (2,), "b": (3,)}
    one = ("a", np.zeros(2))
    with pytest.raises(ValueError, match="unexpected tensor a"):
        write_file(tmp_path / "1", shapes, np.dtype("f4"), [("a", np.zeros(3))])
    with pytest.raises(ValueError, match="tensor b was announced"):
        write_file(tmp_path / "2", shapes, np.dtype("f4"), [one])
    with pytest.raises(ValueError, match="unexpected tensor c"):
        write_file(tmp_path / "3", {"a": (2,)}, np.dtype("f4"), [one, ("c", np.zeros(1))])


def file_of(header: bytes | dict, data: int) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + bytes(data)


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not a safetensors file"),
        (b"PK\x03\x04 a zip file, as torch writes it", "truncated or not a safetensors file"),
        (file_of(GOOD, 8)[:20], "truncated or not a safetensors file"),
        (file_of(GOOD, 7), "truncated: "),
        (file_of(GOOD, 9), "1 bytes after the last tensor"),
        (file_of(b"{", 0), "damaged safetensors header"),
        (file_of(b"[]", 0), "damaged safetensors header"),
        (file_of(b"\xff\xff", 0), "damaged safetensors header"),
        (file_of({"a": {"dtype": "F32"}}, 0), "damaged safetensors header"),
        (file_of({"a": {**GOOD["a"], "shape": [3]}}, 8), "offsets of tensor a"),
        (file_of({"a": {**GOOD["a"], "shape": [-1, -2]}}, 8), "offsets of tensor a"),
        (file_of({"a": {**GOOD["a"], "data_offsets": [8, 16]}}, 16), "offsets of tensor a"),
        (file_of({"a": {**GOOD["a"], "data_offsets": [0]}}, 8), "damaged safetensors header"),
        (file_of({**GOOD, "b": GOOD["a"]}, 8), "offsets of tensor b"),
        (file_of({"a": {**GOOD["a"], "dtype": "F99"}}, 8), "unknown dtype 'F99'"),
    ],
)
def test_damaged_files_are_refused_from_the_header(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_header(path)
