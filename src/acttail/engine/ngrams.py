"""Drafts without a model: what followed the last tokens where they stood before (prompt lookup).

Saxena 2023, "Prompt lookup decoding" (github.com/apoorvumang/prompt-lookup-decoding); LLMA, Yang et al. 2023,
arXiv 2304.04487.
"""

from collections.abc import Iterable

# Lengths that are looked up, the longest first: a pair of tokens alone says little.
LENGTHS = (4, 3, 2)


class Ngrams:
    """An index of runs of tokens, kept while a text grows."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # n -> run of n tokens -> where what followed it last begins.
        self._after: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in LENGTHS}

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        for token in tokens:
            # Runs that end before this token: it is the first that follows them.
            at = len(self._tokens)
            for n, after in self._after.items():
                if at >= n:
                    after[tuple(self._tokens[at - n :])] = at
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def lookup(self, most: int) -> tuple[int, list[int]]:
        """Length of the longest run that ends the text and stood in it before, and what followed it then.

        Args:
            most: tokens wanted at most.

        Returns:
            (0, []) if there is none.
        """
        for n, after in self._after.items():
            at = after.get(tuple(self._tokens[-n:])) if len(self._tokens) >= n else None
            if at is not None:
                found = self._tokens[at : at + most]
                # What follows may run into the end of the text, and goes on as it began: a loop.
                while 0 < len(found) < most:
                    found += found[: most - len(found)]
                return n, found
        return 0, []
