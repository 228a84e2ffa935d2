r"""Which responses answer which reference: pairs decided by hand, in both directions.

`RIGHT` and `WRONG` hold (reference answer, response). Nothing here was taken from what a program said. math-verify, on the whole
response, is a second opinion; where it differs, `OTHER_OPINION` says why the hand is right.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest
from other_opinion import OTHER_OPINION

from zip_rc_jax.data.tasks import Problem
from zip_rc_jax.grading.answers import canonical, extract_answer
from zip_rc_jax.grading.grader import Grader

RIGHT = [
    # Punctuation, remarks and lines behind the answer.
    ("42", "Answer: 42"),
    ("42", "Answer: 42."),
    ("42", "Answer: 42,"),
    ("42", "Answer: 42!"),
    ("42", "Answer: 42;"),
    ("42", "Answer: 42 ."),
    ("42", "Answer: 42 (forty-two)"),
    ("42", "Answer: 42 (since 40 + 2 = 42)."),
    ("42", "Answer: **42** apples"),
    ("42", "Answer: **42**."),
    ("42", "Answer: *42*"),
    ("42", "Answer: __42__"),
    ("42", "Answer: `42`"),
    ("42", 'Answer: "42"'),
    ("42", "Answer: 42\n\nExplanation: we add 40 and 2."),
    ("42", "Answer: 42\nExplanation: we add 40 and 2."),
    ("42", "Answer: 42\nConfidence: 95%"),
    ("42", "Answer: 42\nWe add 40 and 2."),
    ("42", "Answer: 42\n40 + 2 = 42"),
    ("42", "Answer: 42. We add 40 and 2."),
    ("42", "Answer: 42, because 40 + 2 = 42"),
    ("42", "Answer: 42 - because 40 + 2 is that"),
    ("42", "Answer: 42 because 6 times 7 is that."),
    ("42", "Answer: 42.\n\nI hope this helps! Let me know if you have 3 more questions."),
    ("42", "Answer: There are 42 apples in the box."),
    ("42", "Answer: The total is 42."),
    ("42", "Answer: Natalia sold 42 clips."),
    ("5", "Answer: 5. Note that 2*3=6."),
    # Ways to state it.
    ("42", "answer: 42"),
    ("42", "ANSWER: 42"),
    ("42", "Answer : 42"),
    ("42", "Answer:42"),
    ("42", "Answer = 42"),
    ("42", "The answer is 42."),
    ("42", "So the final answer is 42."),
    ("42", "the answer is: 42"),
    ("42", "Therefore, the answer is **42**."),
    ("42", "The answer to the question is 42."),
    ("42", "Thus the answer is $42$."),
    ("42", "The correct answer is 42 apples."),
    ("42", "Final Answer: The final answer is $42$. I hope it is correct."),
    ("42", "**Final Answer:** 42"),
    ("42", "**Final Answer**\n\n42"),
    ("42", "## Answer\n42"),
    ("42", "### Final Answer\n\n$$42$$"),
    ("42", "**Answer:**\n\n42"),
    ("42", "Answer:\n\\[\n42\n\\]"),
    ("42", "#### 42"),
    ("42", "We add 40 and 2.\n#### 42\n"),
    ("42", "\\boxed 42"),
    ("42", "\\boxed{42}"),
    ("42", "\\boxed {42}"),
    ("42", "\\fbox{42}"),
    ("42", "$\\boxed{42}$."),
    ("42", "\\[ \\boxed{\\text{42}} \\]"),
    ("42", "<answer>42</answer>"),
    ("42", "<Answer> 42. </Answer>"),
    ("42", "<answer>\\boxed{42}</answer>"),
    ("42", "<answer>The answer is 42.</answer>"),
    ("42", "<think>Answer: 41</think>The answer is 42."),
    ("42", "<think>\\boxed{41}</think>\n\nAnswer: 42"),
    ("42", "Let me see. Answer: 41. Wait, that is wrong. Answer: 42"),
    ("42", "\\boxed{41}. No. \\boxed{42}"),
    ("42", "Answer: 42\n\nQuestion: What is 3 + 4?\nAnswer: 7"),
    ("42", "Answer: 42\n\nQ: What is 3 + 4?\nA: 7. The answer is 7."),
    ("42", "The answer is 42.\n\nQ: What is 3 + 4?\nA: The answer is 7."),
    ("42", "Answer: 42\nHuman: And 3 + 4?\nAssistant: Answer: 7"),
    ("42", "Answer: 42\nUser: And 3 + 4?\nAnswer: 7"),
    ("42", "#### 42\n\nProblem: What is 3 + 4?\n#### 7"),
    ("42", "\\boxed{42}\n\nProblem 2. What is 3 + 4? \\boxed{7}"),
    ("42", "Answer: 42 Question: What is 3 + 4? Answer: 7"),
    ("42", "Answer: 42<|im_end|>\n<|im_start|>user\nAnswer: 7"),
    # Numbers.
    ("0.00001", "Answer: 1e-5"),
    ("1e-05", "Answer: 0.00001"),
    ("10^{-5}", "Answer: 1e-5"),
    ("1500", "Answer: 1.5E+3"),
    ("1.6\\times 10^{-19}", "Answer: 1.6e-19"),
    ("1.6\\times 10^{-19}", "Answer: $1.60 \\times 10^{-19}$"),
    ("1.6\\times 10^{-19}", "Answer: 1.6 × 10⁻¹⁹"),
    ("1.6\\times 10^{-19}", "Answer: 1.6*10^-19"),
    ("1000000", "Answer: 1,000,000"),
    ("1,000", "Answer: 1000"),
    ("1000", "Answer: 1{,}000"),
    ("1000", "Answer: 1\\,000"),
    ("1000000", "Answer: 1 000 000"),
    ("1234.5", "Answer: 1,234.50"),
    ("0.5", "Answer: .5"),
    ("0.5", "Answer: 1/2"),
    ("0.5", "Answer: \\frac12"),
    ("0.5", "Answer: \\dfrac{1}{2}"),
    ("0.5", "Answer: \\tfrac12"),
    ("0.5", "Answer: $\\frac{1}{2}$."),
    ("0.5", "Answer: ½"),
    ("2.5", "Answer: 2½"),
    ("0.75", "Answer: ¾"),
    ("\\frac{1}{2}", "Answer: 2/4"),
    ("\\frac{1}{2}", "Answer: 0.50"),
    ("-\\frac{1}{2}", "Answer: −1/2"),
    ("-\\frac{1}{2}", "Answer: \\frac{-1}{2}"),
    ("-\\frac{1}{2}", "Answer: -0.5"),
    ("\\frac{1}{3}", "Answer: 0.\\overline{3}"),
    ("\\frac{1}{3}", "Answer: 0.333..."),
    ("\\frac{1}{3}", "Answer: 0.333333"),
    ("\\frac{2}{3}", "Answer: 0.66666667"),
    ("\\sqrt{2}", "Answer: 1.41421356"),
    ("\\pi", "Answer: 3.14159265"),
    ("3\\frac{1}{2}", "Answer: 3 1/2"),
    ("\\frac{7}{2}", "Answer: 3 1/2"),
    ("3.5", "Answer: $3\\frac{1}{2}$"),
    ("-3.5", "Answer: -3 1/2"),
    ("42", "Answer: +42"),
    ("42", "Answer: 042"),
    ("42", "Answer: 42.0"),
    ("42", "Answer: 42.00."),
    ("42", "Answer: 84/2"),
    ("42", "Answer: 40 + 2"),
    ("42", "Answer: 40 + 2 = 42"),
    ("42", "Answer: 6*7 = 42"),
    ("42", "Answer: ４２"),
    ("1024", "Answer: 2^10"),
    ("1024", "Answer: 2**10"),
    ("2^{10}", "Answer: 1024"),
    ("2^{100}", "Answer: 2^100"),
    ("-4", "Answer: -2^2"),
    ("120", "Answer: 5!"),
    ("5000000", "Answer: 5 million"),
    ("0", "Answer: 0"),
    ("0", "Answer: -0"),
    ("0", "Answer: 0.0"),
    # Units, money, percent, degrees.
    ("90", "Answer: 90°"),
    ("90", "Answer: 90 degrees"),
    ("90", "Answer: $90^\\circ$"),
    ("90^\\circ", "Answer: 90"),
    ("90^{\\circ}", "Answer: 90 degrees."),
    ("10", "Answer: 10 km/h"),
    ("10 km/h", "Answer: 10"),
    ("10 km/h", "Answer: 10 kilometers per hour"),
    ("10\\text{ km/h}", "Answer: 10 km/h"),
    ("10\\text{ km/h}", "Answer: 10 km/hr"),
    ("60\\text{ mph}", "Answer: 60 miles per hour"),
    ("5\\text{ km}", "Answer: 5000 m"),
    ("5 km", "Answer: 5km"),
    ("5\\text{ cm}^2", "Answer: 5 cm²"),
    ("5\\text{ cm}^2", "Answer: 5 square centimeters"),
    ("5", "Answer: 5 cm^2"),
    ("5", "Answer: 5\\ \\mathrm{cm}^2"),
    ("5", "Answer: 5 \\text{ units}"),
    ("2 hours", "Answer: 120 minutes"),
    ("3", "Answer: 3 m"),
    ("3", "Answer: $3\\,\\text{m/s}^2$"),
    ("18.90", "\\boxed{\\$18.90}"),
    ("\\$18.90", "\\boxed{18.90}"),
    ("18.90", "Answer: $18.90"),
    ("18.90", "Answer: 18.9 dollars"),
    ("\\$18.90", "Answer: $18.9"),
    ("5", "Answer: $5.00"),
    ("5", "Answer: €5"),
    ("1200", "Answer: $1,200"),
    ("\\$0.50", "Answer: 50 cents"),
    ("18", "Answer: 18 dollars per day"),
    ("18", "Answer: 18 red apples"),
    ("18 apples", "Answer: 18 apples"),
    ("18 apples", "Answer: 18"),
    ("50", "Answer: 50%"),
    ("50%", "Answer: 50"),
    ("50\\%", "Answer: 50 percent"),
    ("50\\%", "Answer: 0.5"),
    ("50\\%", "Answer: \\frac{1}{2}"),
    ("0.5", "Answer: 50%"),
    ("0.5", "Answer: 0.5%"),
    ("0.5\\%", "Answer: 0.005"),
    ("12.5\\%", "Answer: 12.5%."),
    ("25\\pi", "Answer: 25π cm²"),
    ("2\\sqrt{3}\\text{ cm}", "Answer: 2√3"),
    # Formulas as people write them.
    ("\\frac{\\pi}{2}", "Answer: pi/2"),
    ("\\frac{\\pi}{2}", "Answer: π/2"),
    ("\\frac{\\pi}{2}", "Answer: 0.5\\pi"),
    ("\\sqrt{51}", "Answer: √51"),
    ("\\sqrt{51}", "Answer: sqrt(51)"),
    ("\\sqrt{51}", "Answer: √(51)"),
    ("\\sqrt{51}", "Answer: \\sqrt51"),
    ("\\sqrt{12}", "Answer: 2\\sqrt{3}"),
    ("\\sqrt{12}", "Answer: 2*sqrt(3)"),
    ("\\sqrt{12}", "Answer: 2√3"),
    ("\\frac{\\sqrt{2}}{2}", "Answer: 1/\\sqrt{2}"),
    ("\\frac{\\sqrt{2}}{2}", "Answer: sqrt(2)/2"),
    ("\\sqrt[3]{2}", "Answer: 2^{1/3}"),
    ("\\sqrt[3]{2}", "Answer: ∛2"),
    ("x^2", "Answer: x²"),
    ("x^{10}", "Answer: x^10"),
    ("x^2+1", "Answer: 1 + x**2"),
    ("-2\\pi", "Answer: -2*pi"),
    ("5\\pi", "Answer: 5π"),
    ("5\\pi", "Answer: 5 \\cdot \\pi"),
    ("2x", "Answer: 2*x"),
    ("2x", "Answer: x \\times 2"),
    ("(x-1)(x+1)", "\\boxed{x^2 - 1}"),
    ("x^2-2x+1", "Answer: (x-1)^2"),
    ("x^2-2x+1", "Answer: (1 - x)^2"),
    ("\\frac{x+1}{2}", "Answer: (x+1)/2"),
    ("\\frac{1}{x+1}", "Answer: 1/(x+1)"),
    ("e^{2x}", "Answer: exp(2x)"),
    ("e^{2x}", "Answer: e^(2x)"),
    ("\\ln 2", "Answer: ln(2)"),
    ("\\ln 2", "Answer: \\ln{2}"),
    ("\\sin x", "Answer: sin(x)"),
    ("\\sin^2 x", "Answer: 1 - \\cos^2 x"),
    ("\\frac{1}{2}\\sin(2x)", "Answer: \\sin x \\cos x"),
    ("|x|", "Answer: \\sqrt{x^2}"),
    ("3+4i", "Answer: 4i + 3"),
    ("\\frac{1}{1-x}", "Answer: -\\frac{1}{x-1}"),
    ("\\binom{5}{2}", "Answer: 10"),
    ("\\log_2 8", "Answer: 3"),
    ("n(n+1)/2", "Answer: \\frac{n^2+n}{2}"),
    ("\\left(\\frac{1}{2}\\right)^n", "Answer: 2^{-n}"),
    # Names and equations.
    ("5", "Answer: x = 5"),
    ("5", "Answer: $x = 5$"),
    ("x=5", "Answer: 5"),
    ("x = 5", "Answer: x=5."),
    ("5", "Answer: x = 10/2 = 5"),
    ("5", "Answer: f(2) = 5"),
    ("5", "Answer: total = 5"),
    ("5", "Answer: \\text{Area} = 5"),
    ("y=2x+1", "Answer: y = 1 + 2x"),
    ("y=2x+1", "Answer: 2x + 1"),
    ("2x+3y=6", "Answer: 4x + 6y = 12"),
    ("2x+3y=6", "Answer: 3y = 6 - 2x"),
    ("x^2+y^2=4", "Answer: y^2 + x^2 = 4"),
    # Lists, tuples, sets, intervals, matrices.
    ("3, 4", "Answer: 4, 3"),
    ("3, 4", "Answer: 3 and 4"),
    ("3,4", "Answer: x = 3 or x = 4"),
    ("3,4", "Answer: \\{3, 4\\}"),
    ("\\{3,4\\}", "Answer: {4, 3}"),
    ("\\{3,4\\}", "Answer: 3, 4"),
    ("3,4", "The solutions are \\boxed{3} and \\boxed{4}."),
    ("1, 2, 3", "Answer: 1, 2, and 3"),
    ("100, 200", "Answer: 100,200"),
    ("\\pm 3", "Answer: 3, -3"),
    ("-3, 3", "Answer: ±3"),
    ("2\\pm\\sqrt{3}", "Answer: 2+√3, 2-√3"),
    ("(1, 2)", "Answer: (1,2)"),
    ("(1, 2)", "Answer: $\\left(1, 2\\right)$"),
    ("(1, 2)", "Answer: x = 1, y = 2"),
    ("(1, 2)", "Answer: (x, y) = (1, 2)"),
    ("x=1, y=2", "Answer: y = 2, x = 1"),
    ("(\\frac{1}{2}, 3)", "Answer: (0.5, 3)"),
    ("(3, \\frac{\\pi}{2})", "Answer: (3, pi/2)"),
    ("[1, 2)", "Answer: [1,2)"),
    ("[0, \\infty)", "Answer: [0, ∞)"),
    ("[0, \\infty)", "Answer: x \\ge 0"),
    ("x \\ge 0", "Answer: x ≥ 0"),
    ("x \\ge 0", "Answer: x >= 0"),
    ("x \\ge 0", "Answer: 0 \\le x"),
    ("x < 3", "Answer: 2x < 6"),
    ("1 < x < 2", "Answer: (1, 2)"),
    ("(-\\infty, 1) \\cup (2, \\infty)", "Answer: (2, ∞) ∪ (−∞, 1)"),
    ("(-\\infty, 1) \\cup (2, \\infty)", "Answer: (-inf, 1) U (2, inf)"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\boxed{\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}}"),
    ("\\begin{pmatrix} 1 \\\\ 1/2 \\end{pmatrix}", "Answer: \\begin{pmatrix} 1 \\\\ 0.5 \\end{pmatrix}"),
    ("\\emptyset", "Answer: ∅"),
    ("\\emptyset", "Answer: no solution"),
    ("\\infty", "Answer: ∞"),
    ("\\infty", "Answer: infinity"),
    ("-\\infty", "Answer: -∞"),
    # Choices and words.
    ("A", "Answer: A"),
    ("A", "Answer: (A)"),
    ("A", "Answer: A."),
    ("A", "Answer: A)"),
    ("A", "Answer: **A**"),
    ("A", "Answer: a"),
    ("A", "Answer: \\text{A}"),
    ("A", "Answer: \\textbf{(A)}"),
    ("A", "Answer: $\\textbf{(A)}\\ 5$"),
    ("A", "Answer: (A) 5"),
    ("A", "Answer: A. 5"),
    ("A", "Answer: A) blue"),
    ("A", "Answer: Option A"),
    ("A", "The answer is (A)."),
    ("A", "The correct answer is A."),
    ("\\text{(A)}", "Answer: A"),
    ("5", "Answer: (A) 5"),
    ("Tuesday", "Answer: Tuesday."),
    ("\\text{Tuesday}", "Answer: tuesday"),
    ("Tuesday", "Answer: \\boxed{\\text{Tuesday}}"),
    ("Tuesday", "Answer: Tuesday\nBecause Monday was yesterday, it is Tuesday."),
    ("yes", "Answer: Yes"),
    ("yes", "Answer: Yes."),
    ("the blue car", "Answer: blue car"),
    # Times, ratios, bases.
    ("3:15 PM", "Answer: 3:15 p.m."),
    ("3:15 PM", "Answer: 3:15"),
    ("3:15 PM", "Answer: 15:15"),
    ("3:15\\text{ p.m.}", "Answer: 3:15 PM"),
    ("1:2", "Answer: 1 : 2"),
    ("1:2", "Answer: 2:4"),
    ("1:2", "Answer: 1/2"),
    ("1011_2", "Answer: 1011_{2}"),
    ("1011_2", "Answer: 1011"),
]  # fmt: skip

WRONG = [
    # Past the answer.
    ("42", "Answer: 41\n\nCheck: 40 + 2 = 42."),
    ("42", "Answer: 41\nCheck: 40 + 2 = 42"),
    ("42", "Answer: 41\n40 + 2 = 42"),
    ("42", "Answer: 41. The sum of 40 and 2 is 42."),
    ("42", "Answer: 41 (not 42)"),
    ("42", "Answer: 41, not 42"),
    ("42", "Answer: 41\n\nExplanation: 42 is too large."),
    ("42", "Answer: 41\nThe answer is not 42."),
    ("42", "Answer: 41\n\nIf the answer is 42, then we are wrong."),
    ("6", "Answer: 5. Note that 2*3=6."),
    ("7", "Answer: 42\n\nQuestion: What is 3 + 4?\nAnswer: 7"),
    ("7", "The answer is 42.\n\nQ: What is 3 + 4?\nA: The answer is 7."),
    ("7", "Answer: 42\nHuman: And 3 + 4?\nAssistant: Answer: 7"),
    ("7", "Answer: 42\n\nUser: And 3 + 4?\n\nAssistant: \\boxed{7}"),
    ("7", "#### 42\n\nProblem: What is 3 + 4?\n#### 7"),
    ("7", "\\boxed{42}\n\nProblem 2. What is 3 + 4? \\boxed{7}"),
    ("41", "<think>Answer: 41</think>The answer is 42."),
    ("41", "\\boxed{41}. No. \\boxed{42}"),
    ("95", "Answer: 42\nConfidence: 95%"),
    # No answer, or another one.
    ("42", "it is 42"),
    ("42", "42"),
    ("42", "Answer: "),
    ("42", "Answer: \\boxed{}"),
    ("42", "Answer: none"),
    ("42", "Answer: not 42"),
    ("42", "Answer: about 42 or so"),
    ("42", "Answer: It is not 42."),
    ("42", "Answer: more than 42"),
    ("42", "Answer: 42 or 43"),
    ("42", "Answer: 41 or 42"),
    ("42", "Answer: 41, 42"),
    ("42", "Answer: 41 = 42"),
    ("42", "Answer: 42 + 1"),
    ("42", "Answer: 42x"),
    ("42", "Answer: 42 x"),
    ("42", "Answer: 42^2"),
    ("42", "Answer: -42"),
    ("42", "Answer: 4.2"),
    ("42", "Answer: 42 million"),
    ("42", "Answer: half of 42"),
    ("42", "Answer: 42 times 2"),
    ("42", "Answer: 24"),
    ("3", "Answer: 3 and 3"),
    ("3", "\\boxed{3} or \\boxed{4}"),
    ("18", "Answer: 17 or 19 or 20"),
    ("x", "Answer: y"),
    ("#", "#### Check the sum"),
    # Tiny, huge and close numbers.
    ("1.6\\times 10^{-19}", "Answer: 9.1\\times 10^{-31}"),
    ("1.6\\times 10^{-19}", "Answer: 0"),
    ("0", "Answer: 1e-30"),
    ("\\frac{1}{2^{99}}", "\\boxed{\\frac{1}{2^{98}}}"),
    ("1e-7", "Answer: 2e-7"),
    ("0.0000001", "Answer: 0.0000002"),
    ("1.0000001", "Answer: 1"),
    ("1", "Answer: 0.9999999"),
    ("0.1234567", "Answer: 0.1234568"),
    ("1000000.0000001", "Answer: 1000000"),
    ("123456789012345678901234567890", "Answer: 123456789012345678901234567891"),
    ("\\frac{1}{3}", "Answer: 0.33"),
    ("\\frac{1}{3}", "Answer: 0.333334"),
    ("\\frac{1}{8}", "Answer: 0.1250001"),
    ("\\frac{333333}{1000000}", "Answer: 1/3"),
    ("\\sqrt{2}", "Answer: 1.414"),
    ("\\sqrt{2}", "Answer: 1.414213"),
    ("\\sqrt{2}", "Answer: \\sqrt{2} + 10^{-40}"),
    ("\\pi", "Answer: 3.14"),
    ("\\pi", "Answer: 22/7"),
    ("10^{-20} x", "\\boxed{2 \\cdot 10^{-20} x}"),
    ("x", "Answer: x + 10^{-40}"),
    ("\\sin x", "Answer: \\sin x + 10^{-30} \\sin x"),
    ("1e-5", "Answer: e-5"),
    ("1e5", "Answer: 1e-5"),
    ("2^{10}", "Answer: 20"),
    ("2^{99}", "Answer: 2^{98}"),
    ("10^{400}", "Answer: 10^{401}"),
    ("1/3", "Answer: 3"),
    ("3\\frac{1}{2}", "Answer: 3/2"),
    ("1,000", "Answer: 1"),
    ("1000", "Answer: 1, 000"),
    # Not a number.
    ("nan", "Answer: nan"),
    ("42", "Answer: nan"),
    ("42", "Answer: inf"),
    ("\\infty", "Answer: nan"),
    ("\\infty", "Answer: -\\infty"),
    ("\\infty", "Answer: 10^{400}"),
    ("42", "Answer: 42 + nan"),
    ("0", "Answer: 0/0"),
    # Units and percent.
    ("5 km", "Answer: 5 m"),
    ("5 km", "Answer: 5 miles"),
    ("5\\text{ km}", "Answer: 5 \\text{ m}"),
    ("5 km", "Answer: 5000"),
    ("5", "Answer: 5000 m"),
    ("5\\text{ cm}^2", "Answer: 5 cm"),
    ("5\\text{ cm}^2", "Answer: 5 cm³"),
    ("10 km/h", "Answer: 10 m/s"),
    ("2 hours", "Answer: 2 minutes"),
    ("\\$5", "Answer: €5"),
    ("\\$5", "Answer: 5 cents"),
    ("18 apples", "Answer: 18 oranges"),
    ("20^\\circ\\text{C}", "Answer: 20 °F"),
    ("50\\%", "Answer: 5"),
    ("50\\%", "Answer: 5000"),
    ("50", "Answer: 0.5"),
    ("\\frac{x}{2}\\text{ km}", "Answer: \\frac{x}{2} \\text{ m}"),
    # Formulas.
    ("x^2+1", "Answer: x^2 - 1"),
    ("x^{10}", "Answer: x^1 0"),
    ("\\sqrt{x^2}", "Answer: x"),
    ("\\sin x", "Answer: \\cos x"),
    ("5x", "Answer: 5"),
    ("5", "Answer: 5x"),
    ("5m", "Answer: 5n"),
    ("3+4i", "Answer: 3-4i"),
    ("x=5", "Answer: y=5"),
    ("x=5", "Answer: x=6"),
    ("y=2x+1", "Answer: y=2x-1"),
    ("x^2=-1", "Answer: x^2=-4"),
    ("2x+3y=6", "Answer: 2x+3y=7"),
    ("2x+3y=6", "Answer: 3x+2y=6"),
    ("x < 3", "Answer: x > 3"),
    ("x < 3", "Answer: x \\le 3"),
    ("x < 3", "Answer: -x < -3"),
    # Lists.
    ("3, 4", "Answer: 3"),
    ("3, 4", "Answer: 3, 5"),
    ("3, 4", "Answer: 3, 4, 5"),
    ("2, 2, 3", "Answer: 2, 3, 3"),
    ("(1, 2)", "Answer: (2, 1)"),
    ("(1, 2)", "Answer: [1, 2]"),
    ("(1, 2)", "Answer: \\{1, 2\\}"),
    ("(1, 2)", "Answer: (1, 2, 3)"),
    ("(1, 2)", "Answer: 2, 1"),
    ("[1, 2)", "Answer: (1, 2]"),
    ("\\{1,2\\}", "Answer: \\{1,3\\}"),
    ("\\pm 3", "Answer: 3"),
    ("(-\\infty, 1) \\cup (2, \\infty)", "Answer: (-\\infty, 1) \\cup (3, \\infty)"),
    ("(-\\infty, 1) \\cup (2, \\infty)", "Answer: (-\\infty, 1)"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "Answer: \\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}"),
    ("\\emptyset", "Answer: 0"),
    ("x=1, y=2", "Answer: x=2, y=1"),
    # Choices and words.
    ("A", "Answer: B"),
    ("A", "Answer: (B) A car"),
    ("A", "Answer: A or B"),
    ("A", "Answer: A and B"),
    ("A", "Answer: AB"),
    ("silent", "Answer: listen"),
    ("no", "Answer: on"),
    ("no", "Answer: not sure"),
    ("Tuesday", "Answer: Wednesday"),
    ("Tuesday", "Answer: not Tuesday"),
    ("Tuesday", "Answer: Tuesday or Wednesday"),
    ("yes", "Answer: no"),
    ("east", "Answer: west"),
    # Times, ratios, bases.
    ("3:15 PM", "Answer: 3:15 AM"),
    ("3:15", "Answer: 3:51"),
    ("3:15", "Answer: 1:5"),
    ("1:2", "Answer: 2:1"),
    ("1011_2", "Answer: 1011_3"),
    ("1011_2", "Answer: 11"),
]  # fmt: skip


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


def scored(grader, gold, response):
    return grader.score(Problem(0, 0, 0, "?", gold, "math"), response)


def test_the_table_is_long_and_has_no_pair_twice():
    assert len(RIGHT) > 200
    assert len(WRONG) > 100
    assert len({*RIGHT, *WRONG}) == len(RIGHT) + len(WRONG)


@pytest.mark.parametrize(("gold", "response"), RIGHT)
def test_a_right_answer_is_right(grader, gold, response):
    assert scored(grader, gold, response) == 1.0


@pytest.mark.parametrize(("gold", "response"), WRONG)
def test_a_wrong_answer_is_wrong(grader, gold, response):
    assert scored(grader, gold, response) == 0.0


# --- math-verify on the whole response -----------------------------------------------------------------------------------------------

SECOND_OPINION = """
import json, sys
import math_verify
table = json.load(sys.stdin)
def parse(text, whole):
    return math_verify.parse(text if whole or "$" in text or "boxed" in text else f"${text}$", parsing_timeout=None)
print(json.dumps([bool(math_verify.verify(parse(g, False), parse(r, True), timeout_seconds=None)) for g, r in table]))
"""


@pytest.mark.slow
def test_math_verify_differs_only_where_the_hand_has_a_reason():
    table = [*RIGHT, *WRONG]
    done = subprocess.run([sys.executable, "-c", SECOND_OPINION], input=json.dumps(table), capture_output=True, text=True, check=True)
    opinions = json.loads(done.stdout.splitlines()[-1])
    known = {pair for pairs in OTHER_OPINION.values() for pair in pairs}
    assert known <= {*table}
    assert [pair for pair, opinion in zip(table, opinions, strict=True) if opinion != (pair in RIGHT) and pair not in known] == []


# --- properties ----------------------------------------------------------------------------------------------------------------------

rationals = st.fractions(max_denominator=10**12) | st.builds(
    lambda p, q, e: Fraction(p, q) * Fraction(10) ** e, st.integers(-(10**6), 10**6), st.integers(1, 10**6), st.integers(-300, 300)
)
pairs = st.one_of(st.tuples(rationals, rationals), st.builds(lambda x, e: (x, x + Fraction(1, 10**e)), rationals, st.integers(1, 400)))
FORMS = [
    lambda x: f"{x.numerator}/{x.denominator}",
    lambda x: f"\\frac{{{x.numerator}}}{{{x.denominator}}}",
    lambda x: f"{'-' if x < 0 else ''}\\dfrac{{{abs(x.numerator)}}}{{{x.denominator}}}",
    lambda x: f"{2 * x.numerator} / {2 * x.denominator}",
]
DRESSES = [
    "{}.",
    "${}$",
    "\\({}\\)",
    "\\[{}\\]",
    "$${}$$",
    "\\boxed{{{}}}",
    "$\\boxed{{{}}}$.",
    "**{}**",
    "**{}**.",
    " {} ",
    "{} \n\nBecause it is so.",
]


@hypothesis.given(pairs, st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_two_numbers_are_equal_exactly_if_they_are_the_same(grader, both, form, other):
    (x, y), (a, b) = both, (form(both[0]), other(both[1]))
    assert grader.equivalent(a, b) is grader.equivalent(b, a) is (x == y)
    assert (canonical(a) == canonical(b)) is (x == y)


@hypothesis.given(st.decimals(allow_nan=False, allow_infinity=False, places=12), st.integers(-(10**9), 10**9))
def test_decimals_are_compared_to_the_last_digit(grader, x, step):
    y = x + step * type(x)("1e-12")
    assert grader.equivalent(f"{x:f}", f"{y:f}") is (x == y)
    assert grader.equivalent(f"{x:e}", f"{y:e}") is (x == y)


VALUES = [
    "42",
    "-3",
    "\\frac{1}{2}",
    "0.5",
    "3\\sqrt{2}",
    "x^2+1",
    "(1, 2)",
    "\\{1, 2\\}",
    "[0, \\infty)",
    "x = 5",
    "\\text{Tuesday}",
    "5 km",
    "50\\%",
]


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("value", VALUES)
def test_what_stands_around_an_answer_does_not_matter(grader, value, dress):
    assert scored(grader, value, f"Answer: {dress.format(value)}") == 1.0
    answer = extract_answer(f"Answer: {dress.format(value)}")
    assert canonical(answer or "") == canonical(value)


GOLDS = sorted({gold for gold, _ in [*RIGHT, *WRONG] if gold not in ("nan", "#")})


def test_an_answer_that_can_be_read_is_itself(grader):
    assert [gold for gold in GOLDS if not grader.equivalent(gold, gold)] == []


def test_equality_is_the_same_from_both_sides(grader):
    answers = [(gold, extract_answer(response) or "") for gold, response in [*RIGHT, *WRONG]]
    assert [pair for pair in answers if grader.equivalent(*pair) != grader.equivalent(*pair[::-1])] == []


@pytest.mark.slow
def test_equal_forms_mean_equal_answers(grader):
    """Over all pairs of answers in the table; nan equals nothing, but one group of votes may hold it."""
    answers = sorted({extract_answer(r) or "" for _, r in [*RIGHT, *WRONG]} | set(GOLDS))
    forms = {a: canonical(a) for a in answers if "nan" not in a and "=" not in a}
    equal = [(a, b) for a, b in itertools.combinations(forms, 2) if forms[a] == forms[b]]
    assert len(equal) > 100
    assert [pair for pair in equal if not grader.equivalent(*pair)] == []


def test_equal_numbers_share_a_form():
    """So that their votes count together without any comparison."""
    same = [
        "42",
        "42.",
        "$42$",
        "\\(42\\)",
        "**42**",
        "\\boxed{42}",
        "42.0",
        "84/2",
        "+42",
        " 42 ",
        "\\text{42}",
        "42!",
        "42,",
        "４２",
        "42\\\\",
    ]
    assert {canonical(a) for a in same} == {"42"}
    half = [
        "0.5",
        "\\frac{1}{2}",
        "\\dfrac{1}{2}",
        "1/2.",
        "½",
        "\\frac12",
        ".5",
        "5e-1",
        "2/4",
        "\\tfrac{1}{2}",
        "$\\left(\\frac{1}{2}\\right)$",
    ]
    assert {canonical(a) for a in half} == {"1/2"}


def test_no_answer_is_equal_to_nan(grader):
    for a, b in itertools.product(["nan", "NaN", "$nan$", "-nan"], ["nan", "42", "\\infty", "0", "inf"]):
        assert not grader.equivalent(a, b)
        assert not grader.equivalent(b, a)
