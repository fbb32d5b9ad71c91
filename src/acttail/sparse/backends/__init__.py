"""Implementations of the operators: pure torch (the truth) and native code on a CPU."""
