"""Measures the daemon from outside: a daemon process, a load generator of its own, real sockets.

Figures are ratios inside one run; the sides are interleaved, and medians are given with their spread.
"""
