"""Reading answers as people write them: numbers, units, choices, lists.

Pure Python, no imports beyond the standard library.

An answer takes these steps, one file each:
  text        cleaned: one line, without wrappers and emphasis
  reading     a tree of it (`Node`), made with `numbers` and `units`
  comparing   two trees; what is no plain form goes as LaTeX (`latex`) to a judge, math-verify
  canonical   one text for one tree, so that equal answers vote together

The grading worker loads this folder by its path: it imports nothing of the package around it, and
its files import each other relatively.

Decisions
  Numbers     Compared exactly. A decimal with six or more places equals a number that has no finite
              decimal form if it is that number rounded: 0.333333 is 1/3, but 0.333334, 0.33333 and
              (against 1/8) 0.1250001 are wrong. nan equals nothing.
  Units       Left out on one side, they do not matter: 10 km/h answers 10. Given on both sides they
              must agree; known units are converted: 5 km is 5000 m, but not 5 m. Money: $5 is 5
              dollars is 500 cents. Degrees are a unit. A base subscript is treated likewise.
  Percent     50% equals 50 (a question for a percentage) and 0.5 (its value); 50 and 0.5 differ.
  Commas      1,000 is a thousand; 1, 000 and (1,000) are two numbers. 100,200 may be either, and is
              read like the other side.
  Order       Counts in ( ) and [ ]; not in { }, nor in a bare list such as "3 and 4". "3 or 4" is
              both, never one of them.
  Names       x = 5 answers 5, but not y = 5. Words before the equals sign are a description.
  Mixed       3 1/2 and 3\\frac{1}{2} are 7/2. 2^10 is 1024, as people mean it.
  Colons      3:15 is a time and equal to no ratio; 1:2 is a ratio, equal to 2:4 and to 1/2.
  42!         Is 42 with an exclamation mark, or the factorial, as the other side needs.
  Words       Compared without case, articles and punctuation; letters in another order are another
              word.
"""

from .canonical import canonical
from .comparing import as_written, equal, same
from .reading import alternatives, read
from .text import FUNCTION_WORDS, balanced, clean

__all__ = [
    "FUNCTION_WORDS",
    "alternatives",
    "as_written",
    "balanced",
    "canonical",
    "clean",
    "equal",
    "read",
    "same",
]
