"""Adapters around lorambo_alloc: a model's spectra in, ranks out, and the `lorambo` command.

Nothing is imported here, so that the modules without a framework work where none is installed.
"""
