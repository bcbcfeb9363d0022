"""`einlinear.explain(question, A)`: the rules that would run."""

import math
from types import FunctionType
from typing import Any

from einlinear.kernels import explain
from einlinear.linalg.questions import (
    FUNCTIONS,
    apply,
    cholesky,
    cond,
    diagonal,
    eig,
    eigh,
    eigvals,
    eigvalsh,
    entrywise,
    exp,
    inverse,
    log,
    logdet,
    lstsq,
    lu,
    norm,
    picking,
    pinv,
    pow,
    slogdet,
    solve,
    sqrt,
    svd,
    svdvals,
    trace,
)
from einlinear.linalg.rules.determinant import SLOGDET
from einlinear.linalg.rules.factors import CHOLESKY, PLU
from einlinear.linalg.rules.functions import APPLY, TRACE_OF
from einlinear.linalg.rules.inverse import INVERSE
from einlinear.linalg.rules.norm import FROBENIUS, SUMS
from einlinear.linalg.rules.singular import PINV, SINGULAR, SVDVALS
from einlinear.linalg.rules.spectral import EIG, EIGH, EIGVALS, EIGVALSH
from einlinear.linalg.rules.trace import DIAGONAL, TRACE
from einlinear.linalg.scalar import EXP, LOG, SQRT, Function, power
from einlinear.linalg.subjects import Subject, operator
from einlinear.linalg.table import Table
from einlinear.operator import OperatorError

ANSWERS: dict[Any, tuple[Table, tuple[Any, ...]]] = {
    solve: (INVERSE, ()),
    inverse: (INVERSE, ()),
    pinv: (PINV, (0.0,)),
    lstsq: (PINV, (0.0,)),
    slogdet: (SLOGDET, ()),
    logdet: (SLOGDET, ()),
    trace: (TRACE, ()),
    diagonal: (DIAGONAL, ()),
    eigh: (EIGH, ()),
    eigvalsh: (EIGVALSH, ()),
    eig: (EIG, ()),
    eigvals: (EIGVALS, ()),
    svd: (SINGULAR, ()),
    svdvals: (SVDVALS, ()),
    cholesky: (CHOLESKY, ()),
    lu: (PLU, ()),
    exp: (APPLY, (EXP,)),
    log: (APPLY, (LOG,)),
    sqrt: (APPLY, (SQRT,)),
    norm: (FROBENIUS, ()),
    cond: (SVDVALS, ()),
}
"""The table that answers a question, and what it is asked with."""

SQUARE = {solve, inverse, slogdet, logdet, trace, eigh, eigvalsh, eig, eigvals, cholesky, exp, log, sqrt, pow, apply}


@explain.register(FunctionType)
def _explain(question: Any, A: Subject, *arguments: Any) -> str:
    """`explain(solve, A)`: the rules that would run, from the outside in, with their cost."""
    if question in SQUARE and not operator(A).square:
        raise OperatorError(f"cannot explain {question.__name__} of {operator(A)!r}: it needs a square operator")
    given: tuple[Any, ...]
    if question is pow:
        table, given = APPLY, (power(*arguments),)
    elif question is apply:
        table, given = APPLY, (Function("f", *arguments),)
    elif question is trace and arguments:
        table, given = TRACE_OF, (FUNCTIONS.get(arguments[0]) or entrywise(arguments[0]),)
    elif question is norm and arguments and arguments[0] != "fro":
        sums = arguments[0] in (1, -1, math.inf, -math.inf)
        table, given = (SUMS, picking(arguments[0])) if sums else (SVDVALS, ())
    elif question in ANSWERS:
        table, given = ANSWERS[question]
    else:
        raise TypeError(f"cannot explain {question.__name__}: pass a function of einlinear.linalg and an operator")
    subject = operator(A)
    lines = [f"{question.__name__} of {subject!r}: {table.question}"]
    for depth, part, rule, cost in table.plan(subject, *given):
        what = f"{cost:.3g} flops, " if cost else ""
        lines.append(f"{'  ' * (depth + 1)}{part!r}: {rule.law} ({what}{rule.answer})")
    return "\n".join(lines)
