"""Finds the JSON in a model's reply, tolerantly: behind thoughts, LaTeX and braces. It runs
nothing.
"""

import itertools
import json
import re
from dataclasses import dataclass

from json_repair import repair_json

from runtime.chat import clean, plain

MAX_REPLY, MAX_ITEMS, MAX_CONTENT = 20_000, 16, 2_000  # characters, items, characters; ours
# Where a reply holds what it was asked for: a key and the list (or the one object, or a text, which
# is none) behind it
ASKED = re.compile(
    r"""(?i)(?<![\w\\])["'“]?(strategies|lessons|behaviors|actions)["'”]?\s*+[:=]\s*+(?=[\[{"])"""
)
# What opens or ends a value, with the string that follows. A quote inside a string need not be
# escaped: one that no delimiter follows does not end it. The repeat is not possessive, because
# Python 3.11.2 misreads a possessive group
STRING = r"""(?P<quote>["'])(?:\\.?|(?!(?P=quote)\s*+(?:[,:}\]]|\Z))[^\\])*(?P=quote)?"""
# Where a model's thoughts begin and end: <think>, <thinking>, [THINK], <|begin_of_thought|> ...
THOUGHTS = r"think(?:ing)?|thoughts?"
# What a task may ask for, as SciKnowEval asks for <reasoning>: thoughts in a memory's reply alone
ASKED_THOUGHTS = rf"{THOUGHTS}|reasoning|analysis|scratchpad"


def tag_of(names) -> str:
    """The expression of a tag with one of the names, or of one that models have of their own."""
    names = rf"(?:seed:)?(?:{names})\s?"
    begins = rf"<{names}>|\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>|<\|START_THINKING\|>"
    ends = rf"</{names}>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>|<\|END_THINKING\|>"
    return rf"(?P<begins>{begins})|(?P<ends>{ends})"


PIECE = re.compile(rf"{tag_of(ASKED_THOUGHTS)}|[\[{{,:](?:\s*+{STRING})?|[\]}}]", re.S | re.I)
TAG = re.compile(tag_of(ASKED_THOUGHTS), re.I)
OWN_TAG = re.compile(tag_of(THOUGHTS), re.I)
# The end of a text that is whole. A closing quote alone does not tell: it may open a quotation that
# the limit cut
SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][^\w\s]*\Z")
LAST = 100  # characters that are looked at for it: a long run of marks would take its square
MAX_PLACES, MAX_DEPTH = 16, 8  # keys that are looked at in one reply; brackets in brackets


def ends_a_sentence(text) -> bool:
    """Whether a text is whole at its end."""
    return bool(SENTENCE_END.search(text[-LAST:]))


def strip_thoughts(text, tag=OWN_TAG) -> str:
    """A text without a model's thoughts, of which SDPO strips <think>, too.

    tag: of a solution OWN_TAG, since a task may ask for its <reasoning>; TAG of a memory's reply.
    Some templates open the thoughts in the prompt, so that a completion only ends them.
    """
    kept, start, begun = [], 0, None
    for found in tag.finditer(text):
        if found["begins"]:
            begun = found.start() if begun is None else begun
            continue
        if begun is None:  # in the prompt
            kept.clear()
        else:
            kept.append(text[start:begun])
        start, begun = found.end(), None
    return "".join([*kept, text[start:]]).strip()


@dataclass
class Place:
    """One asked-for key in a reply and the texts of the objects behind it."""

    key: str
    start: int
    end: int  # of the list, or of its last whole object where the reply ends within the list
    rows: list[str]
    whole: str = ""  # all that stands behind the key, where that has an end
    cut: bool = False  # the reply ended within the list
    rest: str = ""  # the object that was open then


def parse(reply) -> dict | None:
    """{key: its rows} for each key that the prompts ask for (strategies, lessons, behaviors,
    actions) and a reply holds.

    None if it holds none. A key counts wherever it stands: behind thoughts, prose, LaTeX or code
    fences, in one object or several (their lists are joined), within another object. What stands in
    thoughts (see TAG) does not count. A row is an object, its fields in lower case, or None for
    what is none: callers count those. Broken JSON is repaired, object by object; an object that was
    open when the reply ended is left out, unless it lacks its closing bracket only and its last
    text ends as a sentence does: see `was_cut`.
    """
    found = {}
    for place in places(reply):
        found.setdefault(place.key, []).extend(rows_at(place))
    return found or None


def rows_at(place) -> list[dict | None]:
    """The rows behind one key: of valid JSON all of them, of broken JSON the objects that were
    found in it.
    """
    try:
        value = json.loads(place.whole, strict=False)
    except (RecursionError, ValueError):
        rows = [read_object(text) for text in place.rows[:MAX_ITEMS]]
        rows += [None] * (len(place.rows) - len(rows))
        open_one = place.rest.rstrip().removesuffix(",")
        if ends_a_sentence(open_one) and (row := read_json(open_one + "}")):
            rows.append(row)
        return rows
    if not isinstance(value, list):
        value = [value] if value else []
    return [fields_of(row) for row in value]


def was_cut(reply) -> bool:
    """Whether a reply ended within a list that was asked for, as at its token limit: the item that
    was open is dropped.
    """
    return any(place.cut for place in places(reply)[-1:])


def places(reply) -> list[Place]:
    """Where the reply, its LaTeX made valid JSON, holds the asked-for keys; without those in
    thoughts.
    """
    text = clean(reply)[:MAX_REPLY]
    if '\\"' in text and not ASKED.search(text):  # JSON that stands, escaped, in a string of JSON
        text = re.sub(
            r'\\([\\"/nt])', lambda escape: {"n": "\n", "t": "\t"}.get(escape[1], escape[1]), text
        )
    text = keep_latex(text)
    found = [place_at(text, m) for m in itertools.islice(ASKED.finditer(text), MAX_PLACES)]
    outside = text
    for place in found:  # a tag within an item is no tag
        outside = outside[: place.start] + " " * (place.end - place.start) + outside[place.end :]
    tags = [(place, TAG.search(outside, place.end)) for place in found]
    return [place for place, tag in tags if not (tag and tag["ends"])]


def place_at(text, match) -> Place:
    """Reads the list (or object) behind a key, bracket by bracket; a closing bracket closes those
    that it skips, too.
    """
    start, stack, begin = match.end(), [], None
    place = Place(match[1].lower(), start, start, [])
    if text[start] == '"':
        place.rows.append("")  # a row that can't be read
        return place
    outer = 1 if text[start] == "[" else 0  # brackets around an item
    for piece in PIECE.finditer(text, start):
        mark, at = piece[0][0], piece.start()
        if piece["begins"] or piece["ends"] or len(stack) > MAX_DEPTH:
            return place
        if mark in "[{":
            if mark == "{" and len(stack) == outer:
                begin = at
            stack.append(mark)
        if mark in "]}":
            opener = "[" if mark == "]" else "{"
            while stack and stack.pop() != opener:
                pass
            if begin is not None and len(stack) <= outer:
                place.end = at + (mark == "}")
                place.rows.append(text[begin : place.end])
                begin = None
            if not stack:
                place.end = at + 1
                place.whole = text[start : place.end]
                return place
    place.cut, place.rest = True, "" if begin is None else text[begin:]
    return place


def read_object(text) -> dict | None:
    """A JSON object, repaired if need be."""
    if row := read_json(text):
        return row
    try:
        return fields_of(repair_json(text, return_objects=True))
    except (RecursionError, ValueError):
        return None


def read_json(text) -> dict | None:
    """A JSON object as the standard has it, but for raw line breaks in strings."""
    try:
        return fields_of(json.loads(text, strict=False))
    except (RecursionError, ValueError):
        return None


def fields_of(row) -> dict | None:
    return {str(k).strip().lower(): v for k, v in row.items()} if isinstance(row, dict) else None


# Commands of LaTeX that begin like JSON's escapes for a line break and a tab. \ni and \tt are left
# out: i and t are words
N_AND_T = frozenset(
    """
    nabla natural ncong ne nearrow neg negmedspace negthickspace negthinspace neq newcommand
    newenvironment newline newpage newtheorem nexists ngeq ngeqq ngeqslant ngtr nicefrac
    nLeftarrow nleftarrow nLeftrightarrow nleftrightarrow nleq nleqq nleqslant nless nmid nobreak
    nobreakspace nocite noindent nolimits nonumber nopagebreak norm normalfont normalsize not
    notag notin nparallel nprec npreceq nRightarrow nrightarrow nshortmid nshortparallel nsim
    nsubset nsubseteq nsubseteqq nsucc nsucceq nsupset nsupseteq nsupseteqq ntriangleleft
    ntrianglelefteq ntriangleright ntrianglerighteq nu num numberwithin nVDash nVdash nvDash
    nvdash nwarrow tag tan tanh tau tbinom tensor text textasciitilde textbackslash textbar textbf
    textbullet textcelsius textcolor textdegree textellipsis textemdash textendash textgreater
    textit textless textmd textmicro textmu textnormal textohm textperthousand textpm textrm
    textsc textsf textsl textstyle textsubscript textsuperscript texttimes texttrademark texttt
    textunderscore textup tfrac therefore theta thetasym thickapprox thicksim thickspace thinspace
    tilde times tiny to top transpose triangle triangledown triangleleft trianglelefteq triangleq
    triangleright trianglerighteq twoheadleftarrow twoheadrightarrow
""".split()
)
# JSON's (and ', for the repairer), or letters
ESCAPE = re.compile(r"""\\(?:(["\\/']|u[0-9a-fA-F]{4})|([A-Za-z]*))""")


def keep_latex(text) -> str:
    """Doubles the single backslashes of LaTeX in a JSON text, so that a reader of JSON keeps its
    commands.

    The rule: `\\b`, `\\f` and `\\r` before a letter, `\\n` and `\\t` where all the letters that
    follow make a command of LaTeX, and whatever JSON has no escape for, are LaTeX; the rest is
    JSON's. It errs where what follows a line break or a tab happens to make one: `\\nu` before a
    line that begins with a lone u, `\\tan` before a column that begins with an.
    """

    def one(match):
        json_has_it, letters = match[1], match[2]
        control = (
            letters in ("b", "f", "r") or letters and letters[0] in "nt" and letters not in N_AND_T
        )
        return match[0] if json_has_it or control else "\\" + match[0]

    return ESCAPE.sub(one, text)


TITLE_WORDS, SENTENCES = 10, 4  # of an item, at most (B.3)


def parse_items(found, key, first, second) -> list[tuple[str, str]]:
    """The well-formed items under `key` of a parsed reply, each as the texts of its two fields; at
    most MAX_ITEMS.

    Each text becomes one line, so that it can't pass for a heading of the prompt it will stand in.
    """
    rows = found.get(key) if isinstance(found, dict) else None
    rows = rows[:MAX_ITEMS] if isinstance(rows, list) else []
    return list(filter(None, (texts_of(row, first, second) for row in rows)))


def texts_of(row, first, second) -> tuple[str, str] | None:
    """Returns the texts of a row's two fields; None if it lacks one of them."""
    row = row if isinstance(row, dict) else {}
    title, content = text_of(row.get(first)), text_of(row.get(second))
    if not title or not content:
        return None
    sentences = re.split(r"(?<=[.!?])(?<!\.\w\.) (?=[A-Z])", content)  # not at e.g. X
    sentences = sentences[:SENTENCES]
    while len(sentences) > 1 and len(" ".join(sentences)) > MAX_CONTENT:
        sentences.pop()
    title = " ".join(title.split()[:TITLE_WORDS])
    return title[:MAX_CONTENT], " ".join(sentences)[:MAX_CONTENT]


def text_of(value) -> str:
    """A field's text on one line. Cleaned again: JSON escapes can hide what `parse` cleaned."""
    return " ".join(clean(value).split()) if isinstance(value, str) else ""


# What an abstraction may call its decisions. A new behavior of a known name updates it, so that
# both are one to us.
# the fields that may say it where there is no `action`
DECISION = ("decision", "operation", "op", "type", "event")
WRITES = set(
    """
    new add append create insert introduce save store update upsert adjust amend change combine
    edit extend generalize generalise improve merge modify modified refine replace revise rewrite
    rewritten strengthen
    """.split()
)
REMOVES = set(
    """
    remove delete deprecate discard drop dropped eliminate erase forget prune purge retire
    """.split()
)
UNDECIDED = {"no", "not", "or", "don", "keep", "none", "unchanged"}


def decision_of(row) -> str:
    """What a row decides: "write", "remove", or "" where that is not clear. A row that says no
    decision is written.
    """
    others = [row[name] for name in DECISION if verbs_in(row.get(name))]
    verbs = verbs_in(row["action"] if "action" in row else others[0] if others else "new")
    return verbs.pop() if len(verbs) == 1 else ""


def verbs_in(said) -> set[str]:
    """Which of "write" and "remove" some words say, in any form of the verb (`Removed`,
    `add_behavior`).
    """
    words = set(re.findall("[a-z]+", said.casefold())) if isinstance(said, str) else set()
    if words & UNDECIDED:
        return set()
    stems = words | {word.removesuffix(end) for word in words for end in ("d", "ed", "s")}
    return {verb for verb, known in (("write", WRITES), ("remove", REMOVES)) if stems & known}


def items_under(found, key, first, second) -> tuple[list[tuple[str, str]], int]:
    """`parse_items` of all that stands under `key`, and how many of its rows are none: they are
    counted, not lost.
    """
    rows = (found or {}).get(key, [])
    items = parse_items(found, key, first, second)
    return items, len(rows) - len(items)


def decisions(found) -> tuple[list[tuple[str, str]], list[str], int] | None:
    """A parsed abstraction: ((name, instruction) pairs to write, names to remove, how many rows are
    neither).

    Cold start and decisions may come under each other's key; a row without a decision is written.
    None where the reply has neither key.
    """
    if not found or not found.keys() & {"actions", "behaviors"}:
        return None
    rows = found.get("actions", []) + found.get("behaviors", [])
    writes, removes = [], []
    for row in rows[:MAX_ITEMS]:
        row = row or {}
        decision, name = decision_of(row), row.get("name")
        if decision == "write":
            item = texts_of(row, "name", "instruction")
            writes += [item] if item else []
        elif decision == "remove" and isinstance(name, str):
            removes.append(plain(name))
    return writes, removes, len(rows) - len(writes) - len(removes)
