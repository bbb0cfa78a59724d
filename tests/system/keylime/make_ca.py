"""Keylime's own CA, a server's and a client's certificate; run by .venv-keylime's Python."""

import sys

from keylime import ca_impl_openssl, ca_util

directory = sys.argv[1]
ca_util.read_password("default")
ca_util.cmd_init(directory)
names, addresses = ca_impl_openssl.get_san_entries(bind_address="127.0.0.1")
ca_util.cmd_mkcert(directory, "server", san_dns=names, san_ips=addresses)
ca_util.cmd_mkcert(directory, "client")
