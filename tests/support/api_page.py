"""docs/api.md, made from the OpenAPI description that the proxy serves.

    python tests/api_page.py > docs/api.md        (`make docs`)

`test_docs` holds the page against what this gives. It knows the keywords of JSON Schema that the
description uses, and ends with a KeyError at any other shape.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from places import PACKAGE

Node = dict[str, Any]
SOURCE = PACKAGE / "openapi.json"
WIDTH = 118
LONGEST_PATTERN = 60  # one that is longer explains nothing to a reader
HEAD = """\
# The tenants' API

<!-- Made from provider_proxy/openapi.json by `make docs`: change that. -->

{description} The proxy serves this description at `/openapi.json`. [http-api.md](http-api.md) has an
example, the rules for retries, and what each error means; [evidence-format.md](evidence-format.md) has
the contents of the evidence.

{security}
"""


class Page:
    """The lines of the page."""

    def __init__(self, doc: Node) -> None:
        self._doc = doc
        self._parts: Node = doc["components"]

    def lines(self) -> Iterator[str]:
        """All of them."""
        info, security = self._doc["info"], self._parts["securitySchemes"]["certificate"]
        head = HEAD.format(description=info["description"], security=security["description"])
        yield "\n\n".join(map(_filled, head.split("\n\n"))) + "\n"
        for path, item in self._doc["paths"].items():
            yield from self._operation(path, item["get"])
        yield "## Objects\n"
        yield "Where *always* says no, the key may be missing.\n"
        for name, schema in self._parts["schemas"].items():
            if name not in ENVELOPES and schema.get("type") == "object":
                yield from self._object(name, schema)

    def _operation(self, path: str, operation: Node) -> Iterator[str]:
        yield f"## `GET {path}`\n"
        yield " ".join(filter(None, (operation["summary"], operation.get("description")))) + "\n"
        if "parameters" in operation:
            yield "| Parameter | Needed | Form | Default | Meaning |\n|---|---|---|---|---|"
            for each in operation["parameters"]:
                schema = each["schema"]
                default = f"`{schema['default']}`" if "default" in schema else "none"
                needed = "yes" if each["required"] else "no"
                yield _row(
                    f"`{each['name']}`", needed, self.form(schema), default, each["description"]
                )
            yield ""
        responses = {code: self._resolved(node) for code, node in operation["responses"].items()}
        good = responses.pop("200")
        results = self._results(good)
        yield f"200: {good['description']} Results: {results}.\n"
        yield f"Errors: {', '.join(responses)}.\n"

    def _object(self, name: str, schema: Node) -> Iterator[str]:
        yield f"### {name}\n"
        if "description" in schema:
            yield schema["description"] + "\n"
        yield "| Key | Form | Always | Meaning |\n|---|---|---|---|"
        for key, value in schema["properties"].items():
            always = "yes" if key in schema["required"] else "no"
            yield _row(f"`{key}`", self.form(value), always, self._meaning(value))
        yield ""

    def _resolved(self, node: Node) -> Node:
        while "$ref" in node:
            kind, name = node["$ref"].split("/")[-2:]
            node = self._parts[kind][name]
        return node

    def _meaning(self, node: Node) -> str:
        text: str = node.get("description") or self._resolved(node).get("description", "")
        return text

    def _results(self, response: Node) -> str:
        """What the envelope's `results` are."""
        schema = response["content"]["application/json"]["schema"]
        if "allOf" not in schema:
            return "the body itself"
        (results,) = (
            part["properties"]["results"]
            for part in schema["allOf"]
            if "results" in part.get("properties", {})
        )
        name = results["$ref"].rpartition("/")[2]
        if name == "NoResults":
            return "none"
        return "`parameter`" if name == "ParameterResults" else f"[{name}](#{name.lower()})"

    def form(self, node: Node) -> str:
        """What a value looks like, in a few words."""
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            resolved = self._resolved(node)
            if resolved.get("type") == "object":
                return f"[{name}](#{name.lower()})"
            return self.form(resolved)
        if "const" in node:
            return f"`{json.dumps(node['const'])}`"
        if "enum" in node:
            values = node["enum"]
            if all(isinstance(value, int) for value in values):
                return f"one of {values[0]}, {values[1]}, … {values[-1]}"
            return ", ".join(f"`{value}`" for value in values)
        if "anyOf" in node:
            return " or ".join(self.form(each) for each in node["anyOf"])
        for name, text in NAMED.items():
            if node.get("pattern") == self._parts["schemas"][name]["pattern"]:
                return text
        kind = node["type"]
        if isinstance(kind, list):
            return " or ".join(self.form(node | {"type": each}) for each in kind)
        return str({**SIMPLE, "string": _text, "array": self._list}[kind](node))

    def _list(self, node: Node) -> str:
        return "list of " + self.form(node["items"])


def _text(node: Node) -> str:
    words = ["text"]
    least, most = node.get("minLength"), node.get("maxLength")
    if most is not None:
        words.append(
            f"{least} to {most} characters"
            if least not in (None, most)
            else f"{most} characters"
            if least
            else f"at most {most} characters"
        )
    pattern = node.get("pattern", "")
    if pattern and len(pattern) <= LONGEST_PATTERN:
        words.append(f"`{pattern}`")
    return ", ".join(words)


def _number(node: Node) -> str:
    word = "whole number" if node["type"] == "integer" else "number"
    if "maximum" in node:
        return f"{word}, {node['minimum']} to {node['maximum']}"
    return f"{word}, {node['minimum']} or more" if "minimum" in node else word


def _filled(text: str) -> str:
    """A paragraph as lines. A line does not break at a hyphen: it may be that of a link's target."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def _row(*cells: str) -> str:
    assert not any("|" in cell or "\n" in cell for cell in cells), cells
    return "| " + " | ".join(cells) + " |"


ENVELOPES = {"Envelope", "Success", "NoResults", "ParameterResults"}
NAMED = {"Base64": "base64", "Uuid": "UUID"}
SIMPLE: dict[str, Any] = {
    "integer": _number,
    "number": _number,
    "boolean": lambda _node: "`true` or `false`",
    "null": lambda _node: "`null`",
    "object": lambda _node: "object",
}


def render() -> str:
    """The page."""
    doc: Node = json.loads(SOURCE.read_text(encoding="utf-8"))
    return "\n".join(Page(doc).lines()).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())
