"""Spectra of weights and the heavy-tail exponents fitted to them."""
