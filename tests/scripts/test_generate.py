"""scripts/generate.py as a person runs it."""

import pytest
from flax import nnx

from hackle import zoo
from hackle.layers.multiverse import Tags
from hackle.zoo.data.tokenizer import FILE_NAME, load_tokenizer, train_tokenizer
from hackle.zoo.generate import generate, generate_branches
from hackle.zoo.generate.columns import columns
from tests.scripts.running import call, load


@pytest.fixture(scope="module")
def script():
    return load("generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = dict(vocab_size=300, width=16, mlp_width=16, depth=1, head_width=4)
    model = zoo.create("parscale-tiny-p2", rngs=nnx.Rngs(0), **sizes)
    zoo.save_pretrained(model, folder)
    train_tokenizer(["def f(x):\n    return x + 1\n" * 50], 300, folder / FILE_NAME)
    return folder


def test_streams_what_generate_writes(script, folder, capsys):
    assert call(script, folder, "--prompt", "def f", "--max-new-tokens", 12) == 0
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode("def f")
    (new,) = generate(
        zoo.from_pretrained(folder), [prompt], max_new_tokens=12, eos=tokenizer.eos_id
    )
    expected = "def f" + tokenizer.decode(new, skip_special=True) + "\n"
    assert capsys.readouterr().out == expected


def test_several_prompts_and_sampling(script, folder, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("return x")
    args = [folder, "--prompt", "def", "--prompt-file", tmp_path / "prompt.txt", "--seed", 1]
    args += ["--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01]
    assert call(script, *args, "--max-new-tokens", 5) == 0
    out = capsys.readouterr().out
    assert out.startswith("--- 1\ndef") and "--- 2\nreturn x" in out


def test_a_run_folder_gives_its_exported_model(script, folder, tmp_path, capsys):
    (tmp_path / "model").symlink_to(folder)
    assert call(script, tmp_path, "--prompt", "def", "--max-new-tokens", 2) == 0


@pytest.fixture(scope="module")
def branching(tmp_path_factory):
    """A folder of a Multiverse model whose tokenizer has the tags; weights are random."""
    folder, made = tmp_path_factory.mktemp("branching"), tmp_path_factory.mktemp("tokenizer")
    plain = train_tokenizer(["1: def f(x):\n    return x + 1\n" * 50], 300, made / FILE_NAME)
    tags = Tags.numbered(plain.vocab_size)
    plain.backend.add_special_tokens(list(tags.tokens()))
    sizes = dict(vocab_size=320, width=16, mlp_width=16, depth=1, head_width=4, tags=tags)
    zoo.save_pretrained(zoo.create("multiverse-tiny", rngs=nnx.Rngs(1), **sizes), folder)
    (folder / FILE_NAME).write_text(plain.backend.to_str())
    assert tags.located(plain.backend.token_to_id) == tags
    return folder


BLOCK = "x<Parallel><Goal><Outline>1: def</Outline><Outline>2: f</Outline></Goal>"


def test_branches_are_drawn_side_by_side(script, branching, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert call(script, branching, "--branches", "--prompt", BLOCK, "--max-new-tokens", 40) == 0
    shown = capsys.readouterr().out.splitlines()
    tokenizer, model = load_tokenizer(branching), zoo.from_pretrained(branching)
    draft = generate_branches(
        model,
        tokenizer.encode(BLOCK, special=True),
        max_new_tokens=40,
        index_end=tokenizer.encode(":"),
        eos=tokenizer.eos_id,
    )
    text = lambda ids: tokenizer.decode(
        [i for i in ids if i < tokenizer.vocab_size], skip_special=True
    )
    assert shown[0] == BLOCK and shown[1:-1] == columns(draft.parts, text, 60)
    assert shown[1].startswith("1:") and "│ 2:" in shown[1]
    counts = (
        f"--- {draft.total} tokens, {draft.critical_path} of them one after the other, 1 blocks"
    )
    assert shown[-1] == f"{counts}; ended: length (limit of tokens)"


def test_a_model_that_branches_read_as_plain_text_is_told(script, branching, folder, capsys):
    for model, told in ((branching, True), (folder, False)):
        assert call(script, model, "--prompt", "x", "--max-new-tokens", 2) == 0
        assert ("note: this model writes paths; --branches" in capsys.readouterr().err) == told


def test_branches_of_a_model_without_tags(script, folder, capsys):
    assert call(script, folder, "--branches", "--prompt", "x") == 2
    assert "error: --branches: the tokenizer has no token <Think>" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be >= 1"),
        (["--max-new-tokens", "9999"], "rotary range of 512 tokens"),
        (["--temperature", "-1"], "temperature must be >= 0"),
        (["--top-k", "3"], "top_k has no effect at temperature 0"),
        (["--stop", "no such token"], "expected one token"),
        (["--preset", "cpu8_streams"], "unknown preset 'cpu8_streams'"),
        (["--tokenizer", "missing.json"], "missing.json"),
        (["--prompt-file", "missing.txt"], "prompt file missing.txt"),
        (["--prompt", ""], "prompt 1 is empty"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_and_code_2(script, folder, change, message, capsys):
    assert call(script, folder, "--prompt", "def", *change) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_an_unfinished_run_is_told_from_a_model(script, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert call(script, tmp_path, "--prompt", "x") == 2
    assert "scripts/convert.py export" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_told(script, tmp_path, capsys):
    assert call(script, tmp_path, "--prompt", "x") == 2
    assert f"{tmp_path} holds no config.json; expected a published" in capsys.readouterr().err


def test_an_unknown_model_is_told_before_its_tokenizer(script, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    assert call(script, tmp_path, "--prompt", "x") == 2
    assert "model_type 'gpt2' is not supported" in capsys.readouterr().err


def test_no_model_and_no_prompt(script, folder, tmp_path, capsys):
    assert call(script, tmp_path / "none", "--prompt", "x") == 2
    assert call(script, folder) == 2
    assert "there is no prompt" in capsys.readouterr().err
