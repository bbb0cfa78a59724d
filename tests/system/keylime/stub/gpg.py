"""Stands for the gpg bindings, which keylime imports at start and needs for signed policies only."""
