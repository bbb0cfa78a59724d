"""The documents and the code say the same: keys, options, routes, errors, figures, commands, units."""

from __future__ import annotations

import ast
import base64
import configparser
import importlib.util
import json
import re
import shlex
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Any

import api_page
import pytest
from docs_helpers import (
    ADRS,
    CODE,
    FENCE,
    OWN,
    code,
    codes,
    fenced,
    read,
    rows,
    subclasses,
    tables,
)
from places import ROOT
from scripts import load_script

from provider_proxy import errors
from provider_proxy.cli import main as cli
from provider_proxy.cli import options_file
from provider_proxy.errors import QualifyingDataError, SignatureError
from provider_proxy.evidence import model, query, verify, wire
from provider_proxy.evidence.inclusion import leaf_input, qualifying_data, root_from_proof
from provider_proxy.evidence.model import (
    HashAlg,
    HostLogs,
    InclusionProof,
    LeafHash,
    Nonce,
    PcrMask,
    QuoteRequest,
    TrustedHost,
    parse_nonce,
)
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier
from provider_proxy.evidence.wire import encode_logs
from provider_proxy.host import daemon
from provider_proxy.host.api import admin, tenant
from provider_proxy.host.batching.merkle import build_tree
from provider_proxy.host.config import load
from provider_proxy.host.config import tables as config_tables
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.http import messages
from provider_proxy.host.http import server as http1
from provider_proxy.host.metrics import Metrics
from provider_proxy.tenant import hosts_file
from provider_proxy.tenant.watch.config import parse_watch_config
from provider_proxy.testing.soft_tpm import SoftTpm

PACKAGE = ROOT / "provider_proxy"
UNITS = sorted(path for path in (ROOT / "systemd").rglob("*") if path.is_file())
MAX_ADR_LINES = 60  # a page


def every_markdown() -> list[Path]:
    """All of the repository's, not those of hidden folders, environments and builds."""
    found = []
    for path in ROOT.rglob("*.md"):
        folders = path.relative_to(ROOT).parts[:-1]
        if not any(
            name.startswith(".") or name in ("site-packages", "build", "dist") for name in folders
        ):
            found.append(path)
    return sorted(found)


# --- configuration -------------------------------------------------------------------------------

REFERENCE = load_script("packaging/reference")


def test_the_reference_is_what_the_program_says() -> None:
    assert read("docs/reference.md") == REFERENCE.page(), "make docs"


def test_every_key_and_option_says_what_it_means() -> None:
    found = rows("docs/reference.md", "Key", "Values", "Default", "Meaning")
    assert len(found) > 150
    options = rows("docs/reference.md", "Option", "Meaning")
    assert len(options) > 200
    for row in [*found, *options]:
        assert row[-1].endswith("."), row


def test_the_example_s_comments_are_the_keys_meanings() -> None:
    text = read("docs/provider-proxy.example.toml")
    assert load_script("packaging/example").updated(text) == text, "make docs"


TOML_BLOCKS = [(doc, block) for doc in OWN for block in fenced(doc, "toml")]


@pytest.mark.parametrize(("doc", "block"), TOML_BLOCKS)
def test_toml_blocks_are_configurations(doc: Path, block: str) -> None:
    values = tomllib.loads(block)
    if doc.name in ("watch.md", "fleet.md"):
        parse_watch_config(values)
    elif doc.name == "bridge.md":
        parse_watch_config(values, for_bridge=True)
    elif "pins" in values:
        hosts_file.parse_link_map(values, doc.parent)  # a tenant's, of docs/vtpm.md
    else:
        load.parse_config(values)


def test_toml_blocks_are_there() -> None:
    assert {doc.name for doc, _ in TOML_BLOCKS} == {
        *("configuration.md", "registration.md", "vtpm.md", "watch.md"),
        *("bridge.md", "fleet.md"),
        "fronts.md",
    }


# --- command line --------------------------------------------------------------------------------


HEREDOCS = "\n".join(block for doc in OWN for block in fenced(doc, "sh"))


def commands() -> list[str]:
    """Each command of ours in a shell block, in code within text, and in the unit."""
    found = []
    for doc in OWN:
        text = "\n".join(fenced(doc, "sh")).replace("\\\n", "")  # a command over several lines
        found += re.findall(
            r"^(?:timeout \d+ sh -c ')?(?:until )?(provider-proxy [^&;|\n]*)", text, re.MULTILINE
        )
    found += re.findall(r"ExecStart=/usr/bin/(.*)", read("systemd/provider-proxy.service"))
    return found


@pytest.mark.parametrize("command", commands())
def test_documented_commands_parse(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(
        r"^cat > ([\w.-]+\.toml) <<'END'\n(.*?)^END$", HEREDOCS, re.M | re.S
    ):
        Path(name).write_text(text, encoding="utf-8")
    words = shlex.split(command)[1:]
    parser = cli.build_parser(words[0])
    sub = cli.sub_parser(parser, words[0])
    args = parser.parse_args(options_file.expanded(words, words[0], sub))  # SystemExit if wrong
    assert args.command == words[0]


def test_no_documented_loop_runs_for_ever() -> None:
    """It has a time limit, or ends with the daemon that it waits for."""
    loops = [line for line in HEREDOCS.splitlines() if re.search(r"\b(until|while) ", line)]
    assert loops
    for line in loops:
        assert re.match(r"timeout \d+ ", line) or "|| break" in line, line


def test_commands_are_there() -> None:
    assert {shlex.split(command)[1] for command in commands()} >= {
        "serve",
        "fetch",
        "verify",
        "identity",
    }


def test_commands_named_in_the_text_exist() -> None:
    for doc in OWN:
        for words in re.findall(r"`provider-proxy ([a-z][a-z-]*)(?: [^`]*)?`", read(doc)):
            assert words in cli.SUBCOMMANDS, doc.name


def test_make_targets_named_in_the_text_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), re.MULTILINE))
    named = {t for doc in OWN for t in re.findall(r"`make ([a-z-]+)`", read(doc))}
    assert {"install", "demo", "test", "check"} <= named <= targets


# --- evidence format -----------------------------------------------------------------------------

EVIDENCE = "docs/evidence-format.md"


def test_checks_and_their_error_classes() -> None:
    listed = rows(EVIDENCE, "Check", "Demands", "Error class")
    numbers = {name: int(row[0]) for row, name in zip(listed, codes(listed, 2), strict=True)}
    assert numbers == {
        kind.__name__: kind.check
        for kind in subclasses(errors.VerificationError)
        if issubclass(kind, errors.VerificationError)
    }
    assert list(numbers.values()) == sorted(numbers.values())


def full_reply() -> dict[str, Any]:
    tpm = SoftTpm()
    encoder = wire.EvidenceEncoder(
        tpm.quote(b"q", HashAlg.SHA256, 1),
        ak_name=tpm.ak.name,
        hash_alg=HashAlg.SHA256,
        enc_alg="ecc",
        sign_alg="ecdsa",
        quote_ms=1.0,
        boottime=1,
    )
    parts = encoder.encode(
        InclusionProof(leaf_index=0, tree_size=2, path=(bytes(32),), salt=bytes(16)),
        claims=b"{}",
        logs=encode_logs(
            HostLogs(ima="10 …\n", uefi=b"log", ima_missing="absent", uefi_missing="absent")
        ),
    )
    results: dict[str, Any] = json.loads(b"".join(parts))["results"]
    return results


def test_reply_s_keys_are_documented() -> None:
    reply = full_reply()
    listed = [
        row for head, body in tables(EVIDENCE) if head == ["Key", "Type", "Meaning"] for row in body
    ]
    assert sorted(codes(listed)) == sorted([*reply, *reply["merkle"]])
    for name in reply["timing"]:
        assert f"`{name}`" in read(EVIDENCE)
    kinds = {"number": int, "text": str, "hex": str, "base64": str, "object": dict}
    for row in listed:
        value = {**reply, **reply["merkle"]}[code(row[0])]
        assert isinstance(value, kinds.get(row[1], list))


def test_documented_limits_are_the_code_s() -> None:
    limits = {row[0]: row[1] for row in rows(EVIDENCE, "What", "At most")}
    mib = wire.MAX_EVIDENCE_WITH_LOGS_BYTES >> 20
    kib = wire.MAX_EVIDENCE_BYTES >> 10
    assert limits["body"].startswith(f"{mib} MiB; the client reads {kib} KiB")
    assert "below 16" in limits["body"]
    assert model.IMA_MASK | model.BOOT_MASK == 0xFFFF
    assert limits["`quote`"].startswith(f"{wire.MAX_QUOTE_STRING:,} characters")
    assert limits["`tree_size`"] == f"2^{model.MAX_TREE_SIZE.bit_length() - 1}"
    assert limits["`path`"] == f"{wire.PATH_LIMIT} entries"
    assert limits["`claims`"] == f"{model.MAX_CLAIMS_BYTES >> 10} KiB decoded"


def test_documented_layouts_add_up() -> None:
    layouts = [body for head, body in tables(EVIDENCE) if head == ["Offset", "Bytes", "Field"]]
    attest, blob = layouts
    at = 0
    for offset, size, _ in attest:
        assert int(offset) == at
        at += sum(map(int, size.split("+")))
    tpm = SoftTpm()
    assert at == len(tpm.quote(bytes(32), HashAlg.SHA256, 1).attest)
    assert f"it has {at}\nbytes" in read(EVIDENCE) or f"it has {at} bytes" in read(EVIDENCE)
    at = 0
    for offset, size, _ in blob[:-1]:
        assert int(offset) == at
        at += int(size)
    assert blob[-1][:2] == [str(at), "532 each"]
    sizes = [len(wire.encode_pcr_blob(tpm.read(HashAlg.SHA256, m))) for m in (1, 0xFFFF, 0xFFFFFF)]
    assert sizes == [at + 532 * lists for lists in (1, 2, 3)]
    assert "{}, {} or {} bytes".format(*sizes) in read(EVIDENCE)


# The formulas as the document writes them, on hashlib alone.


def doc_leaf_input(salt: bytes, nonce: bytes, mask: int, bank: int, claims: bytes) -> bytes:
    head = b"provider-proxy/leaf/1" + b"\0" + salt + bytes([len(nonce)]) + nonce
    return head + mask.to_bytes(4, "big") + bank.to_bytes(2, "big") + sha256(claims).digest()


def doc_node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def doc_root(leaf: bytes, index: int, path: tuple[bytes, ...]) -> bytes:
    node = leaf
    for sibling in path:
        node = doc_node(sibling, node) if index & 1 else doc_node(node, sibling)
        index >>= 1
    return node


def doc_bound(root: bytes, size: int) -> bytes:
    return sha256(b"provider-proxy/root/1" + b"\0" + size.to_bytes(8, "big") + root).digest()


def doc_qualifying(bound: bytes) -> str:
    return base64.b32encode(bound[:20]).decode("ascii").lower()


def test_documented_formulas_are_the_code_s() -> None:
    claims = b'{"vm":"x"}'
    given = leaf_input(
        salt=bytes(range(16)),
        nonce=Nonce(b"n" * 64),
        mask=PcrMask(0xFFFFFF),
        bank=HashAlg.SHA512,
        claims=claims,
    )
    assert given == doc_leaf_input(bytes(range(16)), b"n" * 64, 0xFFFFFF, 0x000D, claims)
    for size in (2, 4, 32):
        inputs = [bytes([n]) for n in range(size)]
        tree = build_tree(inputs)
        for index, path in enumerate(tree.paths):
            leaf = LeafHash(sha256(b"\0" + inputs[index]).digest())
            proof = InclusionProof(leaf_index=index, tree_size=size, path=path, salt=bytes(16))
            assert doc_root(leaf, index, path) == root_from_proof(leaf, proof) == tree.root
        assert doc_qualifying(doc_bound(tree.root, size)).encode() == qualifying_data(
            tree.root, size
        )


def example_values() -> dict[str, bytes]:
    return {row[0]: bytes.fromhex(code(row[1])) for row in rows(EVIDENCE, "Value", "Hex")}


def hex_dump(block: str) -> bytes:
    return b"".join(bytes.fromhex(line.split("  ")[0]) for line in block.splitlines())


def test_worked_example_follows_from_the_formulas() -> None:
    values = example_values()
    assert values["SHA-256 of C's claims"] in {
        sha256(code(row[4]).encode()).digest()
        for row in rows(EVIDENCE, "Index", "Nonce", "Mask", "Salt", "Claims")
        if row[4].startswith("`")
    }
    leaves = []
    for index, nonce, mask, salt, claims in rows(
        EVIDENCE, "Index", "Nonce", "Mask", "Salt", "Claims"
    ):
        if nonce == "padding":
            given = values["leaf_input of the padding"]
        else:
            parse_nonce(code(nonce))
            text = b"" if claims == "none" else code(claims).encode()
            given = doc_leaf_input(
                bytes.fromhex(code(salt)), code(nonce).encode(), int(code(mask), 16), 0x0B, text
            )
        if index == "2":
            assert hex_dump(fenced(EVIDENCE, "")[EXAMPLE_LEAF]) == given
        leaves.append(sha256(b"\0" + given).digest())
    assert leaves == [values[f"leaf {n}"] for n in range(4)]
    assert values["node over 0 and 1"] == doc_node(*leaves[:2])
    assert values["node over 2 and 3"] == doc_node(*leaves[2:])
    assert values["root"] == doc_node(values["node over 0 and 1"], values["node over 2 and 3"])
    assert values["bound"] == doc_bound(values["root"], 4)
    assert f"`{doc_qualifying(values['bound'])}`" in read(EVIDENCE)
    pcrs = b"".join(value for name, value in values.items() if name.startswith("PCR "))
    assert values["pcrDigest"] == sha256(pcrs).digest()


EXAMPLE_LEAF, EXAMPLE_ATTEST, EXAMPLE_AK = -3, -2, -1  # of the blocks without a language


def verify_example(*, nonce: bytes, mask: int, ak: bytes) -> dict[str, bytes]:
    """Verify the document's reply; the PCRs by the names of its table."""
    challenge = Challenge(
        request=QuoteRequest(nonce=Nonce(nonce), mask=PcrMask(mask)), made_at_s=0.0
    )
    history = MemoryHistory()
    history.open(challenge.request.nonce)
    (body,) = fenced(EVIDENCE, "json")
    quote = Verifier(UnsafeAcceptAny()).verify(
        body.encode(), challenge, TrustedHost(ak=parse_ak(ak)), history, now_s=1.0
    )
    return {f"PCR {pcr}": value for pcr, value in quote.pcrs.items()}


def test_worked_example_verifies() -> None:
    values = example_values()
    ak = base64.b64decode(fenced(EVIDENCE, "")[EXAMPLE_AK])
    seen = verify_example(nonce=b"nonce-of-tenant-A", mask=0x3, ak=ak)
    assert seen == {name: values[name] for name in ("PCR 0", "PCR 1")}
    with pytest.raises(QualifyingDataError):
        verify_example(nonce=b"nonce-of-tenant-B", mask=0x3, ak=ak)
    with pytest.raises(QualifyingDataError):
        verify_example(nonce=b"nonce-of-tenant-A", mask=0x83, ak=ak)
    with pytest.raises(SignatureError):
        verify_example(nonce=b"nonce-of-tenant-A", mask=0x3, ak=SoftTpm().ak_public)
    evidence = wire.parse_evidence(fenced(EVIDENCE, "json")[0].encode())
    assert hex_dump(fenced(EVIDENCE, "")[EXAMPLE_ATTEST]) == evidence.quote.attest


# --- HTTP ----------------------------------------------------------------------------------------

API = "docs/http-api.md"


async def no_submit(*_args: object, **_kwargs: object) -> Any:
    raise AssertionError("nothing is asked here")


def no_identify(_peer: messages.Peer) -> model.Tenant:
    raise AssertionError("nothing is asked here")


IDENTITY = tenant.identity_results(
    ak_public=b"",
    ak_pem=b"",
    ak_name=b"",
    ek_public=b"",
    ek_cert=None,
    ek_chain=(),
    host_uuid="",
    software=True,
)
TENANT_DOOR = tenant.TenantApi(
    no_submit,
    no_identify,
    identity=IDENTITY,
    version="",
    banks=(HashAlg.SHA256,),
    default_timeout_ms=1,
    max_timeout_ms=1,
)
ADMIN_DOOR = admin.AdminApi(Metrics(), lambda: None, dict)


def test_documented_routes_are_those_of_the_doors() -> None:
    listed = rows(API, "Listener", "Path", "Answers")
    codes(listed, 1)
    assert {(row[0], code(row[1])) for row in listed} == {
        *(("tenants", path) for path in TENANT_DOOR._routes),
        *(("admin", path) for path in ADMIN_DOOR._routes),
    }


def test_the_tenants_calls_are_generated() -> None:
    assert read("docs/api.md") == api_page.render(), "make docs"
    assert f"longer than {query.MAX_QUERY_CHARS} characters" in read(API)


def test_documented_metrics_are_the_code_s() -> None:
    kinds = {metric.name: metric.type for metric in Metrics().registry.collect()}
    listed = rows(API, "Metric", "Kind", "Meaning")
    assert {"provider_proxy_" + code(row[0]): row[1] for row in listed} == kinds
    for doc in OWN:
        for name in re.findall(r"(?:provider_proxy|…)_(?!fleet_)(\w+)_total", read(doc)):
            assert kinds[f"provider_proxy_{name}"] == "counter"


def test_documented_errors_are_the_code_s() -> None:
    listed = rows(API, "Status", "Class or reason", "When")
    statuses = {code(row[1]): int(row[0]) for row in listed}
    kinds = subclasses(errors.RequestError) | subclasses(errors.ServiceError)
    assert {name: n for name, n in statuses.items() if name.endswith("Error")} == {
        kind.__name__: vars(errors)[kind.__name__].status for kind in kinds
    }
    configured = {408}  # limits.busy_status, which the text names
    assert "limits.busy_status = 408" in read("docs/http-api.md")
    assert {int(row[0]) for row in listed} | {200} | configured == set(messages.REASONS)
    for row in listed:
        kind = vars(errors).get(code(row[1]))
        if kind is not None:
            assert (row[4] == "closes") == getattr(kind, "closes", False)
    words = {code(row[1]) for row in listed if not code(row[1]).endswith("Error")}
    strings = {
        node.value
        for module in ("server", "messages")
        for node in ast.walk(ast.parse(read(f"provider_proxy/host/http/{module}.py")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert words <= strings


def test_documented_time_limits_are_the_code_s() -> None:
    limits = {row[0]: row[1] for row in rows(API, "What", "Limit")}
    assert limits == {
        "TLS handshake": f"{http1.HANDSHAKE_LIMIT_S:g} s",
        "waiting for a request": f"{http1.IDLE_LIMIT_S:g} s",
        "from a request's first byte to its last": f"{http1.HEAD_LIMIT_S:g} s",
        "reading the response": f"{http1.SEND_LIMIT_S:g} s, and a second for each "
        f"{http1.SEND_BYTES_PER_S >> 10} KiB of it",
    }


# --- request flow, glossary, decisions, changelog ------------------------------------------------


def defined_in(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


@pytest.mark.parametrize("row", rows("docs/request-flow.md", "Stage", "File", "Function"))
def test_stages_name_functions_that_exist(row: list[str]) -> None:
    assert code(row[2]) in defined_in(PACKAGE / code(row[1]))


GLOSSARY_TERMS = (
    "tenant, provider, host, proxy, listener, registrar, record, registration, round, activation, "
    "TPM, chip, gate, duty, rest, turn, PCR, IMA, event log, bank, mask, AK, EK, authValue, quote, "
    "qualifying data, nonce, request, challenge, waiter, batch key, isolation class, line, window, "
    "ripe, seal, batch, drain, salt, leaf, padding, Merkle tree, root, path, proof, reply, "
    "evidence, label, claims, "
    "link, vTPM, registry, hook, claimed, confirmed, generation, "
    "self-check, check, policy, binding, pin, history, watcher, round, verdict, replay, report"
)


def test_glossary_has_its_terms_once() -> None:
    terms = [row[0] for row in rows("docs/glossary.md", "Term", "Meaning")]
    assert len(terms) == len(set(terms))
    assert terms == sorted(terms, key=str.lower)
    assert set(GLOSSARY_TERMS.split(", ")) <= set(terms)


def test_decisions_have_their_parts() -> None:
    assert [int(path.name[:4]) for path in ADRS] == list(range(1, len(ADRS) + 1))
    for path in ADRS:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {path.name[:4]}: ")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
            "Context",
            "Decision",
            "Consequences",
            "Rejected",
        ]
        assert text.count("\n") <= MAX_ADR_LINES
        assert f"(adr/{path.name})" in read("docs/README.md")


def test_changelog_has_its_form() -> None:
    versions = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    for version in versions[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version)
    for kind in re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.MULTILINE):
        assert kind in {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# --- README --------------------------------------------------------------------------------------


def test_readme_says_what_to_install_before_the_first_make() -> None:
    text = read("README.md")
    assert text.startswith("# provider-proxy\n")
    before = text.split("\n## Try it\n")[1].split("`make demo`")[0]
    assert "`apt-get update && apt-get install -y make git`" in before  # .ci/run does it, too
    assert "Debian 12 or 13" in before


def test_readme_keeps_a_place_for_figures() -> None:
    assert "\n## Figures\n" in read("README.md")
    assert "provider-proxy bench quotes" in read("README.md").split("\n## Figures\n")[1]


@pytest.mark.parametrize("block", fenced("README.md", "python"))
def test_readme_python_compiles(block: str) -> None:
    compile(block, "README.md", "exec")


def soft_proxy(tpm: SoftTpm, path: str) -> bytes:
    """What a proxy answers to a path, a tree of two leaves and all."""
    asked = query.parse_quote_query(path.partition("?")[2])
    salt = bytes(model.SALT_BYTES)
    own = leaf_input(salt=salt, nonce=asked.nonce, mask=asked.mask, bank=asked.bank)
    tree = build_tree([own, bytes(32)])
    quote = tpm.quote(qualifying_data(tree.root, tree.size), asked.bank, asked.mask)
    encoder = wire.EvidenceEncoder(
        quote,
        ak_name=tpm.ak.name,
        hash_alg=HashAlg.SHA256,
        enc_alg="ecc",
        sign_alg="ecdsa",
        quote_ms=1.0,
    )
    proof = InclusionProof(leaf_index=0, tree_size=2, path=tree.paths[0], salt=salt)
    return b"".join(encoder.encode(proof))


def readme_verification() -> str:
    (block,) = (b for b in fenced("README.md", "python") if "verifier.verify(" in b)
    return block


def test_readme_verification_runs(capsys: pytest.CaptureFixture[str]) -> None:
    tpm = SoftTpm(pcrs={0: b"firmware"})
    good = sha256(b"firmware").digest()
    names = {
        "ak_tpm": tpm.ak_public,
        "good_pcr0": good,
        "ask": lambda path: soft_proxy(tpm, path),
    }
    exec(readme_verification(), names)
    assert capsys.readouterr().out == good.hex() + "\n"


def test_readme_verification_refuses() -> None:
    tpm = SoftTpm(pcrs={0: b"firmware"})
    names = {"ak_tpm": tpm.ak_public, "good_pcr0": bytes(32)}
    with pytest.raises(errors.PolicyError):
        exec(readme_verification(), {**names, "ask": lambda path: soft_proxy(tpm, path)})
    other = SoftTpm(pcrs={0: b"firmware"})
    with pytest.raises(SignatureError):
        exec(readme_verification(), {**names, "ask": lambda path: soft_proxy(other, path)})


# --- all documents -------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_relative_links_resolve() -> None:
    seen = 0
    for doc in every_markdown():
        text = FENCE.sub("", doc.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            found = doc.parent / name if name else doc
            assert found.exists(), f"{doc.name} links to {target}"
            assert not anchor or anchor in anchors(found), f"{doc.name} links to {target}"
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("path", [*OWN, *UNITS], ids=lambda path: path.name)
def test_documents_hold_nothing_of_this_machine_and_nothing_open(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for foreign in (ROOT, ROOT.parent, Path.home()):
        if len(foreign.parts) > 1:
            assert not re.search(rf"(?<![\w.-]){re.escape(str(foreign))}/", text)
    assert not re.search(r"/home/\w|/Users/\w|\bTODO\b|\bFIXME\b|\bXXX\b|\btbd\b", text)
    assert text.endswith("\n")
    assert "\t" not in text


LOGGERS = {
    name
    for path in PACKAGE.rglob("*.py")
    for name in re.findall(r'getLogger\("([\w.]+)"\)', path.read_text(encoding="utf-8"))
}
"""The loggers with names of their own, which documents mention."""


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_backticked_names_of_the_package_exist(path: Path) -> None:
    """Modules, and `Class.method` names, that a document mentions in its text."""
    for name in CODE.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if re.fullmatch(r"[\w/]+\.py", name):
            assert any((base / name).exists() for base in (PACKAGE, PACKAGE / "host", ROOT)), name
        elif name in LOGGERS:
            continue
        elif match := re.fullmatch(r"provider_proxy\.([a-z_.]+)", name):
            assert importlib.util.find_spec(f"provider_proxy.{match[1]}"), name
        elif re.fullmatch(r"[A-Z]\w+Error", name):
            assert name in {*vars(errors), "IndexError"}, name


# --- systemd -------------------------------------------------------------------------------------


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(read(Path("systemd") / name))
    return parser


def test_service_unit_has_its_keys() -> None:
    service = unit("provider-proxy.service")["Service"]
    assert service["Type"] == "notify"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == str(cli.EXIT_USAGE)
    assert service["User"] == "provider-proxy"
    assert service["DevicePolicy"] == "closed"
    assert f"device:{service['DeviceAllow'].removesuffix(' rw')}" == Tpm().tcti
    assert f"/var/lib/{service['StateDirectory']}" == config_tables.DEFAULT_STATE_DIR
    assert service["StateDirectoryMode"] == "0700"
    assert "provider-proxy.toml" in service["ExecStart"]
    limits = config_tables.Limits()
    stop_s = int(service["TimeoutStopSec"].removesuffix("s"))
    assert stop_s > limits.drain_ms / 1000 + daemon.CLOSE_LIMIT_S
    assert int(service["LimitNOFILE"]) > limits.max_connections


def test_socket_unit_has_its_keys() -> None:
    sockets = unit("provider-proxy.socket")["Socket"]
    assert sockets["Accept"] == "no"
    assert (sockets["ListenStream"],) == config_tables.Listen().address


def test_verify_default_age_is_the_documented_one() -> None:
    assert verify.DEFAULT_MAX_AGE_S == 60
    assert "(default: 60)" in read("docs/reference.md")
