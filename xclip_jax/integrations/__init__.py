"""Adapters of the Python API to other projects, each with an extra of its own."""
