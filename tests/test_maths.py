"""Answers that are mathematics, words or quantities, and how replies write them."""

import time

import pytest

from runtime.replies import ends_a_sentence
from tasks import verify
from tasks.problem import Problem
from tasks.units import QUANTITY, measured

# the key, what stands in the box of a reply, the reward
IN_A_BOX = r"""
0.5 | \frac 1 2 | 1
\frac 1 2 | 0.5 | 1
10 | \binom 5 2 | 1
0 | 5-3-2 = 0 | 1
555-12-34 | 509 | 0
3 pm | 3 am | 0
3 pm | 3 pm | 1
3 pm | 3 PM | 1
3 pm | 3 | 0
10 m | 10 cm | 0
9 m | 9 cm | 0
10 m | 10 m | 1
10 m | 10 | 1
10 m | 10\text{ m} | 1
10 m | 10\,\mathrm{m} | 1
10 m | 10 meters | 1
10 m | 10.0 m | 1
10 m | 9 m | 0
10 | 10 cm | 1
10 | 10\text{ cm} | 1
10\text{ cm} | 10 | 1
10\text{ cm} | 10\text{ m} | 0
10 cm | 10 centimeters | 1
10 km | 10 cm | 0
5 meters | 5 feet | 0
5 dollars | 5 cents | 0
5 m^2 | 5 square meters | 1
5 m^2 | 5 m | 0
2 m/s | 2 km/h | 0
2 m/s | 2\text{ m/s} | 1
2 m/s | 2\,\frac{\text{m}}{\text{s}} | 0
12 apples | 12 | 1
12 apples | 12 oranges | 0
12 | 12\text{ bananas} | 1
12 | 12 apples | 1
90^\circ | 90 | 1
90 | 90^\circ | 1
20^\circ C | 20^\circ F | 0
5 | 5\text{ square units} | 1
36\pi\text{ square inches} | 36\pi | 1
36\pi\text{ square inches} | 36\pi\text{ square feet} | 0
room 12 | moor 12 | 0
room 12 | Room 12 | 1
abc123 | cba123 | 0
abc123 | abc123 | 1
CO2 | OC2 | 0
CO2 | CO_2 | 0
H2O | HO2 | 0
H2O | H2O | 1
Tom, Ann | Ann, Tom | 0
Tom, Ann | tom,Ann | 1
3rd | 3 | 0
3rd | 3rd | 1
2024-01-02 | 2021 | 0
2024-01-02 | 2024-01-02 | 1
1/2/2024 | 1/4048 | 0
1.2.3 | 1.2.3 | 1
1 2 3 | 6 | 0
1 2 3 | 1 2 3 | 1
2xy | 2yx | 1
2xy | 2xy | 1
2xy | 2x | 0
xy+1 | 1+yx | 1
xy+1 | xy | 0
2ab | 2ba | 1
2ab | 2 | 0
2ab | 2cm | 0
5t | 5 | 0
3h | 3 | 0
2c | 2 c | 1
4s+1 | 1+4s | 1
ab | ab | 1
ab | a \cdot b | 1
ab | a \cdot c | 0
ab | ba | 0
AB+1 | 1+AB | 1
y=mx+b | y=b+mx | 1
\frac{ab}{c} | \frac{ba}{c} | 1
\sin x | \sin x | 1
\sin(2x) | 2\sin x\cos x | 1
\log_2 8 | 3 | 1
x=2 \text{ or } x=3 | 2,3 | 1
x=6 | 6 | 1
6 | x=6 | 1
\text{even} | odd | 0
\text{even} | even | 1
sqrt(2) | sqrt(2) | 1
2*pi | 2\pi | 1
m | m | 1
(5,6) | (6,5) | 0
(5,6) | (5,6) | 1
5,6 | 6,5 | 1
a,b | b,a | 1
0 | 1\,000 | 0
0 | 12\,000 | 0
0 | 1 000 | 0
1000 | 1\,000 | 1
1000 | 1 000 | 1
1000 | 1~000 | 1
1000 | 1{,}000 | 1
1000 | 1,\!000 | 1
1000 | 1,000 | 1
1000 | 1\;000 | 1
1000 | 1\ 000 | 1
1000 | 1\:000 | 1
12\,345 | 12345 | 1
12 345 | 12345 | 1
12345678 | 12\,345\,678 | 1
3.141592 | 3.141\,592 | 1
0 | 1\,00 | 0
0 | 5 0 | 0
6 | 2 3 | 0
1.75 | 1 3/4 | 1
0.75 | 1 3/4 | 0
1.75 | 1\frac{3}{4} | 1
6.02e23 | 6.02\times 10^{23} | 1
6.022e23 | 6.022\times 10^{23} | 1
1.989e30 | 1.989\times 10^{30} | 1
6.02\times 10^{23} | 6.02e23 | 1
6.02e23 | 6.022\times 10^{23} | 0
6.02e23 | 6.02\times 10^{22} | 0
6.02e23 | 6.02\cdot10^{23} | 1
2e-3 | 0.002 | 1
2e-3 | 2\times10^{-3} | 1
2e-3 | 0.003 | 0
0.002 | 2e-3 | 1
2e3 | 2000 | 1
2e-1 | -1+2e | 1
2e-1 | 0.2 | 0
2e - 3 | -3+2e | 1
1e100 | 10^{100} | 1
\frac{3\times10^2}{2} | 150 | 1
1/3\times 10^2 | \frac{100}{3} | 1
7 | \color{red}7 | 1
7 | \textcolor{red}{7} | 1
7 | \underline{7} | 1
7 | \bm{7} | 1
7 | \boldsymbol{7} | 1
7 | \mathbf{7} | 1
7 | \text{7} | 1
7 | **7** | 1
7 | $7$ | 1
7 | \displaystyle 7 | 1
7 | \mbox{7} | 1
cat | **cat** | 1
cat | `cat` | 1
cat | "cat" | 1
cat | \textrm{cat} | 1
cat | \mbox{cat} | 1
cat | \emph{cat} | 1
cat | \textbf{\text{cat}} | 1
cat | cat. | 1
cat | act | 0
cat | the cat | 0
yes | yes. | 1
no | on | 0
x-ray | X-ray | 1
\$10 | 10 | 1
$10 | 10 | 1
50\% | 50 | 1
50\% | 0.5 | 1
3:2 | \frac32 | 1
10^{23} | 10^23 | 1
\infty | \infty | 1
\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix} | 1
(-\infty, 2] | (-\infty,2] | 1
[1,2)\cup(3,4) | [1,2) \cup (3,4) | 1
\text{(A)} | A | 1
10:30 | 10:30 | 1
9.8 m/s^2 | 9.8\text{ m/s}^2 | 1
9.8 m/s^2 | 9.8 m s^{-2} | 1
9.8 m/s^2 | 9.8 m/s | 0
5 meters per second | 5 m/s | 1
5 N m | 5 m N | 1
5 ms | 5 m s | 0
10 | 10 \mathrm{~m} | 1
10 m | 10 \mathrm{~m} | 1
10 m | 10~\text{cm} | 0
pi/2 | \frac{\pi}{2} | 1
sqrt(2) | \sqrt{2} | 1
3 hours 20 minutes | 3 hours 20 minutes | 1
3 hours 20 minutes | 320 | 0
x^2 m | x^2 | 0
3 h | 3 h | 1
1:05 pm | 1:05 am | 0
12 thousand | 12 | 0
12\text{ thousand} | 12 | 0
12 | 12\text{ thousand} | 0
5th | 5 | 0
12,345 | 12345 | 1
x_1 | x_1 | 1
A1 | 1A | 0
B12 | 12B | 0
triangle ABC | ABC triangle | 0
2 NaCl | 2 ClNa | 0
3x+2y | 2y+3x | 1
abc+1 | 1+cba | 1
not 5 | 5 | 0
May 5 | 5 May | 0
1st | 1 | 0
10 a.m. | 10 p.m. | 0
\triangle ABC | \triangle ABC | 1
\mathbb{R} | \mathbb{R} | 1
\{1,2\} | \{2,1\} | 1
f(x)=2x | f(x)=2x | 1
true | True | 1
100 000 | 100000 | 1
1000 m | 1\,000 m | 1
-4 | -4 | 1
1/2 | 0.5 | 1
10! | 3628800 | 1
3,4,5 | 5,4,3 | 1
5\% | 5 | 1
5 percent | 5\% | 1
0 | \frac{}{} | 0
0 | n/a | 0
"""
REPLIES = [
    ("12.5 km/h", "It is $12.5 km/h$.", 1),
    ("12.5 km/h", "It is $12.5 m/h$.", 0),
    ("2 dozen", "The answer is $2 dozen$.", 1),
    ("90", "\\boxed{90\xb0}", 1),
    ("x^2", "\\boxed{x\xb2}", 1),
    ("1000", "\\boxed{1\u202f000}", 1),
    ("1000", "\\boxed{1\xa0000}", 1),
    ("6.02e23", "\\boxed{6.02 \xd7 10^23}", 1),
    ("7", "\\boxed{\uff17}", 1),
    ("7", "\\boxed{\\boxed{7}}", 1),
    ("cat", "\\boxed{\u201ccat\u201d}", 1),
    ("Caf\xe9", "\\boxed{Cafe\u0301}", 1),
    ("Cafe\u0301", "\\boxed{Caf\xe9}", 1),
    ("O\u2019Brien", "\\boxed{O'Brien}", 1),
    ("O'Brien", "\\boxed{O\u2019Brien}", 1),
    ("-4", "\\boxed{\u22124}", 1),
    ("0", "\\boxed{}", 0),
    ("7", "\\fbox{7}", 1),
    ("7", "\\boxed {7}", 1),
    ("7", "<answer>7</answer>", 1),
    ("7", "<answer>\n7\n</answer>", 1),
    ("7", "<answer>The answer is 7</answer>", 1),
    ("7", "<answer>\\boxed{7}</answer>", 1),
    ("\\frac12", "<answer>\\frac{1}{2}</answer>", 1),
    ("7", "<answer>8</answer>", 0),
    ("7", "\\boxed7", 1),
    ("7", "\\boxed{6}\n\\boxed{7}", 1),
    ("6", "\\boxed{6}\n\\boxed{5}", 0),
    ("5", "\\boxed{6}, no: \\boxed{5}", 1),
    ("5,6", "\\boxed{5} and \\boxed{6}", 1),
    ("5,6", "$\\boxed{6}$, $\\boxed{5}$", 1),
    ("5,6", "\\boxed{4}, \\boxed{5}, \\boxed{6}", 0),
    ("0", "\\boxed{", 0),
    ("5,6", "first \\boxed{4} then \\boxed{5,6}", 1),
    ("7", "\\boxed{7} \\boxed{}", 1),
    ("cat", "Answer: cat", 1),
    ("cat", "**Answer:** cat", 1),
    ("cat", "The answer is cat.", 1),
    ("cat", "<answer>cat</answer>", 1),
    ("cat", "I like the cat", 0),
    ("cat", "\\fbox{cat}", 1),
    ("10 m", "It is $10$ m.", 1),
    ("10 m", "It is 10 cm.", 0),
    ("10", "It is $10$ cm.", 1),
    ("2ab", "It is $2ab$.", 1),
    ("2ab", "It is $2$.", 0),
    ("1000", "It is $1\\,000$.", 1),
    ("0", "It is $1\\,000$.", 0),
    ("6.02e23", "It is 6.02e23.", 1),
    ("12", "So $x=12$ km.", 1),
    ("12", "so 13 and not 12.5", 0),
]


def reward_of(key, reply):
    return verify(Problem("x", "q", key, "math"), reply).reward


@pytest.mark.parametrize("line", IN_A_BOX.strip().split("\n"))
def test_what_stands_in_a_box(line):
    key, said, right = line.split(" | ")
    assert reward_of(key, f"So it is \\boxed{{{said}}}.") == float(right)


@pytest.mark.parametrize("key, reply, right", REPLIES)
def test_what_a_reply_says(key, reply, right):
    assert reward_of(key, reply) == right


HOSTILE = [
    "\\boxed{",
    "\\boxed 1 ",
    "\\boxed{1} ",
    "\\boxed{{",
    "\\text{",
    "\\text{a}",
    "\\color{",
    "<answer>",
    "<answer>1",
    "1 ",
    "1 000 ",
    "1\\,",
    "1e",
    "1e99 ",
    "1e999 ",
    "1\\times 10^{99} ",
    "10^",
    "10 m ",
    "m ",
    "1 m/",
    "\\a",
    "\\a1",
    "1-",
    "1/",
    "1.",
    "ab ",
    "A, ",
    "*",
    "`",
    "$",
    "~",
    " ",
    "\n",
    "{",
    "}",
    "^{\\circ}",
    "\u00b2",
    "\ufdfa",
    "and ",
    "answer ",
]


@pytest.mark.parametrize("part", HOSTILE)
def test_no_text_of_a_model_holds_the_reading_up(part, monkeypatch):
    """math-verify aside, which is cut off after seconds."""
    import math_verify

    monkeypatch.setattr(math_verify, "parse", lambda *args, **limits: [])
    for start, end in (("", ""), ("1", "x"), ("\\boxed{1", "}"), ("<answer>1", "")):
        text = start + part * (40_000 // len(part)) + end
        for key in ("7", "cat", "10 m", "5,6", "2xy", "a\u0301 1"):
            before = time.process_time()
            assert reward_of(key, text) == 0
            assert time.process_time() - before < 1


@pytest.mark.parametrize(
    "unit", [" m", "   m", " m^2", "  m^{ 2 }", r"\text{ m}", r" \degree C", "  °", " cubic cm^3 "]
)
def test_a_repetition_of_units_takes_no_time(unit):
    """What a model repeats without end; ways to part it would double with each unit."""
    for text in ("5" + (unit * 200)[:198] + "!", (unit * 200)[:198] + " x"):
        start = time.process_time()
        measured(text)
        QUANTITY.findall(text)
        assert time.process_time() - start < 0.5


def test_the_ends_of_long_runs_of_marks_take_no_time():
    start = time.process_time()
    assert not ends_a_sentence("!" * 40000 + "x") and ends_a_sentence("So it is." + '"' * 40)
    assert time.process_time() - start < 0.5
