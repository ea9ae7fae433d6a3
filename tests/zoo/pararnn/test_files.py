"""Saved models: there and back bit for bit; a config that says something else is refused."""

import chex
import pytest
from flax import nnx

from hackle import zoo
from hackle.zoo import UserError
from hackle.zoo.pararnn import params
from hackle.zoo.weights.folder import CheckpointError
from tests.zoo.published import stored, write_folder

SMALL = dict(vocab_size=40, width=32, mlp_width=48, depth=3)
FIELDS = params.write_config(zoo.entry("pararnn-tiny-lstm").config)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "heads": 2, "taps": 3}])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_export_then_import_is_bit_equal(tmp_path, cell, changes):
    model = zoo.create(f"pararnn-tiny-{cell}", rngs=nnx.Rngs(7), **SMALL, **changes)
    zoo.save_pretrained(model, tmp_path / "out", max_shard_bytes=20_000)
    again = zoo.from_pretrained(tmp_path / "out")
    assert type(again) is type(model) and again.config == model.config
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(again))
    chex.assert_trees_all_equal_dtypes(nnx.state(model), nnx.state(again))
    for path, variable in nnx.to_flat_state(nnx.state(again)):
        assert len(variable.get_metadata("axes")) == variable.ndim, path


def test_how_a_model_runs_is_chosen_at_loading(tmp_path):
    model = zoo.create("pararnn-tiny-gru", rngs=nnx.Rngs(0), **SMALL)
    zoo.save_pretrained(model, tmp_path / "out")
    again = zoo.from_pretrained(tmp_path / "out", remat="full", recurrence="scan")
    assert (again.config.remat, again.config.recurrence) == ("full", "scan")
    with pytest.raises(UserError, match="attention='xla': ParaRNNConfig has no attention"):
        zoo.from_pretrained(tmp_path / "out", attention="xla")


def test_a_cell_of_another_kind_is_seen_in_the_tensors(tmp_path):
    model = zoo.create("pararnn-tiny-gru", rngs=nnx.Rngs(0), **SMALL)
    zoo.save_pretrained(model, tmp_path / "out")
    config = {**params.write_config(model.config), "cell": "lstm"}
    folder = write_folder(tmp_path / "in", stored(tmp_path / "out"), config)
    with pytest.raises(CheckpointError, match="3 missing tensors: .*cell.peephole"):
        zoo.from_pretrained(folder)


@pytest.mark.parametrize(
    "field, value, shown",
    [
        ("some_new_field", None, "unknown field some_new_field=null"),
        ("cell", "rnn", 'cell="rnn" is not supported; expected "gru" or "lstm"'),
        ("num_heads", 0, "num_heads=0"),
        ("conv_taps", "4", 'conv_taps="4"'),
        ("rms_norm_eps", None, "rms_norm_eps=null"),
        ("tie_word_embeddings", 1, "tie_word_embeddings=1"),
        ("model_type", "qwen2", 'model_type="qwen2"'),
    ],
)
def test_refused_by_name_and_value(field, value, shown):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        params.read_config({**FIELDS, field: value})
    assert shown in str(caught.value)


@pytest.mark.parametrize("field", sorted(FIELDS.keys() - params.IGNORED.keys() - {"model_type"}))
def test_a_missing_field_is_named(field):
    lacking = {key: value for key, value in FIELDS.items() if key != field}
    with pytest.raises(UserError, match=f"field {field}=null"):
        params.read_config(lacking)
