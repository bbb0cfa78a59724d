"""The dashboard and the alert rules speak of metrics that exist, and each alert fires when it should."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_helpers import read
from monitoring import (
    check_alerts,
    check_dashboard,
    check_names,
    check_panels,
    needs_promtool,
    promtool,
    series,
)
from places import DOCS
from status_helpers import HANDSHAKE_FAILURES

from provider_proxy.host.metrics import Metrics
from provider_proxy.tenant.bridge.metrics import BridgeMetrics
from provider_proxy.tenant.watch.metrics import WatchMetrics

RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(read("docs/alerts.yml"))["groups"] for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads(read("docs/grafana-dashboard.json"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
TARGETS = [(panel["title"], t["expr"]) for panel in PANELS for t in panel.get("targets", ())]


SERIES = series(Metrics().registry, WatchMetrics().registry, BridgeMetrics().registry)
# --- the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_names_metrics_that_exist_and_is_explained(rule: dict[str, Any]) -> None:
    if rule["alert"] != "ProviderProxyDown":
        check_names(rule["expr"], SERIES)
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"]["summary"]
    page, anchor = rule["annotations"]["runbook"].split("#")
    assert page == "docs/monitoring.md"
    assert anchor == rule["alert"].lower()


def test_each_rule_has_a_section_and_no_more() -> None:
    listed = re.findall(r"^### (ProviderProxy\w+)$", read("docs/monitoring.md"), re.MULTILINE)
    assert listed == list(dict.fromkeys(listed))
    assert sorted(listed) == sorted(rule["alert"] for rule in RULES)


def test_a_name_that_does_not_exist_is_seen() -> None:
    for expr in (
        "provider_proxy_queues",
        "provider_proxy_requests",  # a counter is asked for with _total
        'provider_proxy_requests_total{outcome="x"}',
        "sum by (code) (provider_proxy_queue)",
    ):
        with pytest.raises(AssertionError):
            check_names(expr, SERIES)


def test_reasons_in_rules_are_those_of_the_code() -> None:
    text = read("docs/alerts.yml")
    for reason in re.findall(r'reason="(\w+)"', text):
        assert f"`{reason}`" in read("docs/http-api.md")
    for reason in HANDSHAKE_FAILURES:
        assert f"`{reason}`" in read("docs/monitoring.md")


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", DOCS / "alerts.yml")
    assert done.returncode == 0, done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


# alert: series that make it fire, and labels of the alert beside `instance`
FIRES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "ProviderProxyDown": ({"up": "0x120"}, {"job": "provider-proxy"}),
    "ProviderProxySelfCheckFailed": (
        {"provider_proxy_selfcheck_failures_total": "0x100 1x20"},
        {"job": "provider-proxy"},
    ),
    "ProviderProxyTpmOutOfOrder": (
        {"provider_proxy_tpm_circuit_open": "1x120"},
        {"job": "provider-proxy"},
    ),
    "ProviderProxyBatchesFail": (
        {
            'provider_proxy_batches_total{outcome="ok"}': "0+90x120",
            'provider_proxy_batches_total{outcome="QuoteError"}': "0+10x120",
        },
        {},
    ),
    "ProviderProxyTpmErrors": (
        {'provider_proxy_tpm_errors_total{code="RETRY", step="again"}': "0+6x120"},
        {"code": "RETRY"},
    ),
    "ProviderProxyOverloaded": (
        {
            'provider_proxy_requests_total{reason="ok", status="200"}': "0+90x120",
            'provider_proxy_requests_total{reason="OverloadedError", status="503"}': "0+10x120",
        },
        {},
    ),
    "ProviderProxyDutyAtCap": (
        {"provider_proxy_duty": "0.49x120", "provider_proxy_max_duty": "0.5x120"},
        {"job": "provider-proxy"},
    ),
    "ProviderProxyWaitsLong": (
        {
            'provider_proxy_wait_seconds_bucket{le="3.2"}': "0+5x120",
            'provider_proxy_wait_seconds_bucket{le="6.4"}': "0+10x120",
            'provider_proxy_wait_seconds_bucket{le="+Inf"}': "0+10x120",
        },
        {},
    ),
    "ProviderProxyQuoteSlower": (
        {"provider_proxy_learnt_quote_seconds": "0.1x100 0.9x20"},
        {"job": "provider-proxy"},
    ),
    "ProviderProxyTenantsLimited": (
        {'provider_proxy_requests_total{reason="TenantLimitError", status="429"}': "0+120x120"},
        {},
    ),
    "ProviderProxyHandshakesFail": (
        {
            'provider_proxy_tls_handshakes_total{result="ok", reason="ok"}': "0+5x120",
            'provider_proxy_tls_handshakes_total{result="failed", reason="protocol"}': "0+5x120",
        },
        {},
    ),
    "ProviderProxyRegistrationNeedsYou": (
        {'provider_proxy_registrations{registrar="acme", state="conflict"}': "1x120"},
        {"job": "provider-proxy", "registrar": "acme", "state": "conflict"},
    ),
    "ProviderProxyAuditLost": (
        {"provider_proxy_audit_lost_batches_total": "0x100 1x20"},
        {"job": "provider-proxy"},
    ),
    "ProviderProxyCertificateExpiresSoon": (
        {'provider_proxy_not_after_seconds{what="listen.tls_cert"}': "1000000x120"},
        {"job": "provider-proxy", "what": "listen.tls_cert"},
    ),
    "ProviderProxyCertificateExpired": (
        {'provider_proxy_not_after_seconds{what="listen.tls_cert"}': "60x120"},
        {"job": "provider-proxy", "what": "listen.tls_cert"},
    ),
    "ProviderProxyTenantCertificateExpiresSoon": (
        {'provider_proxy_watch_not_after_seconds{what="webhook.ca"}': "1000000x120"},
        {"job": "provider-proxy", "what": "webhook.ca"},
    ),
    "ProviderProxyTenantCertificateExpired": (
        {'provider_proxy_bridge_not_after_seconds{what="bridge.client_ca"}': "60x120"},
        {"job": "provider-proxy", "what": "bridge.client_ca"},
    ),
    "ProviderProxyRevocationUnknown": (
        {'provider_proxy_not_after_seconds{what="listen.client_crl"}': "60x120"},
        {"job": "provider-proxy", "what": "listen.client_crl"},
    ),
    "ProviderProxyRegistrarAway": (
        {'provider_proxy_registrations{registrar="acme", state="away"}': "1x120"},
        {"job": "provider-proxy", "registrar": "acme", "state": "away"},
    ),
}
# All of these at once, and nothing fires: a proxy that is well.
WELL = {
    "up": "1x120",
    "provider_proxy_audit_lost_batches_total": "0x120",
    'provider_proxy_not_after_seconds{what="listen.tls_cert"}': "2000000x120",
    'provider_proxy_not_after_seconds{what="listen.client_crl"}': "2000000x120",
    'provider_proxy_watch_not_after_seconds{what="webhook.ca"}': "2000000x120",
    'provider_proxy_bridge_not_after_seconds{what="bridge.client_ca"}': "2000000x120",
    "provider_proxy_selfcheck_failures_total": "0x120",
    "provider_proxy_tpm_circuit_open": "0x120",
    'provider_proxy_batches_total{outcome="ok"}': "0+90x120",
    'provider_proxy_batches_total{outcome="QuoteError"}': "0x60 1x60",
    'provider_proxy_tpm_errors_total{code="RETRY", step="again"}': "0+1x120",
    'provider_proxy_requests_total{reason="ok", status="200"}': "0+900x120",
    'provider_proxy_requests_total{reason="OverloadedError", status="503"}': "0+1x120",
    'provider_proxy_requests_total{reason="TenantLimitError", status="429"}': "0+10x120",
    "provider_proxy_duty": "0.4x120",
    "provider_proxy_max_duty": "0.5x120",
    'provider_proxy_wait_seconds_bucket{le="0.4"}': "0+10x120",
    'provider_proxy_wait_seconds_bucket{le="+Inf"}': "0+10x120",
    "provider_proxy_learnt_quote_seconds": "0.1x100 0.15x20",
    'provider_proxy_registrations{registrar="acme", state="registered"}': "1x120",
    'provider_proxy_registrations{registrar="acme", state="conflict"}': "0x120",
    'provider_proxy_registrations{registrar="acme", state="away"}': "0x90 1x30",
    'provider_proxy_tls_handshakes_total{result="ok", reason="ok"}': "0+50x120",
    'provider_proxy_tls_handshakes_total{result="failed", reason="protocol"}': "0+5x120",
}


@needs_promtool
def test_each_alert_fires_and_none_without_cause(tmp_path: Path) -> None:
    assert set(FIRES) == {rule["alert"] for rule in RULES}
    check_alerts(tmp_path, DOCS / "alerts.yml", RULES, FIRES, WELL)


# --- the dashboard --------------------------------------------------------------------------------


@pytest.mark.parametrize(("title", "expr"), TARGETS)
def test_a_panel_asks_for_metrics_that_exist(title: str, expr: str) -> None:
    check_names(expr, SERIES)


def test_the_dashboard_can_be_imported() -> None:
    assert DASHBOARD["title"] == "provider-proxy"
    check_dashboard(DASHBOARD)


@needs_promtool
def test_promtool_can_read_each_panel_s_question(tmp_path: Path) -> None:
    check_panels(tmp_path, TARGETS)
