"""A family of structures: what remains to be chosen once the two widths are known."""

import ast
import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar

from einlinear.structure import PADDING_TOLERANCE, Structure, StructureError, is_count

_families: dict[str, type["Family"]] = {}


@dataclass(frozen=True, repr=False)
class Family(ABC):
    """Called with two widths, gives a `Structure`. Subclasses are frozen dataclasses.

    Subclassing registers the family: it then has a short text (`"btt(rank=4)"`, read by
    `structure`), a row in every table and a place in every law that the tests check. Field names
    are the option names of the command line. `example` holds the settings that tests, tables and
    benchmarks use; `source` says where the family comes from. One that is not `listed` has a short text only.
    """

    example: ClassVar[Mapping[str, object]] = {}
    source: ClassVar[str] = ""
    listed: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, d_in: int, d_out: int) -> Structure:
        """The structure of a map from `d_in` to `d_out` features."""

    def __init_subclass__(cls, listed: bool = True) -> None:
        cls.listed = listed
        name = _short_name(cls)
        if name in _families and _families[name].__module__ != cls.__module__:
            raise TypeError(
                f"cannot register the family {cls.__name__} of {cls.__module__}: "
                f"{_families[name].__module__} already has one of that name; rename yours"
            )
        _families[name] = cls

    def __post_init__(self) -> None:
        """Refuses what is no count of at least one (ranks, blocks, cores, experts), whatever the family."""
        for field in fields(self):
            value = getattr(self, field.name)
            for count in value if isinstance(value, tuple) else (value,):
                if (isinstance(count, int) or field.type is int) and not is_count(count):
                    raise StructureError(
                        f"cannot make the family {_short_name(type(self))}: {field.name}={value!r}, "
                        f"but it counts something; pass an integer of at least 1"
                    )

    def __str__(self) -> str:
        changed = ((f.name, getattr(self, f.name)) for f in fields(self))
        defaults = {f.name: f.default for f in fields(self)}
        settings = ", ".join(f"{name}={value!r}" for name, value in changed if value != defaults[name])
        return f"{_short_name(type(self))}({settings})" if settings else _short_name(type(self))

    def __repr__(self) -> str:
        return type(self).__name__ + (str(self).removeprefix(_short_name(type(self))) or "()")


def families() -> tuple[Family, ...]:
    """Every family that has been imported, with its example settings, by name."""
    return tuple(cls(**cls.example) for _, cls in sorted(_families.items()) if cls.listed)


def structure(text: str) -> Family:
    """The family that a short text names: `"dense"`, `"btt(rank=4)"`, `"BTT(rank=4)"`.

    Settings are Python literals and nothing is evaluated. The inverse of `str` and `repr`.

    Raises:
        StructureError: for an unknown family or setting, naming the nearest one.
    """
    doing = f"cannot read the structure '{text}'"
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text, re.DOTALL) if isinstance(text, str) else None
    if match is None:
        raise StructureError(f"{doing}: expected a family and its settings, as in 'btt(rank=4)'")
    name = match.group(1)
    known = {alias: cls for short, cls in _families.items() for alias in (short, cls.__name__)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known families: {', '.join(sorted(_families))}"
        raise StructureError(f"{doing}: there is no family '{name}'; {hint}")
    cls = known[name]
    options = {field.name for field in fields(cls)}
    try:
        call = ast.parse(f"f({match.group(2) or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise SyntaxError
        settings = {str(pair.arg): ast.literal_eval(pair.value) for pair in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the parser's own limits among them
        raise StructureError(f"{doing}: expected settings of the form name=number, as in 'btt(rank=4)'") from None
    if call.args:
        raise StructureError(f"{doing}: settings are given by name, as in 'btt(rank=4)'")
    if len(settings) < len(call.keywords):
        raise StructureError(f"{doing}: a setting is given twice; leave one of the two out")
    for option in settings:
        if option not in options:
            hint = f"it has {', '.join(sorted(options))}" if options else "it has no settings"
            raise StructureError(f"{doing}: {_short_name(cls)} has no setting '{option}'; {hint}")
    try:
        return cls(**settings)
    except TypeError as error:
        raise StructureError(f"{doing}: {str(error).split('__init__() ')[-1]}") from None


def split(width: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Integers near `width ** share` whose product is `width`, or slightly more.

    The product exceeds `width` (the structure is then padded to it) only where no factorisation
    has every part within a factor of 2 of its ideal; the first larger product that has one is
    taken, or failing that the best factorisation within `PADDING_TOLERANCE`. Among equally good
    ones the smaller part comes first: `split(11008, (.5, .5)) == (86, 128)`.
    """
    check_width(width)
    best: tuple[float, tuple[int, ...]] = (math.inf, (width,))
    for padded in range(width, int(width * (1 + PADDING_TOLERANCE)) + 1):
        parts = _factorise(padded, tuple(shares))
        logs = zip(parts, shares, strict=True)
        deviation = max(abs(math.log2(part) - share * math.log2(padded)) for part, share in logs)
        if deviation <= 1:
            return parts
        best = min(best, (deviation, parts))
    return best[1]


def check_width(width: object) -> None:
    """Refuses what is no width."""
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise StructureError(f"cannot make a structure of the width {width!r}: pass an integer of at least 1")


def equal_split(width: int, parts: int) -> tuple[int, ...]:
    """`split` into equal shares."""
    return split(width, [1 / parts] * parts)


def block_size(width: int, blocks: int) -> int:
    """Features per block when `width` is cut into `blocks` of equal size, rounded up."""
    check_width(width)
    return -(-width // blocks)


@lru_cache(maxsize=4096)
def _factorise(number: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """`number` as a product, part after part taking the divisor nearest to its share of what is left."""
    parts: list[int] = []
    left, total = number, math.fsum(shares)
    for share in shares[:-1]:
        goal = math.log2(left) * share / total if total > 1e-9 else 0.0
        distance = {divisor: round(abs(math.log2(divisor) - goal), 9) for divisor in _divisors(left)}
        parts.append(min(distance, key=lambda divisor: (distance[divisor], divisor)))
        left //= parts[-1]
        total -= share
    return (*parts, left)


def _divisors(number: int) -> list[int]:
    divisors = [1]
    for prime in prime_factors(number):
        divisors += [d * prime for d in divisors]
        divisors = sorted(set(divisors))
    return divisors


def prime_factors(number: int) -> list[int]:
    """The prime factors of `number` with repetition, ascending."""
    primes, candidate = [], 2
    while candidate * candidate <= number:
        while number % candidate == 0:
            primes.append(candidate)
            number //= candidate
        candidate += 1
    return [*primes, number] if number > 1 else primes


def _short_name(cls: type[Family]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
