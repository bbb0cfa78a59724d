"""Asking until a host is judged whole has a deadline for the whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from provider_proxy.errors import ReplyError
from provider_proxy.evidence.logs.judge import LogJudge
from provider_proxy.evidence.model import QuoteRequest, TrustedHost
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.verify import MemoryHistory, Verifier
from provider_proxy.tenant import asking
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.replies import TOO_MANY
from provider_proxy.testing.soft_tpm import SoftTpm


class Busy:
    """Says 429 to every part of a list but the first, each time just before the asker gives up."""

    async def fetch(self, _request: QuoteRequest) -> bytes:
        await trio.sleep(asking.MAX_WAIT_S - 1)
        raise ReplyError("too many", status=TOO_MANY, retry_after_s=0.0)


async def test_a_proxy_that_is_always_busy_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    judge = SimpleNamespace(ima_ml_entry=1, policy=SimpleNamespace(needed_mask=0))
    with pytest.raises(ReplyError, match="no verdict within"):
        await asking.attest_whole(
            cast("ProxyClient", Busy()),
            Verifier(UnsafeAcceptAny()),
            TrustedHost(ak=SoftTpm().ak),
            MemoryHistory(),
            cast("LogJudge", judge),
            mask=1,
        )
    assert trio.current_time() == asking.WHOLE_LIMIT_S
