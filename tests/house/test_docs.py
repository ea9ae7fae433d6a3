"""README, map and cards: what they name exists, and generated parts are up to date."""

import json
import os
import re
from pathlib import Path

import pytest

from hackle import pjit_configs
from hackle.zoo import registry
from tests.house.tree import ROOT, project_files

UPDATE = "HACKLE_UPDATE_GOLDEN"
PAGES = [path for path in project_files() if path.suffix == ".md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    return set(re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split())


def commands(text: str) -> set[str]:
    """`make x` and `python x` in code blocks and in backquotes."""
    code = "\n".join(re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.S))
    code += "\n" + "\n".join(re.findall(r"`([^`\n]+)`", text))
    return set(re.findall(r"\b(make [a-z-]+|python3? (?:-m )?[\w./]+)", code))


def missing(command: str) -> bool:
    words = command.split()
    if words[0] == "make":
        return words[1] not in targets()
    if words[1] == "-m":
        return words[2] not in ("hackle", "venv", "pip", "pytest", "build")
    return not (ROOT / words[1]).is_file()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_on_a_page_exist(page):
    found = commands((ROOT / page).read_text(encoding="utf-8"))
    assert {command for command in found if missing(command)} == set()


def test_readme_names_the_two_commands():
    assert {"make demo", "make test"} <= commands(README)
    assert missing("make sandwich") and missing("python scripts/none.py")
    assert not missing("make test")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_of_a_page_resolve(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        place = ROOT / page.parent / target if target else ROOT / page
        assert place.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}
            assert anchor in slugs, f"{page}: {link}"


def folders() -> set[str]:
    """Folders of the first and second level that hold files of the project."""
    found = set()
    for path in project_files():
        for depth in (1, 2):
            if len(path.parts) > depth:
                found.add("/".join(path.parts[:depth]) + "/")
    return found


def test_map_names_every_folder_and_every_top_level_file():
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`\n]+)`", text))
    expected = folders()
    expected |= {path.name for path in project_files() if len(path.parts) == 1}
    expected -= {f"hackle/{package}/" for package in ("layers", "zoo", "pjit_configs")}
    assert expected - named == set()


def test_map_names_only_what_exists():
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    for name in re.findall(r"^\| `([^`]+)` \|", text, re.M):
        assert (ROOT / name).exists(), name


def model_table() -> str:
    lines = ["| model | parameters | without embedding |", "|---|---:|---:|"]
    for name in registry.list_models():
        config = registry.entry(name).config
        total, trunk = config.parameter_count(), config.parameter_count(embedding=False)
        lines.append(f"| `{name}` | {total:,} | {trunk:,} |")
    return "\n".join(lines)


def preset_table() -> str:
    lines = ["| preset | for |", "|---|---|"]
    for name in pjit_configs.list_presets():
        lines.append(f"| `{name}` | {pjit_configs.preset(name).description} |")
    return "\n".join(lines)


def newest_report(subject: str, number: int = 0) -> str:
    """Hardware, date and one of the tables of the newest report on `subject`."""
    paths = (ROOT / "reports").glob(f"{subject}_*.md")
    newest = max(paths, key=lambda path: (path.stem.split("_")[-1], path.name))
    text = newest.read_text(encoding="utf-8")
    record = json.loads(text.split("```json\n")[1].split("\n```")[0])
    table = re.findall(r"(?:^\|.*\n)+", text, re.M)[number].strip()
    jax = record["versions"]["jax"]
    return f"{record['hardware']}, jax {jax}, {record['date']}:\n\n{table}"


@pytest.mark.parametrize(
    ("page", "part", "make"),
    [
        ("zoo/README.md", "models", model_table),
        ("pjit_configs/README.md", "presets", preset_table),
        ("README.md", "training speed", lambda: newest_report("train")),
        ("README.md", "streams", lambda: newest_report("streams")),
        ("README.md", "attention", lambda: newest_report("attention", 1)),
        ("README.md", "recurrence", lambda: newest_report("recurrent-rival", 3)),
        ("README.md", "branching", lambda: newest_report("mapreduce")),
    ],
)
def test_generated_tables_are_up_to_date(page, part, make):
    """Set HACKLE_UPDATE_GOLDEN=1 to write them anew."""
    path = Path(ROOT / page)
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {part} -->\n).*?(<!-- end of {part} -->)", re.S)
    assert len(pattern.findall(text)) == 1
    fresh = pattern.sub(lambda found: f"{found[1]}{make()}\n{found[2]}", text)
    if os.environ.get(UPDATE):
        path.write_text(fresh, encoding="utf-8")
    else:
        assert fresh == text, f"{page}: set {UPDATE}=1 to write the table of {part} anew"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_on_a_page_runs(page):
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S):
        exec(compile(code, str(page), "exec"), {})
