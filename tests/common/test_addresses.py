"""One reader of addresses and URLs: every setting, option and client says the same of one text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider_proxy.cli import arguments
from provider_proxy.cli.main import build_parser
from provider_proxy.common.addresses import (
    MAX_UNIX_BYTES,
    MUST_ADDRESS,
    authority,
    is_loopback,
    is_safe_url,
    parse_address,
    parse_agent_id,
    parse_contact,
    parse_host,
    parse_safe_url,
    parse_url,
    split_address,
)
from provider_proxy.errors import ConfigError, UsageError
from provider_proxy.host.config.load import parse_config
from provider_proxy.tenant.hosts_file import parse_link_map
from provider_proxy.tenant.watch.config import parse_watch_config
from provider_proxy.trust.registrar import AgentRecords

URLS = {
    "https://host:8890": "https://host:8890",
    "HTTPS://Host.Example": "https://host.example",
    "https://host:8890/": "https://host:8890",
    "https://r_1:8891/base/": "https://r_1:8891/base",
    "https://192.0.2.7": "https://192.0.2.7",
    "https://[2001:DB8:0::7]:1": "https://[2001:db8::7]:1",
    "http://127.0.0.1:1": "http://127.0.0.1:1",
    "http://LOCALHOST:65535": "http://localhost:65535",
    "http://[::1]": "http://[::1]",
    "https://xn--bcher-kva.example": "https://xn--bcher-kva.example",
    "https://xn--strae-oqa.example": "https://xn--strae-oqa.example",  # IDNA 2008 alone has it
}
BAD_URLS = {
    "": "is not an http or https URL",
    "host:8890": "is not an http or https URL",
    "ftp://host": "is not an http or https URL",
    "https://": "has no host",
    "https://:8890": "has no host",
    "https://host:0": '"0" is not a port: ports are 1 to 65535',
    "https://localhost:99999": '"99999" is not a port: ports are 1 to 65535',
    "https://host:": '"" is not a port',
    "https://host:\u0661": "is not a port",
    "https://host: 1": "is not a port",
    "https://xn--a:1": '"xn--a" is not a valid xn-- name',
    "https://::1:8890": "must be in brackets",
    "https://[::1": "a bracket too few",
    "https://[127.0.0.1]": "an IPv4 address has no brackets",
    "https://[host]:1": "neither an IP address nor the name",
    "https://[fe80::1%eth0]:1": "has no host",
    "https://10.0.0.256": "is not an IP address",
    "https://0x7f.1": "is not an IP address",
    "https://2130706433": "is not an IP address",
    "https://a b": "neither an IP address nor the name",
    "https://a~b": "neither an IP address nor the name",
    "https://host.": "neither an IP address nor the name",
    "https://-host": "neither an IP address nor the name",
    "https://registr\u00e4r.example": "is not ASCII: write the name with xn--",
    "https://host/a b": "must be written as %XX",
    "https://host/%zz": "must be written as %XX",
    "https://host/\\x": "must be written as %XX",
    "https://host#x": "is not an http or https URL",
    "https://host/?x": "leave out what follows the ?",
    "https://user:word@host": "must not hold a user or a password",
    f"https://{'a.' * 1024}a": "more than 2048 characters",
    "http://192.0.2.7": "goes over the network in the clear",
    "http://localhost.example": "goes over the network in the clear",
    "http://127.0.0.1.example": "goes over the network in the clear",
}


@pytest.mark.parametrize(("text", "written"), URLS.items())
def test_good_urls_have_one_writing(text: str, written: str) -> None:
    assert parse_safe_url(text) == written
    assert parse_safe_url(written) == written
    httpx.URL(written)  # and our client takes it


@pytest.mark.parametrize(("text", "words"), BAD_URLS.items())
def test_bad_urls(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_safe_url(text)
    assert words in str(caught.value)
    assert not is_safe_url(text)
    assert len(str(caught.value)) < 400
    assert "word@" not in str(caught.value)


def test_a_webhook_may_have_a_query() -> None:
    text = "https://hooks.example/services/T0/B0?token=a%20b&x=/"
    assert parse_safe_url(text, query=True) == text
    with pytest.raises(UsageError) as caught:
        parse_url("https://hooks.example:0/?token=geheim", query=True)
    assert "geheim" not in str(caught.value)


def _watch(text: str) -> None:
    host = {"provider_ip": "192.0.2.7", "insecure_any_state": True, "registrar": "r", "uuid": "u"}
    registrar = {"url": text, "insecure_no_ek": True}
    parse_watch_config({"hosts": {"h": host}, "registrars": {"r": registrar}})


def _webhook(text: str) -> None:
    host = {"provider_ip": "192.0.2.7", "insecure_any_state": True}
    parse_watch_config({"hosts": {"h": host}, "webhook": {"url": text, "secret_file": "/s"}})


def _hosts_file(text: str) -> None:
    host = {"url": text, "insecure_any_state": True}
    parse_link_map({"pins": "/p", "hosts": {"h": host}, "agents": {}}, Path("/"))


def _daemon(text: str) -> None:
    listen = {"insecure_plaintext": True}
    parse_config({"listen": listen, "registrars": {"r": {"url": text}}})


def _agent(text: str) -> None:
    agent = {"url": text, "registrar_url": "https://r", "agent_id": "a", "insecure_no_ek": True}
    agent |= {"client_cert": "/c", "client_key": "/k"} if text.lower().startswith("https") else {}
    listen = {"insecure_plaintext": True}
    parse_config({"listen": listen, "quoter": {"kind": "keylime-agent"}, "keylime_agent": agent})


def _library(text: str) -> None:
    async def make() -> None:
        async with httpx.AsyncClient() as http:
            AgentRecords(http, text)

    asyncio.run(make())


def _option(text: str) -> None:
    try:
        build_parser("identity").parse_args(["identity", "--", text])
    except SystemExit as exc:
        raise UsageError(str(exc.code)) from exc


READERS: list[Callable[[str], None]] = [
    *(_watch, _webhook, _hosts_file, _daemon, _agent, _library, _option)
]


@pytest.mark.parametrize("text", [*URLS, *BAD_URLS])
def test_all_readers_agree(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """But for two that are meant: a webhook's query, and a registrar with plain HTTP said to be."""
    verdicts = {}
    for reader in READERS:
        try:
            reader(text)
        except UsageError:
            verdicts[reader.__name__] = False
        else:
            verdicts[reader.__name__] = True
    capsys.readouterr()
    if text == "https://host/?x":
        assert verdicts.pop("_webhook")
    if text.lower().startswith("http://"):
        assert not verdicts.pop("_daemon")  # wants insecure_plaintext beside it
    assert set(verdicts.values()) == {text in URLS}, verdicts


@given(st.text(alphabet="htps:/[]@?#%.0123456789abxn-_ \\\u00e4", max_size=60))
def test_what_is_accepted_is_read_alike_by_httpx(text: str) -> None:
    try:
        url = parse_url("https://" + text, query=True)
    except UsageError:
        return
    theirs = httpx.URL(str(url))
    assert theirs.raw_host.decode() == url.host
    assert theirs.port == (None if url.port in (None, 443) else url.port)
    assert parse_url(str(url), query=True) == url


ADDRESSES = {
    "127.0.0.1:0": "127.0.0.1:0",
    "LocalHost:8890": "localhost:8890",
    "[::0]:443": "[::]:443",
    "[fe80::1%eth0]:1": "[fe80::1%eth0]:1",
    "unix:/run/x": "unix:/run/x",
}
BAD_ADDRESSES = {
    "*:8890": '"*" is not an address: every interface is "0.0.0.0" in IPv4 and "[::]" in IPv6',
    "https://host:8890": "is a URL: leave out what is before the host",
    "8890": "has no port",
    ":8890": "has no host",
    "127.0.0.1": "has no port",
    "::1:8890": "must be in brackets",
    "127.0.0.1:65536": '"65536" is not a port: ports are 0 to 65535',
    "unix:run/x": "the path of a unix socket must be absolute",
    "unix:/" + "ä" * 54: f"may have {MAX_UNIX_BYTES} bytes, and this one has 109",
}


@pytest.mark.parametrize(("text", "written"), ADDRESSES.items())
def test_addresses_to_listen_on(text: str, written: str) -> None:
    assert parse_address(text) == written


@pytest.mark.parametrize(("text", "words"), BAD_ADDRESSES.items())
def test_bad_addresses_to_listen_on(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"listen": {"insecure_plaintext": True, "address": text}})
    assert str(caught.value).startswith(f"listen.address must be {MUST_ADDRESS}: ")
    assert words in str(caught.value)
    assert caught.value.key == "listen.address"


def test_the_longest_path_of_a_socket_is_fine() -> None:
    address = "unix:/" + "x" * (MAX_UNIX_BYTES - 1)
    assert parse_address(address) == address


@pytest.mark.parametrize("text", ["2001:db8::7", "[2001:DB8::7]"])
def test_a_lone_ipv6_address_with_and_without_brackets(text: str) -> None:
    assert parse_host(text) == "2001:db8::7"
    config = parse_watch_config({"hosts": {"h": {"provider_ip": text, "insecure_any_state": True}}})
    assert config.hosts["h"].provider_ip == "2001:db8::7"
    assert authority(config.hosts["h"].provider_ip, 8890) == "[2001:db8::7]:8890"
    assert split_address("[2001:db8::7]:8890") == ("2001:db8::7", 8890)


AGENT_IDS = {"a~b": True, "r_1": True, "A" * 80: True, "A" * 81: False, "-a": False, "a/b": False}


@pytest.mark.parametrize(("text", "good"), AGENT_IDS.items())
def test_agent_ids_are_the_same_everywhere(text: str, good: bool) -> None:
    def watch() -> None:
        host = {"provider_ip": "192.0.2.7", "insecure_any_state": True, "uuid": text}
        parse_watch_config({"hosts": {"h": host}})

    def registrar() -> None:
        table = {"url": "https://r", "agent_id": text}
        parse_config({"listen": {"insecure_plaintext": True}, "registrars": {"r": table}})

    def hosts_file() -> None:
        host = {"url": "https://h", "insecure_any_state": True}
        vm = "00000000-0000-0000-0000-000000000001"
        agents = {text: {"vm": vm, "hosts": ["h"]}}
        parse_link_map({"pins": "/p", "hosts": {"h": host}, "agents": agents}, Path("/"))

    for read in (lambda: parse_agent_id(text), watch, registrar, hosts_file):
        if good:
            read()
        else:
            with pytest.raises(UsageError):
                read()


@pytest.mark.parametrize(
    "text", ["host:1", "192.0.2.7", "192.0.2.7:0", "2001:db8::7:1", "[fe80::1%1]:1", "[::1]", ""]
)
def test_contacts_are_ip_addresses_with_a_port(text: str) -> None:
    with pytest.raises(UsageError):
        parse_contact(text)


@pytest.mark.parametrize("host", ["127.9.9.9", "::1", "LocalHost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


def test_an_option_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser("pin")
    argv = ["pin", "add", "h", "--pins", "p", "--registrar", "https://localhost:99999"]
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    assert caught.value.code == 2
    assert (
        "argument --registrar: must be an https URL (http:// is for loopback only): "
        '"https://localhost:99999": "99999" is not a port'
    ) in (capsys.readouterr().err)
    assert arguments.safe_url("HTTPS://A") == "https://a"
