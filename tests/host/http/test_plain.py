"""The plain GET's expression against h11, which is the judge; and our responses as h11 reads them.

FUZZ_SEED repeats or changes what is tried; FUZZ_CASES makes it longer."""

from __future__ import annotations

import os
import random
import re

import h11
import pytest

from provider_proxy.host.http import plain
from provider_proxy.host.http.messages import MAX_TARGET_CHARS, REASONS, Response
from provider_proxy.host.http.plain import client_certs, plain_get, response_head

SEED = int(os.environ.get("FUZZ_SEED", "1"))
CASES = int(os.environ.get("FUZZ_CASES", "40000"))

GOOD = b"GET /verifier/quote?nonce=abc&mask=0x1 HTTP/1.1\r\nHost: proxy:8890\r\n\r\n"
BEGINS = (
    GOOD,
    GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
    b"GET /version HTTP/1.1\r\nConnection: keep-alive\r\nAccept: */*\r\nhost: a\r\nX: y\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: a\r\nClient-Cert: :AAAA:\r\nClient-Cert-Chain: :A=:, :B:\r\n\r\n",
    b"GET / HTTP/1.1\r\nconnection:close\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n",
)
TARGETS = (
    *(b"/", b"/verifier/quote?nonce=a%00&mask=0x1", b"//a", b"/a?b?c#d", b'/"<>^`{|}', b"*"),
    *(b"http://proxy/a", b"a", b"", b"/a b", b"/\x7f", b"/\xe9", b"/\x00", b"/\t"),
    *(b"/" + b"x" * length for length in (2046, 2047, 2048, 3000)),
)
VERSIONS = (b"HTTP/1.1",) * 5 + (
    b"HTTP/1.0",
    b"HTTP/1.2",
    b"HTTP/2.0",
    b"http/1.1",
    b"HTTP/1.1 ",
    b"",
)
HEADERS = (
    *(b"Host: proxy",) * 6,
    *(b"host:proxy", b"HOST: \t[::1]:8890", b"Host:", b"Host: a ", b"Host: a b", b"Host : a"),
    *(b"Accept: */*", b"User-Agent: python-httpx/0.27.0", b'Cookie: a=b; c="d"', b"X:", b"X: "),
    *(b"X: \t a\t b \t", b"X-Host: a", b"Hostile: a", b"TEst: a", b"T: a", b"X : a", b": a", b"X"),
    *(b"Connection: keep-alive", b"connection:Keep-Alive", b"Connection:  keep-alive"),
    *(b"Client-Cert: :AAAA:", b"client-CERT:\t:B: ", b"Client-Cert:", b"Client-Cert-Chain:a,b"),
    *(b"X-Client-Cert: a", b"Client-Certs: a", b"Client-Cert-: a", b"Client-Cert : a"),
    *(b"X: Connection: close", b"Connection:CLOSE", b"Connection: closed", b"Connection:\tclose"),
    *(
        b"Connection: close",
        b"Connection: keep-alive, close",
        b"Connection: Upgrade",
        b"Connection:",
    ),
    *(b"Content-Length: 0", b"content-length:5", b"Content-Length: 0, 0", b"Content-Length : 5"),
    *(b"Transfer-Encoding: chunked", b"transfer-encoding:gzip", b"Transfer-Encoding\t: chunked"),
    *(b"Upgrade: h2c", b"Expect: 100-continue", b"TE: trailers", b"Trailer: X", b" folded: a"),
    *(b"X: \x00", b"X: \x7f", b"X: a\rb", b"X: \xe9", b"X\x01: a", b"X(: a", b"X: " + b"y" * 9000),
)
LINE_ENDS = (b"\r\n",) * 12 + (b"\n", b"\r", b"\r\r\n", b"\n\r\n")
NEXT = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nClient-Cert: :AAAA:\r\n\r\n"
BEHIND = (b"", b"", NEXT, b"x", b"\r\n", b"5\r\nhello\r\n0\r\n\r\n")


def composed(dice: random.Random) -> bytes:
    """A head of parts, good ones and bad ones."""
    method = dice.choice((b"GET",) * 9 + (b"get", b"HEAD", b"POST", b"GET\t", b"\r\nGET"))
    lines = [
        method + b" " + dice.choice(TARGETS) + b" " + dice.choice(VERSIONS),
        *dice.choices(HEADERS, k=dice.choice((0, 1, 1, 1, 2, 2, 3, 5))),
    ]
    if dice.randrange(2):
        lines.insert(dice.randrange(1, len(lines) + 1), b"Host: a")
    lines.append(b"")
    return b"".join(line + dice.choice(LINE_ENDS) for line in lines) + dice.choice(BEHIND)


def damaged(dice: random.Random) -> bytes:
    """A good request with a few bytes flipped, inserted, repeated or cut off."""
    data = bytearray(dice.choice(BEGINS))
    for _ in range(dice.choice((0, 1, 1, 2, 3))):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(4):
            case 0 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                data[at:at] = dice.choice((*HEADERS, b"\r\n", b"\n", b" ", b"\x00"))
            case 2:
                data[at:at] = data[at : at + dice.randrange(30)]
            case _:
                del data[at : at + dice.randrange(4)]
    return bytes(data) + dice.choice(BEHIND)


def judge(data: bytes) -> tuple[bytes, bytes, bytes, bool]:
    """What h11 says of a request that is one: target, Host, what it left unread, and whether it keeps the
    connection."""
    conn = h11.Connection(h11.SERVER, max_incomplete_event_size=16 * 1024)
    conn.receive_data(data)
    head = conn.next_event()
    assert isinstance(head, h11.Request), head
    assert (head.method, head.http_version) == (b"GET", b"1.1")
    (host,) = (value for name, value in head.headers if name == b"host")
    assert isinstance(conn.next_event(), h11.EndOfMessage)
    assert conn.their_state in (h11.DONE, h11.MUST_CLOSE)
    return head.target, host, conn.trailing_data[0], conn.their_state is h11.DONE


def front_headers(data: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What h11 reads of a front's two headers."""
    conn = h11.Connection(h11.SERVER, max_incomplete_event_size=16 * 1024)
    conn.receive_data(data)
    head = conn.next_event()
    assert isinstance(head, h11.Request)
    certs, chains = (
        tuple(value.decode("ascii") for name, value in head.headers if name == wanted)
        for wanted in (b"client-cert", b"client-cert-chain")
    )
    return certs, chains


def test_what_is_taken_is_what_h11_reads() -> None:
    dice = random.Random(SEED)
    taken, last, fronts = 0, 0, 0
    for number in range(CASES):
        data = (composed if number % 2 else damaged)(dice)
        found = plain_get(data)
        if found is None:
            continue
        taken += 1
        target, host, end, keeps = found
        last += not keeps
        assert (target.encode(), host.encode(), data[end:], keeps) == judge(data), data
        assert len(target) <= MAX_TARGET_CHARS
        certs = client_certs(data[:end])
        fronts += any(certs)
        assert certs == front_headers(data), data
    assert CASES / 20 < taken < CASES / 2, taken  # neither nothing nor everything
    assert taken / 100 < last < taken / 2, last
    assert taken / 100 < fronts < taken / 2, fronts


@pytest.mark.parametrize(
    "head",
    [
        GOOD,
        b"GET / HTTP/1.1\r\nhost:a\r\nConnection: keep-alive\r\nAccept: */*\r\n\r\n",
        b"GET / HTTP/1.1\r\nAccept: */*\r\nHost: a\r\nX:\r\n\r\nGET /2",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Close\r\nConnection: keep-alive\r\n\r\n",
        b"GET /" + b"x" * (MAX_TARGET_CHARS - 1) + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_plain_requests_are_taken(head: bytes) -> None:
    assert plain_get(head) is not None
    judge(head)


@pytest.mark.parametrize(
    "damage",
    [
        lambda head: head[:-1],
        lambda head: head.replace(b"Host: proxy:8890\r\n", b""),
        lambda head: head.replace(b"\r\n\r\n", b"\r\nHost: b\r\n\r\n"),
        lambda head: head.replace(b"\r\n", b"\n"),
        lambda head: head.replace(b"GET", b"HEAD"),
        lambda head: head.replace(b"1.1", b"1.0"),
        lambda head: head.replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n"),
        lambda head: head.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"),
        lambda head: head.replace(b"\r\n\r\n", b"\r\nConnection: close, x\r\n\r\n"),
        lambda head: head.replace(b"\r\n\r\n", b"\r\nUpgrade: h2c\r\n\r\n"),
        lambda head: head.replace(b"\r\n\r\n", b"\r\n folded\r\n\r\n"),
        lambda head: head.replace(b"\r\n\r\n", b"\r\nX : a\r\n\r\n"),
        lambda head: head.replace(b"/verifier", b"/" + b"x" * MAX_TARGET_CHARS),
        lambda head: b"\r\n" + head,
        lambda head: b"",
    ],
)
def test_everything_else_is_left_to_h11(damage: object) -> None:
    assert callable(damage)
    assert plain_get(damage(GOOD)) is None


def test_no_quantifier_goes_back() -> None:
    """Each is possessive, so the time is linear in what comes; one that goes back can take its square."""
    pattern = re.sub(rb"\[[^]]*\]", b"C", plain._PLAIN_GET.pattern)
    pattern = re.sub(rb"\(\?(?:i:|:|!)", b"(", pattern).replace(rb"\.", b"")
    quantifiers = re.findall(rb"(?:[*+?]|\{[0-9,]+\})\+?", pattern)
    assert len(quantifiers) > 8
    assert all(quantifier.endswith(b"+") and len(quantifier) > 1 for quantifier in quantifiers)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("status", sorted(REASONS))
def test_a_response_is_one_to_h11(status: int, keeps: bool) -> None:
    body = (b"{", b'"a":1', b"}")
    response = Response(status=status, body=body, headers=((b"Retry-After", b"3"),))
    conn = h11.Connection(h11.CLIENT)
    conn.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    conn.send(h11.EndOfMessage())
    conn.receive_data(response_head(response, b"Sat, 28 Nov 2026 08:00:00 GMT", keeps=keeps))
    conn.receive_data(b"".join(body))
    head = conn.next_event()
    assert isinstance(head, h11.Response)
    assert (head.status_code, head.reason) == (status, REASONS[status])
    assert dict(head.headers)[b"retry-after"] == b"3"
    data = conn.next_event()
    assert isinstance(data, h11.Data)
    assert data.data == b'{"a":1}'
    assert isinstance(conn.next_event(), h11.EndOfMessage)
    assert (conn.their_state is h11.DONE) == keeps
