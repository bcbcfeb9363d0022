"""What the name of a column says: "params (M)", "log10_tokens", "compute (PF-days)", "time_hours".

    read_name("Params (in millions)")   # Name(base="params", factor=1e6, kind="count")

Only what is unambiguous is taken off a name: a unit that is known, a spelling of some column as a remark, a
logarithm of a stated base. Anything else stays, and such a name is not recognised.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

# What a column may be called, best first; compared without case, blanks and punctuation.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "parameters": (
        "params", "parameters", "nparams", "nparameters", "numparams", "numparameters", "numberofparameters",
        "numberofparams", "parametercount", "paramcount", "paramscount", "totalparams", "totalparameters", "ntotal",
        "modelsize", "modelparams", "modelparameters", "n", "trainableparams", "activeparams", "activeparameters",
        "nactive", "nonembeddingparams", "nonembeddingparameters", "paramsnonembedding", "nonembedparams", "param",
        "size", "totalparametercount", "paramsnoembed", "paramsnoemb", "nnoemb",
    ),
    "tokens": (
        "tokens", "ntokens", "numtokens", "numberoftokens", "trainingtokens", "traintokens", "tokensseen",
        "tokencount", "totaltokens", "tokenstrained", "d", "data", "datasize", "datasetsize", "dataset", "examples",
        "samples", "nsamples", "numsamples", "token",
        "imagesseen", "samplesseen", "examplesseen", "images", "nimages",
    ),
    "flops": (
        "flops", "flop", "trainingflops", "trainflops", "totalflops", "nflops", "trainingflop", "compute",
        "trainingcompute", "traincompute", "totalcompute", "c", "budget", "computebudget", "flopsbudget",
        "flopbudget", "isoflop",
    ),
    "loss": (
        "loss", "valloss", "validationloss", "evalloss", "testloss", "finalloss", "finalvalloss", "finalevalloss",
        "heldoutloss", "l", "nll", "crossentropy", "ce", "celoss", "lmloss", "losses", "validloss", "lossval",
        "lossvalidation", "devloss", "finalvalidationloss", "trainloss", "trainingloss", "finaltrainloss",
    ),
    "family": (
        "family", "structure", "architecture", "arch", "modelfamily", "variant", "group", "method", "layer",
        "modeltype", "type",
    ),
    "seed": ("seed", "randomseed", "rngseed", "replicate", "replica", "repeat"),
    "trunk": ("trunk", "trunkid", "run", "runid", "runname", "parentrun", "trajectory"),
    "seconds": (
        "seconds", "secs", "wallseconds", "trainingseconds", "trainseconds", "traintime", "trainingtime", "walltime",
        "wallclock", "wallclocktime", "time", "duration", "elapsed", "runtime", "gputime",
    ),
    "device": ("device", "gpu", "hardware", "accelerator"),
}  # fmt: skip
BITS = ("bits", "bpb", "bpc", "bitsperbyte", "bitsperchar", "bitspertoken", "valbpb", "bpbval", "evalbpb", "lossbits")
PERPLEXITY = ("ppl", "perplexity", "valppl", "valperplexity", "testppl", "evalppl")

Kind = Literal["", "count", "flops", "time", "nats"]
KINDS: dict[str, tuple[Kind, ...]] = {
    "parameters": ("", "count"), "tokens": ("", "count"), "flops": ("", "count", "flops"), "seconds": ("", "time"),
    "loss": ("", "nats"),
}  # fmt: skip
"""Which units a role may have; the others have none."""

MULTIPLES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
UNITS: dict[str, tuple[Kind, float]] = {
    **{letter: ("count", factor) for letter, factor in MULTIPLES.items()},
    **{word: ("count", factor) for word, factor in {
        "thousand": 1e3, "thousands": 1e3, "million": 1e6, "millions": 1e6, "mio": 1e6, "billion": 1e9,
        "billions": 1e9, "bn": 1e9, "trillion": 1e12, "trillions": 1e12, "giga": 1e9, "mega": 1e6, "tera": 1e12,
    }.items()},
    **{f"{short}{flops}": ("flops", factor) for flops in ("flop", "flops") for short, factor in {
        "giga": 1e9, "g": 1e9, "tera": 1e12, "t": 1e12, "peta": 1e15, "p": 1e15, "exa": 1e18, "e": 1e18,
        "zetta": 1e21, "z": 1e21, "yotta": 1e24, "y": 1e24,
    }.items()},
    **dict.fromkeys(
        ("pfdays", "pfsdays", "pfday", "petaflopdays", "petaflopsdays", "petaflopsday", "petaflopday", "pflopdays",
         "pflopsdays"), ("flops", 1e15 * 86400)),
    **{word: ("time", factor) for word, factor in {
        "s": 1.0, "sec": 1.0, "secs": 1.0, "seconds": 1.0, "min": 60.0, "mins": 60.0, "minutes": 60.0, "h": 3600.0,
        "hr": 3600.0, "hrs": 3600.0, "hour": 3600.0, "hours": 3600.0, "days": 86400.0,
    }.items()},
    "nats": ("nats", 1.0), "natspertoken": ("nats", 1.0),
}  # fmt: skip
ALONE = {  # names that are all unit; "tflops" and "pflops" alone are as often a speed, and are not among them
    "hours": "time", "minutes": "time", "walltimehours": "time", "gpuhours": "gputime", "pfdays": "compute",
    "pfsdays": "compute", "petaflopdays": "compute", "petaflopsdays": "compute", "exaflops": "flops",
    "exaflop": "flops", "eflops": "flops", "zettaflops": "flops", "zflops": "flops",
}  # fmt: skip
LOGARITHMS = {"log10": 10.0, "log2": 2.0, "ln": math.e, "log": math.nan}
_LOG = r"(log[_ ]?10|log[_ ]?2|ln|log)"


@dataclass(frozen=True)
class Name:
    """A column's name, taken apart."""

    base: str  # what is left, without case, blanks and punctuation
    factor: float = 1.0  # that its numbers want
    kind: Kind = ""  # what that is a unit of
    logarithm: float | None = None  # the base of the logarithm that its numbers are; NaN where it is not said

    @property
    def roles(self) -> list[str]:
        """The roles that a column of this name may have."""
        return [role for role, names in SPELLINGS.items() if self.base in names and self.kind in KINDS.get(role, ("",))]


def plain(name: str) -> str:
    """Without case, blanks and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_name(name: str) -> Name:
    """Takes a name apart: the logarithm around it, the remark or unit behind it."""
    text = name.strip()
    before = re.fullmatch(rf"{_LOG}[\s_]*[(\[]?[\s_]*(.*?)[)\]]?", text, re.I)
    behind = re.fullmatch(rf"(.*?)[\s_]*[(\[\s_]{_LOG}[)\]]?", text, re.I)
    for found, inner, said in ((before, 2, 1), (behind, 1, 2)):
        # "log" in front of letters alone is part of a word, as in "logits"
        if found and (rest := _without_unit(found[inner])).roles and not re.match(r"log[a-z]", text, re.I):
            return Name(rest.base, rest.factor, rest.kind, LOGARITHMS[re.sub(r"[_ ]", "", found[said].lower())])
    return _without_unit(text)


def _without_unit(text: str) -> Name:
    if (whole := plain(text)) in ALONE:
        unit = next(word for word in (whole, "hours", "minutes") if word in UNITS and whole.endswith(word))
        return Name(ALONE[whole], UNITS[unit][1], UNITS[unit][0])
    remark = re.fullmatch(r"(.*\w)\s*[(\[]([^)\]]*)[)\]]\s*", text)
    if remark:
        if unit_of := _unit(remark[2]):
            return Name(plain(remark[1]), unit_of[1], unit_of[0])
        if len(plain(remark[2])) > 1 and any(plain(remark[2]) in names for names in SPELLINGS.values()):
            return _without_unit(remark[1])  # "Model Size (params)"
        return Name(whole)
    words = [word for word in re.split(r"[^A-Za-z0-9]+", text) if word]
    if len(words) > 1 and (unit_of := UNITS.get(words[-1].lower())):
        words = words[:-2] if words[-2].lower() == "in" else words[:-1]
        return Name(plain("".join(words)), unit_of[1], unit_of[0])
    if glued := re.fullmatch(r"([A-Za-z_]*[a-z])([KMBGT])", text):  # "paramsM"
        return Name(plain(glued[1]), MULTIPLES[glued[2].lower()], "count")
    return Name(whole)


def _unit(remark: str) -> tuple[Kind, float] | None:
    """Of "M", "in millions", "PF-days", "1e18", "x 10^9"; None for any other remark."""
    power = re.fullmatch(r"\s*[x×*]?\s*(?:1e|10\^|10\*\*)(\d{1,2})\s*", remark)
    if power:
        return "count", 10.0 ** int(power[1])
    return UNITS.get(plain(re.sub(r"^\s*in\b", "", remark)))
