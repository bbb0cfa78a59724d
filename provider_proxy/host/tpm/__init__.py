"""The chip: contexts, keys, the gate to it, and the embedded swtpm. tpm2_pytss is used here and in
`quoters.esys` only, and every error of it is translated here."""

import os

# tpm2-tss logs to stderr each response code that it meets, the expected ones too ("no key at this
# handle yet"). We translate and log them ourselves; TSS2_LOG set by the operator wins.
os.environ.setdefault("TSS2_LOG", "all+none")
