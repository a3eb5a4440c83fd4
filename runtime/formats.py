"""The forms in which a memory's prompts ask for a reply, and how such a reply is read.

json: as in the paper (B.3). guided: the same prompts, and decoding can write nothing but the JSON
that they ask for (runtime/guide.py). lines: plain lines, for small models (deviation 14).

A request ends with the form of its reply, so that the end of a prompt tells its schema. What a
model wrote stands before it and can't change it.
"""

import json
import re
from dataclasses import replace
from typing import Literal

from runtime import replies
from runtime.replies import MAX_REPLY, TAG, ends_a_sentence, parse, strip_thoughts, text_of

Format = Literal["json", "guided", "lines"]

ITEM = '{"title": "at most ten words", "content": "two to four sentences"}'
BEHAVIOR = '"name": "behavior_...", "instruction": "one or two sentences"'
# The words of what stands there for a title, a content and an instruction, and of their variants
ECHOED = set("at most ten words word two to four three sentences sentence one or two".split())
JSON_REPLY = "Reply with this JSON and nothing else:\n"
BOTH = f'{{"strategies": [{ITEM}], "lessons": [{ITEM}]}}'
ONLY_STRATEGIES = f'{{"strategies": [{ITEM}], "lessons": []}}'
ONLY_LESSONS = f'{{"strategies": [], "lessons": [{ITEM}]}}'
NEW_BEHAVIORS = f'{{"behaviors": [{{{BEHAVIOR}}}]}}'
DECISIONS = f'{{"actions": [{{"action": "new, update or remove", {BEHAVIOR}}}]}}'
# The lists that a reply to each request has, with the least and the largest number of their rows
LISTS = {
    BOTH: {"strategies": (1, 3), "lessons": (1, 3)},
    ONLY_STRATEGIES: {"strategies": (1, 3)},
    ONLY_LESSONS: {"lessons": (1, 3)},
    NEW_BEHAVIORS: {"behaviors": (1, 8)},
    DECISIONS: {"actions": (0, 8)},
}

# --------------------------------------------------------------------------------------------------
# guided
# --------------------------------------------------------------------------------------------------


def schema_of(prompt, tokens) -> str | None:
    """Returns the JSON schema of the reply that a memory's prompt asks for, or None of another.

    tokens: the limit of the reply. Texts are bounded by it, so that from 160 tokens on the first
    row is whole within the limit, even if each of its characters takes a token.
    """
    for request, lists in LISTS.items():
        if prompt.endswith(request):
            rows = {key: rows_of(key, *sizes, tokens) for key, sizes in lists.items()}
            compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            return json.dumps({**object_of(rows), "x-guidance": compact})
    return None


def rows_of(key, least, most, tokens) -> dict:
    """Returns the schema of one list."""
    room = max(tokens // 2, tokens - 64)  # the rest is for keys and brackets
    if key in ("strategies", "lessons"):
        fields = {"title": text_within(max(8, room // 12)), "content": text_within(room * 3 // 5)}
    else:
        fields = {
            "name": {"type": "string", "pattern": r"^behavior_\w[\w -]{0,30}$"},
            "instruction": text_within(room // 3),
        }
    if key == "actions":
        fields = {"action": {"enum": ["new", "update", "remove"]}, **fields}
    return {"type": "array", "items": object_of(fields), "minItems": least, "maxItems": most}


def object_of(fields) -> dict:
    """Returns the schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def text_within(characters) -> dict:
    """Returns the schema of a text on one line that begins with a letter or digit."""
    return {"type": "string", "pattern": rf"^[\p{{L}}\p{{N}}][^\p{{C}}]{{0,{characters}}}$"}


# --------------------------------------------------------------------------------------------------
# lines
# --------------------------------------------------------------------------------------------------

STRATEGY_LINE = "Strategy: a short title - one or two sentences"
LESSON_LINE = "Lesson: a short title - one or two sentences"
LINE_REPLY = "Reply with lines of this form and nothing else:\n"
LINES = {
    BOTH: f"{STRATEGY_LINE}\n{LESSON_LINE}",
    ONLY_STRATEGIES: STRATEGY_LINE,
    ONLY_LESSONS: LESSON_LINE,
    NEW_BEHAVIORS: "Behavior: behavior_... - one or two sentences",
    DECISIONS: (
        "New: behavior_... - one or two sentences\n"
        "Update: behavior_... - one or two sentences\n"
        "Remove: behavior_..."
    ),
}
REQUESTS = ("contrastive", "strategies_only", "lessons_only", "cold_start", "decide")  # of Forms
LINE = re.compile(
    r"(?i)^[\W\d]*(strategy|lesson|behavior|new|update|remove)\b"
    r"[^\w:：.-]*(?:\d+[^\w:：.-]*)?[:：.-][\s*_]*(\S.*)$"
)
MARKUP = "*_` "  # of Markdown, around a title or a sentence
DIVIDER = re.compile(r"\s+[-–—]+\s+|:\s+|：\s*")
LEAST_WORDS = 4  # of a line without a full stop that is more than a title; ours


def as_lines(forms):
    """Returns a domain's prompts with requests for lines in the place of those for JSON.

    forms: a memory.Forms whose requests end in JSON_REPLY and a key of LINES.
    """
    changed = {}
    for name in REQUESTS:
        request, _, shape = getattr(forms, name).partition(JSON_REPLY)
        changed[name] = request + LINE_REPLY + LINES[shape]
    return replace(forms, **changed)


def parse_lines(reply) -> dict | None:
    """Returns {key: its rows} as replies.parse does, of a reply in lines; None if it has none.

    A line without a divider is its own title. A mere title has no content: see items_under, which
    counts it.
    """
    found = {}
    for kind, text in whole_lines(reply)[0]:
        key, row = row_of(kind, text)
        found.setdefault(key, []).append(row)
    return found or None


def whole_lines(reply) -> tuple[list[tuple[str, str]], bool]:
    """Returns (kind, text) of each line of a reply that has a kind, and whether one was left out.

    A line without a kind belongs to the title before it, if that has no content of its own. A last
    line that does not end as a sentence was perhaps cut by the limit: it is left out where another
    stands before it. The name of a behavior to remove is no sentence.
    """
    text = strip_thoughts(str(reply)[:MAX_REPLY], TAG)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rows, last = [], None  # the last line that is of a row
    for n, line in enumerate(lines):
        match = LINE.match(line)
        if match:
            rows.append((match[1].lower(), match[2]))
        elif rows and last == n - 1 and is_title(*rows[-1]):
            kind, title = rows[-1]
            rows[-1] = kind, f"{title.rstrip(MARKUP + ':：')}: {line.lstrip('-•' + MARKUP)}"
        else:
            continue
        last = n
    is_cut = rows and last == len(lines) - 1 and not ends_a_sentence(lines[-1])
    if len(rows) > 1 and is_cut and rows[-1][0] != "remove":
        return rows[:-1], True
    return rows, False


def is_title(kind, text) -> bool:
    """Says whether a line can be a title whose content stands on the next line."""
    if kind == "remove":
        return False
    return not DIVIDER.search(text_of(text)) and not ends_a_sentence(text)


def was_cut(reply) -> bool:
    """Says whether a reply of any format ended within an item, which was left out."""
    return replies.was_cut(reply) or whole_lines(reply)[1]


def row_of(kind, text) -> tuple[str, dict]:
    """Returns the list that a line belongs to, and its row."""
    title, *rest = [part.strip(MARKUP) for part in DIVIDER.split(text_of(text), maxsplit=1)]
    content = rest[0] if rest else ""
    if not rest and (ends_a_sentence(title) or len(title.split()) >= LEAST_WORDS):
        content = title
    if kind == "strategy":
        return "strategies", {"title": title, "content": content}
    if kind == "lesson":
        return "lessons", {"title": title, "content": content}
    name = title.lower().rstrip("." + MARKUP)
    if not name.startswith("behavior_"):
        name = "behavior_" + name_of(title)
    action = "new" if kind == "behavior" else kind
    return "actions", {"action": action, "name": name, "instruction": content}


def name_of(title) -> str:
    """Returns the first words of a title, joined by underscores."""
    return "_".join(re.findall(r"\w+", title.lower())[:5])


def in_format(forms, format) -> tuple:
    """Returns a domain's prompts in a format, and the function that reads the replies."""
    if format == "lines":
        return as_lines(forms), parse_lines
    return forms, parse


def is_echo(text) -> bool:
    """Says whether a model copied a placeholder of its instructions, also with other numbers."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    return bool(words) and ECHOED.issuperset(words)
