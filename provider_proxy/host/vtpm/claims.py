"""The claims about a VM that go into its tenant's leaf.

Called at admission and again at the seal, on the event loop: two dict look-ups, whatever the answer.
A VM that is unknown, another tenant's, not running, or without a known EK gets the same error after
the same time, so that a tenant cannot tell these apart.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable

from provider_proxy.errors import NotFoundError
from provider_proxy.evidence.model import QuoteRequest, Tenant
from provider_proxy.host.vtpm.entries import CONFIRMED, Entry

NO_SUCH_VM = "no VM of yours with this UUID runs on this host"

Look = Callable[[uuid.UUID], Entry | None]


class Claims:
    """A `batcher.ClaimsSource` over what is known of VMs.

    Args:
        look: the entry of a VM that runs here now, None for any other: `VtpmService.running_entry`.
    """

    def __init__(self, look: Look) -> None:
        self._look = look

    def __call__(self, tenant: Tenant, request: QuoteRequest) -> bytes:
        """The claims about the VM that a request names.

        Raises:
            NotFoundError: there are no such claims for this tenant.
        """
        assert request.vm is not None
        entry = self._look(request.vm)
        is_own = request.vm in tenant.vms
        if entry is None or not is_own or not entry.eks:
            raise NotFoundError(NO_SUCH_VM)
        return encode_claims(entry)


def encode_claims(entry: Entry) -> bytes:
    """An entry as the leaf's claims: JSON in UTF-8, keys as docs/vtpm.md has them."""
    values = {
        "vm": str(entry.vm),
        "eks": [{"alg": ek.alg, "spki_sha256": ek.spki_sha256} for ek in entry.eks],
        "running": entry.running,
        "state": entry.state,
        "confirmed": entry.state == CONFIRMED,
        "issuer": entry.issuer,
        "migrated": entry.migrated,
        "generation": entry.generation,
        "registered_at": entry.registered_at,
    }
    return json.dumps(values, separators=(",", ":")).encode("ascii")


def entry_values(entry: Entry) -> dict[str, object]:
    """An entry for the operator: the claims, and facts that tenants do not see."""
    values: dict[str, object] = json.loads(encode_claims(entry))
    spire = [ek.spire for ek in entry.eks if ek.spire]
    return {"name": entry.name, **values, "spire": spire, "changed_at": entry.changed_at}
