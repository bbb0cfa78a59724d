"""Rewrites the comments of docs/provider-proxy.example.toml: a key's is the `doc` of its field.

    python packaging/example.py        (`make docs`)

The values in that file, those of keys without a default above all, and everything above the first
key are written by hand.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

from provider_proxy.host.config.environment import known_keys
from provider_proxy.host.config.tables import NAMED_TABLES

EXAMPLE = Path(__file__).parents[1] / "docs" / "provider-proxy.example.toml"
WIDTH = 104


def main() -> None:
    """Rewrite the file."""
    EXAMPLE.write_text(updated(EXAMPLE.read_text(encoding="utf-8")), encoding="utf-8")


def updated(text: str) -> str:
    """The file with each key's comment as the program has it."""
    fields = dict(known_keys())
    for field in dataclasses.fields(NAMED_TABLES["registrars"]):
        fields[f"registrars.NAME.{field.name}"] = field
    out: list[str] = []
    table = ""
    for line in text.splitlines():
        if header := re.match(r"#?\[([a-z_]+)(\.\w+)?\]", line):
            table = header[1] + (".NAME." if header[2] else ".")
        elif key := re.match(r"#(\w+) = ", line):
            known = fields.get(table.replace("tenants.NAME", "tenant_defaults") + key[1])
            while out and out[-1].startswith("# "):
                out.pop()
            if known is not None:
                unset = known.default is None and not table.startswith("registrars")
                doc = known.metadata["doc"] + (" No\u00a0default." if unset else "")
                out += [
                    f"# {part}".replace("\u00a0", " ")
                    for part in textwrap.wrap(doc, WIDTH, break_on_hyphens=False)
                ]
        out.append(line)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
