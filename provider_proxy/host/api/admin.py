"""The operator's server: health, metrics, and status as JSON and as a page, registrations.

Everything here only reads. The listener has no password, so `config` allows loopback and unix sockets
only. A web page in the operator's browser must not read it through a DNS name that points at
127.0.0.1: a request whose Host names anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources

from provider_proxy.common.pages import NO_SNIFF, check_host, page_headers
from provider_proxy.evidence.wire import encode_envelope
from provider_proxy.host.api.tenant import Registrations, no_query, route
from provider_proxy.host.http.messages import HTML, TEXT, WHAT_IS_ALLOWED, Request, Response
from provider_proxy.host.metrics import Metrics

PAGE = "status.html"


class AdminApi:
    """The handler of the operator's listeners.

    Args:
        not_ready: why the daemon cannot serve now; None while it can.
        status: what `GET /status` tells.
        registrations: what `GET /registrations` tells.
        vms: the VMs in the registry of vTPMs; None without a registry.
    """

    def __init__(
        self,
        metrics: Metrics,
        not_ready: Callable[[], str | None],
        status: Callable[[], Mapping[str, object]],
        registrations: Callable[[], Registrations] = tuple,
        *,
        vms: Callable[[], Sequence[Mapping[str, object]]] | None = None,
    ) -> None:
        self._metrics = metrics
        self._not_ready = not_ready
        self._status = status
        self._registrations = registrations
        self._vms = vms
        self._page = resources.files("provider_proxy").joinpath(PAGE).read_bytes()
        self._page_headers = page_headers(self._page)
        self._routes = {
            "/": self._get_page,
            "/status": self._get_status,
            "/healthz": self._health,
            "/readyz": self._ready,
            "/metrics": self._get_metrics,
            "/registrations": self._get_registrations,
            "/vms": self._get_vms,
        }

    async def __call__(self, request: Request) -> Response:
        """Answer a request. Raises: RequestError."""
        if request.peer.uid is None:  # a browser cannot be made to speak to a unix socket
            check_host(request.host)
        if request.method == "OPTIONS":
            return WHAT_IS_ALLOWED
        return await route(self._routes, request)(request)

    async def _get_page(self, request: Request) -> Response:
        no_query(request)
        return Response(body=(self._page,), content_type=HTML, headers=self._page_headers)

    async def _get_status(self, request: Request) -> Response:
        no_query(request)
        return Response(
            body=(encode_envelope(200, "Success", self._status()),), headers=(NO_SNIFF,)
        )

    async def _health(self, _request: Request) -> Response:
        return Response(body=(encode_envelope(200, "alive", {}),))

    async def _ready(self, _request: Request) -> Response:
        why = self._not_ready()
        status = 200 if why is None else 503
        return Response(
            status=status,
            body=(encode_envelope(status, why or "ready", {}),),
            reason="ok" if why is None else "not ready",
        )

    async def _get_metrics(self, _request: Request) -> Response:
        return Response(body=(self._metrics.text(),), content_type=TEXT)

    async def _get_registrations(self, request: Request) -> Response:
        no_query(request)
        results = {"registrations": list(self._registrations())}
        return Response(body=(encode_envelope(200, "Success", results),), headers=(NO_SNIFF,))

    async def _get_vms(self, request: Request) -> Response:
        no_query(request)
        listed = list(self._vms()) if self._vms is not None else []
        results = {"enabled": self._vms is not None, "vms": listed}
        return Response(body=(encode_envelope(200, "Success", results),), headers=(NO_SNIFF,))
