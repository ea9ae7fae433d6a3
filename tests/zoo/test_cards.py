"""The size tables of the model cards are those of the registry."""

import os
import re
from pathlib import Path

import pytest

from hackle.zoo import registry

ZOO = Path(__file__).resolve().parents[2] / "zoo"
PART = re.compile(r"(<!-- sizes -->\n).*?(<!-- end of sizes -->)", re.S)


def dense_table(family: str = "dense") -> list[str]:
    columns = ["model", "width", "MLP", "layers", "heads / kv", "head width", "vocabulary", "head"]
    lines = [
        f"| {' | '.join(columns)} | parameters |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for name in registry.list_models():
        entry = registry.entry(name)
        if entry.family == family:
            c = entry.config
            lines.append(
                f"| `{name}` | {c.width:,} | {c.mlp_width:,} | {c.depth} "
                f"| {c.heads} / {c.kv_heads} | {c.head_width} | {c.vocab_size:,} "
                f"| {'tied' if c.tie_embeddings else 'own'} | {c.parameter_count():,} |"
            )
    return lines


def parscale_table() -> list[str]:
    columns = " | ".join(f"P = {p}" for p in registry.STREAMS)
    lines = [
        f"| model | width | MLP | head width | embedding | {columns} |",
        "|---|---:|---:|---:|---:|" + "---:|" * len(registry.STREAMS),
    ]
    names = [name for name in registry.list_models() if name.startswith("parscale")]
    sizes = dict.fromkeys(name.rpartition("-p")[0] for name in names)
    for size in sizes:
        configs = [registry.entry(f"{size}-p{p}").config for p in registry.STREAMS]
        c = configs[0]
        counts = " | ".join(f"{one.parameter_count(embedding=False):,}" for one in configs)
        lines.append(
            f"| `{size}-p{{P}}` | {c.width:,} | {c.mlp_width:,} | {c.head_width} "
            f"| {c.vocab_size * c.width:,} | {counts} |"
        )
    return lines


def pararnn_table() -> list[str]:
    lines = [
        "| model | width | MLP | layers | heads | vocabulary | parameters |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in registry.list_models():
        entry = registry.entry(name)
        if entry.family == "pararnn" and entry.config.cell == "gru":
            c = entry.config
            lines.append(
                f"| `{name.removesuffix('gru')}{{cell}}` | {c.width:,} | {c.mlp_width:,} "
                f"| {c.depth} | {c.heads} | {c.vocab_size:,} | {c.parameter_count():,} |"
            )
    return lines


TABLES = {
    "dense": dense_table,
    "parscale": parscale_table,
    "multiverse": lambda: dense_table("multiverse"),
    "pararnn": pararnn_table,
}


def test_every_family_has_a_card():
    assert registry.FAMILIES.keys() == TABLES.keys()


@pytest.mark.parametrize("family", TABLES)
def test_size_table_is_up_to_date(family):
    """Set HACKLE_UPDATE_GOLDEN=1 to write it anew."""
    path = ZOO / family / "README.md"
    text = path.read_text(encoding="utf-8")
    table = "\n".join(TABLES[family]())
    fresh, found = PART.subn(lambda part: f"{part[1]}{table}\n{part[2]}", text)
    assert found == 1
    if os.environ.get("HACKLE_UPDATE_GOLDEN"):
        path.write_text(fresh, encoding="utf-8")
    else:
        assert fresh == text, f"{path}: set HACKLE_UPDATE_GOLDEN=1 to write the sizes anew"
