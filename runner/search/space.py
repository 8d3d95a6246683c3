"""The search space: options of `runner train` that have a range in place of a value, such as `log:1e-4:1e-1`."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runner.common.errors import UserError

Scale = Literal["log", "lin", "int"]
SCALES: dict[str, Scale] = {"log": "log", "lin": "lin", "int": "int"}
EXPERIMENT = "NAME"  # the parameter that chooses among several experiments
EXPECTED = "expected log:A:B, lin:A:B, int:A:B or A|B|C"
MAX_COMBINATIONS = 100_000
MAX_INTEGER = 10**15  # below it, a float holds every integer exactly


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included: on a log or linear scale with four digits, or integers."""

    scale: Scale
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.scale}:{self.word(self.low)}:{self.word(self.high)}"

    @property
    def samples(self) -> tuple[str, ...]:
        """Both ends, as words."""
        return self.word(self.low), self.word(self.high)

    @property
    def size(self) -> float:
        """Number of values."""
        return self.high - self.low + 1 if self.scale == "int" else math.inf

    def distribution(self) -> Any:
        """Returns the range as a distribution of Optuna."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.scale == "int":
            return IntDistribution(int(self.low), int(self.high))
        return FloatDistribution(self.low, self.high, log=self.scale == "log")

    def word(self, value: float) -> str:
        """Returns a value as a word of the command line."""
        return str(int(value)) if self.scale == "int" else f"{value:.4g}"

    def rounded(self, value: float) -> float:
        """Returns the value that `word` stands for, within the range: the one that is trained."""
        return min(max(float(self.word(value)), self.low), self.high) if self.scale != "int" else int(value)


@dataclass(frozen=True)
class Choices:
    """One of several words."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return "|".join(self.words)

    @property
    def samples(self) -> tuple[str, ...]:
        """All words."""
        return self.words

    @property
    def size(self) -> float:
        """Number of values."""
        return len(self.words)

    def distribution(self) -> Any:
        """Returns the choices as a distribution of Optuna."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.words)

    def word(self, value: str) -> str:
        """Returns a value as a word of the command line."""
        return value

    def rounded(self, value: str) -> str:
        """Returns the value."""
        return value


Domain = Range | Choices
Space = Mapping[str, Domain]  # by option, or EXPERIMENT


def parse_domain(option: str, word: str) -> Domain | None:
    """Parses the value of an option as a range; returns None if it is a plain value.

    Raises:
        UserError: it begins as a range does but is none, or a choice is empty or there twice.
    """
    scale, colon, rest = word.partition(":")
    if colon and scale in SCALES:
        return _parse_range(option, word, SCALES[scale], rest)
    if "|" not in word:
        return None
    words = tuple(word.split("|"))
    if "" in words or len({_number(one) for one in words}) < len(words):
        raise UserError(f"{option} {word}: {EXPECTED}, each once")
    return Choices(words)


def _number(word: str) -> str | float:
    """Returns a word as a number, if it is one, so that 0.1 and 1e-1 are the same."""
    try:
        return float(word)
    except ValueError:
        return word


def _parse_range(option: str, word: str, scale: Scale, rest: str) -> Range:
    number = int if scale == "int" else float
    try:
        low, high = map(number, rest.split(":"))
    except ValueError:
        raise UserError(f"{option} {word}: {EXPECTED}") from None
    if scale == "int" and max(abs(low), abs(high)) >= MAX_INTEGER:
        raise UserError(f"{option} {word}: expected integers of at most 15 digits")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{option} {word}: expected a range from a lower to a higher number")
    if scale == "log" and low <= 0:
        raise UserError(f"{option} {word}: expected a range above 0 on a logarithmic scale")
    found = Range(scale, low, high)
    if [low, high] != [float(found.word(end)) for end in (low, high)]:
        raise UserError(f"{option} {word}: expected bounds of at most four digits")
    return found


def words_of(space: Space, values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the values of a trial as words of the command line, by option."""
    return {option: domain.word(values[option]) for option, domain in space.items()}


def size(space: Space) -> float:
    """Returns the number of different trials; infinite if a range is continuous."""
    return math.prod(domain.size for domain in space.values())


def combinations(space: Space) -> Iterator[dict[str, Any]]:
    """Yields all different trials of a finite space."""
    values = [
        range(int(domain.low), int(domain.high) + 1) if isinstance(domain, Range) else domain.words
        for domain in space.values()
    ]
    for combination in itertools.product(*values):
        yield dict(zip(space, combination, strict=True))
