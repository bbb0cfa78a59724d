"""The chip: contexts, keys, the gate to it, and the embedded swtpm. tpm2_pytss is used here and in
`quoters.local_tpm` only, and all its errors are translated here."""

import os

# tpm2-tss logs every response code to stderr, also the expected ones ("no key at this
# handle yet"). We translate and log them ourselves; TSS2_LOG set by the operator wins.
os.environ.setdefault("TSS2_LOG", "all+none")
