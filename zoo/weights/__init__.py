"""Published checkpoints, both ways: folders of safetensors files with an index and config.json.

`table` says how one of our parameters and its published tensors correspond, `config_fields` how a
config.json is read, `tensor_file` reads and writes one safetensors file, `load` and `save` move
whole models. Each family lists its own rows and fields in `zoo/<family>/params.py`.
"""
