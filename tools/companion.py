"""Writes companion.html: the code beside the paper's equations, in one file without a server.

    python tools/companion.py [--out FILE]

The left side has the docstrings and comments of the code, and each equation that they name. The
right side has the code. The page is made from the files of this checkout. Only the paper's
equations are written here, in `EQUATIONS`, with the letters of this code. latex2mathml turns them
into MathML, and pygments colours the code.
"""

import argparse
import ast
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from latex2mathml.converter import convert
from markupsafe import Markup, escape
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.errors import RunError
from tools.page import write_page

HERE = Path(__file__).resolve().parent.parent
# Of PMD, arXiv 2607.01480. i is a problem, j one of its J completions, n a token, t a step; E, I
# and B are experience, insight and behavior, V is the verifier, g what this batch adds.
EQUATIONS = {
    1: (
        "the memory-free student answers, the verifier responds",
        r"\begin{split} y_{i,j} &\sim \pi_{\theta_t}(\cdot \mid x_i), \quad j = 1, \dots, J \\"
        r" (r_{i,j}, f_{i,j}) &= V(x_i, y_{i,j}) \end{split}",
    ),
    2: (
        "attempts become experience, experience becomes insight, problem by problem",
        r"\begin{split} E_i^{t+1} &= \mathrm{record}\left(E_i^t, \{(y, r, f)_{i,j}\}_j\right) \\"
        r" I_i^{t+1} &= I_i^t \cup \mathrm{reflect}_{\pi_{\theta_t}}\left(E_i^{t+1}\right)"
        r" \end{split}",
    ),
    3: (
        "every K steps insights become behaviors, in one bank",
        r"B^{t+1} = \begin{cases} \mathrm{abstract}\left(B^t, \{I_i^{t+1}\}_i\right) & \quad"
        r" K \mid t + 1 \\ B^t & \quad \text{else} \end{cases}",
    ),
    4: (
        "what the memory offers a teacher",
        r"c_{i,j} = \left(I_i^{t+1}, \; \mathrm{top}_k(B^t, x_i), \; E_i^{t+1}, \; g_{i,j}\right)",
    ),
    5: (
        "the teacher's prompt",
        r"\tilde{x}_{i,j} = \mathrm{compose}(x_i, c_{i,j})",
    ),
    6: (
        "the teacher: the same policy under that prompt, without a gradient",
        r"q_{i,j,n} = \mathrm{stopgrad}\left[\pi_{\theta_t}(\cdot \mid \tilde{x}_{i,j},"
        r" y_{i,j,<n})\right]",
    ),
    7: (
        "the divergence, token by token, on the student's own text",
        r"\mathcal{L}(\theta) = \mathbb{E}_{x_i} \, \mathbb{E}_{y_{i,j}} \sum_n \mathrm{KL}\left("
        r"\pi_\theta(\cdot \mid x_i, y_{i,j,<n}) \; \| \; q_{i,j,n}\right)",
    ),
    8: (
        "the update",
        r"\theta_{t+1} = \theta_t - \eta \, \nabla_\theta \mathcal{L}(\theta_t)",
    ),
}
# What is shown, in the order in which it is best read. "" is a file's own docstring.
PIECES = [
    ("pmd.py", ["", "train", "PMD", "attempt", "teacher_prompts"]),
    ("memory.py", ["", "Memory.record", "Memory.reflect", "Memory.abstract", "gate"]),
    ("memory.py", ["Memory.contexts", "compose"]),
    ("runtime/rows.py", ["completion_hidden"]),
    ("pmd.py", ["update", "loss_of", "token_weight"]),
    ("kernels.py", ["", "oracle", "_kl", "_buckets", "distill_loss", "_distillation"]),
    ("kernels.py", ["_divergence_and_gradient"]),
    ("runtime/model.py", ["follow"]),
]
NAMED = re.compile(r"Eq\.\s(\d+)((?:(?:, | and | to |-)\d+)*)")


@dataclass
class Block:
    """Holds some lines of code and the prose that stands before or in them."""

    file: str
    line: int
    prose: str = ""
    code: list[str] = field(default_factory=list)

    @property
    def equations(self) -> list[int]:
        return equations_in("\n".join([self.prose, *self.code]))

    @property
    def html(self) -> Markup:
        return coloured(textwrap.dedent("\n".join(self.code)).strip("\n"))

    @property
    def paragraphs(self) -> list[Markup]:
        return [paragraph(text) for text in re.split(r"\n\s*\n", self.prose) if text.strip()]


def equations_in(text) -> list[int]:
    """Gives the numbers of the equations that a text names, such as "Eq. 2, 3" or "Eq. 6-8"."""
    numbers = set()
    for first, others in NAMED.findall(text):
        last = int(first)
        numbers.add(last)
        for sign, digits in re.findall(r"(, | and | to |-)(\d+)", others):
            is_range = sign in (" to ", "-")
            numbers.update(range(last, int(digits) + 1) if is_range else [int(digits)])
            last = int(digits)
    return sorted(numbers)


def coloured(code) -> Markup:
    """Colours Python by pygments, as HTML."""
    return Markup(highlight(code, PythonLexer(), HtmlFormatter(nowrap=True)))


def paragraph(text) -> Markup:
    """Lays out a paragraph of a docstring: `code` as such, and lines that are indented as lines."""
    parts = re.split(r"`([^`\n]+)`", text)
    pieces = [escape(parts[0])]
    for code, rest in zip(parts[1::2], parts[2::2], strict=True):
        pieces += [Markup("<code>{}</code>").format(code), escape(rest)]
    is_laid_out = re.search(r"\n +\S|^ +\S|\S {2,}\S", text)
    form = "<pre>{}</pre>" if is_laid_out else "<p>{}</p>"
    return Markup(form).format(Markup("").join(pieces))


def blocks_of(file, name) -> list[Block]:
    """Cuts a function or class into blocks: at each definition, and at each comment of its own
    lines.
    """
    source = (HERE / file).read_text(encoding="utf-8")
    node = ast.parse(source)
    if not name:
        return [Block(file, 1, ast.get_docstring(node))]
    for part in name.split("."):
        (node,) = [inner for inner in node.body if getattr(inner, "name", "") == part]
    docstrings, begins = {}, set()
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            begins.add(min(line.lineno for line in [inner, *inner.decorator_list]))
            text = ast.get_docstring(inner)
            if text:
                docstrings[inner.body[0].lineno] = inner.body[0].end_lineno, text
    lines = source.splitlines()
    blocks, was_comment, number = [], False, min(begins)
    while number <= node.end_lineno:
        line = lines[number - 1]
        is_comment = line.lstrip().startswith("#")
        if number in begins or is_comment and not was_comment:
            blocks.append(Block(file, number))
        if number in docstrings:
            number, blocks[-1].prose = docstrings[number]
        elif is_comment:
            words = line.strip().removeprefix("#").split()
            blocks[-1].prose += " ".join(words) + "\n"
        else:
            blocks[-1].code.append(line)
        was_comment, number = is_comment, number + 1
    return blocks


def companion() -> dict:
    """Gathers what pages/companion.html shows. Raises KeyError for an equation that the code names
    and `EQUATIONS` lacks.
    """
    sections, places = [], {number: [] for number in EQUATIONS}
    for file, names in PIECES:
        for name in names:
            blocks = blocks_of(file, name)
            sections.append({"file": file, "name": name, "blocks": blocks})
            for block in blocks:
                for number in block.equations:
                    places[number].append(block)
    math = {number: Markup(convert(latex)) for number, (_, latex) in EQUATIONS.items()}
    names = {number: name for number, (name, _) in EQUATIONS.items()}
    return {"sections": sections, "places": places, "math": math, "names": names}


def main(argv=None):
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/companion.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="companion.html", help="the file (default: %(default)s)")
    args = parser.parse_args(argv)
    light = HtmlFormatter(style="friendly").get_style_defs(".code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".code")
    title = "Procedural Memory Distillation, line by line"
    page = companion() | {"title": title, "light": Markup(light), "dark": Markup(dark)}
    try:
        print(write_page(args.out, "companion.html", **page))
    except RunError as error:
        sys.exit(f"companion.py: {error}")


if __name__ == "__main__":
    main()
