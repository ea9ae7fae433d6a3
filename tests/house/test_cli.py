"""The command lines are frozen: an option appears, changes or goes only together with this file."""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.house.tree import ROOT, parse, python_files
from tests.scripts.running import load

# Command line -> its options, as `--help` prints them; `--help` itself is left out.
OPTIONS: dict[str, str] = {
    "-m hackle": "--version",
    "-m hackle ls": "",
    "-m hackle presets": "",
    "scripts/bench_attention.py": (
        "--dtype --heads --implementations --kinds --quick --report --seconds --sizes"
    ),
    "scripts/bench_branches.py": "--dtype --model --paths --prompt --report --tokens",
    "scripts/bench_input.py": (
        "--batch --cores --corpus --data-dir --hardware --length --packing --report --seconds "
        "--threads --vocab-size --windows --workers"
    ),
    "scripts/bench_recurrent.py": (
        "--cells --devices --dtypes --layers --lengths --methods --quick --report --rival --scan "
        "--seconds --shapes"
    ),
    "scripts/bench_train.py": "--attention --case --preset --report --steps",
    "scripts/compare_runs.py": "--note --report --steps",
    "scripts/compare_streams.py": "--control --note --out --recipe --report --set --streams",
    "scripts/convert.py": "",
    "scripts/convert.py add-tags": "--dtype --max-shard-gb --overwrite --tokenizer",
    "scripts/convert.py copy": "--dtype --max-shard-gb --overwrite --to --tokenizer",
    "scripts/convert.py export": "--dtype --max-shard-gb --overwrite --step --tokenizer",
    "scripts/convert.py import": "",
    "scripts/convert.py inspect": "",
    "scripts/convert.py retrofit": (
        "--dtype --max-shard-gb --overwrite --prefix-length --seed --smoothing --streams "
        "--tokenizer"
    ),
    "scripts/demo.py": "--data-dir --out --steps",
    "scripts/generate.py": (
        "--branches --dtype --max-new-tokens --min-p --preset --prompt --prompt-file --seed --stop "
        "--temperature --tokenizer --top-k --top-p"
    ),
    "scripts/mapreduce_accuracy.py": (
        "--max-new-tokens --note --out --problems --recipe --report --runs --seconds --seeds --set"
    ),
    "scripts/synthetic_tasks.py": (
        "--batch --check-every --epochs --held-out-rows --learning-rate --length --method --models "
        "--note --out --report --seconds --seed --seeds --state-clip --stop-after --tasks "
        "--test-rows --train-rows --weight-decay"
    ),
    "scripts/train.py": "--distributed --dry-run --list --out --recipe --resume --seed --set",
}


def test_a_missing_extra_is_named(capsys):
    cli = load("cli")

    def main(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    assert cli.call(lambda: main("tokenizers")) == 2
    assert "needs the package tokenizers: pip install 'hackle[train,hf]'" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        cli.call(lambda: main("hackle.zoo.nothing"))


def mains() -> set[str]:
    """Scripts that can be run: those with an `if __name__ == "__main__"`."""
    return {
        path.as_posix()
        for path in python_files("scripts")
        if any(isinstance(n, ast.If) and "__main__" in ast.dump(n.test) for n in parse(path).body)
    }


def help_text(command: str) -> str:
    ran = subprocess.run(
        [sys.executable, *command.split(), "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def options_in(text: str) -> set[str]:
    """Options at the head of their lines: `  -o OUT, --out OUT  where to`."""
    found = set()
    for line in re.findall(r"^ {2}(-\S.*)$", text, re.M):
        head = re.split(r" {2,}", line)[0]
        found.update(re.findall(r"(?:^|, )(--?[\w-]+)", head))
    return found - {"-h", "--help"}


def commands_in(text: str) -> set[str]:
    """Names of sub-commands: the four-space lines under a line that is one metavar alone."""
    block = re.search(r"^ {2}(?:\w+|\{[\w,-]+\})\n((?: {4}.*\n)+)", text, re.M)
    return set(re.findall(r"^ {4}([\w-]+)", block.group(1), re.M)) if block else set()


def test_every_script_is_in_the_table():
    listed = {command.split()[0] for command in OPTIONS if not command.startswith("-m")}
    assert listed == mains()


@pytest.mark.parametrize("command", OPTIONS)
def test_options_are_those_in_the_table(command):
    text = help_text(command)
    assert options_in(text) == set(OPTIONS[command].split())
    assert {f"{command} {name}" for name in commands_in(text)} == {
        other for other in OPTIONS if other.startswith(command + " ")
    }


@pytest.mark.parametrize("command", sorted(mains()))
def test_help_of_a_script_has_examples(command):
    text = help_text(command)
    assert "examples:" in text and f"python {command.split()[0]}" in text


def test_the_search_sees_options_and_commands():
    text = (
        "usage: x [--a A]\n\noptions:\n  -h, --help  show\n  -o O, --out O  with --not this\n"
        "  --set KEY=VALUE\n         more --words\n\ncommands:\n  COMMAND\n    ls   list\n"
    )
    assert options_in(text) == {"-o", "--out", "--set"}
    assert commands_in(text) == {"ls"}


def test_scripts_let_kernels_write_in_place(monkeypatch):
    from hackle.layers import in_place

    cli = load("cli")
    assert cli.XLA_FLAG == in_place.FLAG
    assert in_place.FLAG in (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    monkeypatch.setattr(cli, "version", lambda _: "0.11.2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=somewhere")
    for _ in range(2):
        cli.allow_writing_in_place()
        assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=somewhere {in_place.FLAG}"
    chosen = in_place.FLAG.replace("false", "true")
    monkeypatch.setenv("XLA_FLAGS", chosen)
    cli.allow_writing_in_place()
    assert os.environ["XLA_FLAGS"] == chosen
    monkeypatch.setattr(cli, "version", lambda _: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "")
    cli.allow_writing_in_place()
    assert os.environ["XLA_FLAGS"] == ""
