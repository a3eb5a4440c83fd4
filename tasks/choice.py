"""Multiple choice: the letter of an answer, as SDPO reads it, and leniently."""

import re
import unicodedata

from tasks.problem import Verdict


def verify_choice(problem, completion) -> Verdict:
    """Judges multiple choice by SDPO's rule to the letter: the last <answer>...</answer> is the
    key.

    Exact and case-sensitive. A bare `B` and an unclosed `<answer>B` pass, `b`, `B.` and `(B)` do
    not.
    """
    answer = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    return Verdict(float(answer == problem.answer), answer)


# How a person says that a letter is the answer, in pieces. Gaps are bounded, so that no text takes
# long.
TAKEN_BACK = (  # words before a statement that make it none
    r"(?P<before>(?i:\b(?:or|nor|not|neither|never|anything|than|instead of|eliminate|exclude|rule"
    r" out|cannot|\w{1,8}n.t)"
    r"\W{1,3}(?:(?:be|the|choose|pick|select|go|with)\W{1,3}){0,3}))?"
)
NAMED = (
    r"\b(?i:answer|option|choice|letter|boxed|pick|picked|choose|chose|select|selected|selection|go"
    r" with|going with|"
    r"réponse|antwort|respuesta|resposta|risposta|ответ|jawaban)"
    r"(?i:.s)?\b"
)
FILLED = (
    r"(?i:\W{1,3}(?:is|was|be|est|ist|es|é|è|would|should|must|has|to|the|it.s|it|option|choice|letter|answer|"
    r"probably|likely|clearly|definitely|indeed|thus|therefore|then|still|just)\b){0,5}"
)
NAMED_IN_CHINESE = (
    "(?:答案|选项|選項|选择|選擇|选|選|答え|解答|正解)"
    "(?:应该?|應該?|当然|當然|为|為|是|就|选|選|项|項|は){0,4}"
)
NAMED_LETTER = r"(?!I(?:'| [a-z]))(?:(?P<named>[A-Z])\b|(?P<small>[a-z])\b(?=\W*$|[).,;:]))"
MEANT = (
    r"\b(?i:it.s|that.s|it is|that is|must be|should be|has to"
    r" be|so|thus|hence|therefore|but|final|definitely|clearly|"
    r"surely|probably|guess|say|think|believe|looks"
    r" like|hmm)\W{1,9}(?P<meant>[A-Z])\b(?=\W*$|\W?[.,;:!?)])"
)
JUDGED = (
    r"\b(?P<judged>[A-Z]) (?:it is\b|(?:is|must be|has to be|should be|would be|seems(?: to"
    r" be)?|looks) "
    r"(?:(?:the|my) (?:\w{1,9} )?(?:answer|option|choice|one)|right|correct|true)\b)"
)
DENIED = (  # and after it, such as another letter
    r"(?=(?P<after>\W{0,3}(?:(?:or|nor)\b|(?:and\b|[/&+])\W{0,3}[A-HJ-Z]\b|\w{1,8}n.t\b|cannot\b|"
    r"is (?:not|wrong|incorrect|false)\b)|\W{0,2},\W{0,3}[A-Z]\b(?! (?:is|was|isn)))?)"
)
NAMED = rf"(?:{NAMED}{FILLED}|{NAMED_IN_CHINESE})\W{{1,9}}{NAMED_LETTER}"
STATED = re.compile(rf"{TAKEN_BACK}(?:{NAMED}|{MEANT}|{JUDGED}){DENIED}")
OPENING = re.compile(
    r"\W*([A-Za-z])(?:\W*$| ?[).:;、](?! or\b| and\b)|,(?! (?:or |and )?[A-Z]\b)| [-–—] | \((?!or"
    r" |and |[A-Z]\b)| "
    r"(?:because|since|as|rather than|instead of)\b| (?:选项|選項))"
)
CORRECTION = re.compile(
    r"(?i)\b(?:wait|actually|sorry|correction|scratch that|on second thoughts?|i meant?|make"
    r" that|oops|"
    r"my mistake|no(?= ?[,.:;!–—-]))\b|不对|更正|等等|抱歉"
)
WRONG = re.compile(r"(?i)\b(?:wrong|incorrect|not (?:right|correct|it|that))\b")


def letter_said(text) -> str:
    """Finds the letter that a text says is the answer, or "".

    That is the last clear statement of one (`B is the answer`). Else it is the only letter that the
    text opens with (`B, since`), ends with as a sentence of its own, or has as the name of an
    option (`B:`).
    """
    statements = [m for m in STATED.finditer(text) if not m["before"] and not m["after"]]
    if statements:
        last = statements[-1]
        return last["named"] or last["small"] or last["meant"] or last["judged"]
    letters = set()
    opening = OPENING.match(text)
    if opening:
        letters = {opening[1], *re.findall(r"[.;:!?] {0,2}\W{0,2}([A-Z])(?=[).:,;])", text)}
    end = len(text)
    while end and not text[end - 1].isalnum():
        end -= 1
    closing = re.search(
        r"(?<!vs)(?:[.:;!?=。→]|->)[ (\[\"']{0,4}([A-Z])$", text[max(0, end - 12) : end]
    )
    if closing:
        letters.add(closing[1])
    return letters.pop() if len(letters) == 1 else ""


def verify_choice_lenient(problem, completion) -> Verdict:
    """Judges multiple choice as a person would read it: ours, reported apart.

    `b`, `(B)`, `\\boxed{B}`, `It's B.` and `答案：B` are B.

    What comes after a correction counts above all: `A. No wait, B.` is B. What passes the strict
    rule passes here.
    """
    strict = verify_choice(problem, completion)
    if strict.reward:
        return strict
    plain = unicodedata.normalize("NFKC", strict.answer)  # full-width letters and punctuation
    plain = re.sub(r"\\(?:text|math)\w*|</?\w{1,9}>|[*$`{\\]", " ", plain.replace("\n", " ; "))
    # underscores around a word are emphasis, and \b would take them for letters
    plain = re.sub(r"_(?:(?<![A-Za-z\d]_)|(?![A-Za-z\d]))", " ", plain)
    plain = re.sub(r"(?<=[\u3040-\u9fff])(?=[A-Za-z])|(?<=[A-Za-z])(?=[\u3040-\u9fff])", " ", plain)
    parts = CORRECTION.split(" ".join(plain.replace("}", ")").replace("’", "'").split()))
    said = ""
    while parts and not said:
        part = parts.pop()
        said = letter_said(part.strip())
        if parts and not said and WRONG.search(part):
            break
    if not said:
        return strict
    right = said.upper() == problem.answer.upper()
    return Verdict(float(right), problem.answer if right else said.upper())
