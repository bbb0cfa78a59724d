"""The link between VMs' vTPMs and the host's TPM: the registry of vTPMs, and claims about them."""
