"""scripts/convert.py as a person runs it."""

import importlib
import json
import os
import subprocess
import sys

import chex
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.zoo.weights.folder import open_checkpoint
from tests.scripts import running
from tests.scripts.running import SCRIPTS, load
from tests.zoo.golden import write_golden_checkpoint

TARGETS = ("dense", "parscale", "multiverse")


@pytest.fixture
def call(capsys):
    """Runs the script: exit code, what it printed, its error line."""
    script = load("convert")

    def run(*args):
        capsys.readouterr()
        code = running.call(script, *args)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def golden(tmp_path, streams):
    return write_golden_checkpoint(tmp_path / f"golden{streams}", streams)


def tensors(folder):
    return {name: np.array(info.map()) for name, info in open_checkpoint(folder).tensors.items()}


def test_inspect_says_what_a_folder_is(tmp_path, call):
    code, out, err = call("inspect", golden(tmp_path, 3))
    assert (code, err) == (0, "")
    for line in (
        "family      parscale (model_type qwen2_parscale)",
        "size of     no model of the registry",
        "parameters  5,715, 5,203 without embedding",
        "tensors     34 (34 F32)",
        "bytes       22,860 in 1 file",
        "  streams         3",
    ):
        assert line in out.splitlines()


def test_inspect_knows_released_names(call):
    code, out, _ = call("inspect", "ParScale/ParScale-1.8B-P8-Inst")
    assert code == 0
    assert "size of     parscale-1.8b-p8" in out
    assert "1,829,042,696, 1,595,669,000 without embedding" in out
    assert "tensors     510" in out


def test_copy_to_dense_and_back(tmp_path, call):
    source = golden(tmp_path, 1)
    assert call("copy", source, tmp_path / "dense", "--to", "dense")[0] == 0
    dense = zoo.from_pretrained(tmp_path / "dense")
    assert type(dense).__name__ == "DenseLM"
    assert call("copy", tmp_path / "dense", tmp_path / "back", "--to", "parscale")[0] == 0
    back, model = zoo.from_pretrained(tmp_path / "back"), zoo.from_pretrained(source)
    assert type(back) is type(model)
    chex.assert_trees_all_equal(nnx.state(back), nnx.state(model))
    tokens = np.array([[3, 1, 4, 1, 5]], np.int32)
    np.testing.assert_array_equal(dense(tokens), model(tokens))


def test_a_dense_copy_loads_in_transformers(tmp_path, call):
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    source = golden(tmp_path, 1)
    assert call("copy", source, tmp_path / "dense", "--to", "dense")[0] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    tokens = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(zoo.from_pretrained(source)(tokens), expected, atol=1e-5)


def test_copy_changes_dtype_and_shards(tmp_path, call):
    source, out = golden(tmp_path, 3), tmp_path / "out"
    code, said, _ = call("copy", source, out, "--dtype", "bfloat16", "--max-shard-gb", "4e-6")
    assert code == 0 and "5,715 parameters, bfloat16" in said
    assert len(list(out.glob("*.safetensors"))) > 1
    for name, tensor in tensors(out).items():
        assert tensor.dtype.name == "bfloat16", name
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2


def test_retrofit_adds_streams_around_the_same_trunk(tmp_path, call):
    source = golden(tmp_path, 1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = ["--streams", 4, "--prefix-length", 5, "--seed", seed]
        assert call("retrofit", source, tmp_path / name, *flags)[0] == 0
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    chex.assert_trees_all_equal(a, b)
    trunk = tensors(source)
    new = {name: tensor for name, tensor in a.items() if name not in trunk}
    assert len(new) == 2 * 2 + 4
    for name, tensor in trunk.items():
        np.testing.assert_array_equal(a[name], tensor)
    for name, tensor in new.items():
        if not name.endswith("bias"):
            assert not np.array_equal(tensor, c[name]), name
            assert 0.01 < tensor.std() < 0.03, name
    config = zoo.from_pretrained(tmp_path / "a").config
    assert (config.streams, config.prefix_length, config.smoothing) == (4, 5, 0.1)


def test_import_and_export_of_a_run(tmp_path, call):
    checkpoint = importlib.import_module("hackle.zoo.train.checkpoint")
    source, run = golden(tmp_path, 1), tmp_path / "run"
    code, said, _ = call("import", source, run)
    assert code == 0 and "start_from" in said
    model = checkpoint.load_model(run)
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(zoo.from_pretrained(source)))
    assert call("export", run, tmp_path / "out")[0] == 0
    chex.assert_trees_all_equal(tensors(tmp_path / "out"), tensors(source))
    code, _, err = call("export", run, tmp_path / "other", "--step", 7)
    assert code == 2 and "no checkpoint of step 7" in err
    code, _, err = call("import", source, run)
    assert code == 2 and "not an empty folder" in err


def test_an_imported_run_is_a_trunk_of_recipes(tmp_path, call):
    plan = importlib.import_module("hackle.zoo.train.plan")
    from hackle.zoo.train.recipe import Recipe

    sizes = dict(width=16, mlp_width=16, depth=1, head_width=4)
    model = zoo.create("parscale-tiny-p1", rngs=nnx.Rngs(0), vocab_size=300, **sizes)
    zoo.save_pretrained(model, tmp_path / "in")
    assert call("import", tmp_path / "in", tmp_path / "run")[0] == 0
    recipe = dict(
        model="parscale-tiny-p2",
        overrides=sizes,
        start_from=str(tmp_path / "run"),
        vocab_size=300,
        length=8,
        batch=8,
    )
    assert plan.Plan(Recipe(**recipe, continue_data=False)).trunk.step == 0
    with pytest.raises(zoo.UserError, match=r"data cannot go on from .*: corpus: saved 'that of"):
        plan.Plan(Recipe(**recipe))


@pytest.fixture
def tokenizer(tmp_path):
    data = importlib.import_module("hackle.zoo.data")
    folder = tmp_path / "text"
    folder.mkdir()
    data.train_tokenizer(["def f(x): return x"] * 9, 260, folder / "tokenizer.json")
    (folder / "generation_config.json").write_text("{}")
    (folder / "notes.txt").write_text("not for copying")
    return folder


def test_the_tokenizer_comes_along(tmp_path, call, tokenizer):
    sizes = dict(vocab_size=300, width=16, depth=1)
    zoo.save_pretrained(
        zoo.create("dense-tiny", rngs=nnx.Rngs(0), **sizes),
        tmp_path / "in",
        files=[tokenizer / "tokenizer.json"],
    )
    code, said, _ = call("copy", tmp_path / "in", tmp_path / "a")
    assert code == 0 and "copied tokenizer.json" in said
    code, said, _ = call("inspect", tmp_path / "a")
    assert code == 0 and "tokenizer   260 entries" in said
    assert call("copy", tmp_path / "in", tmp_path / "b", "--tokenizer", tokenizer)[0] == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    for name in ("a", "b"):
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (
            tokenizer / "tokenizer.json"
        ).read_bytes()


def test_tags_are_added_to_model_and_tokenizer(tmp_path, call, tokenizer):
    data = importlib.import_module("hackle.zoo.data")
    sizes = dict(vocab_size=384, width=16, mlp_width=24, depth=1, tie_embeddings=False)
    trunk = zoo.create("dense-tiny", rngs=nnx.Rngs(0), **sizes)
    zoo.save_pretrained(trunk, tmp_path / "in", files=[tokenizer / "tokenizer.json"])
    code, said, _ = call("add-tags", tmp_path / "in", tmp_path / "out")
    assert code == 0 and "260 <Think>, 261 </Think>, 262 <Parallel>" in said
    model = zoo.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "MultiverseLM" and model.config.vocab_size == 320
    assert list(model.config.tags.tokens().values()) == list(range(260, 272))
    text = data.load_tokenizer(tmp_path / "out")
    assert text.encode("<Path>", special=True) == [model.config.tags.path[0].open]
    assert text.vocab_size == 272
    # Not twice: that would forget the rows of the tags.
    code, _, err = call("add-tags", tmp_path / "out", tmp_path / "twice")
    assert code == 2 and "the model has tags already" in err and not (tmp_path / "twice").exists()
    # With the tokenizer of another folder, and to a dense model and back without a loss.
    assert call("copy", tmp_path / "out", tmp_path / "dense", "--to", "dense")[0] == 0
    assert type(zoo.from_pretrained(tmp_path / "dense")).__name__ == "DenseLM"
    assert call("copy", tmp_path / "dense", tmp_path / "back", "--to", "multiverse")[0] == 0
    back = zoo.from_pretrained(tmp_path / "back")
    assert back.config == model.config
    chex.assert_trees_all_equal(nnx.state(back), nnx.state(model))


def test_a_tokenizer_without_tags_or_a_model_without_tokenizer_gets_none(tmp_path, call, tokenizer):
    source, out = golden(tmp_path, 1), tmp_path / "out"
    code, _, err = call("add-tags", source, out)
    assert code == 2 and "cannot read tokenizer" in err
    code, _, err = call("copy", source, out, "--to", "multiverse")
    assert code == 2 and "tag <Think> has token id 151665, but vocab_size=32" in err
    code, _, err = call("copy", source, out, "--to", "multiverse", "--tokenizer", tokenizer)
    assert code == 2 and "the tokenizer has no token <Think>" in err
    assert not out.exists()


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path, call, tokenizer):
    out = tmp_path / "out"
    code, _, err = call("copy", golden(tmp_path, 1), out, "--tokenizer", tokenizer)
    assert code == 2 and "has 260 entries, the model's table 32" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "nowhere/at/all"], "is no folder, and no name"),
        (["inspect", "parscale-1.8b-p3"], "did you mean parscale-1.8b-p"),
        (["copy", "nowhere", "{out}"], "checkpoint folder nowhere does not exist"),
        (["copy", "{p3}", "{out}", "--to", "dense"], "3 streams is no dense model"),
        (["copy", "{p1}", "{p3}"], "is not empty (it holds config.json)"),
        (["copy", "{p1}", "{p3}/config.json"], "is a file"),
        (["copy", "{p1}", "/proc/x/y"], "cannot write /proc/x/y"),
        (["copy", "{p1}", "{out}", "--max-shard-gb", "0"], "--max-shard-gb 0.0"),
        (["copy", "{p1}", "{out}", "--tokenizer", "{p1}"], "holds no tokenizer.json"),
        (["retrofit", "{p3}", "{out}", "--streams", "4"], "3 streams already"),
        (["retrofit", "{p1}", "{out}", "--streams", "1"], "--streams 1; expected at least 2"),
        (["retrofit", "{p1}", "{out}", "--streams", "2", "--prefix-length", "0"], "-length 0"),
        (["retrofit", "{p1}", "{out}", "--streams", "2", "--smoothing", "2"], "smoothing"),
        (["retrofit", "{p1}", "{out}", "--streams", "2", "--seed", "-1"], "--seed -1"),
        (["export", "nowhere", "{out}"], "nowhere holds no complete checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, call, args, message):
    places = {"out": tmp_path / "out", "p1": golden(tmp_path, 1), "p3": golden(tmp_path, 3)}
    code, out, err = call(*(arg.format(**places) for arg in args))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_a_recurrent_model_is_copied_and_becomes_no_transformer(tmp_path, call):
    sizes = dict(vocab_size=32, width=16, mlp_width=24, depth=1)
    zoo.save_pretrained(zoo.create("pararnn-tiny-gru", rngs=nnx.Rngs(0), **sizes), tmp_path / "rnn")
    assert call("copy", tmp_path / "rnn", tmp_path / "again")[0] == 0
    chex.assert_trees_all_equal(tensors(tmp_path / "rnn"), tensors(tmp_path / "again"))
    said = call("inspect", "pararnn-400m-lstm")[1]
    assert "size of     pararnn-400m-lstm" in said and "  cell            lstm" in said
    for args in (*(("copy", "--to", name) for name in TARGETS), ("retrofit",)):
        more = ("--streams", "2") if args == ("retrofit",) else args[1:]
        code, _, err = call(args[0], tmp_path / "rnn", tmp_path / "no", *more)
        assert code == 2 and "ParaRNNLM" in err
        assert not (tmp_path / "no").exists()


def test_help_shows_examples():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "convert.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    )
    assert "examples:" in done.stdout
    assert all(f"convert.py {name}" in done.stdout for name in ("inspect", "retrofit", "import"))


def test_an_unknown_option_exits_with_2():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "convert.py", "inspect", "x", "--colour"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    )
    assert done.returncode == 2 and "unrecognized arguments: --colour" in done.stderr
