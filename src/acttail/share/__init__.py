"""Sparse models for others: folders with a card, the Hub, other formats."""
