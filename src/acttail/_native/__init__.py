"""Holds the compiled library; see :mod:`acttail.sparse.backends.cpu`."""
