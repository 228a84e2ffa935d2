"""Whether two LaTeX formulas are equal: math-verify, with the spots closed where it calls different
things equal.

Runs in the worker, which loads it by its path: it imports nothing of the package. What was changed,
and why:
  Numbers     Decimals become exact fractions. math-verify rounds floats to six places and drops
              differences below 1e-15, so that 1.6e-19 was 9.1e-31. Here two numbers are equal if
              their difference is zero, exactly or to 45 significant digits.
  Texts       Only formulas that parse are compared. math-verify also compares leftover strings,
              and takes numbers out of sentences.
  Equations   Two equations without solutions were equal. Now two are equal if one is a multiple of
              the other, or if they have one unknown and the same solutions, at least one.
  Symbols     A symbol equals only itself, not the product whose letters spell its name.
  Not a number, complex infinity: equal to nothing.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import latex2sympy2_extended.latex2sympy2 as latex_reader
import math_verify
import math_verify.grader as verifier
import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from sympy.core.relational import Relational

DIGITS, AGREE = 60, 45
# Signs and sizes differ, so that |x| and x, or sqrt(x) and its square, fall apart.
POINTS = [
    sympy.Rational(p, q)
    for p, q in (
        (7, 5),
        (-13, 11),
        (17, 3),
        (-31, 7),
        (5, 19),
        (43, 9),
        (-2, 23),
        (101, 13),
        (-57, 17),
        (3, 29),
    )
]
_NORMAL = NormalizationConfig(
    basic_latex=True,
    units=False,
    malformed_operators=True,
    nits=False,
    boxed="none",
    equations=False,
)
_DECIMAL = re.compile(r"(-?)([0-9]*)\.([0-9]{6,})")


def equal(a: str, b: str) -> bool:
    """Whether two formulas in LaTeX are equal.

    Symmetric; may take any time and memory, so the caller limits both.
    """
    if _without_spaces(a) == _without_spaces(b):
        return bool(a.strip())
    complex_valued = any(verifier.should_treat_as_complex(text) for text in (a, b))
    x, y = _parse(a, complex_valued), _parse(b, complex_valued)
    if x is None or y is None:
        return False
    for text, other in ((a, y), (b, x)):
        if (rounding := _DECIMAL.fullmatch(text.strip())) and _is_number(other):
            return _rounds_to(other, rounding)
    return any(
        math_verify.verify(g, t, timeout_seconds=None, allow_set_relation_comp=True)
        for g, t in ((x, y), (y, x))
    )


def _without_spaces(text: str) -> str:
    return re.sub(r"\s+(?![0-9])|(?<![0-9\s])\s+", "", text.strip())


def _parse(text: str, complex_valued: bool) -> Any:
    if re.search(r"(?<![_^0-9.])[0-9][0-9.]*\s+[0-9]", text):  # the grammar would read 4 2 as 42
        return None
    try:
        formula = latex_reader.latex2sympy(
            normalize_latex(text, _NORMAL),
            is_real=not complex_valued,
            convert_degrees=False,
            normalization_config=None,
        )
        if formula is None or formula.has(sympy.nan, sympy.zoo):
            return None
        return sympy.nsimplify(formula, rational=True) if formula.has(sympy.Float) else formula
    except Exception:  # the grammar does not know it
        return None


def _exact_number(text: str) -> Any:
    """math-verify reads decimals as floats, and "0,5" with a decimal comma."""
    if "," in text and text.startswith("0"):
        text = text.replace(",", ".")
    digits = text.replace(",", "").replace(" ", "")
    return sympy.Rational(digits if digits.strip(".") else "0")


def _is_number(x: Any) -> bool:
    return (
        isinstance(x, sympy.Expr)
        and not x.free_symbols
        and not x.atoms(sympy.core.function.AppliedUndef)
    )


def _rounds_to(exact: Any, rounding: re.Match[str]) -> bool:
    """A decimal with six or more places and figures is a number that it is the rounding of, unless
    that one is rational."""
    sign, whole, places = rounding.groups()
    value = sympy.Rational(f"{sign}{whole or 0}.{places}")
    exact = _evaluated(exact)
    if exact.is_rational:
        return bool(exact == value) or (
            not _finite_decimal(exact)
            and len((whole + places).strip("0")) >= 6
            and abs(exact - value) * 2 * 10 ** len(places) <= 1
        )
    if len((whole + places).strip("0")) < 6:
        return False
    return bool(abs((exact - value).evalf(DIGITS)) * 2 * sympy.Integer(10) ** len(places) <= 1)


def _finite_decimal(x: Any) -> bool:
    under = sympy.Rational(x).q
    for p in (2, 5):
        while under % p == 0:
            under //= p
    return under == 1


def _evaluated(x: Any) -> Any:
    try:
        return x.doit()
    except Exception:
        return x


def exactly_equal(a: Any, b: Any) -> bool:
    """Two expressions or matrices: equal as formulas, or by value at points of both signs."""
    a, b = _evaluated(a), _evaluated(b)
    if a == b:
        return not (hasattr(a, "has") and a.has(sympy.nan, sympy.zoo))
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(
            exactly_equal(x, y) for x, y in zip(list(a), list(b), strict=True)
        )
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    if a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        return False
    if isinstance(a, sympy.Rational) and isinstance(b, sympy.Rational):
        return False
    if a.is_infinite or b.is_infinite:
        return False
    difference = a - b
    if _is_number(difference):
        return _zero(a, b)
    symbols = sorted(difference.free_symbols, key=str)
    expanded = sympy.expand(difference)
    if expanded == 0:
        return True
    if _is_number(expanded):
        return _zero(expanded, sympy.Integer(0))
    if symbols and all(s.is_Symbol for s in symbols) and expanded.is_polynomial(*symbols):
        return all(_zero(c, sympy.Integer(0)) for c in sympy.Poly(expanded, *symbols).coeffs())
    agreed = 0
    complex_valued = difference.has(sympy.I)
    for shift in range(len(POINTS)):
        at = dict(
            zip(
                symbols,
                itertools.islice(itertools.cycle(POINTS), shift, shift + len(symbols)),
                strict=True,
            )
        )
        try:
            x, y = (e.subs(at).evalf(DIGITS) for e in (a, b))
            if not (x.is_number and y.is_number and x.is_finite and y.is_finite) or (
                not complex_valued and not (_real(x) and _real(y))
            ):
                continue
            if not _agree(x, y):
                return False
            agreed += 1
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            continue
    return agreed >= 3 or sympy.simplify(difference) == 0


def _real(x: Any) -> bool:
    return bool(abs(sympy.im(x)) <= sympy.Float(10, DIGITS) ** -AGREE * abs(x)) if x != 0 else True


def _agree(x: Any, y: Any) -> bool:
    scale = max(abs(x), abs(y))
    return bool(abs(x - y) <= scale * sympy.Float(10, DIGITS) ** -AGREE)


def _zero(a: Any, b: Any) -> bool:
    """Whether two constants are equal: exactly if their difference is rational, else to `AGREE`
    significant digits."""
    x, y = a.evalf(DIGITS), b.evalf(DIGITS)
    if not (x.is_finite and y.is_finite) or not _agree(x, y):
        return False
    difference = sympy.expand(a - b)
    if not isinstance(difference, sympy.Rational):
        difference = sympy.simplify(difference)
    if isinstance(difference, sympy.Rational):
        return bool(difference == 0)
    return difference.equals(0) is not False


def _numbers(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    return exactly_equal(a, b)


def _symbols(a: Any, b: Any) -> bool:
    names = [x.name.lower() if isinstance(x, sympy.Symbol) else None for x in (a, b)]
    if names[0] is not None and names[1] is not None:
        return names[0] == names[1]
    if "e" in names and sympy.E in (a, b):
        return True
    return exactly_equal(a, b)


def _relations(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Equations, inequalities and chains of them."""
    if isinstance(a, sympy.And) != isinstance(b, sympy.And):
        return _same_region(a, b)
    if isinstance(a, sympy.And):
        first, second = list(a.args), list(b.args)
        if len(first) == len(second) and all(
            any(_relations(x, y, 0, 0) for y in second) for x in first
        ):
            return all(any(_relations(x, y, 0, 0) for x in first) for y in second)
        return _same_region(a, b)
    if not (isinstance(a, Relational) and isinstance(b, Relational)):
        return False
    a, b = (
        r.reversed if isinstance(r, sympy.StrictGreaterThan | sympy.GreaterThan) else r
        for r in (a, b)
    )
    if type(a) is not type(b):
        return False
    try:
        left, right = a.lhs - a.rhs, b.lhs - b.rhs
        if not left.free_symbols or not right.free_symbols:
            return exactly_equal(a.lhs, b.lhs) and exactly_equal(a.rhs, b.rhs)
        ratio = sympy.simplify(left / right)
        if _is_number(ratio) and ratio.is_finite and not ratio.is_zero:
            return isinstance(a, sympy.Eq | sympy.Ne) or bool(ratio > 0)
    except (TypeError, AttributeError, NotImplementedError):
        return bool(a == b)
    if isinstance(a, sympy.Eq):
        if a.free_symbols != b.free_symbols or len(a.free_symbols) != 1:
            return False
        unknown = next(iter(a.free_symbols))
        solutions = [sympy.solveset(e, unknown, sympy.S.Reals) for e in (left, right)]
        return (
            isinstance(solutions[0], sympy.FiniteSet)
            and len(solutions[0]) > 0
            and solutions[0] == solutions[1]
        )
    return _same_region(a, b)


def _same_region(a: Any, b: Any) -> bool:
    try:
        if a.free_symbols != b.free_symbols or len(a.free_symbols) != 1:
            return False
        first, second = a.as_set(), b.as_set()
        return bool(first == second and not first.is_empty)
    except Exception:  # sympy solves few of them
        return False


def close_lenient_spots() -> None:
    """Puts the comparisons of this module in the place of math-verify's.

    Once, before the first `equal`.
    """
    latex_reader.convert_number = _exact_number
    verifier.sympy_numeric_eq = _numbers
    verifier.sympy_symbolic_eq = exactly_equal
    verifier.sympy_compare_symbols = _symbols
    verifier.sympy_compare_relational = _relations
