"""Recipes: every bad value is refused by name; texts of the command line become fields."""

import dataclasses
import json

import pytest
from flax import nnx

from hackle import pjit_configs
from hackle.zoo import registry
from hackle.zoo.errors import UserError
from hackle.zoo.train.plan import Plan, model_config
from hackle.zoo.train.recipe import FREE_ON_RESUME, REQUIRED, Recipe, field_names
from hackle.zoo.train.recipes import RECIPES, frozen_trunk, recipe, stage_1, stage_2, tiny
from tests.zoo.train.small import recipe as small


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_model(name):
    chosen = recipe(name)
    preset = pjit_configs.preset(chosen.preset)
    config = model_config(chosen, preset)
    assert chosen.length <= getattr(config, "max_length", chosen.length)  # a recurrence has none
    nnx.eval_shape(lambda: registry.entry(chosen.model).model_class(config, rngs=nnx.Rngs(0)))
    assert Recipe(**json.loads(json.dumps(chosen.to_json()))) == chosen


def test_unknown_recipes_name_their_neighbours():
    with pytest.raises(UserError, match="unknown recipe 'parscale-tiny-p3'; did you mean parscale"):
        recipe("parscale-tiny-p3")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"batch": 0}, "batch=0; expected at least 1"),
        ({"length": 1}, "length=1; expected at least 2"),
        ({"steps": 1.5}, "steps=1.5; expected an integer"),
        ({"steps": True}, "steps=True; expected an integer"),
        ({"learning_rate": 0}, "learning_rate=0.0; expected more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan; expected a finite number"),
        ({"mode": "some"}, "mode='some'; expected one of all, frozen_trunk"),
        ({"schedule": "linear"}, "schedule='linear'; expected one of cosine, wsd, constant"),
        ({"accumulate": 3}, "batch=8; expected a multiple of accumulate=3"),
        ({"warmup": 7}, "warmup=7 and decay=0 do not fit into steps=6"),
        ({"clip": 0.0}, "clip=0.0; expected more than 0, or none"),
        ({"final": 2.0}, "final=2.0; expected between 0 and 1"),
        ({"beta1": 1.0}, "beta1=1.0; expected at least 0 and below 1"),
        ({"save_every": -1}, "save_every=-1; expected at least 0"),
        ({"model": 3}, "model=3; expected text"),
        ({"overrides": [1]}, r"overrides=\[1\]; expected Mapping"),
        ({"colour": 1}, "unknown recipe field 'colour'"),
        ({"batch_size": 1}, "did you mean batch"),
    ],
)
def test_bad_values_are_refused_by_name(changes, text):
    with pytest.raises(UserError, match=text):
        small().replace(**changes)


def test_texts_become_fields():
    found = small().set(
        [
            "batch=16", "learning_rate=1e-4", "export=true", "clip=none", "attention=xla",
            "steps=1_000", "model.depth=3", "model.tie_embeddings=false", "corpus = a/b=c",
        ]
    )  # fmt: skip
    assert (found.batch, found.learning_rate, found.export, found.clip) == (16, 1e-4, True, None)
    assert (found.attention, found.steps, found.corpus) == ("xla", 1000, "a/b=c")
    assert found.overrides == {**small().overrides, "depth": 3, "tie_embeddings": False}


@pytest.mark.parametrize(
    "text, message",
    [
        ("batch", "'batch' is not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("batch=many", "batch='many'; expected an integer"),
        ("export=perhaps", "export='perhaps'; expected true or false"),
        ("overrides=1", "unknown recipe field 'overrides'"),
        ("lenght=3", "unknown recipe field 'lenght'; did you mean length"),
    ],
)
def test_bad_texts_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        small().set([text])


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"model": "parscale-tiny-p3"}, "unknown model 'parscale-tiny-p3'"),
        ({"overrides": {"hight": 3}}, "unknown config field model.hight"),
        ({"overrides": {"depth": "3"}}, "model.depth='3'; expected int, as 4"),
        ({"overrides": {"vocab_size": 9}}, "set the recipe's own field vocab_size"),
        ({"overrides": {"heads": 3}}, "heads=3 is not a positive multiple of kv_heads=2"),
        ({"length": 65, "batch": 8}, "length=65 exceeds the rotary range .* model.max_length=64"),
        ({"preset": "cpu9"}, "unknown preset 'cpu9'; did you mean"),
        ({"preset": "h100x8_fsdp", "batch": 12}, "batch of 12 rows does not divide"),
        (
            {"preset": "cpu8_tensor"},
            r"embedding.weight: dimension 0 \(vocab\) of size 61 does not divide over tensor=2",
        ),
        ({"remat": "half"}, "remat='half'; expected preset or one of none, dots, full"),
        ({"attention": "fast"}, "-p2: unknown attention implementation 'fast'; expected"),
        ({"attention": "cudnn"}, "attention='cudnn': .*cuDNN needs"),
        ({"corpus": "/nowhere"}, "corpus='/nowhere' does not exist; expected a folder"),
        ({"corpus": "pyton"}, "unknown corpus 'pyton'; did you mean python"),
        ({"corpus": "gs://bucket/text"}, "corpus='gs://bucket/text' is a URL; expected a path"),
        ({"data_dir": "gs://bucket/data"}, "data_dir='gs://bucket/data' is a URL; expected"),
        ({"corpus": "~/nowhere"}, "corpus='~/nowhere' does not exist; expected a folder"),
        ({"tokenizer": "/no.json"}, "tokenizer='/no.json': random has no text; expected none"),
        (
            {"corpus": "python", "tokenizer": "/no.json"},
            "tokenizer='/no.json' does not exist; expected",
        ),
        (
            {"corpus": "mapreduce-easy", "tokenizer": "/no.json"},
            "tokenizer='/no.json': mapreduce-easy has its own; expected none",
        ),
        ({"packing": "tight"}, "packing='tight'; expected one of documents, stream"),
        ({"start_from": "/nowhere"}, "start_from='/nowhere' holds no finished checkpoint"),
        ({"start_from": "gs://bucket/run"}, "start_from='gs://bucket/run' is a URL; expected"),
        ({"start_from": REQUIRED}, "give --set start_from=DIR"),
        ({"model": "dense-tiny", "start_from": "/nowhere"}, "needs a ParScale model"),
    ],
)
@pytest.mark.devices(8)
def test_what_does_not_fit_model_or_mesh_is_refused(changes, text):
    overrides = changes.pop("overrides", {})
    chosen = small(**changes)
    if changes.get("model") == "dense-tiny":
        chosen = dataclasses.replace(chosen, overrides={})
    with pytest.raises(UserError, match=text):
        Plan(chosen.replace(overrides=overrides))


def test_a_published_model_is_no_run_to_start_from(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"checkpoint; it is a published model: .*convert.py import"
    ):
        Plan(small(start_from=str(tmp_path)))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_decay_without_effect_is_refused(schedule):
    with pytest.raises(UserError, match="decay=5; expected 0, since schedule="):
        Recipe(schedule=schedule, decay=5)


def test_two_stages_share_all_but_what_the_second_needs():
    one, two = stage_1(tiny(1)), stage_2(tiny(4), share=0.1)
    assert (one.schedule, one.decay, one.mode) == ("wsd", 0, "all")
    assert two.steps == two.warmup + two.decay == tiny(4).steps // 10
    assert two.start_from == REQUIRED
    assert frozen_trunk(tiny(4)).mode == "frozen_trunk"
    data = ("corpus", "tokenizer", "vocab_size", "batch", "length", "packing", "seed")
    assert all(getattr(one, name) == getattr(two, name) for name in data)


def test_what_a_resumed_run_may_change_are_fields():
    assert set(field_names()) >= FREE_ON_RESUME
    assert not FREE_ON_RESUME & {"steps", "batch", "seed", "model", "learning_rate"}
