"""Why a structure won: what it saves, what it loses, and what of that its exponents say."""

import math
from collections.abc import Sequence

import einlinear as el
from einlinear.lab.laws import AXES, Axis, multiplier
from einlinear.lab.run import Run
from einlinear.lab.search.searching import Explored, Searched
from einlinear.lab.search.surrogate import FEATURES
from einlinear.lab.search.worth import Reference
from einlinear.space import Candidate


def explain(searched: Searched) -> str:
    """A paragraph for each winner, best first, from the runs that confirmed it."""
    explored = searched.explored
    return "\n\n".join(
        "\n".join(_lines(searched, family))
        for family in explored.winners
        if any(run.family == family and run.purpose == "measure" for run in searched.runs)
    )


def told(searched: Searched) -> str:
    """What was searched and what came of it, in a few sentences; every number in it is of the confirming runs."""
    explored = searched.explored
    counts = explored.counts
    axis = explored.plan.objective
    lines = [
        f"explored {counts[0]} of {len(explored.pool)} candidates, "
        + ", ".join(f"{count} of them to horizon {rung + 2}" for rung, count in enumerate(counts[1:]))
        + f"; confirmed with fresh seeds ({', '.join(map(str, explored.plan.confirmation.seeds))}), by {AXES[axis]}:"
    ]
    for what, families in (("chosen", explored.winners), ("at random", explored.controls)):
        for family in families:
            found = multiplier(searched.runs, family, axis=axis)
            lines.append(f"  {what:9}  {family}: {found}{'' if found.reason else f' of dense, {found.verdict}'}")
    return "\n".join(lines)


def _lines(searched: Searched, family: str) -> list[str]:
    explored = searched.explored
    number = next(n for n, one in enumerate(explored.pool) if one.family == family)
    candidate = explored.pool[number]
    axes: tuple[Axis, Axis] = ("flops", "seconds")
    return [
        family,
        *(f"  {axis:11}  {verdict(searched.runs, family, axis)}" for axis in axes),
        *(f"    {said}" for axis in axes if (said := parts(searched.runs, family, axis))),
        f"  taxonomy     {in_words(candidate.psi, candidate.nu, candidate.omega)}",
        f"  costs        {_costs(candidate)}",
        f"  exploration  {_exploration(explored, number)}",
    ]


def verdict(runs: Sequence[Run], family: str, axis: Axis) -> str:
    """The multiplier of a confirmed family in words, or why there is none."""
    found = multiplier(runs, family, axis=axis)
    return str(found) if found.reason else f"dense needs {found} its {AXES[axis]}: {found.verdict}"


def parts(runs: Sequence[Run], family: str, axis: Axis) -> str:
    """The multiplier as what is saved at equal size times what the difference in loss is worth to dense.

    ln C_dense(L) / C = ln C_dense(size) / C + ln C_dense(L) / C_dense(L_dense), the mean over sizes that both have;
    empty where there are none.
    """
    done = [run for run in runs if run.purpose == "measure" and run.loss is not None]
    dense = {(run.width, run.tokens, run.seed): run for run in done if run.family == "dense"}
    pairs = [
        (run, dense[size])
        for run in done
        if run.family == family and (size := (run.width, run.tokens, run.seed)) in dense
    ]
    try:
        reference = Reference(list(dense.values()), axis)
    except ValueError:  # the multiplier has said why
        return ""
    if not pairs:
        return ""
    saved = math.exp(_mean([math.log(getattr(plain, axis) / getattr(run, axis)) for run, plain in pairs]))
    lost = _mean([(run.loss or 0.0) - (plain.loss or 0.0) for run, plain in pairs])
    worth = math.exp(
        _mean([reference.log_cost(run.loss or 1.0) - reference.log_cost(plain.loss or 1.0) for run, plain in pairs])
    )
    direction = "higher" if lost > 0 else "lower"
    return (
        f"at equal width and tokens it takes {1 / saved:.3g} of dense's {AXES[axis]}; its loss is {abs(lost):.3g} "
        f"nats {direction}, worth a factor {worth:.3g} of compute to dense; {saved:.3g} × {worth:.3g} = "
        f"{saved * worth:.3g}, the mean over {len(pairs)} pairs of runs"
    )


def in_words(psi: float, nu: float, omega: float) -> str:
    """What the three exponents of a structure say."""
    rank = "rank grows like dense's" if psi >= 1 else f"rank only as width^{psi:g}"
    sharing = "no weight is used twice" if omega <= 0 else f"each weight is used width^{omega:g} times"
    return f"ψ = {psi:g} ({rank}), ν = {nu:g} (FLOPs as width^{1 + nu:g}), ω = {omega:g} ({sharing})"


def _costs(candidate: Candidate) -> str:
    modelled = "" if candidate.seconds is None else f", {candidate.seconds:.3g} of their modelled seconds"
    shares = f"{candidate.flops:.3g} of the FLOPs and {candidate.parameters:.3g} of the parameters of dense maps"
    maps = el.structure(candidate.family)(256, 256)
    return f"{shares}{modelled}; at 256 → 256: {maps!r}"


def _exploration(explored: Explored, number: int) -> str:
    """What the surrogate makes of it: contributions of features to ln multiplier, largest first."""
    found = explored.found
    rank = found.ranking.index(number)
    told = f"predicted {math.exp(found.means[rank]):.2f} × before it was confirmed"
    if found.surrogate is None:
        return told
    said = sorted(zip(FEATURES, found.surrogate.blame(number), strict=True), key=lambda one: -abs(one[1]))
    parts = ", ".join(f"{name} × {math.exp(part):.2f}" for name, part in said if abs(part) > 0.005)
    return f"{told}; against a candidate that is average in it: {parts or 'nothing stands out'}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
