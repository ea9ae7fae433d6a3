"""The project's own files, and what they import, for the house tests."""

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("layers", "zoo", "pjit_configs")
# What may lie in a working folder without being part of the project; .gitignore says the same.
IGNORED = {"build", "dist", "runs", "data"}


@functools.cache
def project_files() -> tuple[Path, ...]:
    """Files of the project relative to its root: what git tracks, or would."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        names = listing.stdout.decode().split("\0")
        paths = {Path(name) for name in names if name}
    else:  # an unpacked archive
        paths = set(_walk(ROOT))
    return tuple(sorted(path for path in paths if (ROOT / path).is_file()))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        hidden = path.name.startswith(".") and path.name not in (".ci", ".gitignore")
        ignored = path.name == "__pycache__" or (path.parent == ROOT and path.name in IGNORED)
        if hidden or ignored or path.name.endswith(".egg-info"):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path.relative_to(ROOT)


def python_files(*folders: str) -> list[Path]:
    """Python files, relative to the root, of the given top folders (all folders when none)."""
    return [
        path
        for path in project_files()
        if path.suffix == ".py" and (not folders or path.parts[0] in folders)
    ]


def module_name(path: Path) -> str:
    """`zoo/dense/__init__.py -> hackle.zoo.dense`; files outside the packages keep their path."""
    parts = path.with_suffix("").parts
    if parts[0] in PACKAGES:
        parts = ("hackle", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Dotted names of what a file imports; `from a import b` counts as `a.b`.

    Args:
      at_import: leave out what only a function call or a type checker would import.
    """
    return imports_of(parse(path), at_import=at_import)


def imports_of(tree: ast.AST, *, at_import: bool = False) -> set[str]:
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found.update(f"{base}.{alias.name}" for alias in node.names)
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found
