"""Faults that are injected, hostile and damaged input, concurrency: what docs/reliability.md tells of.

`make test` runs a part of the trials of each kind, `make test-faults` all of them.
"""
