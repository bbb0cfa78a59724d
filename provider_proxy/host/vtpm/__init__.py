"""The link between a VM's vTPM and the host's TPM: who is registered, and what of it is claimed."""
