"""The three-tier memory of PMD: experience -> insight -> behavior (Eq. 2 to 5, B.1 to B.3).

    experience   raw attempts, per problem            at most 5 successes and 3 failures, behind a novelty gate
    insight      strategies and lessons, per problem  written by the model itself out of its experience, 10 + 10
    behavior     name and instruction, one bank       patterns that recur across the problems of a cluster, 500

Everything lives in one SQLite file, append-only. A row has the step it was `born` and, once it is replaced, evicted or
contradicted, the step it `ended`; nothing is ever overwritten. The memory as it stood at the end of step t is therefore
a query (`as_of`), and so is going back to it (`truncate_after`). Counters come from the `event` table.

This file imports neither torch nor any model. It is handed two plain callables:

    embed(texts)      -> float32 array (len(texts), D), rows of unit length
    generate(prompts) -> one text per prompt; the policy itself, through the run's sampler

Whatever a model wrote is data: it is stored as text, parsed as JSON by a tolerant parser that runs nothing, joined by
concatenation (never as a format string), and `neutralise` breaks the tokenizer's control tokens in it before it enters
a prompt.

Ours, because the paper does not say: thresholds of the gates, the clustering (k-means on question embeddings), what is
cut first under a token budget, how many existing behaviors an update sees. `ground_insights` is an addition to the
paper, off by default; see `Memory`.
"""

import contextlib
import json
import re
import sqlite3
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from json_repair import repair_json
from sklearn.cluster import KMeans

SCHEMA_VERSION = 1
SUCCESS = 0.5  # a reward above this is a success (SDPO code: success_reward_threshold)

# ---------------------------------------------------------------------------------------------------------------------
# Prompts. The headings of the teacher's prompt are the paper's (B.2); all other sentences are ours.
# ---------------------------------------------------------------------------------------------------------------------

STRATEGIES = "Relevant strategies from correct solutions to this problem:"
LESSONS = "Lessons from past failed attempts on this problem:"
BEHAVIORS = "Reasoning skills learned across all problems (apply those that are relevant):"
SOLUTION = "Correct solution:"
FEEDBACK = "The following is feedback from your unsuccessful earlier attempt:"
CLOSING = "Correctly solve the original question."


@dataclass(frozen=True)
class Forms:
    """The sentences of one domain's reflection and abstraction prompts; their order is fixed by the two builders below.

    `key_term` finds the words that carry an insight's claim; only `ground_insights` uses it.
    """

    role: str
    confidence: str  # our own template with {label}, {solved} and {total}; no model text ever goes through it
    problem: str
    correct: str
    wrong: str
    feedback: str
    contrastive: str
    strategies_only: str
    lessons_only: str
    abstract_role: str
    known: str
    cold_start: str
    decide: str
    key_term: str = r"[^\W\d_]{5,}"


# One line a sentence: nano's tokenizer holds each of these lines as a single token, so that a tiny model can afford them.
NANO = Forms(
    role="Reflect on your attempts at this problem.",
    confidence="Confidence: {label}.",
    problem="Problem:",
    correct="Correct attempt:",
    wrong="Wrong attempt:",
    feedback="Feedback:",
    contrastive="Write strategies and lessons as JSON.",
    strategies_only="Write strategies as JSON.",
    lessons_only="Write lessons as JSON.",
    abstract_role="Find rules that recur across these problems.",
    known="Known behaviors:",
    cold_start="Write behaviors as JSON.",
    decide="Decide which behaviors are new, to update or to remove, as JSON.",
    key_term=r"[a-z]+[=!][a-z]+",
)

RULES = """Rules for every item:
- State knowledge of the field or a way of working that also helps with other questions of this kind.
- Do not refer to this particular question, to its numbers or names, or to the letters or order of its options.
- Do not mention attempts, answers, verdicts, a model or a student.
- Give no advice about taking tests, such as guessing or eliminating options by their form."""

ITEM = '{"title": "at most ten words", "content": "two to four sentences"}'

# For questions in plain language, multiple choice among them (B.3 in our own words).
QUESTION = Forms(
    role="You are a science teacher who turns solved and failed exercises into general knowledge.",
    confidence="Confidence in this exercise: {label} ({solved} of {total} answers were correct).",
    problem="Exercise:",
    correct="A correct answer:",
    wrong="An incorrect answer:",
    feedback="What was said about it:",
    contrastive="Compare what separates the correct from the incorrect answers. Write two or three strategies that lead "
                f"to correct answers and two or three lessons that prevent the mistakes.\n{RULES}\nReply with this JSON and "
                f'nothing else:\n{{"strategies": [{ITEM}], "lessons": [{ITEM}]}}',
    strategies_only="Write two or three strategies that make answers like these correct.\n"
                    f'{RULES}\nReply with this JSON and nothing else:\n{{"strategies": [{ITEM}], "lessons": []}}',
    lessons_only="Work out what went wrong and write two or three lessons that prevent it.\n"
                 f'{RULES}\nReply with this JSON and nothing else:\n{{"strategies": [], "lessons": [{ITEM}]}}',
    abstract_role="Below are exercises of one kind with what was learned from each. Find the patterns of reasoning that "
                  "recur across them, helpful ones and mistakes to avoid.",
    known="Behaviors that are already known:",
    cold_start="Write three to eight behaviors, each named behavior_ and a few words joined by underscores.\n"
               f"{RULES}\nReply "
               'with this JSON and nothing else:\n{"behaviors": [{"name": "behavior_...", "instruction": "one or two '
               'sentences"}]}',
    decide="Decide which behaviors to add, which known ones to rewrite and which known ones to remove because they are "
           f"wrong or covered by others.\n{RULES}\nReply with this JSON and nothing else:\n"
           '{"actions": [{"action": "new, update or remove", "name": "behavior_...", '
           '"instruction": "one or two sentences"}]}',
)
FORMS = {"nano": NANO, "question": QUESTION}


def compose(problem, strategies=(), lessons=(), behaviors=(), solution="", feedback="") -> str:
    """The teacher's user message, block by block as in B.2; blocks without content are left out (Eq. 4 and 5).

    problem: str. strategies, lessons: (title, content) pairs. behaviors: (name, instruction) pairs. With no block at
    all the problem is returned as it is, so `compose(x) == x` tells that the teacher has nothing to add.
    """
    parts, solution = [], re.sub(r"<think>.*?</think>", "", solution, flags=re.DOTALL).strip()  # SDPO strips thoughts too
    if strategies:
        parts += [STRATEGIES, *(f"- {title}: {content}" for title, content in strategies)]
    if lessons:
        parts += [LESSONS, *(f"- {title}: {content}" for title, content in lessons)]
    if behaviors:
        parts += [BEHAVIORS, *(f"{i}. {name}: {text}" for i, (name, text) in enumerate(behaviors, 1))]
    if solution:
        parts += [SOLUTION, solution]
    if feedback:
        parts += [FEEDBACK, feedback]
    return "\n".join([problem, *parts, CLOSING]) if parts else problem


CUT_FIRST = ("behaviors", "lessons", "strategies", "feedback", "solution")


def compose_within(budget, count, problem, **context) -> str:
    """`compose` within `budget` tokens, counted by count(text). Blocks give way in the order of CUT_FIRST, lists from their
    end (the least similar behavior, the newest insight), the solution last; the problem itself is never cut."""
    text = compose(problem, **context)
    for block in CUT_FIRST:
        while context.get(block) and count(text) > budget:
            context[block] = context[block][:-1] if isinstance(context[block], list) else ""
            text = compose(problem, **context)
    return text


def reflection_prompt(forms, problem, successes, failures, solved, total) -> str:
    """Asks for the insight of one problem (B.3): contrastive, strategies only or lessons only, by what there is.

    successes: texts. failures: (text, feedback) pairs. solved of total: the problem's success fraction, given to the
    model as a confidence signal (the label's thresholds, one and two thirds, are ours).
    """
    label = "low" if 3 * solved < total else "medium" if 3 * solved < 2 * total else "high"
    parts = [forms.role, forms.confidence.format(label=label, solved=solved, total=total), forms.problem, problem]
    for text in successes:
        parts += [forms.correct, text]
    for text, feedback in failures:
        parts += [forms.wrong, text] + ([forms.feedback, feedback] if feedback else [])
    both = forms.contrastive if successes and failures else forms.strategies_only if successes else forms.lessons_only
    return "\n".join([*parts, both])


def abstraction_prompt(forms, cluster, known) -> str:
    """Asks for the behaviors of one cluster: from nothing (cold start), or as decisions on the `known` ones.

    cluster: (problem, lines) pairs, the lines being its insights, or its experience where it has none yet.
    known: (name, instruction) pairs.
    """
    parts = [forms.abstract_role]
    for problem, lines in cluster:
        parts += [forms.problem, problem, *lines]
    if known:
        parts += [forms.known, *(f"{name}: {instruction}" for name, instruction in known)]
    return "\n".join([*parts, forms.decide if known else forms.cold_start])


# ---------------------------------------------------------------------------------------------------------------------
# Text from a model
# ---------------------------------------------------------------------------------------------------------------------

MAX_REPLY, MAX_ITEMS, MAX_CONTENT, TITLE_WORDS = 20_000, 16, 2_000, 10  # characters, items, characters, words (B.3)


def clean(text) -> str:
    """Text that SQLite and a tokenizer accept: no NUL, no lone surrogates."""
    return str(text).replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def neutralise(text, control_tokens) -> str:
    """Breaks every control token in `text` with a space after its first character, so that it can't open a chat turn."""
    pattern = "|".join(re.escape(t) for t in sorted(control_tokens, key=len, reverse=True) if len(t) > 1)
    return re.sub(pattern, lambda m: m[0][0] + " " + m[0][1:], text) if pattern else text


def parse(reply) -> dict | None:
    """The JSON object in a model's reply, or None. Code fences, trailing prose and missing brackets are repaired."""
    if "{" not in reply:
        return None
    try:
        found = repair_json(clean(reply)[:MAX_REPLY], return_objects=True)
    except (RecursionError, ValueError):  # thousands of nested brackets
        return None
    if isinstance(found, list):  # the repairer returns a list where prose holds several objects
        found = next((x for x in found if isinstance(x, dict)), None)
    return found if isinstance(found, dict) else None


def parse_items(found, key, first, second) -> list[tuple[str, str]]:
    """The well-formed items under `key` of a parsed reply, each as the texts of its two fields; at most MAX_ITEMS."""
    rows = found.get(key) if isinstance(found, dict) else None
    items = []
    for row in rows[:MAX_ITEMS] if isinstance(rows, list) else []:
        pair = [row.get(first), row.get(second)] if isinstance(row, dict) else [None, None]
        if all(isinstance(x, str) and x.strip() for x in pair):
            items.append((" ".join(pair[0].split()[:TITLE_WORDS])[:MAX_CONTENT], pair[1].strip()[:MAX_CONTENT]))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE problem (id TEXT PRIMARY KEY, text TEXT, cluster INTEGER, embedding BLOB);
CREATE TABLE item (
    id INTEGER PRIMARY KEY,
    tier TEXT,            -- experience, insight, behavior
    kind TEXT,            -- success, failure; strategy, lesson; behavior
    problem TEXT,         -- NULL for behaviors: one bank for all
    title TEXT,           -- an insight's title, a behavior's name
    text TEXT,            -- completion; content; instruction
    reward REAL, feedback TEXT,
    sources TEXT,         -- JSON list: an experience's rollout, an insight's experience ids, a behavior's problems
    embedding BLOB,       -- float32
    born INTEGER, ended INTEGER,
    policy_step INTEGER   -- optimizer steps the policy that wrote it had taken
);
CREATE INDEX living ON item (tier, problem) WHERE ended IS NULL;
CREATE TABLE event (step INTEGER, kind TEXT, problem TEXT, n INTEGER);
CREATE INDEX events ON event (problem, kind);
"""


@dataclass
class Item:
    """One row of the memory; see TABLES for the fields."""

    id: int
    tier: str
    kind: str
    problem: str | None
    title: str | None
    text: str
    reward: float | None
    feedback: str | None
    sources: list
    embedding: np.ndarray = field(repr=False)
    born: int = 0
    ended: int | None = None
    policy_step: int = 0

    @classmethod
    def from_row(cls, row):
        item = cls(*row)
        item.sources, item.embedding = json.loads(item.sources), np.frombuffer(item.embedding, np.float32)
        return item


class Memory:
    """Experience, insight and behavior in one SQLite file, and the model calls that make the upper two from the lower.

    path: the file; ":memory:" for none. embed, generate: see the top of this file. embedder: the name of the embedding
    model, written into the file; a file of another one is refused with a ValueError. The caps are the paper's. frozen: the
    file is opened immutable, for a control that reads another run's memory and writes none. fits(prompt): whether the
    model can read it; what is left out of a prompt to make it fit is counted.

    ground_insights, beyond the paper (it cures a small model that miscopies its own attempts and then locks in on the
    mistake): reflection reads one attempt at a time; an insight whose key terms are not in that attempt is rejected; a
    failure made of nothing but living strategies ends them, a success that holds a lesson's terms ends that lesson; a
    behavior is rejected unless the living strategies of two problems hold its key terms. Rejections are counted.
    """

    def __init__(self, path, embed, generate, *, forms="nano", embedder="", ground_insights=False, max_successes=5,
                 max_failures=3, max_insights=10, max_behaviors=500, response_novelty=0.95, insight_novelty=0.85,
                 clusters=16, cluster_problems=8, cluster_insights=3, known_behaviors=8, retrieve_k=3, seed=0,
                 frozen=False, fits=lambda prompt: True):
        self.embed, self.generate, self.fits = embed, generate, fits
        self.forms, self.ground_insights = FORMS[forms], ground_insights
        self.caps = {"success": max_successes, "failure": max_failures, "strategy": max_insights,
                     "lesson": max_insights, "behavior": max_behaviors}
        self.novelty = {"experience": response_novelty, "insight": insight_novelty, "behavior": insight_novelty}
        self.clusters, self.cluster_problems, self.cluster_insights = clusters, cluster_problems, cluster_insights
        self.known_behaviors, self.retrieve_k, self.seed, self.frozen = known_behaviors, retrieve_k, seed, frozen
        new = str(path) == ":memory:" or not Path(path).exists()
        uri = f"{Path(path).resolve().as_uri()}?immutable=1"
        self.db = sqlite3.connect(uri, uri=True) if frozen else sqlite3.connect(path)
        try:
            if new:
                self.db.executescript("PRAGMA journal_mode = WAL;" + TABLES)
                rows = {"schema": str(SCHEMA_VERSION), "embedder": embedder, "dimension": str(embed([" "]).shape[1])}
                self.db.executemany("INSERT INTO meta VALUES (?, ?)", rows.items())
                self.db.commit()
            self.db.execute("PRAGMA synchronous = NORMAL")  # with WAL: a power cut may lose the last step, never corrupt
            meta = dict(self.db.execute("SELECT key, value FROM meta"))
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} can't be used as a memory: {error}; name another file or remove it") from error
        if meta.get("schema") != str(SCHEMA_VERSION):
            raise ValueError(f"{path} has memory schema {meta.get('schema')}, this code reads {SCHEMA_VERSION}")
        if meta["embedder"] != embedder:
            raise ValueError(f"{path} was embedded by {meta['embedder']!r}, this run uses {embedder!r}: choose that one")

    # -- writing ------------------------------------------------------------------------------------------------------

    def add_problems(self, problems):
        """Embeds and clusters the training questions, once, before step 1. problems: objects with .id and .prompt."""
        if self.db.execute("SELECT 1 FROM problem").fetchone():
            return
        vectors = self.embed([p.prompt for p in problems])
        k = min(self.clusters, len(np.unique(vectors, axis=0)))
        labels = KMeans(k, n_init=4, random_state=self.seed).fit_predict(vectors)
        rows = [(p.id, p.prompt, int(c), v.tobytes()) for p, c, v in zip(problems, labels, vectors, strict=True)]
        self.db.executemany("INSERT INTO problem VALUES (?, ?, ?, ?)", rows)
        self.db.commit()

    def record(self, step, rollouts):
        """Tier 1, Eq. 2: keeps this step's attempts behind the novelty gate.

        rollouts: objects with .id (str), .problem (.id), .text, .reward, .feedback.
        """
        for rollout, vector in zip(rollouts, self.embed([r.text for r in rollouts]), strict=True):
            kind = "success" if rollout.reward > SUCCESS else "failure"
            self._event(step, kind, rollout.problem.id)
            if self.ground_insights:
                self._contradict(step, rollout, kind)
            self._admit(step, Item(0, "experience", kind, rollout.problem.id, None, clean(rollout.text), rollout.reward,
                                   clean(rollout.feedback), [rollout.id], vector))
        self.db.commit()

    def reflect(self, step, problems):
        """Tier 2, Eq. 2: the model reads the accumulated experience of each problem and writes strategies and lessons.

        All prompts of the step go out as one batch. Insights accumulate behind the gate and are never overwritten.
        """
        jobs = []  # (problem, attempts) per prompt
        for problem in problems:
            attempts = self.living("experience", problem.id)
            if self.ground_insights:  # one at a time, and each until some living insight came from it
                done = {s for i in self.living("insight", problem.id) for s in i.sources}
                jobs += [(problem, [a]) for a in attempts if a.id not in done]
            elif attempts:
                jobs.append((problem, attempts))
        def prompt_of(problem, attempts):
            return reflection_prompt(self.forms, problem.prompt, [a.text for a in attempts if a.kind == "success"],
                                     [(a.text, a.feedback) for a in attempts if a.kind == "failure"],
                                     *self._success_fraction(problem.id))

        for problem, attempts in jobs:  # too long for the model: the oldest attempt of the more frequent kind goes
            while attempts and not self.fits(prompt_of(problem, attempts)):
                kinds = [a.kind for a in attempts]
                del attempts[kinds.index(max(set(kinds), key=kinds.count))]
                self._event(step, "reflection_cut", problem.id)
        jobs = [(problem, attempts) for problem, attempts in jobs if attempts]
        prompts = [prompt_of(problem, attempts) for problem, attempts in jobs]
        written = []
        for (problem, attempts), reply in zip(jobs, self.generate(prompts) if prompts else [], strict=True):
            self._event(step, "reflection", problem.id)
            found = parse(reply)
            strategies = parse_items(found, "strategies", "title", "content")
            lessons = parse_items(found, "lessons", "title", "content")
            if not strategies and not lessons:
                self._event(step, "reflect_parse_failure", problem.id)
            for kind, outcome, items in (("strategy", "success", strategies), ("lesson", "failure", lessons)):
                evidence = [a for a in attempts if a.kind == outcome]
                for title, content in items:
                    if not evidence or self.ground_insights and not self._contained(content, evidence):
                        self._event(step, "insight_rejected", problem.id)
                        continue
                    written.append(Item(0, "insight", kind, problem.id, title, content, None, None,
                                        [a.id for a in evidence], None))
        self._admit_all(step, written)
        self.db.commit()

    def abstract(self, step):
        """Tier 3, Eq. 3: the insights of each cluster of similar questions become behaviors of the shared bank.

        An empty bank is filled from nothing (cold start); later the nearest existing behaviors are shown and the reply
        decides which are new, updated or removed. A behavior's name is its key: a new one of a known name updates it.
        """
        bank, insights = self.living("behavior"), defaultdict(list)
        for item in self.living("insight"):
            insights[item.problem].append(item)
        jobs = self._cluster_prompts(step, bank, insights)
        replies = self.generate([prompt for *_, prompt in jobs]) if jobs else []
        by_name, written = {b.title: b for b in bank}, {}
        for (problems, known, _), reply in zip(jobs, replies, strict=True):
            self._event(step, "abstraction", None)
            found = parse(reply)
            if found is None:
                self._event(step, "abstract_parse_failure", None)
                continue
            key = "actions" if known else "behaviors"
            if known:  # an action without an instruction can still remove
                rows = found.get(key)
                rows = [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
                for name in (str(r.get("name")).strip() for r in rows[:MAX_ITEMS] if r.get("action") == "remove"):
                    if name in by_name:
                        self._end(step, by_name.pop(name))
                found = {key: [r for r in rows if r.get("action") in ("new", "update")]}
            for name, instruction in parse_items(found, key, "name", "instruction"):
                sources = [p for p in problems if not self.ground_insights or
                           self._contained(instruction, insights[p], "strategy")]
                if not name.startswith("behavior_") or self.ground_insights and len(sources) < 2:
                    self._event(step, "behavior_rejected", None)
                elif name not in by_name or by_name[name].text != instruction:
                    written[name] = Item(0, "behavior", "behavior", None, name, instruction, None, None, sources, None)
        for name in written.keys() & by_name.keys():
            self._end(step, by_name[name])
        self._admit_all(step, list(written.values()))
        self.db.commit()

    def _cluster_prompts(self, step, bank, insights):
        """(problem ids, known behaviors, prompt) for each cluster that something is remembered of."""
        experience, clusters, jobs = defaultdict(list), defaultdict(list), []
        for item in self.living("experience"):
            experience[item.problem].append(item)
        for pid, text, cluster, vector in self.db.execute("SELECT * FROM problem ORDER BY id"):
            if insights[pid] or experience[pid]:
                clusters[cluster].append((pid, text, np.frombuffer(vector, np.float32)))
        for _, problems in sorted(clusters.items()):
            # most insights first: under the cap, problems that have been understood say more than those that have not
            problems = sorted(problems, key=lambda p: -len(insights[p[0]]))[: self.cluster_problems]
            known, summary = nearest(np.mean([v for *_, v in problems], axis=0), bank, self.known_behaviors), []
            for pid, text, _ in problems:
                newest = [i for kind in ("strategy", "lesson")
                          for i in [i for i in insights[pid] if i.kind == kind][-self.cluster_insights:]]
                attempts = [f"{self.forms.correct if e.kind == 'success' else self.forms.wrong}\n{e.text}"
                            for e in experience[pid]]
                summary.append((text, [f"- {i.title}: {i.text}" for i in newest] or attempts))
            shown = [(b.title, b.text) for b in known]
            while summary and not self.fits(prompt := abstraction_prompt(self.forms, summary, shown)):
                summary.pop()  # too long for the model: the last problem goes
                self._event(step, "abstraction_cut", None)
            if summary:
                jobs.append(([pid for pid, *_ in problems[: len(summary)]], known, prompt))
        return jobs

    def _admit_all(self, step, items):
        vectors = self.embed([f"{i.title}: {i.text}" for i in items]) if items else []
        for item, vector in zip(items, vectors, strict=True):
            item.embedding = vector
            self._admit(step, item)

    def _admit(self, step, item):
        """The novelty gate of every tier: a near-duplicate is refused; when full, the most redundant item goes.

        Redundant is what has the highest cosine to any other item of its kind, the newcomer included; the older of two.
        """
        peers = [i for i in self.living(item.tier, item.problem) if i.kind == item.kind]
        if peers:
            vectors = np.stack([p.embedding for p in peers])
            to_new = vectors @ item.embedding
            if to_new.max() > self.novelty[item.tier]:
                self._event(step, f"{item.tier}_duplicate", item.problem)
                return
            if len(peers) >= self.caps[item.kind]:
                among = vectors @ vectors.T
                np.fill_diagonal(among, -1.0)
                self._end(step, peers[int(np.maximum(among.max(1), to_new).argmax())])
        self.db.execute(
            "INSERT INTO item (tier, kind, problem, title, text, reward, feedback, sources, embedding, born, policy_step)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (item.tier, item.kind, item.problem, item.title, item.text, item.reward, item.feedback,
             json.dumps(item.sources), item.embedding.astype(np.float32).tobytes(), step, step - 1))

    def _end(self, step, item):
        self.db.execute("UPDATE item SET ended = ? WHERE id = ?", (step, item.id))

    def _event(self, step, kind, problem):
        self.db.execute("INSERT INTO event VALUES (?, ?, ?, 1)", (step, kind, problem))

    # -- grounding (ours, `ground_insights`) --------------------------------------------------------------------------

    def _terms(self, text):
        return {t.replace("!", "=") for t in re.findall(self.forms.key_term, text.lower())}

    def _contained(self, text, evidence, kind=None):
        terms = self._terms(text)
        return bool(terms) and any(terms <= self._terms(e.text) for e in evidence if kind in (None, e.kind))

    def _contradict(self, step, rollout, outcome):
        terms, kind = self._terms(rollout.text), "strategy" if outcome == "failure" else "lesson"
        items = [i for i in self.living("insight", rollout.problem.id) if i.kind == kind and self._terms(i.text) <= terms]
        covered = set().union(*(self._terms(i.text) for i in items))
        # a failure counts against strategies only if it did nothing else that could be to blame
        if items and (outcome == "success" or covered == terms):
            for item in items:
                self._end(step, item)
                self._event(step, "insight_contradicted", rollout.problem.id)

    # -- reading ------------------------------------------------------------------------------------------------------

    def living(self, tier, problem=None) -> list[Item]:
        """The living items of a tier, oldest first; of one problem if it is given."""
        where, args = ("AND problem = ?", (tier, problem)) if problem is not None else ("", (tier,))
        rows = self.db.execute(f"SELECT * FROM item WHERE tier = ? AND ended IS NULL {where} ORDER BY id", args)
        return [Item.from_row(row) for row in rows]

    def as_of(self, step, tier) -> list[Item]:
        """The items of a tier that were alive at the END of `step`, oldest first."""
        alive = "born <= ? AND (ended IS NULL OR ended > ?)"
        rows = self.db.execute(f"SELECT * FROM item WHERE tier = ? AND {alive} ORDER BY id", (tier, step, step))
        return [Item.from_row(row) for row in rows]

    def retrieve(self, problems, bank) -> dict[str, list[Item]]:
        """The `retrieve_k` behaviors of `bank` nearest to each question, by cosine: {problem id: items}."""
        vectors = self.embed([p.prompt for p in problems]) if bank else [None] * len(problems)
        return {p.id: nearest(v, bank, self.retrieve_k) for p, v in zip(problems, vectors, strict=True)}

    def contexts(self, rollouts, step, tiers=("experience", "insight", "behavior"), refreshed=False) -> list[dict]:
        """What the teacher may read for each rollout, as keyword arguments of `compose` (Eq. 4).

        A problem's own experience and insight after this step's update; behaviors from the bank as it was at the end
        of the step before (`refreshed`: after this step's refresh, as in Algorithm 1, lines 11 to 14); the most recent
        stored success that is not the rollout's own. `tiers` hides blocks for the ablations and changes no extraction.
        """
        problems = {r.problem.id: r.problem for r in rollouts}
        bank = self.living("behavior") if refreshed else self.as_of(step - 1, "behavior")
        behaviors = self.retrieve(list(problems.values()), bank) if "behavior" in tiers else {}
        insights = {pid: self.living("insight", pid) if "insight" in tiers else [] for pid in problems}
        successes = {pid: [e for e in self.living("experience", pid) if e.kind == "success"]
                     if "experience" in tiers else [] for pid in problems}
        contexts = []
        for r in rollouts:
            pid = r.problem.id
            others = [e.text for e in successes[pid] if r.id not in e.sources]
            contexts.append({
                "strategies": [(i.title, i.text) for i in insights[pid] if i.kind == "strategy"],
                "lessons": [(i.title, i.text) for i in insights[pid] if i.kind == "lesson"],
                "behaviors": [(b.title, b.text) for b in behaviors.get(pid, [])],
                "solution": others[-1] if others else "",
                "feedback": r.feedback})
        return contexts

    def knows(self, problem) -> bool:
        """Whether a problem of this id was among those that `add_problems` was given."""
        return bool(self.db.execute("SELECT 1 FROM problem WHERE id = ?", (problem,)).fetchone())

    def sizes(self) -> dict[str, int]:
        """Living items in each tier."""
        rows = dict(self.db.execute("SELECT tier, COUNT(*) FROM item WHERE ended IS NULL GROUP BY tier"))
        return {tier: rows.get(tier, 0) for tier in ("experience", "insight", "behavior")}

    def counts(self, step=None) -> dict[str, int]:
        """How often each kind of event happened, in all or in one step."""
        where, args = ("WHERE step = ?", (step,)) if step is not None else ("", ())
        return dict(self.db.execute(f"SELECT kind, SUM(n) FROM event {where} GROUP BY kind ORDER BY kind", args))

    def _success_fraction(self, problem):
        rows = dict(self.db.execute("SELECT kind, SUM(n) FROM event WHERE problem = ? AND kind IN ('success', 'failure') "
                                    "GROUP BY kind", (problem,)))
        return rows.get("success", 0), sum(rows.values())

    def describe(self, problem) -> str:
        """One problem's memory in readable form: its experience, its insight and the behaviors retrieved for it."""
        solved, total = self._success_fraction(problem.id)
        lines = [f"problem {problem.id}: {problem.prompt}", f"  solved in {solved} of {total} attempts so far"]
        for tier, items in (("experience", self.living("experience", problem.id)),
                            ("insight", self.living("insight", problem.id)),
                            ("behavior", self.retrieve([problem], self.living("behavior"))[problem.id])):
            lines.append(f"  {tier}" + ("" if items else ": none yet"))
            for i in items:
                head = i.kind if tier == "experience" else f"{i.kind} {i.title}" if tier == "insight" else i.title
                lines.append(f"    [step {i.born}] {head}: {i.text}")
        return "\n".join(lines)

    def inference_contexts(self, problems, tiers=("insight", "behavior"), neighbors=1) -> list[dict]:
        """What may be put into the PROMPT of held-out problems, as keyword arguments of `compose`; they have no insight of
        their own, so they read that of their `neighbors` nearest training problems, by question embedding, and the nearest
        behaviors. Ours: the paper does not say how its frozen-policy rows feed memory at test time."""
        ids, known = [], []
        for pid, vector in self.db.execute("SELECT id, embedding FROM problem ORDER BY id"):
            ids.append(pid)
            known.append(np.frombuffer(vector, np.float32))
        behaviors = self.retrieve(problems, self.living("behavior")) if "behavior" in tiers else {}
        contexts = []
        for problem, vector in zip(problems, self.embed([p.prompt for p in problems]), strict=True):
            near = [ids[i] for i in np.argsort(-(np.stack(known) @ vector), kind="stable")[:neighbors]]
            insights = [i for pid in near for i in self.living("insight", pid)] if "insight" in tiers else []
            contexts.append({
                "strategies": [(i.title, i.text) for i in insights if i.kind == "strategy"],
                "lessons": [(i.title, i.text) for i in insights if i.kind == "lesson"],
                "behaviors": [(b.title, b.text) for b in behaviors.get(problem.id, [])]})
        return contexts

    # -- time ---------------------------------------------------------------------------------------------------------

    def forget(self, step):
        """Ends everything that lives at `step`: the transient control keeps nothing from one step to the next."""
        self.db.execute("UPDATE item SET ended = ? WHERE ended IS NULL", (step,))
        self.db.commit()

    def truncate_after(self, step):
        """Back to the end of `step`: what was born later is deleted, what ended later lives again."""
        self.db.execute("DELETE FROM item WHERE born > ?", (step,))
        self.db.execute("UPDATE item SET ended = NULL WHERE ended > ?", (step,))
        self.db.execute("DELETE FROM event WHERE step > ?", (step,))
        self.db.commit()

    def copy_to(self, path):
        """A copy of the file as it is now, for a checkpoint; a WAL database copied by hand may miss its last commits."""
        with contextlib.closing(sqlite3.connect(path)) as copy:
            self.db.backup(copy)

    def close(self):
        if not self.frozen:
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.db.close()


def nearest(vector, items, k) -> list[Item]:
    """The k items nearest to `vector` by cosine, best first; the older first among equals."""
    if not items:
        return []
    return [items[i] for i in np.argsort(-(np.stack([i.embedding for i in items]) @ vector), kind="stable")[:k]]
