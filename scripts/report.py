"""How benchmarks write `reports/<subject>_<hardware>_<date>.md`: one form for all of them."""

import datetime
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "reports"
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def versions() -> dict[str, str]:
    """Python and the installed packages of `VERSIONED`."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table; the columns are the keys of the first row. None shows as a dash."""
    rows = list(rows)
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = ("-" if row[name] is None else _cell(row[name]) for name in head)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def columns(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """A table of the columns of `names` that any row has, under their new names; errors (whose
    name ends so) with one digit."""
    kept = [k for k in names if any(row.get(k) is not None for row in rows)]

    def cell(name: str, value: Any) -> Any:
        return f"{value:.0e}" if name.endswith("error") and value is not None else value

    return table({names[k]: cell(k, row.get(k)) for k in kept} for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.4g}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )


def write(
    subject: str,
    hardware: str,
    name: str = "",
    *,
    title: str,
    sections: Sequence[str],
    record: Mapping[str, Any],
    folder: Path = FOLDER,
) -> Path:
    """Writes a report and prints its JSON line; returns the path.

    Args:
      subject: first part of the file name.
      hardware: what it ran on, e.g. `jax.devices()[0].device_kind`.
      name: of one report among others on the subject, behind it in the file name.
      sections: Markdown blocks: text and tables.
      record: the numbers for machines; device, date, versions and command are added.
    """
    subject = f"{subject}-{name}" if name else subject
    date = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    command = " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    record = {
        "subject": subject,
        "hardware": hardware,
        "date": date,
        "versions": versions(),
        "command": command,
        **record,
    }
    line = json.dumps(record)
    lines = [
        f"# {title}",
        f"{hardware}, {date}. "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        + ".",
        f"```\n{command}\n```",
        *sections,
        f"```json\n{line}\n```",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{subject}_{slug}_{date}.md"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(line)
    return path
