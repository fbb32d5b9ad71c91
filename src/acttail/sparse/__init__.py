"""Sparse models: selection rules, the modules that apply them, prefill policies, operators."""
