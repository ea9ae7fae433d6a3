"""Published folders by plain writing and plain reading, for the tests of importer and exporter."""

import json

import numpy as np

from hackle.zoo.weights.tensor_file import read_header, write_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_folder(folder, tensors, config, dtype=np.float32):
    """A published folder of one file, by plain writing."""
    folder.mkdir(parents=True)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_file(folder / SINGLE, shapes, np.dtype(dtype), tensors.items())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stored(folder):
    """Name -> array of all tensors of a folder."""
    return {
        name: np.array(info.map())
        for file in sorted(folder.glob("*.safetensors"))
        for name, info in read_header(file).items()
    }


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
