"""Test vectors of evidence format 1 and the generator that writes them; README.md says how."""
