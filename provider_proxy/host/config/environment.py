"""`PROVIDER_PROXY_*`: single keys of the configuration from the environment.

A key's variable is its name in capitals with an underscore for the dot: `batch.window_ms` is
PROVIDER_PROXY_BATCH_WINDOW_MS. The names are looked up among the known keys and not parsed, so
underscores in them are no problem (a test checks that no two keys share a variable). The environment is
untrusted: an unknown name is refused like an unknown key, and tables that the operator names, such as
tenants, come from files only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from provider_proxy.common.settings.document import Document, Origin
from provider_proxy.common.settings.values import Reader
from provider_proxy.errors import ConfigError
from provider_proxy.host.config.tables import TABLES, Config

PREFIX = "PROVIDER_PROXY_"
MAX_VALUE_CHARS = 4096  # PATH_MAX, the longest value that means something
MAX_SHOWN_CHARS = 80


def known_keys() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Each key of the tables with fixed names, such as "batch.window_ms", and its field."""
    for field in dataclasses.fields(Config):
        if "read" in field.metadata:
            yield field.name, field
        elif field.name in TABLES:
            for inner in dataclasses.fields(TABLES[field.name]):
                yield f"{field.name}.{inner.name}", inner


def variable_of(key: str) -> str:
    """The variable of a key."""
    return PREFIX + key.replace(".", "_").upper()


def apply_environment(document: Document, environ: Mapping[str, str]) -> Document:
    """The document with the environment's values, which override those of files.

    Raises:
        ConfigError: an unknown name or a wrong value; the message names the variable.
    """
    ours = {name: text for name, text in environ.items() if name.startswith(PREFIX)}
    if not ours:
        return document
    known = {variable_of(key): (key, field) for key, field in known_keys()}
    for name in sorted(ours):
        if name not in known:
            near = difflib.get_close_matches(name[:MAX_SHOWN_CHARS], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{ascii(name[:MAX_SHOWN_CHARS])[1:-1]} is not a known variable "
                f"(named tables, such as tenants, can be set in files only){hint}"
            )
        key, field = known[name]
        value = parse_value(name, key, ours[name], field.metadata["read"])
        document = document.overlaid(key, value, Origin(variable=name))
    return document


def parse_value(variable: str, key: str, text: str, read: Reader) -> object:
    """A value in TOML syntax; a string or a path also without quotes.

    Returns:
        The value for the key's reader.

    Raises:
        ConfigError: neither form is valid for the key.
    """
    if len(text) > MAX_VALUE_CHARS:
        raise ConfigError(f"{variable}: longer than {MAX_VALUE_CHARS} characters")
    if (
        not text.isprintable()
    ):  # line ends would be more TOML; surrogates are bytes that are not UTF-8
        raise ConfigError(f"{variable}: {key} must be one line of printable text")
    candidates: list[object] = []
    with contextlib.suppress(tomllib.TOMLDecodeError, RecursionError):  # bare text, or wrong
        candidates.append(tomllib.loads(f"value = {text}")["value"])
    candidates.append(text)
    problem: ConfigError | None = None
    for candidate in candidates:
        try:
            read(key, candidate)
        except ConfigError as exc:
            problem = problem or exc
        else:
            return candidate
    raise ConfigError(f"{variable}: {problem}", key=key) from problem
