"""Training on texts that branch: what a batch holds, what the step makes of it, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.layers.multiverse import Tags, branch_structure
from hackle.zoo.errors import UserError
from hackle.zoo.mapreduce.alphabet import TAG_IDS
from hackle.zoo.train import loop
from hackle.zoo.train.checkpoint import RunFolder, load_model
from hackle.zoo.train.imported import write_run
from hackle.zoo.train.loop import run
from hackle.zoo.train.loss import next_tokens
from hackle.zoo.train.plan import Plan
from hackle.zoo.train.source import Source, fields
from tests.zoo.multiverse.test_conversations import row, tokenizer, write  # noqa: F401
from tests.zoo.train.small import SIZES, recipe

LENGTH = 256


def branching(**changes):
    settings = {
        "model": "multiverse-tiny",
        "overrides": SIZES,
        "corpus": "mapreduce-easy",
        "packing": "branches",
        "vocab_size": 192,
        "length": LENGTH,
        "batch": 4,
        "steps": 4,
        "warmup": 1,
        "branch_depth": 1,
        "eval_batches": 1,
        "save_every": 0,
    }
    return recipe(**{**settings, **changes})


@pytest.fixture
def here(tmp_path):
    """Recipes that write nothing elsewhere."""
    return lambda **changes: branching(data_dir=str(tmp_path / "data"), **changes)


def test_a_batch_holds_the_structure_of_its_documents(here):
    it = here(corpus="mapreduce", length=1024, branch_depth=2, batch=6)
    batch = next(Source(it).train())
    shapes = {name: (6, 1024, *rest) for name, rest in fields(it).items()}
    assert {name: array.shape for name, array in batch.items()} == shapes
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    deepest = 0
    for line in range(6):
        segments = batch["segment_ids"][line]
        assert not batch["block"][line][segments == 0].any()
        for number in range(1, segments.max() + 1):
            one = segments == number
            alone = branch_structure(batch["tokens"][line][one], TAG_IDS, depth=2)
            np.testing.assert_array_equal(batch["positions"][line][one], alone.position)
            np.testing.assert_array_equal(batch["path"][line][one].T, alone.path)
            # Numbers of blocks count on within a row.
            block = batch["block"][line][one].T
            shift = np.unique((block - alone.block)[block > 0])
            assert (alone.block > 0).sum() == (block > 0).sum() and shift.size == 1
            deepest = max(deepest, int((block > 0).any(axis=1).sum()))
    assert deepest == 2


def test_the_twin_has_the_same_problems_and_no_branches(here):
    tagged, plain = here(), here(packing="documents")
    assert set(fields(plain)) == set(fields(tagged)) - {"block", "path"}
    batches = [next(Source(it).train()) for it in (tagged, plain)]
    for one, other in zip(batches[0]["tokens"], batches[1]["tokens"], strict=True):
        rest = one[(one < TAG_IDS.think[0].open) & (one > 0)]
        np.testing.assert_array_equal(rest, other[other > 0])


def test_the_loss_is_that_of_each_document_alone_with_its_branches(here):
    it = here()
    program = Plan(it).program
    state = program.init(0)
    # Large weights, so that what a token sees decides what it says.
    state = state._replace(trainable=jax.tree.map(lambda x: 20 * x, state.trainable))
    model = program.model(state)
    batch = next(Source(it).train())
    batch = {name: array[:2] for name, array in batch.items()}
    total = count = 0.0
    for line in range(2):
        for number in range(1, batch["segment_ids"][line].max() + 1):
            one = batch["segment_ids"][line] == number
            tokens = np.zeros((1, LENGTH), np.int32)  # one shape, one compilation
            size = int(one.sum())
            tokens[0, :size] = batch["tokens"][line][one]
            structure = branch_structure(tokens, TAG_IDS, cut=True, depth=1)
            scores = np.asarray(jax.nn.log_softmax(model(tokens, branches=structure)))[0]
            trained = batch["loss_mask"][line][one]
            for at in range(1, size):
                if trained[at]:
                    total -= scores[at - 1, tokens[0, at]]
                    count += 1
    sums = program.evaluate(state, batch)
    assert float(sums.targets) == count
    assert float(sums.nll) == pytest.approx(total, rel=1e-5)
    # Without the branches it is another loss.
    causal = {k: v for k, v in batch.items() if k not in ("block", "path")}
    assert float(program.evaluate(state, causal).nll) != pytest.approx(total, rel=1e-3)


def test_only_what_follows_a_prompt_is_a_target(here):
    batch = next(Source(here()).train())
    targets, weights = next_tokens({k: jax.numpy.asarray(v) for k, v in batch.items()})
    counted = np.asarray(weights) > 0
    assert counted.sum() == batch["loss_mask"].sum()  # a prompt is before every answer
    for line, segments in enumerate(batch["segment_ids"]):
        for number in range(1, segments.max() + 1):
            first = np.flatnonzero(counted[line] & (segments == number))[0]
            # The first target of a document is the token that opens its thoughts.
            assert np.asarray(targets)[line, first] == TAG_IDS.think[0].open


def test_a_run_resumes_and_is_exported_with_letters_and_tags(here, tmp_path, monkeypatch):
    it = here(export=True)
    whole = run(it, tmp_path / "whole", say=lambda line: None)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Stop, "agreed", lambda self, at: at >= 2)
        run(it, tmp_path / "parts", say=lambda line: None)
    parts = run(it, tmp_path / "parts", say=lambda line: None)
    assert parts.validation_loss == whole.validation_loss
    model = zoo.from_pretrained(tmp_path / "whole" / "model")
    assert model.config.tags == TAG_IDS
    tokens = zoo.data.load_tokenizer(tmp_path / "whole" / "model")
    assert tokens.encode("<Path>3", special=True) == [TAG_IDS.path[0].open, ord("3")]


def test_branches_lie_over_a_mesh(here):
    it = here(batch=8, preset="cpu8_fsdp", overrides={**SIZES, "width": 32, "mlp_width": 32})
    one = dataclasses.replace(it, preset="cpu1")
    batch = next(Source(it).train())
    sums = [(p := Plan(r).program).evaluate(p.init(0), batch) for r in (it, one)]
    assert float(sums[0].nll) == pytest.approx(float(sums[1].nll), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "python"}, "packing='branches'; expected one of documents, stream with"),
        ({"packing": "stream"}, "packing='stream'; expected one of documents, branches with"),
        ({"vocab_size": 139}, "vocab_size=139"),
        ({"tokenizer": "some.json"}, "tokenizer='some.json': mapreduce-easy has its own"),
        ({"corpus": "mapreduce"}, "branch_depth=1; mapreduce needs at least 2"),
        ({"length": 64}, "length 64 is too small for the problems"),
        ({"branch_depth": 7}, "branch_depth=7; expected 1 to 6"),
        ({"model": "pararnn-tiny-gru", "overrides": {}}, "packing='branches': branches: a recur"),
        ({"corpus": "rows.jsonl"}, "corpus='rows.jsonl' needs a tokenizer"),
        ({"corpus": "rows.jsonl", "workers": 1}, "workers=1: batches of rows.jsonl take no time"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UserError, match=message):
        run(here(**changes), tmp_path / "run", say=lambda line: None)


def refusal(it, folder):
    with pytest.raises(UserError) as caught:
        run(it, folder / "run", say=lambda line: None)
    return str(caught.value)


def test_a_run_through_the_stages_from_a_dense_trunk(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    """Eight stages on a tokenizer without tags, whose rows of the table are made from words."""
    rows = write(tmp_path / "rows.jsonl", [row(n) for n in range(12)])
    known = zoo.data.load_tokenizer(tokenizer).vocab_size
    table = 64 * -(-(known + 12) // 64)
    sizes = {**SIZES, "max_length": 512}
    trunk = zoo.create("dense-tiny", rngs=nnx.Rngs(0), vocab_size=known, **sizes)
    write_run(tmp_path / "trunk", trunk, "a trunk")
    it = branching(
        corpus=str(rows), tokenizer=str(tokenizer), data_dir=str(tmp_path / "data"), length=512,
        vocab_size=table, start_from=str(tmp_path / "trunk"), continue_data=False, overrides=sizes,
    )  # fmt: skip
    with pytest.raises(UserError, match="multiverse-tiny: tag <Think> has token id 128, which is"):
        run(it, tmp_path / "run", say=lambda line: None)
    steps = int(refusal(it.replace(start_from=None), tmp_path).split("expected ")[1].split()[0])
    message = refusal(it.replace(start_from=None, steps=steps), tmp_path)
    assert f"not those of {rows}: <Think> is token 128; expected {known}" in message
    monkeypatch.setattr(
        "hackle.zoo.registry._ENTRIES",
        {
            name: dataclasses.replace(
                one, config=dataclasses.replace(one.config, tags=Tags.numbered(known))
            )
            if name == "multiverse-tiny"
            else one
            for name, one in zoo.registry._ENTRIES.items()
        },
    )
    seen = []
    step = type(Plan(it).program).step

    def watched(self, state, batch):
        seen.append(np.asarray(batch["block"]).any(axis=(1, 2)))
        return step(self, state, batch)

    monkeypatch.setattr(type(Plan(it).program), "step", watched)
    lines = []
    it = it.replace(steps=steps, learning_rate=1e-9)
    assert run(it, tmp_path / "run", say=lines.append).finished
    # At first no row branches, in the end all that are no padding do.
    tagged = np.concatenate(seen)
    assert not tagged[:6].any() and tagged[-12:-4].all()
    # The weights are the trunk's; those of the tags are made from their words.
    model = load_model(tmp_path / "run")
    table = np.asarray(model.embedding.weight[...])
    np.testing.assert_allclose(table[:known], trunk.embedding.weight[...], atol=1e-6)
    words = zoo.data.load_tokenizer(tokenizer).encode("/Goal")
    np.testing.assert_allclose(
        table[Tags.numbered(known).goal[0].close], table[words].mean(axis=0), atol=1e-6
    )
    assert RunFolder(tmp_path / "run").steps() == [steps]
    assert any("conversations" in line and "rows in all stages" in line for line in lines)
