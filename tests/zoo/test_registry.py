"""Names, sizes and exact parameter counts."""

import math
import re

import jax
import pytest
from flax import nnx

from hackle import zoo
from hackle.zoo import registry
from hackle.zoo.weights.folder import abstract_model, published_shapes

# Without embedding, for 1, 2, 4 and 8 streams (the official fitting script).
COUNTS = {
    "0.7b": (535_813_376, 538_195_842, 540_577_412, 545_340_552),
    "0.9b": (693_753_856, 696_738_818, 699_722_756, 705_690_632),
    "1.3b": (1_088_376_320, 1_092_762_882, 1_097_148_164, 1_105_918_728),
    "1.8b": (1_571_472_384, 1_577_522_690, 1_583_571_460, 1_595_669_000),
    "3b": (2_774_773_760, 2_784_937_986, 2_795_100_164, 2_815_424_520),
    "4.7b": (4_353_203_200, 4_368_529_922, 4_383_854_084, 4_414_502_408),
}
# With the tied embedding, for 1 and 8 streams.
TOTALS = {
    "0.7b": (671_948_032, 681_475_208),
    "0.9b": (849_336_320, 861_273_096),
    "1.3b": (1_282_854_400, 1_300_396_808),
    "1.8b": (1_804_846_080, 1_829_042_696),
    "3b": (3_085_938_688, 3_126_589_448),
    "4.7b": (4_742_159_360, 4_803_458_568),
}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_are_the_published_ones(size):
    for streams, expected in zip(registry.STREAMS, COUNTS[size], strict=True):
        entry = zoo.entry(f"parscale-{size}-p{streams}")
        family = registry.FAMILIES[entry.family]
        config = entry.config
        assert config.parameter_count(embedding=False) == expected
        total = expected + config.vocab_size * config.width
        assert config.parameter_count() == total
        if streams in (1, 8):
            assert total == TOTALS[size][streams == 8]
        leaves = jax.tree.leaves(abstract_model(family, config)[1])
        assert sum(math.prod(leaf.shape) for leaf in leaves) == total
        shapes = published_shapes(family, config)
        assert len(shapes) == (434 if streams == 1 else 510)
        assert sum(math.prod(shape) for shape in shapes.values()) == total


# Of the released weights; a tied head counts once.
DENSE_TOTALS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    # Qwen2.5-32B, less 384 rows of table and head.
    "multiverse-32b": 32_763_876_352 - 2 * 384 * 5120,
}


@pytest.mark.parametrize(
    "name", [n for n in zoo.list_models() if zoo.entry(n).family in ("dense", "multiverse")]
)
def test_dense_counts_are_those_of_the_arrays(name):
    entry = zoo.entry(name)
    leaves = jax.tree.leaves(abstract_model(registry.FAMILIES[entry.family], entry.config)[1])
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    assert total == entry.config.parameter_count()
    assert total == DENSE_TOTALS.get(name, total)
    assert name in DENSE_TOTALS or "tiny" in name
    tables = 1 if entry.config.tie_embeddings else 2
    rows = tables * entry.config.vocab_size * entry.config.width
    assert entry.config.parameter_count(embedding=False) == total - rows


def test_the_published_multiverse_has_151680_rows_and_771_tensors():
    entry = zoo.entry("multiverse-32b")
    shapes = published_shapes(registry.FAMILIES["multiverse"], entry.config)
    assert len(shapes) == 771
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert shapes[name] == (151680, 5120)
    assert sum(math.prod(shape) for shape in shapes.values()) == 32_759_944_192
    assert list(entry.config.tags.tokens().values()) == list(range(151665, 151677))


def test_67_released_checkpoints_each_have_a_config():
    names = zoo.released_models()
    assert len(names) == len(set(names)) == 67
    for name in names:
        entry = zoo.entry(name)
        assert zoo.entry("ParScale/" + name) == entry
        size, streams = re.fullmatch(
            r"ParScale-(?:Qwen-|QwenInit-)?([\d.]+B)-P(\d)(?:-Inst|-Python|-Pile)?", name
        ).groups()
        assert entry.config.streams == int(streams)
        assert (
            entry.config.parameter_count(embedding=False)
            == (COUNTS[size.lower()][registry.STREAMS.index(int(streams))])
        )
        assert entry.config.rope_theta == (1e6 if "Qwen" in name else 1e4)
        assert (entry.config.max_length, entry.config.smoothing) == (2048, 0.1)
        assert (entry.config.prefix_length, entry.config.tie_embeddings) == (48, True)


def test_the_released_frozen_models_have_no_single_stream():
    with pytest.raises(zoo.UserError, match="ParScale-Qwen-3B-P1-Python"):
        zoo.entry("ParScale-Qwen-3B-P1-Python")


def test_names_are_unique_and_complete():
    names = zoo.list_models()
    assert len(set(names)) == len(names)
    assert {f"parscale-tiny-p{p}" for p in (1, 2, 4, 8)} < set(names)
    assert {"dense-tiny", "qwen2.5-72b", "parscale-qwen-3b-p8", "multiverse-tiny"} < set(names)


def test_create_makes_a_model_with_overrides():
    model = zoo.create("parscale-tiny-p2", rngs=nnx.Rngs(0), depth=1, vocab_size=16, width=32)
    assert (model.config.depth, model.config.streams) == (1, 2)
    assert model(jax.numpy.zeros((1, 3), "int32")).shape == (1, 3, 16)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "parscale-1.8-p4",
            {},
            r"unknown model 'parscale-1.8-p4'; did you mean .*parscale-1.8b-p4",
        ),
        ("xyz", {}, "unknown model 'xyz'; known: dense-tiny"),
        ("dense-tiny", {"streams": 2}, "unknown config field of dense-tiny 'streams'"),
        ("dense-tiny", {"widht": 2}, "did you mean width"),
        ("dense-tiny", {"kv_heads": 3}, "dense-tiny: heads=4"),
        ("dense-tiny", {"remat": "some"}, "dense-tiny: remat='some'"),
        ("dense-tiny", {"attention": "flash"}, "dense-tiny: unknown attention implementation 'fl"),
        ("multiverse-tiny", {"vocab_size": 139}, "multiverse-tiny: tag </Conclusion> has token id"),
        ("multiverse-tiny", {"tags": 7}, "multiverse-tiny: tags=7; expected"),
    ],
)
def test_create_refuses_by_name(name, overrides, message):
    with pytest.raises(zoo.UserError, match=message):
        zoo.create(name, rngs=nnx.Rngs(0), **overrides)


def test_a_stranger_belongs_to_no_family():
    with pytest.raises(TypeError, match="int is not a model of the zoo"):
        registry.family_of(3)
