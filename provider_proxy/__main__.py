"""`python -m provider_proxy` is the command `provider-proxy`."""

from provider_proxy.cli.main import main

main()
