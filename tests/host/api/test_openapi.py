"""`openapi.json` and the server say the same: paths, parameters and their bounds, statuses, and each
reply that a server really gives."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any
from urllib.parse import urlencode

import h11
import pytest
import schemathesis
import trio
from helpers import FakeQuoter, Reply, Wire, connected, get_bytes, make_evidence
from http_server_helpers import NONCE, VM, make_server
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator, ValidationError
from places import VECTORS

from provider_proxy import errors
from provider_proxy.errors import (
    ParameterError,
    ProviderProxyError,
    RequestError,
    ServiceError,
    WrongHostError,
)
from provider_proxy.evidence import model, query
from provider_proxy.evidence.model import (
    HashAlg,
    HostLogs,
    QuoteRequest,
    Tenant,
    mask_of,
    parse_mask,
    parse_nonce,
)
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.evidence.wire import FORMAT, LogsPart, encode_logs
from provider_proxy.host.api import tenant as server
from provider_proxy.host.batching.batcher import Batcher
from provider_proxy.host.batching.queue import BatchSettings
from provider_proxy.host.config.tables import DEFAULT_ISOLATED
from provider_proxy.host.http import messages
from provider_proxy.host.http import server as http1
from provider_proxy.host.http.messages import Peer
from provider_proxy.host.http.server import HttpServer
from provider_proxy.host.metrics import Metrics
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.registration.state import State, Status, for_tenant

ISOLATED = mask_of(DEFAULT_ISOLATED)

RAW = resources.files("provider_proxy").joinpath("openapi.json").read_bytes()
DOC: dict[str, Any] = json.loads(RAW)
VALID = VECTORS / "valid.json"
QUOTE = "/verifier/quote"
VTPM_CA = "/verifier/vtpm-ca"
MINIMAL = {"nonce": NONCE, "mask": "0x1"}
GOOD = f"{QUOTE}?{urlencode(MINIMAL)}"
CONFIGURED = 408  # limits.busy_status
# After a bug the connection closes without a response; the admin server alone sends 421.
NEVER_SENT = {500, WrongHostError.status}
NOT_OF_GET = 405


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    """What a node is, or refers to."""
    while "$ref" in node:
        found: Any = DOC
        for name in node["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        node = found
    return node


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    """Of a schema that may refer to the description's components."""
    return Draft202012Validator({"components": DOC["components"], "allOf": [schema]})


OPERATIONS: dict[str, dict[str, Any]] = {path: item["get"] for path, item in DOC["paths"].items()}
PARAMETERS: dict[str, dict[str, Any]] = {p["name"]: p for p in OPERATIONS[QUOTE]["parameters"]}
VALIDATORS = {name: validator(p["schema"]) for name, p in PARAMETERS.items()}


def response_of(path: str | None, status: int) -> dict[str, Any]:
    """The description of a path's response; of the one that any path gives where the path has none."""
    described = OPERATIONS[path]["responses"] if path is not None else {}
    if str(status) in described:
        return resolve(described[str(status)])
    assert path is None or status == NOT_OF_GET, f"{path} has no {status}"
    (found,) = (r for r in DOC["components"]["responses"].values() if code_of(r) == status)
    return resolve(found)


def schema_of(response: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = response["content"]["application/json"]["schema"]
    return schema


def code_of(response: dict[str, Any]) -> int | None:
    """The one `code` that a response's envelope may have; None where it has no envelope."""
    found: list[int] = []

    def walk(schema: dict[str, Any]) -> None:
        schema = resolve(schema)
        found.extend(
            s["const"]
            for n, s in schema.get("properties", {}).items()
            if n == "code" and "const" in s
        )
        for part in schema.get("allOf", ()):
            walk(part)

    walk(schema_of(response))
    return found[0] if found else None


# --- the description itself -------------------------------------------------------------------------


def test_the_description_is_valid() -> None:
    schemathesis.openapi.from_dict(copy.deepcopy(DOC)).validate()
    broken = copy.deepcopy(DOC)
    del broken["paths"][QUOTE]["get"]["parameters"][0]["in"]
    with pytest.raises(ValidationError):
        schemathesis.openapi.from_dict(broken).validate()


def test_references_resolve_and_nothing_is_left_over() -> None:
    named = set(re.findall(r'"\$ref": "#/(components/\w+/\w+)"', RAW.decode()))
    assert len(re.findall(r'"\$ref"', RAW.decode())) >= len(named) > 0
    there = {
        f"components/{kind}/{name}"
        for kind in ("schemas", "responses", "headers")
        for name in DOC["components"][kind]
    }
    assert there - named == {"components/responses/MethodNotAllowed"}  # of no GET
    assert named <= there


def test_schemas_compile() -> None:
    for schema in DOC["components"]["schemas"].values():
        validator(schema)
    with pytest.raises(ValidationError):
        validator({"type": "text"})  # the compiler does look


def test_only_evidence_may_grow() -> None:
    """All other objects have the keys that are described, each of them, and no more."""
    schemas = DOC["components"]["schemas"]
    for name in ("Envelope", "Version", "Identity", "Registration", "VtpmCa"):
        assert schemas[name]["required"] == list(schemas[name]["properties"])
    for name in ("Envelope", "Version", "Identity", "Registration", "VtpmCa", "ParameterResults"):
        assert schemas[name]["additionalProperties"] is False


def test_versions_are_the_codes() -> None:
    assert DOC["openapi"].startswith("3.1.")
    assert DOC["info"]["version"] == server.API_VERSION
    results = DOC["components"]["schemas"]
    assert results["Evidence"]["properties"]["format"]["const"] == FORMAT


def test_paths_are_the_doors() -> None:
    handler = make_server(no_submit).handler
    assert isinstance(handler, server.TenantApi)
    assert set(DOC["paths"]) == set(handler._routes)
    for item in DOC["paths"].values():
        assert set(item) == {"get"}


# --- parameters -------------------------------------------------------------------------------------


def test_parameters_are_the_parsers() -> None:
    assert set(PARAMETERS) == set(query._PARSERS)
    assert len(OPERATIONS[QUOTE]["parameters"]) == len(PARAMETERS)
    for name, parameter in PARAMETERS.items():
        assert parameter["in"] == "query"
        assert parameter["required"] == (name in MINIMAL)
    for path in set(OPERATIONS) - {QUOTE}:
        assert "parameters" not in OPERATIONS[path]
    with pytest.raises(ParameterError, match="mask: is missing"):
        parse_quote_query(urlencode({"nonce": NONCE}))
    with pytest.raises(ParameterError, match="nonce: is missing"):
        parse_quote_query(urlencode({"mask": "0x1"}))


def test_patterns_bounds_and_defaults_are_the_codes() -> None:
    schemas = {name: parameter["schema"] for name, parameter in PARAMETERS.items()}
    nonce = schemas["nonce"]
    characters = nonce["pattern"].removeprefix("^").removesuffix("+$")
    assert model.NONCE_RE.pattern == f"{characters}{{{nonce['minLength']},{nonce['maxLength']}}}"
    assert schemas["bank"]["enum"] == [bank.label for bank in HashAlg]
    entry, timeout = schemas["ima_ml_entry"], schemas["timeout_ms"]
    assert (entry["minimum"], entry["maximum"]) == (0, query.MAX_IMA_ENTRY)
    assert timeout["minimum"] == query.MIN_TIMEOUT_MS
    assert timeout["maximum"] == query.MAX_TIMEOUT_MS
    plain = parse_quote_query(urlencode(MINIMAL))
    assert schemas["bank"]["default"] == plain.bank.label
    assert entry["default"] == plain.ima_ml_entry
    assert "default" not in timeout
    longest = sum(len(f"&{n}=") + s.get("maxLength", 10) for n, s in schemas.items())
    assert longest < query.MAX_QUERY_CHARS
    description = DOC["info"]["description"]
    assert f"longer than {query.MAX_QUERY_CHARS} characters" in description
    too_long = OPERATIONS[QUOTE]["responses"]["414"]
    assert (
        f"longer than {messages.MAX_TARGET_CHARS:,} characters" in resolve(too_long)["description"]
    )


def is_parsed(name: str, text: str) -> bool:
    try:
        parse_quote_query(urlencode({**MINIMAL, name: text}))
    except ParameterError as exc:
        blamed = exc.parameter
    else:
        return True
    assert blamed == name
    return False


def is_described(name: str, text: str) -> bool:
    value: object = text
    if PARAMETERS[name]["schema"]["type"] == "integer" and re.fullmatch(r"0|[1-9][0-9]*", text):
        value = int(text)
    return VALIDATORS[name].is_valid(value)


BOUNDARIES: list[tuple[str, str, bool]] = [
    ("nonce", "n" * 15, False),
    ("nonce", "n" * 16, True),
    ("nonce", "n" * 64, True),
    ("nonce", "n" * 65, False),
    ("nonce", "AZaz09._~-AZaz09", True),
    *(("nonce", "n" * 16 + char, False) for char in " +/=:%@[`{\x7f\n\0é٣"),
    ("nonce", "\n" + "n" * 16, False),
    ("mask", "0x1", True),
    ("mask", "0xffffff", True),
    ("mask", "0x00FFFFFF", True),
    ("mask", "0x00000001", True),
    ("mask", "0x01000000", False),
    ("mask", "0x1000000", False),
    ("mask", "0xffffffff", False),
    ("mask", "0x000000001", False),
    ("mask", "0x0", False),
    ("mask", "0x00000000", False),
    ("mask", "0x", False),
    ("mask", "", False),
    ("mask", "1", False),
    ("mask", "0X1", False),
    ("mask", "0xg", False),
    ("mask", "0x1\n", False),
    ("mask", "0x٣", False),
    *(("bank", bank.label, True) for bank in HashAlg),
    ("bank", "SHA256", False),
    ("bank", "sha224", False),
    ("bank", "", False),
    ("ima_ml_entry", "0", True),
    ("ima_ml_entry", "2147483648", True),
    ("ima_ml_entry", "2147483649", False),
    ("ima_ml_entry", "-1", False),
    ("ima_ml_entry", "", False),
    ("ima_ml_entry", "1.0", False),
    ("ima_ml_entry", "٣", False),
    ("timeout_ms", "0", False),
    ("timeout_ms", "1", True),
    ("timeout_ms", "600000", True),
    ("timeout_ms", "600001", False),
    ("timeout_ms", "1e3", False),
    ("logs", "none", True),
    ("logs", "all", False),
    ("logs", "", False),
    ("vm", VM, True),
    ("vm", "00000000-0000-0000-0000-000000000000", True),
    ("vm", VM.upper(), False),
    ("vm", VM.replace("-", ""), False),
    ("vm", "{" + VM + "}", False),
    ("vm", VM + "0", False),
    ("vm", VM[:-1], False),
    ("vm", VM[:-1] + "g", False),
    ("vm", VM + "\n", False),
    ("vm", VM[:8] + VM[9:12] + "-" + VM[12:], False),
]


@pytest.mark.parametrize(("name", "text", "good"), BOUNDARIES)
def test_boundaries_are_the_same(name: str, text: str, good: bool) -> None:
    assert is_parsed(name, text) is good
    assert is_described(name, text) is good


SHAPES = {
    "nonce": st.text("aZ09._~-+ é", min_size=13, max_size=67),
    "mask": st.from_regex(r"\A0?[xX]?0{0,7}[0-9a-fA-Fg]{0,9}\Z"),
    "bank": st.from_regex(r"\A(sha|SHA|md)[0-9]{0,3}\Z"),
    "ima_ml_entry": st.integers(-5, 1 << 34).map(str),
    "timeout_ms": st.integers(-5, 1_200_000).map(str),
    "vm": st.uuids().map(str)
    | st.from_regex(r"\A[0-9a-fA-F]{8}(-?[0-9a-g]{4}){3}-?[0-9a-f]{12}\Z"),
}


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(pair=st.one_of(*(st.tuples(st.just(n), shape) for n, shape in SHAPES.items())))
def test_description_and_parser_judge_alike(pair: tuple[str, str]) -> None:
    assert is_parsed(*pair) is is_described(*pair)


async def test_unknown_and_repeated_parameters_are_refused_as_described() -> None:
    description = DOC["info"]["description"]
    assert "unknown, repeated or malformed" in description
    values = {**MINIMAL, "bank": "sha256", "ima_ml_entry": "0", "vm": VM, "timeout_ms": "1"}
    values |= {"logs": "none"}
    assert set(values) == set(PARAMETERS)
    async with connected(make_server(no_submit)) as wire:
        for name, value in {**values, "new": "1"}.items():
            target = f"{QUOTE}?{urlencode([*values.items(), (name, value)])}"
            reply = await wire.get(target)
            assert (reply.status, reply.results()) == (400, {"parameter": name})
            check_reply(QUOTE, reply)


# --- statuses ---------------------------------------------------------------------------------------


def error_kinds() -> list[type[ProviderProxyError]]:
    """Each error that becomes a response at the tenants' server."""
    return [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind)
        and issubclass(kind, RequestError | ServiceError)
        and kind not in (RequestError, ServiceError, WrongHostError)
    ]


def statuses_of_the_code() -> set[int]:
    kinds = {vars(errors)[kind.__name__].status for kind in error_kinds()}
    refusals = set(
        map(
            int,
            re.findall(r"\brefuse\((\d+)", inspect.getsource(http1) + inspect.getsource(messages)),
        )
    )
    hints: set[int] = set()
    for module in (h11._connection, h11._headers, h11._events, h11._readers, h11._util):
        found = re.findall(r"error_status_hint(?:: int )? ?= ?(\d+)", inspect.getsource(module))
        hints |= set(map(int, found))
    assert {414, 431, 501} <= refusals | hints
    return {200} | kinds | refusals | hints


def test_statuses_are_the_codes() -> None:
    described = {code_of(resolve(r)) for r in DOC["components"]["responses"].values()}
    sent = set(messages.REASONS) - NEVER_SENT - {CONFIGURED}
    assert described | {200} == statuses_of_the_code() == sent
    used = {int(status) for op in OPERATIONS.values() for status in op["responses"]}
    assert used == statuses_of_the_code() - {NOT_OF_GET}


def test_documents_have_the_statuses_of_any_path() -> None:
    """What identity, version and description can meet is the server's and `identify`'s doing alone."""
    everywhere = {"200", "400", "403", "414", "431", "501", "505"}
    for path, operation in OPERATIONS.items():
        more = {QUOTE: {"404", "429", "502", "503", "504"}, VTPM_CA: {"404"}}.get(path, set())
        assert set(operation["responses"]) == everywhere | more


def test_each_response_has_its_status_in_the_envelope() -> None:
    for path, operation in OPERATIONS.items():
        for status, response in operation["responses"].items():
            code = code_of(resolve(response))
            assert code == int(status) or (path, status, code) == ("/openapi.json", "200", None)


# --- real replies -----------------------------------------------------------------------------------


async def no_submit(*_args: object, **_kwargs: object) -> Any:
    raise AssertionError("nothing is asked here")


def check_reply(path: str | None, reply: Reply) -> None:
    """A reply is what the description says of its path and status."""
    response = response_of(path, reply.status)
    assert reply.reason.encode() == messages.REASONS[reply.status]
    assert reply.header("Content-Type") in response["content"]
    validator(schema_of(response)).validate(json.loads(reply.body))
    for name, header in response["headers"].items():
        header = resolve(header)
        value: Any = reply.header(name)
        assert value is not None or not header["required"], f"{name} is missing"
        if value is not None:
            value = int(value) if header["schema"].get("type") == "integer" else value
            validator(header["schema"]).validate(value)
    known = {"date", "content-type", "content-length", "connection"}
    assert {name.lower() for name, _ in reply.headers} - known == {
        name.lower() for name in response["headers"] if reply.header(name) is not None
    }


class AllLogs:
    """A host's logs, for any tenant."""

    async def read(self, requests: tuple[QuoteRequest, ...]) -> tuple[LogsPart | None, ...]:
        made = encode_logs(HostLogs(ima="10 line\n", ima_entry=2, uefi=b"event log"))
        return tuple(made for _ in requests)


@asynccontextmanager
async def quoting() -> AsyncIterator[Wire]:
    """A connection to a server with everything: claims, logs, all banks."""
    batcher = Batcher(
        FakeQuoter(),
        BatchSettings(isolate_mask=ISOLATED, window_s=0),
        Metrics(),
        claims=lambda _tenant, request: json.dumps({"vm": str(request.vm)}).encode(),
        logs=AllLogs(),
        boottime=1_700_000_000,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(batcher.run)
        async with connected(make_server(batcher.submit, banks=tuple(HashAlg))) as wire:
            yield wire
        nursery.cancel_scope.cancel()


async def test_good_replies_are_as_described() -> None:
    async with quoting() as wire:
        for path in OPERATIONS:
            reply = await wire.get(GOOD if path == QUOTE else path)
            assert reply.status == 200
            check_reply(path, reply)
        for bank in HashAlg:
            target = (
                f"{QUOTE}?nonce={'~' * 64}&mask=0xffffff&bank={bank.label}&ima_ml_entry=2&vm={VM}"
            )
            reply = await wire.get(target)
            assert reply.status == 200
            results = reply.results()
            described = set(DOC["components"]["schemas"]["Evidence"]["properties"])
            assert set(results) == {key for key in described if not key.endswith("_missing")}
            check_reply(QUOTE, reply)


async def test_a_host_without_a_ca_says_so_as_described() -> None:
    async with connected(make_server(no_submit, vtpm_ca=None)) as wire:
        reply = await wire.get(VTPM_CA)
        assert reply.status == 404
        check_reply(VTPM_CA, reply)


async def test_the_description_is_served() -> None:
    async with connected(make_server(no_submit)) as wire:
        reply = await wire.get("/openapi.json")
        assert (reply.status, reply.body) == (200, RAW)
        assert reply.header("Content-Type") == "application/json"
        reply = await wire.get("/openapi.json?x=1")
        assert (reply.status, reply.results()) == (400, {"parameter": "query"})
        check_reply("/openapi.json", reply)


async def test_registrations_are_as_described() -> None:
    schema = DOC["components"]["schemas"]["Registration"]
    assert schema["properties"]["state"]["enum"] == [state.value for state in State]
    for state in State:
        for last_success in (None, 1_795_353_880.5):
            status = Status(state=state, last_success=last_success)
            own = [for_tenant("acme", "host-a.example", status)]
            async with connected(make_server(no_submit, registrations=lambda tenant: own)) as wire:  # noqa: B023
                reply = await wire.get("/verifier/identity")
                assert reply.results()["registrations"] == own
                check_reply("/verifier/identity", reply)


def failing_door(error: ProviderProxyError) -> HttpServer:
    async def submit(*_args: object, **_kwargs: object) -> Any:
        raise error

    return make_server(submit)


def an_error(kind: type[ProviderProxyError], retry_after_s: float | None) -> ProviderProxyError:
    if issubclass(kind, ParameterError):
        return kind("mask", "is wrong")
    if issubclass(kind, errors.TenantLimitError):
        return kind("wrong", retry_after_s=retry_after_s or 1.0)
    if issubclass(kind, ServiceError):
        return kind("wrong", retry_after_s=retry_after_s if kind.status == 503 else None)
    return kind("wrong")


@pytest.mark.parametrize("retry_after_s", [None, 0.2, 7.6])
@pytest.mark.parametrize("kind", error_kinds())
async def test_errors_are_as_described(
    kind: type[ProviderProxyError], retry_after_s: float | None
) -> None:
    async with connected(failing_door(an_error(kind, retry_after_s))) as wire:
        reply = await wire.get(GOOD)
        check_reply(QUOTE, reply)


BAD_HTTP: list[tuple[bytes, int]] = [
    (get_bytes("{}", "Content-Length: 1") + b"x", 400),
    (get_bytes("{}", "Transfer-Encoding: chunked"), 400),
    (get_bytes("{}", "no header"), 400),
    (get_bytes("{}?" + "x" * messages.MAX_TARGET_CHARS), 414),
    (get_bytes("{}", "X: " + "x" * 3 * http1.MAX_HEAD_BYTES), 431),
    (get_bytes("{}", "Transfer-Encoding: gzip"), 501),
    *((get_bytes("{}", method=method), 405) for method in ("POST", "PUT", "DELETE")),
]


@pytest.mark.parametrize("path", OPERATIONS)
@pytest.mark.parametrize(("data", "status"), BAD_HTTP, ids=lambda value: str(value)[:60])
async def test_refusals_are_as_described(path: str, data: bytes, status: int) -> None:
    async with connected(make_server(no_submit)) as wire:
        await wire.send(data.replace(b"{}", path.encode(), 1))
        reply = await wire.reply()
        assert reply.status == status
        check_reply(path, reply)


@pytest.mark.parametrize("path", OPERATIONS)
async def test_who_is_no_tenant_is_refused_as_described(path: str) -> None:
    def nobody(_peer: Peer) -> Tenant:
        raise errors.UnknownTenantError("you are no tenant")

    async with connected(make_server(no_submit, identify=nobody)) as wire:
        reply = await wire.get(path)
        assert reply.status == 403
        check_reply(path, reply)


@pytest.mark.parametrize("target", ["/", "/v1", "/metrics", "/openapi.json/", "/verifier"])
async def test_another_path_is_404_as_described(target: str) -> None:
    async with connected(make_server(no_submit)) as wire:
        reply = await wire.get(target)
        assert reply.status == 404
        check_reply(None, reply)


async def test_late_quotes_are_504_as_described(autojump_clock: trio.testing.MockClock) -> None:
    async def submit(*_args: object, **_kwargs: object) -> Any:
        await trio.sleep_forever()

    async with connected(make_server(submit)) as wire:
        await wire.send(get_bytes(GOOD))
        await trio.sleep(31)  # and with it the answer
        reply = await wire.reply()
        assert reply.status == 504
        check_reply(QUOTE, reply)


# --- evidence ---------------------------------------------------------------------------------------

EVIDENCE = validator({"$ref": "#/components/schemas/Evidence"})


def test_evidence_of_the_vectors_is_as_described() -> None:
    bodies = [
        json.loads(test["evidence"])["results"]
        for group in json.loads(VALID.read_text())["testGroups"]
        for test in group["tests"]
    ]
    assert bodies
    for results in bodies:
        EVIDENCE.validate(results)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": "1"},
        {"quote": "r"},
        {"quote": "rAAAA:AAAA"},
        {"quote": "rAAAA:AAAA:AAA"},
        {"bank": "md5"},
        {"hash_alg": "sha1"},
        {"enc_alg": "dsa"},
        {"mask": "1"},
        {"ak_name": "000"},
        {"ak_name": None},
        {"claims": "?"},
        {"boottime": -1},
        {"boottime": None},
        {"timing": {"queued_ms": 1}},
        {"ima_measurement_list": "10 line\n"},
        {"mb_measurement_list": "A"},
        {"leaf_index": -1},
        {"tree_size": 1},
        {"tree_size": 3},
        {"tree_size": 1 << 21},
        {"path": []},
        {"path": ["00" * 32] * 21},
        {"path": ["00" * 31]},
        {"salt": "00" * 15},
    ],
    ids=str,
)
def test_what_is_no_evidence_is_not_described(changes: dict[str, object]) -> None:
    asked = QuoteRequest(nonce=parse_nonce(NONCE), mask=parse_mask("0x1"))
    results = json.loads(make_evidence(SoftTpm(), asked))["results"]
    assert EVIDENCE.is_valid(results)
    assert EVIDENCE.is_valid({**results, "new_key": 1})
    for name, value in changes.items():
        (results["merkle"] if name in results["merkle"] else results)[name] = value
    assert not EVIDENCE.is_valid(results)
    for name in DOC["components"]["schemas"]["Evidence"]["required"]:
        good = json.loads(make_evidence(SoftTpm(), asked))["results"]
        assert not EVIDENCE.is_valid({key: good[key] for key in good if key != name})
