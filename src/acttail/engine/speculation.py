"""Whether drafting pays, and how far: what passes have cost here, and how often drafts were kept.

Knows no model: seconds and outcomes in, numbers of tokens out. A draft is worth what it may save, the time of a
token times the chance that it is reached and kept; it costs its own time and what it adds to the pass that
verifies it.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

# Passes whose median is believed: a context grows, other work comes and goes.
_WINDOW = 9
# Of what passes over more tokens than were ever tried may cost, each further token, in first tokens.
_GUESS = 0.2
# What is known of a chance before anything was seen, worth so many outcomes; old outcomes fade at this rate.
_PRIOR, _WORTH, _FADING = 0.6, 2.0, 0.98
_BINS = 8
# Rounds after which a source is judged, drafts of each; plain tokens until it is tried again, for half as many
# rounds, doubled each time it fails.
_TRIAL, _TRIED, _PAUSE, _LONGEST_PAUSE = 6, 3, 16, 512
# Rounds by which a source is judged, and how many times the median's seconds one of them counts at most: a machine that
# did something else for a moment says nothing about drafts.
_JUDGED, _SLOWEST = 32, 3
# Rounds between plain tokens that say what one costs by now.
_REFRESHED = 32


@dataclass
class Drafts:
    """What became of the drafts of one generation.

    Attributes:
        drafted: tokens that were drafted and verified.
        accepted: of them, those that were kept.
        rounds: passes that verified drafts.
        plain: tokens that were decoded without any.
        gain: speed of this engine's drafting rounds over plain decoding, by its own clock; None before it has
            seen both.
    """

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    plain: int = 0
    gain: float | None = None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that was kept, None without any."""
        return self.accepted / self.drafted if self.drafted else None

    def to_dict(self) -> dict[str, float | None]:
        """Plain JSON data, the acceptance with it."""
        return asdict(self) | {"acceptance": self.acceptance}

    def __str__(self) -> str:
        if not self.drafted:
            return f"no drafts, {self.plain} tokens plain"
        kept = f"{self.accepted} of {self.drafted} drafts kept ({self.accepted / self.drafted:.0%})"
        said = f"{kept} in {self.rounds} passes, {self.plain} tokens plain"
        if self.gain is not None and self.gain < 1 and self.plain > self.rounds:
            said += f": drafting does not pay here ({self.gain:.2f} of plain speed)"
        return said


class _Chance:
    """A share that is learnt from outcomes, the newest of which count most."""

    def __init__(self, prior: float) -> None:
        self._kept, self._all = prior * _WORTH, _WORTH

    def note(self, kept: bool) -> None:
        self._kept = self._kept * _FADING + kept
        self._all = self._all * _FADING + 1

    @property
    def value(self) -> float:
        return self._kept / self._all


@dataclass
class _Source:
    """How drafts of one kind fared: by how sure the drafter was, and as speed."""

    mean: _Chance = field(default_factory=lambda: _Chance(_PRIOR))
    bins: dict[int, _Chance] = field(default_factory=dict)
    log: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_JUDGED))
    rounds: int = 0
    pause: int = _PAUSE
    sleeps: int = 0
    unheard: int = 0

    def chance(self, confidence: float) -> _Chance:
        at = min(int(confidence * _BINS), _BINS - 1)
        if at not in self.bins:
            # The surer the drafter, the better; how much so is what the outcomes tell.
            self.bins[at] = _Chance(0.5 * (self.mean.value + (at + 0.5) / _BINS))
        return self.bins[at]


class Pace:
    """What is known of one engine's speculation; generations share it.

    Args:
        most: tokens that may be drafted at a time.
        fixed: draft always so many, whatever they bring; None to adapt.
    """

    def __init__(self, most: int = 7, fixed: int | None = None) -> None:
        self.most, self.fixed = most if fixed is None else fixed, fixed
        self._passes: dict[int, deque[float]] = {}
        self._drafts: dict[str, deque[float]] = {}
        self._sources: dict[str, _Source] = {}
        self._since_plain = 0

    def note_pass(self, tokens: int, seconds: float) -> None:
        """A pass of the dense model over some tokens."""
        self._passes.setdefault(tokens, deque(maxlen=_WINDOW)).append(seconds)

    def note_draft(self, source: str, seconds: float) -> None:
        """Drafting one token."""
        self._drafts.setdefault(source, deque(maxlen=_WINDOW)).append(seconds)

    def note_outcome(self, source: str, confidence: float, kept: bool) -> None:
        """A draft that was verified; those behind one that was not kept are not outcomes."""
        found = self._of(source)
        found.mean.note(kept)
        found.chance(confidence).note(kept)

    def note_round(self, source: str, tokens: int, seconds: float) -> None:
        """A round of drafting and verifying, and what came of it."""
        s = self._of(source)
        self._since_plain += 1
        s.log.append((tokens, seconds))
        s.rounds += 1
        s.unheard = 0
        gain = self.gain(source)
        if self.fixed is not None or gain is None or s.rounds < _TRIAL:
            return
        if gain >= 1:
            s.pause = _PAUSE
            return
        s.sleeps, s.pause = s.pause, min(2 * s.pause, _LONGEST_PAUSE)
        s.rounds = _TRIAL // 2
        s.log.clear()

    def note_plain(self) -> None:
        """A token was decoded without drafts.

        A source from which nothing was wanted for a while gets one more round: what its passes cost was perhaps measured at
        a bad moment, and would never be measured again.
        """
        self._since_plain = 0
        for s in self._sources.values():
            s.sleeps = max(0, s.sleeps - 1)
            s.unheard += 1
            if s.unheard >= s.pause and s.rounds >= _TRIAL:
                s.rounds, s.unheard = _TRIAL - 1, 0
                s.pause = min(2 * s.pause, _LONGEST_PAUSE)

    def gain(self, source: str) -> float | None:
        """Speed of a source's rounds over plain decoding, None if either was not seen."""
        plain, log = self._median(self._passes.get(1)), self._of(source).log
        most = _SLOWEST * self._median([seconds for _, seconds in log])
        seconds = sum(min(s, most) for _, s in log)
        return sum(n for n, _ in log) * plain / seconds if plain and seconds else None

    def trying(self, source: str) -> bool:
        """Whether a source drafts to be judged, whatever is expected of it."""
        return self.fixed is None and self._of(source).rounds < _TRIAL

    def wants(self, source: str, drafts: Sequence[float], room: int) -> bool:
        """Whether one more draft is worth making.

        Args:
            source: that would make it.
            drafts: how sure it was of those it has made.
            room: drafts there is room for.
        """
        n = len(drafts)
        if n >= min(room, self.most):
            return False
        if self.fixed is not None:
            return True
        s = self._of(source)
        if self._silent(s):
            return False
        if self.trying(source):
            return n < _TRIED
        reached = self._reached(s, drafts)[-1]
        return reached * s.mean.value * self._token(source) > self._draft(source) + self._added(
            n + 1
        )

    def keep(self, source: str, drafts: Sequence[float], room: int) -> int:
        """How many of the drafts that were made are worth verifying.

        Args:
            source: that made them.
            drafts: how sure it was of each.
            room: drafts there is room for.
        """
        n = min(len(drafts), room, self.most)
        if self.fixed is not None:
            return n
        s = self._of(source)
        if self._silent(s):
            return 0
        if self.trying(source):
            return min(n, _TRIED)
        reached = self._reached(s, drafts)
        while n and reached[n] * self._token(source) <= self._added(n):
            n -= 1
        return n

    def worth(self, source: str, drafts: Sequence[float], room: int) -> float:
        """Seconds that verifying these drafts is expected to save."""
        n = self.keep(source, drafts, room)
        reached = self._reached(self._of(source), drafts)
        return sum(reached[i] * self._token(source) - self._added(i) for i in range(1, n + 1))

    def worth_drafting(self, source: str, room: int) -> float:
        """Seconds that as many drafts as pay on average are expected to save."""
        s, total, reached = self._of(source), 0.0, 1.0
        for n in range(1, min(room, self.most) + 1):
            reached *= s.mean.value
            more = reached * self._token(source) - self._draft(source) - self._added(n)
            if more <= 0:
                break
            total += more
        return total

    def _silent(self, s: _Source) -> bool:
        """Whether a source is not asked: it did not pay lately, or a plain token is due."""
        return bool(s.sleeps) or not self._passes.get(1) or self._since_plain >= _REFRESHED

    def _of(self, source: str) -> _Source:
        return self._sources.setdefault(source, _Source())

    @staticmethod
    def _reached(s: _Source, drafts: Sequence[float]) -> list[float]:
        """[n + 1] chances that the first 0, 1 ... n drafts are all kept."""
        found = [1.0]
        for confidence in drafts:
            found.append(found[-1] * s.chance(confidence).value)
        return found

    @staticmethod
    def _median(seconds: Sequence[float] | None) -> float:
        return statistics.median(seconds) if seconds else 0.0

    def _token(self, source: str) -> float:
        """Seconds that a token takes while this source drafts: what one saved is worth."""
        return self._median(self._passes.get(1)) / max(1.0, self.gain(source) or 1.0)

    def _draft(self, source: str) -> float:
        """Seconds of a draft; those of a dense pass until one was seen, halved for the doubt."""
        seen = self._drafts.get(source)
        return self._median(seen) if seen else self._median(self._passes.get(1)) / 2

    def _added(self, n: int) -> float:
        """Seconds that the n-th draft adds to the pass that verifies them."""
        return max(0.0, self._pass(n + 1) - self._pass(n))

    def _pass(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens, on a line between those that were seen."""
        seen = sorted(self._passes)
        one = self._median(self._passes.get(1))
        if tokens in self._passes:
            return self._median(self._passes[tokens])
        above = next((n for n in seen if n > tokens), None)
        below = max((n for n in seen if n < tokens), default=1)
        at = self._median(self._passes.get(below))
        if above is not None:
            slope = (self._median(self._passes[above]) - at) / (above - below)
        elif below > 1:
            slope = (at - one) / (below - 1)
        else:
            slope = _GUESS * one
        return at + slope * (tokens - below)
