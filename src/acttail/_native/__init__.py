"""Holds the compiled library; see :mod:`acttail.backends.cpu`."""
