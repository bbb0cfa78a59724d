"""A host that was cured keeps its AK: what a thief has of it is worth nothing after `tpm ak renew`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG
from tpm2_pytss.types import (
    TPM2B_AUTH,
    TPM2B_NAME,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPMT_SIG_SCHEME,
)
from tpm2_pytss.utils import make_credential
from tpm_helpers import AK_HANDLE, Faults, raw_tpm, tool

from provider_proxy.errors import HostError, TpmError, UsageError
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters.ca_signer import open_ca_signer
from provider_proxy.host.quoters.local_tpm import open_quoter
from provider_proxy.host.quoters.renewal import Renewed, renew
from provider_proxy.host.quoters.tpm_opener import TpmOpener
from provider_proxy.host.tpm import renewal
from provider_proxy.host.tpm.chip import EkAuth, ek_session, open_context
from provider_proxy.testing.broker import Broker

pytestmark = pytest.mark.real

CA_HANDLE, COPY_HANDLE = 0x81000101, 0x81000177
FIRST, SECOND = b"f" * 16, b"s" * 32
NULL = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)


@dataclass
class Host:
    """A host with an AK that has signed."""

    chip: Broker
    folder: Path
    endorsement: Path | None = None

    @property
    def settings(self) -> Tpm:
        return Tpm(tcti=self.chip.tcti, max_duty=1.0, endorsement_auth_file=self.endorsement)

    @property
    def state_dir(self) -> Path:
        return self.folder / "s"

    def quoter(self) -> Any:
        return open_quoter(self.settings, self.state_dir, Metrics())

    def renew(self, endorsement: bytes) -> Renewed:
        opener = TpmOpener(self.settings, self.state_dir, host_uuid=None, open_context=open_context)
        return renew(opener, self.settings, self.state_dir, CA_HANDLE, endorsement)

    def configure(self, endorsement: bytes) -> None:
        self.endorsement = self.folder / "endorsement"
        self.endorsement.touch(mode=0o600)
        self.endorsement.write_bytes(endorsement + b"\n")

    def auth(self) -> bytes:
        return bytes.fromhex(json.loads((self.state_dir / "ak.json").read_text())["auth"])

    async def serves(self) -> bytes:
        """Quotes, and answers a registrar; the AK's name."""
        async with self.quoter() as quoter:
            public, _ = TPM2B_PUBLIC.unmarshal(quoter.identity.ek_public)
            made = make_credential(public, b"k" * 32, TPM2B_NAME(quoter.ak.name))
            blob, wrapped = (part.marshal() for part in made)
            assert await quoter.activate_credential(blob, wrapped) == b"k" * 32
            name: bytes = quoter.ak.name
            return name


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Broker]:
    with raw_tpm(tmp_path / "chip", Faults()) as chip:
        yield chip


@pytest.fixture
async def host(chip: Broker, tmp_path: Path) -> Host:
    made = Host(chip, tmp_path)
    await made.serves()
    return made


class Thief:
    """Was root once, and has taken what there was; may still open the TPM."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.auth = host.auth()
        context = open_context(host.chip.tcti)
        ak = context.tr_from_tpmpublic(AK_HANDLE)
        ek = context.tr_from_tpmpublic(host.settings.ek_handle)
        context.tr_set_auth(ak, self.auth)
        self.private = context.object_change_auth(ak, ek, TPM2B_AUTH(b"mine")).marshal()
        self.public = context.read_public(ak)[0].marshal()
        context.close()

    def load(self, context: ESAPI) -> ESYS_TR:
        ek = context.tr_from_tpmpublic(self.host.settings.ek_handle)
        private, _ = TPM2B_PRIVATE.unmarshal(self.private)
        public, _ = TPM2B_PUBLIC.unmarshal(self.public)
        with ek_session(context, EkAuth()) as session:
            return context.load(ek, private, public, session1=session)

    def leaves_a_copy(self) -> None:
        context = open_context(self.host.chip.tcti)
        loaded = self.load(context)
        context.evict_control(ESYS_TR.OWNER, loaded, COPY_HANDLE)
        context.flush_context(loaded)
        context.close()

    def signs(self) -> set[str]:
        """The ways in which he gets a signature of the AK."""
        ways = set()
        for way in ("authValue", "private part", "copy"):
            context = open_context(self.host.chip.tcti)
            loaded = None
            try:
                if way == "private part":
                    key = loaded = self.load(context)
                else:
                    handle = AK_HANDLE if way == "authValue" else COPY_HANDLE
                    key = context.tr_from_tpmpublic(handle)
                context.tr_set_auth(key, self.auth if way == "authValue" else b"mine")
                context.quote(key, "sha256:0", b"x", NULL)
                ways.add(way)
            except TSS2_Exception:
                pass
            finally:
                if loaded is not None:
                    context.flush_context(loaded)
                context.close()
        return ways


async def test_what_a_thief_has_is_worth_nothing_and_the_ak_is_the_same(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    thief = Thief(host)
    thief.leaves_a_copy()
    assert thief.signs() == {"authValue", "private part", "copy"}
    name = await host.serves()
    assert f"handle {COPY_HANDLE:#x} holds a copy of the AK" in caplog.text
    done = host.renew(FIRST)
    assert done == Renewed(ak_name=name, copies=(COPY_HANDLE,), ca_key=False)
    assert thief.signs() == set()
    host.configure(FIRST)
    assert await host.serves() == name  # found, not made: its EK needs the hierarchy's authValue
    again = Thief(host)
    host.renew(SECOND)
    assert again.signs() == thief.signs() == set()
    host.configure(SECOND)
    assert await host.serves() == name


async def test_clearing_the_tpm_gives_a_thief_nothing(host: Host) -> None:
    """The lockout's authValue is empty: any user who may open the TPM can clear it."""
    thief = Thief(host)
    host.renew(FIRST)
    tool(host.chip.tcti, "tpm2_clear", "-c", "lockout")
    ek = ("-c", f"{host.settings.ek_handle:#x}", "-G", "rsa")
    tool(host.chip.tcti, "tpm2_createek", *ek)  # the same EK as before
    assert thief.signs() == set()


async def test_without_the_hierarchy_s_part_it_would_be_worth_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why it has to be there: an old private part loads with an empty authValue."""
    thief = Thief(host)
    monkeypatch.setattr(renewal, "change_endorsement", lambda *_: None)
    host.renew(FIRST)
    assert thief.signs() == {"private part"}


async def test_the_vtpm_ca_s_key_too(host: Host) -> None:
    async with host.quoter() as quoter:
        before = await open_ca_signer(quoter, host.settings, host.state_dir, CA_HANDLE)
    stolen = bytes.fromhex(json.loads((host.state_dir / "vtpm-ca-key.json").read_text())["auth"])
    assert host.renew(FIRST).ca_key
    host.configure(FIRST)
    context = open_context(host.chip.tcti)
    key = context.tr_from_tpmpublic(CA_HANDLE)
    ek = context.tr_from_tpmpublic(host.settings.ek_handle)
    assert renewal.change_auth(context, key, ek, stolen, b"mine") is None
    context.close()
    async with host.quoter() as quoter:
        after = await open_ca_signer(quoter, host.settings, host.state_dir, CA_HANDLE)
        assert after.public == before.public
        assert await after.sign(b"d" * 32)


@pytest.mark.parametrize("commands", range(3), ids=["nothing", "emptied", "kept"])
async def test_one_that_is_interrupted_goes_on(
    host: Host, monkeypatch: pytest.MonkeyPatch, commands: int
) -> None:
    """The power fails after so many changes of persistent handles."""
    name = await host.serves()
    thief = Thief(host)
    real, left = ESAPI.evict_control, [commands]

    def evict_control(self: ESAPI, *words: Any, **more: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        done = real(self, *words, **more)
        if left[0] == 0 and commands == 2:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(ESAPI, "evict_control", evict_control)
    with pytest.raises(KeyboardInterrupt):
        host.renew(FIRST)
    monkeypatch.setattr(ESAPI, "evict_control", real)
    with pytest.raises(HostError, match="run `provider-proxy tpm ak renew` again"):
        await host.serves()
    assert host.renew(FIRST).ak_name == name
    host.configure(FIRST)
    assert await host.serves() == name
    assert thief.signs() == set()


async def test_one_that_ended_before_the_configuration_knew_may_be_run_again(host: Host) -> None:
    host.renew(FIRST)
    assert host.renew(FIRST).ak_name
    with pytest.raises(HostError, match="authValue is not the one in"):
        host.renew(SECOND)
    host.configure(FIRST)
    await host.serves()


async def test_what_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (b"", b"x" * 15, b"x" * 33):
        with pytest.raises(UsageError, match="16 to 32 bytes"):
            host.renew(bad)
    before = (host.state_dir / "ak.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("provider_proxy.host.tpm.chip.USER_WITH_AUTH", 0xFFFFFFFF)
        with pytest.raises(HostError, match="of the high range"):
            host.renew(FIRST)
    thief = Thief(host)
    thief.auth = b"another"
    context = open_context(host.chip.tcti)
    loaded = thief.load(context)
    context.evict_control(ESYS_TR.OWNER, context.tr_from_tpmpublic(AK_HANDLE), AK_HANDLE)
    with pytest.raises(HostError, match="is empty"):
        host.renew(FIRST)
    context.evict_control(ESYS_TR.OWNER, loaded, AK_HANDLE)
    context.flush_context(loaded)
    context.close()
    with pytest.raises(HostError, match="does not accept the authValue in state_dir"):
        host.renew(FIRST)
    assert (host.state_dir / "ak.json").read_bytes() == before
    (host.state_dir / "ak.json").unlink()
    with pytest.raises(HostError, match="no AK to renew"):
        host.renew(FIRST)
    host.configure(FIRST)
    with pytest.raises(UsageError, match="make another one"):
        host.renew(FIRST)


def test_a_chip_that_fails_is_not_a_wrong_authvalue() -> None:
    class Failing:
        def object_change_auth(self, *_: object) -> None:
            raise TSS2_Exception(0x101)

        def tr_set_auth(self, *_: object) -> None: ...

    with pytest.raises(TpmError, match="TPM2_ObjectChangeAuth"):
        renewal.change_auth(Failing(), ESYS_TR.NONE, ESYS_TR.NONE, b"", b"")
