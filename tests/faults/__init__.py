"""Injected faults: what a build, a set and their readers do when things go wrong."""
