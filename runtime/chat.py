"""Text becomes a prompt here and nowhere else: chat templates, and what must not stand in a
message.
"""

import functools
import itertools
import re
import unicodedata
from dataclasses import dataclass

from runtime.errors import RunError


def encode_prompt(tokenizer, user, system="", thinking=False) -> list[int]:
    """The ids of a chat prompt with one message of the user's: see encode_turns."""
    return encode_turns(tokenizer, [("user", user)], system, thinking=thinking)


def encode_within(tokenizer, user, budget) -> list[int]:
    """Encodes a chat prompt of at most `budget` tokens: a longer text loses its middle.

    Its beginning, mostly the problem, stays, and so does the request at its end.
    """
    ids = encode_prompt(tokenizer, user)
    while len(ids) > budget and user:
        cut = max(1, len(user) * (len(ids) - budget) // len(ids))
        middle = (len(user) - cut) // 2
        user = user[:middle] + user[middle + cut :]
        ids = encode_prompt(tokenizer, user)
    return ids


def encode_turns(tokenizer, turns, system="", given="", budget=None, thinking=False) -> list[int]:
    """Encodes a conversation up to where the assistant answers, and `given`, how its answer begins.

    turns: (role, text) pairs, the first of them the user's. budget: tokens, at most; the longest of
    the other texts then loses its beginning. thinking: what the template's switch of that name
    says, where it has one. The one way text becomes a prompt: control tokens and turn markers in it
    are broken here, and a system message that the template does not take goes before the user's.
    Raises ValueError if the template does not take such a conversation.
    """
    chat = chat_of(tokenizer)
    roles, texts = [role for role, _ in turns], [text for _, text in turns]
    if system and chat.takes_system:
        roles, texts = ["system", *roles], [system, *texts]
    elif system:
        texts[0] = f"{system}\n\n{texts[0]}"
    texts = [neutralise(text, chat.markers) for text in [*texts, given]]

    def encoded(texts):
        turns = list(zip(roles, texts[:-1], strict=True))
        prompt = render(tokenizer, turns, True, enable_thinking=thinking)
        parts = [prompt, texts[-1]] if texts[-1] else [prompt]
        parts = tokenizer(parts, add_special_tokens=False)["input_ids"]
        return [id for part in parts for id in part]

    ids = encoded(texts)
    # a form that only this tokenizer's normaliser knows
    template = str(tokenizer.chat_template)
    if count_of(ids, chat.control_ids) != own_controls(tokenizer, template, tuple(roles), thinking):
        texts = [without_ids(tokenizer, text, chat.control_ids) for text in texts]
        ids = encoded(texts)
    first = len(texts) - len(turns)  # behind the problem
    while budget and len(ids) > budget and any(texts[first:]):
        longest = max(range(first, len(texts)), key=lambda i: len(texts[i]))
        texts[longest] = texts[longest][len(ids) - budget :]
        ids = encoded(texts)
    return ids


def encoder(tokenizer, cfg):
    """Gives encode(user, system) of the student's and the teacher's prompts, which think alike."""
    return functools.partial(encode_prompt, tokenizer, thinking=cfg.thinking)


@functools.cache
def own_controls(tokenizer, template, roles, thinking) -> int:
    """Counts the control tokens that the template itself writes around messages of these roles."""
    text = render(tokenizer, [(role, SLOTS[0]) for role in roles], True, enable_thinking=thinking)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return count_of(ids, read_template(tokenizer, template).control_ids)


def render(tokenizer, turns, asks, **switches) -> str:
    """The template's text of (role, content) turns; asks: up to where the assistant answers.
    ValueError if it fails.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asks, **switches
        )
    except Exception as error:  # a template is a program of its own
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise template_error(
            tokenizer,
            f"fails on a conversation of {', '.join(m['role'] for m in messages)} ({said}); "
            "repair it in the model's folder",
        ) from error


def template_error(tokenizer, what) -> RunError:
    return RunError(f"the chat template of {tokenizer.name_or_path or 'the model'} {what}")


def without_ids(tokenizer, text, forbidden) -> str:
    """`text` with a space in whatever its tokenizer reads as one of the `forbidden` ids."""
    for _ in range(20 if tokenizer.is_fast else 0):  # only a fast one says where a token stands
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [
            span
            for id, span in zip(read["input_ids"], read["offset_mapping"], strict=True)
            if id in forbidden
        ]
        for start, end in reversed(spans):
            # a token may take the white space before it along
            start = end - len(text[start:end].lstrip())
            text = (
                text[: start + 1] + " " + text[start + 1 :]
                if end - start > 1
                else text[:start] + " " + text[end:]
            )
        if not spans:
            break
    return text


def count_of(ids, kind) -> int:
    return sum(id in kind for id in ids)


@dataclass(frozen=True)
class Chat:
    """What a chat template does, found by rendering conversations with it."""

    takes_system: bool  # it neither refuses a system message nor drops it
    markers: (
        frozenset  # texts that no message may hold: control tokens, and what opens and ends turns
    )
    control_ids: frozenset  # the ids of those that are tokens


SLOTS = ("qz0zq", "qz1zq", "qz2zq")  # contents that no template writes or alters
TURNS = (["user", "assistant"], ["user", "assistant", "user"], ["system", "user", "assistant"])
OTHER_TURNS = (
    ["user", "assistant", "tool"],
    ["user", "assistant", "function"],
    ["developer", "user"],
)
BRACKETED = re.compile(
    r"<{1,2}[^<>\n]*\w[^<>\n]*>{1,2}|\[[^\[\]\n]*\w[^\[\]\n]*\]|\|[^|\n]*\w[^|\n]*\|"
)


def chat_of(tokenizer) -> Chat:
    """ValueError where the template can't be used: it fails on a user's message, or leaves it
    out.
    """
    return read_template(tokenizer, str(tokenizer.chat_template))


@functools.cache
def read_template(tokenizer, template) -> Chat:
    if SLOTS[0] not in render(tokenizer, [("user", SLOTS[0])], True, enable_thinking=False):
        raise template_error(
            tokenizer, "leaves the user's message out; repair it in the model's folder"
        )
    takes_system = SLOTS[0] in attempted(tokenizer, ["system", "user"], True, enable_thinking=False)
    control = control_tokens(tokenizer)
    markers = frozenset(control | turn_markers(tokenizer, takes_system))
    # the unknown token's id stands for any unknown word
    ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(control))) - {tokenizer.unk_token_id}
    return Chat(takes_system, markers, ids)


def can_think(tokenizer) -> bool:
    """Says whether the template has a switch for thinking."""
    turns = [("user", SLOTS[0])]
    on, off = (render(tokenizer, turns, True, enable_thinking=x) for x in (True, False))
    return on != off


def attempted(tokenizer, roles, asks, **switches) -> str:
    """A conversation of SLOTS as the template writes it; empty where it refuses such roles."""
    try:
        return render(tokenizer, zip(roles, SLOTS, strict=False), asks, **switches)
    except ValueError:
        return ""


def control_tokens(tokenizer) -> set[str]:
    """The added tokens that are special, and those that look it."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (
        special
        | set(tokenizer.all_special_tokens)
        | set(filter(is_marker, tokenizer.get_added_vocab()))
    )


def is_marker(text) -> bool:
    """Whether an added token that is not called special controls something, as </think>, [INST] or
    @@END@@ do.

    It begins and ends with a mark, and there is a letter between. Not so words, runs of blanks,
    pieces of JSON.
    """
    marks = all(not c.isalnum() and not c.isspace() for c in text[:1] + text[-1:])
    return marks and any(c.isalnum() for c in text) and not (text[0] in "{[\"'" and '"' in text)


def turn_markers(tokenizer, takes_system) -> set[str]:
    """What the template writes between the messages, without ordinary words: <|user|>, [INST], ###
    Assistant:
    """
    added, found = tokenizer.get_added_vocab(), set()
    switches = ({}, {"enable_thinking": False}, {"enable_thinking": True})
    for roles, asks, switch in itertools.product(TURNS + OTHER_TURNS, (True, False), switches):
        if "system" in roles and not takes_system:
            continue
        before, *between = re.split("|".join(SLOTS), attempted(tokenizer, roles, asks, **switch))
        # above it may stand what opens no turn: a date, an instruction
        first = before.rstrip().rpartition("\n")[2]
        markers = set(BRACKETED.findall(before)).union(
            *(markers_in(text, added) for text in (first, *between))
        )
        # `function:` is common
        found |= markers if roles in TURNS else {m for m in markers if not m[0].isalnum()}
    return found


def markers_in(text, added) -> set[str]:
    """Bracketed words, and tokens and lines of up to four words that begin or end with a mark, no
    full stop or quote.
    """
    lines = [
        token for token in sorted(filter(str.strip, added), key=len, reverse=True) if token in text
    ]
    for token in lines:
        text = text.replace(token, "\n")
    found = set(BRACKETED.findall(text))
    for line in map(str.strip, [*lines, *BRACKETED.sub("\n", text).splitlines()]):
        words = line[:1].isalnum() and (line[-1].isalnum() or line[-1] in ".,!?")
        if (
            any(c.isalnum() for c in line)
            and not words
            and '"' not in line
            and len(line.split()) <= 4
        ):
            found.add(line)
    return found


def turn_ends(tokenizer) -> set[int]:
    """The ids of the tokens that the template writes after an assistant's message, at the end of a
    conversation and within one; none where it writes nothing, and the turn ends with the
    tokenizer's EOS. ValueError where it ends a turn with a text that is no token: no sampler could
    stop there, and no end would be learned.
    """
    ends, control, added = set(), control_tokens(tokenizer), set(tokenizer.get_added_vocab())
    for roles, tokens in zip(TURNS, (control | added, control), strict=False):
        after = (
            attempted(tokenizer, roles, False)
            .partition(SLOTS[1])[2]
            .partition(SLOTS[2])[0]
            .lstrip()
        )
        token = max((t for t in tokens if t.strip() and after.startswith(t)), key=len, default="")
        # a token of the vocabulary, if it is one
        if not token and (bracketed := BRACKETED.match(after)):
            ids = tokenizer(bracketed[0], add_special_tokens=False)["input_ids"]
            token = bracketed[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else ""
        if token:
            ends.add(tokenizer.convert_tokens_to_ids(token))
        elif after and len(roles) == 2:
            raise template_error(
                tokenizer,
                f"ends an assistant's turn with {after.strip()!r}, which is no token of its "
                "tokenizer, so that nothing would stop there; have it write "
                f"{tokenizer.eos_token!r}, or add that token to the tokenizer",
            )
    return ends


def clean(text) -> str:
    """Text that SQLite and a tokenizer accept: no NUL, no lone surrogates."""
    return str(text).replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Folded(dict):
    """A table for str.translate: each character as a normalising tokenizer may see it (NFKC, lower
    case), one for one.
    """

    def __missing__(self, code):
        folded = unicodedata.normalize("NFKC", chr(code)).lower()
        self[code] = folded if len(folded) == 1 else chr(code)
        return self[code]


FOLDED = Folded()


def neutralise(text, control_tokens) -> str:
    """Breaks every control token in `text` with a space after its first character, so that it can't
    open a chat turn.

    control_tokens: texts; one of a single character is left alone. They are found in upper and
    lower case, in full-width and other compatible characters, and with any white space where they
    have some.
    """
    text, finder = clean(text), token_finder(frozenset(control_tokens))
    while found := [m.start() + first_joint(m[0]) for m in finder.finditer(text.translate(FOLDED))]:
        borders = [0, *found, len(text)]
        # where two overlap, the next round
        text = " ".join(text[a:b] for a, b in itertools.pairwise(borders))
    return text


@functools.cache
def token_finder(control_tokens) -> re.Pattern:
    """Finds any of the control tokens in a text that went through FOLDED."""
    words = [t.translate(FOLDED).split() for t in sorted(control_tokens, key=len, reverse=True)]
    patterns = [r"\s+".join(map(re.escape, w)) for w in words if max(map(len, w), default=0) > 1]
    return re.compile("|".join(patterns) or r"(?!)")


def first_joint(token) -> int:
    """The first place between two characters that are no white space: a space there makes another
    text of any token.
    """
    return next(
        i for i in range(1, len(token)) if not (token[i - 1].isspace() or token[i].isspace())
    )


def plain(text) -> str:
    """A text without its white space's kind and amount, by which two texts are told to be the
    same.
    """
    return " ".join(clean(text).split())
