"""What the tree may hold: names, sizes, and nothing about the machines it was written on."""

import os
import re
import subprocess
import sys

import pytest

from tests.house.tree import PACKAGES, ROOT, module_name, parse, project_files, python_files

MAX_LINES = 499
TEXT = {".py", ".md", ".toml", ".json", ".yml", ".yaml", ".sh", ".cfg", ".txt", ".ipynb", ""}
# Written in two parts, so that this file does not hold them.
FORBIDDEN = [
    "/wo" + "rk/",
    "/opt" + "/hv",
    "/tmp" + "/hk",
    "pypi" + ".org",
    "python" + "hosted",
    "registry." + "npmjs",
    "download.py" + "torch",
    "deb." + "debian",
]


def text_files():
    return [path for path in project_files() if path.suffix in TEXT and path.name != "LICENSE"]


def test_the_listing_sees_the_project():
    names = {path.as_posix() for path in project_files()}
    assert {"pyproject.toml", "layers/__init__.py", ".ci/run", "tests/house/tree.py"} <= names
    assert not any(name.startswith((".venv/", "build/")) for name in names)


def test_nothing_is_called_utils():
    names = {"utils", "util", "helpers", "misc", "common"}
    assert [path for path in python_files() if {path.stem, *path.parts} & names] == []


def test_python_files_are_short():
    long = {}
    for path in python_files():
        count = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if count > MAX_LINES:
            long[str(path)] = count
    assert not long


def test_no_file_names_a_machine_or_a_package_host():
    wrong = []
    for path in text_files():
        content = (ROOT / path).read_text(encoding="utf-8")
        wrong += [f"{path}: {word}" for word in FORBIDDEN if word in content]
        wrong += [f"{path}: conflict mark"] * bool(re.search(r"^(<{7}|>{7}) ", content, re.M))
    assert not wrong


def test_every_module_of_the_packages_says_what_it_is():
    silent = []
    for path in python_files(*PACKAGES, "hackle", "scripts"):
        first = parse(path).body[:1]
        if not (first and getattr(getattr(first[0], "value", None), "value", None)):
            silent.append(str(path))
    assert not silent


@pytest.mark.parametrize("package", PACKAGES)
def test_bare_import_is_refused_by_name(package):
    code = f"import hackle.{package}\nimport {package}"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and f"hackle.{package}" in last


def test_symlinks_are_relative_and_lead_to_the_packages():
    for package in PACKAGES:
        link = ROOT / "hackle" / package
        assert link.is_symlink() and os.readlink(link) == f"../{package}"


def test_licence_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11_000


def test_tests_mirror_the_tree():
    """A folder of tests is named after a folder of the project, or is the house."""
    folders = {path.parent.relative_to("tests") for path in python_files("tests")}
    for folder in folders - {folder for folder in folders if "house" in folder.parts}:
        assert (ROOT / folder).is_dir(), f"tests/{folder} mirrors no folder"


def test_module_names():
    assert {module_name(path) for path in python_files("layers")} >= {"hackle.layers.norm"}
