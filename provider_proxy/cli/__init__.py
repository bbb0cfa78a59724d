"""The command `provider-proxy`: a file a subcommand."""
