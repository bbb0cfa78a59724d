"""The authValue and name of the AK, or of the vTPM CA's key, kept 0600 in the state directory.

The authValue keeps other programs that may open the TPM device from using the key; by the name a later
start notices that the TPM has been cleared or replaced. Written before the key is made, so that a crash
cannot leave a key in the TPM whose authValue is unknown.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from provider_proxy.common.files import is_there, read_secret, write_private
from provider_proxy.errors import EvidenceFormatError, HostError
from provider_proxy.evidence.strict_json import Fields, parse_json_object

MAX_PART_BYTES = 2048  # of a key's public or private part
AUTH_BYTES = 32  # the length of the AK's name hash: the longest authValue that a TPM keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """A key with another authValue, on its way to the key's handle.

    Attributes:
        public, private: TPM2B_PUBLIC and TPM2B_PRIVATE.
    """

    auth: bytes = field(repr=False)
    public: bytes
    private: bytes = field(repr=False)


class AkStore:
    """`ak.json` in the state directory, or another key's file.

    Args:
        key: the key's name for people.
        handle: the configuration key of its handle.
        file: its name.
        after: what has to be done after a new key was made.

    Attributes:
        renewal: one that has started and not finished; the handle may hold the old key, the new one,
            or none.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        key: str = "AK",
        handle: str = "tpm.ak_handle",
        file: str = "ak.json",
        after: str = "tenants must then pin the host again",
    ) -> None:
        self._path = state_dir / file
        self._key = key
        self._handle = handle
        self._after = after
        self._auth = b""
        self._name = b""
        self.renewal: Renewal | None = None
        if is_there(self._path):
            self._load()

    def _load(self) -> None:
        try:
            name = self._path.name
            fields = Fields(parse_json_object(read_secret(name, self._path), name), name)
            self._auth = fields.hex("auth", AUTH_BYTES)
            self._name = fields.hex("name", 66) if "name" in fields else b""
            if "next_auth" in fields:
                self.renewal = Renewal(
                    auth=fields.hex("next_auth", AUTH_BYTES),
                    public=fields.hex("next_public", MAX_PART_BYTES),
                    private=fields.hex("next_private", MAX_PART_BYTES),
                )
        except EvidenceFormatError as exc:
            raise HostError(f"{self._path} is damaged: {exc}") from exc

    def auth_for(self, is_new: bool) -> bytes:
        """The authValue of the existing key, or of the one that is about to be made.

        Raises:
            HostError: the handle holds a key whose authValue we do not have, or our key has gone.
        """
        if self.renewal is not None:
            raise HostError(
                f"the renewal of the {self._key}'s authValue was not finished: run "
                "`provider-proxy tpm ak renew` again"
            )
        if is_new and self._name:
            raise HostError(
                f"the TPM no longer holds the {self._key} {self._name.hex()}: it was cleared or "
                f"replaced. Remove {self._path} to make a new one; {self._after}"
            )
        if is_new and not self._auth:
            self._auth = secrets.token_bytes(AUTH_BYTES)
            self._save()
        if not self._auth:
            raise HostError(
                f"{self._handle} holds a key, but {self._path} with its authValue is missing; "
                f"restore this file, choose another {self._handle}, or evict that key"
            )
        return self._auth

    @property
    def known(self) -> tuple[bytes, bytes] | None:
        """The key's authValue and name; None if it has never signed."""
        return (self._auth, self._name) if self._auth and self._name else None

    def begin(self, renewal: Renewal) -> None:
        """Store a renewal, so that it can be finished whatever happens. Raises: HostError."""
        self.renewal = renewal
        self._save()

    def finish(self) -> None:
        """Make the new authValue the key's. Raises: HostError."""
        if self.renewal is not None:
            self._auth, self.renewal = self.renewal.auth, None
            self._save()

    def confirm(self, name: bytes) -> None:
        """Store the key's name once it has signed for the first time.

        Raises:
            HostError: it is not the key that was used before.
        """
        if self._name and self._name != name:
            raise HostError(
                f"{self._handle} holds the {self._key} {name.hex()}, but it was {self._name.hex()} "
                f"before; it was left unchanged. If this change is intended, remove {self._path}"
            )
        if not self._name:
            self._name = name
            self._save()

    def _save(self) -> None:
        values = {"auth": self._auth.hex()}
        if self._name:
            values["name"] = self._name.hex()
        if self.renewal is not None:
            values["next_auth"] = self.renewal.auth.hex()
            values["next_public"] = self.renewal.public.hex()
            values["next_private"] = self.renewal.private.hex()
        write_private(self._path, json.dumps(values).encode("ascii"))
