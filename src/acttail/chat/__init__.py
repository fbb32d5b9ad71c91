"""A conversation in a terminal: what was said, the KV cache it left, and the screen it is shown on."""
