"""The three-tier memory of PMD: experience -> insight -> behavior (Eq. 2 to 5, B.1 to B.3).

    tier        what it holds                      whose         how much
    experience  raw attempts                       per problem   5 successes and 3 failures
    insight     strategies and lessons             per problem   10 of each
    behavior    patterns that recur in a cluster   one bank      500

The model itself writes insight out of experience, and behaviors out of insight. Each tier has a
novelty gate (`gate`). Everything lives in one SQLite file (runtime/store.py), append-only, in which
each item has the steps of its birth and its end.

This file imports neither torch nor any model. It is handed plain callables:

    embed(texts)      -> (len(texts), D) numbers of any type
    generate(prompts) -> one text per prompt; the policy itself, through the run's sampler
    abstractor        -> the same for behaviors, where another model writes them (the paper:
                         GPT-5.4)

Whatever a model wrote is data. It is stored as text and parsed as JSON by a tolerant parser that
runs nothing (runtime/replies.py). It is joined by concatenation, never as a format string. Before
it enters a prompt, control tokens and turn markers in it are broken (`neutralise` of
runtime/chat.py).

Ours, because the paper does not say: the thresholds of the gates, the clustering (k-means on
question embeddings), which problems of a cluster its prompt shows, what is cut first under a token
budget, how many existing behaviors an update sees, the prompts for code, the patterns of shortcuts.
"""

import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

from runtime.chat import clean, encoder, plain
from runtime.formats import (
    BOTH,
    DECISIONS,
    JSON_REPLY,
    NEW_BEHAVIORS,
    ONLY_LESSONS,
    ONLY_STRATEGIES,
    Format,
    in_format,
    is_echo,
    was_cut,
)
from runtime.options import option
from runtime.replies import (
    decisions,
    items_under,
    parse,  # noqa: F401  as the next
    parse_items,  # noqa: F401  also for those who import memory
    strip_thoughts,
)
from runtime.shortcuts import shortcuts
from runtime.store import TIERS, WITH_EMBEDDING, Item, Store, nearest
from tasks.problem import SUCCESS


@dataclass
class MemoryOptions:
    """Memory."""

    tiers: str = option(
        "experience,insight,behavior",
        "the tiers that the teacher reads; the others are written all the same [Tab. 4]",
    )
    memory_from: str = option("", "frozen-memory: the run RUN, or RUN@STEP, whose memory is read")
    max_insights: int = option(
        10, "maximum strategies, and maximum lessons, kept per problem [Fig. 6]", within="[1, inf)"
    )
    retrieve_k: int = option(
        3,
        "behaviors shown to the teacher. With a memory in the prompt of held-out problems: the"
        " nearest training problems, and the behaviors, that each reads [paper, main experiments;"
        " Tab. 4]",
        within="[0, inf)",
    )
    behavior_every: int = option(
        0,
        "steps between refreshes of the bank; 0 for once an epoch [Eq. 3; Alg. 1: every batch]",
        within="[0, inf)",
    )
    behaviors_refreshed: bool = option(
        False,
        "the teacher reads the bank after this step's refresh [Alg. 1] instead of "
        "before it [Eq. 4]",
    )
    query_feedback: bool = option(
        False, "retrieve behaviors by question and feedback together [optional in B.5]"
    )
    clusters: int = option(
        16, "number of clusters of questions, for abstraction [ours]", within="[1, inf)"
    )
    drop_shortcuts: bool = option(
        False,
        "drop insights and behaviors with shortcut-like phrasing; they are counted either way "
        "[B.3 counts them]",
    )
    ground_insights: bool = option(
        False,
        "keep only insights that their evidence contains, with further rules: see"
        " nano/grounded.py [deviation 7]",
    )
    abstractor: str = option(
        "policy",
        "the writer of behaviors: policy, or openai:MODEL on the server of OPENAI_BASE_URL "
        "with OPENAI_API_KEY [deviation 4; C.1: GPT-5.4]",
    )
    memory_format: Format = option(
        "json",
        "the form of reflections and abstractions. json: as in the paper. guided: the sampler can"
        " write only the JSON asked for. lines: plain lines, for small models [deviation 14]",
    )
    memory_completion: int = option(
        768, "maximum tokens of a reflection or abstraction [ours]", within="[1, inf)"
    )
    embedder: str = option(
        "Qwen/Qwen3-Embedding-0.6B",
        "embeds questions, attempts and insights: a sentence-transformers folder or Hub name"
        " [paper], or hashing, which hashes words and needs no download",
    )


# --------------------------------------------------------------------------------------------------
# Prompts. The headings of the teacher's prompt are the paper's (B.2); all other sentences are ours.
# --------------------------------------------------------------------------------------------------

STRATEGIES = "Relevant strategies from correct solutions to this problem:"
LESSONS = "Lessons from past failed attempts on this problem:"
BEHAVIORS = "Reasoning skills learned across all problems (apply those that are relevant):"
SOLUTION = "Correct solution:"
EXAMPLES = "Correct solutions to similar problems:"
FEEDBACK = "The following is feedback from your unsuccessful earlier attempt:"
CLOSING = "Correctly solve the original question."
# Sentences of prompts that other methods show, ours; nano's checkpoint reads them (nano/README.md
# says how each is used).
CRITIQUE = "Your attempt, corrected at its first wrong step:"
BEGINNING = "The beginning of a correct solution:"
REVISE_WRONG = (  # these two in the assistant's own turn, after an attempt
    "That was wrong; once more:"
)
REVISE_RIGHT = "That was right; once more:"
AGAIN = (  # opens a second message of the user
    "That attempt was wrong. Answer again, minding this critique:"
)
CRITIC = "Name the first wrong step of this attempt."
ASK_CONFIDENCE = "End with your confidence that the answer is right."  # stands after the problem
CONFIDENCE = "Confidence:"


@dataclass(frozen=True)
class Forms:
    """The sentences of one domain's reflection and abstraction prompts; their order is fixed by the
    two builders below.

    Only `ground_insights` uses the last two: `key_term` finds what carries an insight's claim, and
    `literal` says that such a term is the claim itself rather than a word about it.
    """

    role: str
    # our own template with {label}, {solved} and {total}; no model text ever goes through it
    confidence: str
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
    literal: bool = False


# One line a sentence: nano's tokenizer holds each of these lines as a single token, so that a tiny
# model can afford them.
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
    literal=True,
)


def forms_in_words(role, exercise, solution, feedback, about, particulars) -> Forms:
    """Makes the prompts for a model that reads plain language (B.3 in our own words)."""
    rules = (
        "Rules for every item:\n"
        "- State knowledge of the field or a way of working that also helps with other"
        f" {exercise}s of this kind.\n"
        f"- Do not refer to this particular {exercise}, to {particulars}.\n"
        f"- Do not mention attempts, {solution}s, verdicts, a model or a student.\n"
        f"- Give no advice about {about}.\n{JSON_REPLY}"
    )
    return Forms(
        role=role,
        confidence=(
            f"Confidence in this {exercise}: {{label}} ({{solved}} of {{total}} {solution}s were"
            " correct)."
        ),
        problem=f"The {exercise}:",
        correct=f"A correct {solution}:",
        wrong=f"An incorrect {solution}:",
        feedback=feedback,
        contrastive=(
            f"Compare what separates the correct from the incorrect {solution}s. Write two or three"
            " strategies that "
            f"lead to correct {solution}s and two or three lessons that prevent the"
            f" mistakes.\n{rules}{BOTH}"
        ),
        strategies_only=(
            f"Write two or three strategies that make {solution}s like these correct.\n"
            f"{rules}{ONLY_STRATEGIES}"
        ),
        lessons_only=(
            "Work out what went wrong and write two or three lessons that prevent it.\n"
            f"{rules}{ONLY_LESSONS}"
        ),
        abstract_role=(
            f"Below are {exercise}s of one kind with what was learned from each. Find the patterns"
            " of reasoning that recur across them, helpful ones and mistakes to avoid."
        ),
        known="Behaviors that are already known:",
        cold_start=(
            "Write three to eight behaviors, each named behavior_ and a few words joined by"
            " underscores.\n"
            f"{rules}{NEW_BEHAVIORS}"
        ),
        decide=(
            "Decide which behaviors to add, which known ones to rewrite and which known ones to"
            " remove because they are "
            f"wrong or covered by others.\n{rules}{DECISIONS}"
        ),
    )


QUESTION = forms_in_words(  # multiple choice, and other questions with one short answer
    "You are a science teacher who turns solved and failed questions into general knowledge.",
    "question",
    "answer",
    "What was said about it:",
    "taking tests, such as guessing or eliminating options by their form",
    "its numbers or names, or to the letters or order of its options",
)
CODE = forms_in_words(
    "You are an experienced programmer who turns solved and failed programming problems into"
    " general knowledge.",
    "programming problem",
    "program",
    "What the tests said about it:",
    "passing tests by other means, such as answering known inputs from a table",
    "its story, or to the numbers of its examples and tests",
)
FORMS = {"nano": NANO, "question": QUESTION, "code": CODE}


def compose(
    problem,
    strategies=(),
    lessons=(),
    behaviors=(),
    solution="",
    feedback="",
    examples=(),
    critique="",
    beginning="",
) -> str:
    """Composes the teacher's user message, block by block as in B.2 (Eq. 4 and 5).

    problem: str. strategies, lessons: (title, content) pairs. behaviors: (name, instruction) pairs.
    examples: (problem, solution) pairs, which B.2 does not have and no teacher reads (see
    Memory.inference_contexts). critique: an attempt rewritten up to and with its first wrong step.
    beginning: the first steps of a solution. Both are for other methods.

    Blocks without content are left out. Without any block the problem is returned as it is, so that
    `compose(x) == x` tells that the teacher has nothing to add.
    """
    parts, solution = [], strip_thoughts(solution)
    for header, items in {STRATEGIES: strategies, LESSONS: lessons}.items():
        if items:
            parts += [header, *(f"- {title}: {content}" for title, content in items)]
    if behaviors:
        parts.append(BEHAVIORS)
        parts += (f"{i}. {name}: {text}" for i, (name, text) in enumerate(behaviors, 1))
    if examples:
        parts.append(EXAMPLES)
        for question, text in examples:
            parts += [question, strip_thoughts(text)]
    texts = {BEGINNING: beginning, CRITIQUE: critique, SOLUTION: solution, FEEDBACK: feedback}
    for header, text in texts.items():
        if text:
            parts += [header, text]
    return "\n".join([problem, *parts, CLOSING]) if parts else problem


TEXTS = ("feedback", "critique", "beginning", "solution")
CUT_FIRST = ("examples", "behaviors", "lessons", "strategies", *TEXTS)


def compose_within(budget, count, problem, **context) -> str:
    """Composes within `budget` tokens, counted by count(text).

    A text that does not fit even alone is left out: all else would give way in vain. Then blocks
    give way in the order of CUT_FIRST, the solution last. Lists give way from their end: the least
    similar behavior, the newest insight. The problem itself is never cut.
    """
    whole = compose(problem, **context)
    if count(whole) <= budget:
        return whole
    for block in TEXTS:
        if context.get(block) and count(compose(problem, **{block: context[block]})) > budget:
            context[block] = ""
    for block in CUT_FIRST:
        while context.get(block) and count(compose(problem, **context)) > budget:
            context[block] = "" if block in TEXTS else context[block][:-1]
    return compose(problem, **context)


def reprompt(problem, context, tokenizer, cfg, encode=None) -> str:
    """Composes a problem with a context within `max_reprompt` tokens, template included.

    encode(user, system): runtime.chat.encoder of the tokenizer, or one that remembers.
    """
    encode = encode or encoder(tokenizer, cfg)
    return compose_within(
        cfg.max_reprompt, lambda text: len(encode(text, problem.system)), problem.prompt, **context
    )


def reflection_prompt(forms, problem, successes, failures, solved, total) -> str:
    """Asks for the insight of one problem (B.3).

    The request is contrastive, for strategies only or for lessons only, by what there is.
    successes: texts. failures: (text, feedback) pairs. solved of total: the problem's success
    fraction, a confidence signal. The label's thresholds, one and two thirds, are ours.
    """
    label = "high"
    if 3 * solved < 2 * total:
        label = "medium"
    if 3 * solved < total:
        label = "low"
    confidence = forms.confidence.format(label=label, solved=solved, total=total)
    parts = [forms.role, confidence, forms.problem, problem]
    for text in successes:
        parts += [forms.correct, text]
    for text, feedback in failures:
        parts += [forms.wrong, text]
        if feedback:
            parts += [forms.feedback, feedback]
    request = forms.contrastive
    if not failures:
        request = forms.strategies_only
    if not successes:
        request = forms.lessons_only
    return "\n".join([*parts, request])


def critic_prompt(problem, attempt, solution="") -> str:
    """Asks for the first wrong step of an attempt, beside a solution if there is one. For other
    methods.
    """
    parts = [CRITIC, problem, NANO.wrong, attempt]
    return "\n".join(parts + ([SOLUTION, solution] if solution else []))


def abstraction_prompt(forms, cluster, known) -> str:
    """Asks for the behaviors of one cluster, from nothing (cold start) or as decisions on `known`.

    cluster: (problem, lines) pairs. The lines are its insights, or its experience where it has no
    insight yet. known: (name, instruction) pairs.
    """
    parts = [forms.abstract_role]
    for problem, lines in cluster:
        parts += [forms.problem, problem, *lines]
    if known:
        parts += [forms.known, *(f"{name}: {instruction}" for name, instruction in known)]
    return "\n".join([*parts, forms.decide if known else forms.cold_start])


def gate(cosines, held, cap, novelty, same, names=None) -> tuple[list[int], int, int]:
    """Is the novelty gate of every tier; gives (which stay, newcomers refused, updates).

    cosines (n, n): of the `held` living vectors, oldest first, and after them the newcomers. same
    (n, n): whether two texts are equal. names: n keys, or None.

    Newcomers come in one by one. A newcomer nearer than `novelty` to one that stays is refused, and
    so is one with the same text. A newcomer takes the place of the item of its name, which stays
    where the newcomer is refused. While all `cap` places are taken, the most redundant item goes:
    the one with the highest cosine to any other, the newcomer included, and the older one of two.
    """
    stay, refused, updates = list(range(held)), 0, 0
    cosines = cosines.clip(-1, 1)
    np.fill_diagonal(cosines, -2.0)  # nothing is redundant because of itself
    for new in range(held, len(cosines)):
        others = [i for i in stay if names is None or names[i] != names[new]]
        if same[new, stay].any() or others and cosines[new, others].max() > novelty:
            refused += 1
            continue
        updates += len(stay) - len(others)
        stay = others
        while len(stay) >= cap:
            del stay[int(cosines[stay][:, [*stay, new]].max(1).argmax())]
        stay.append(new)
    return stay, refused, updates


class Memory(Store):
    """Experience, insight and behavior in one file, and the model calls that write the upper two.

    path, embed, embedder: of the file, see Store. generate, abstractor: see the top of this file.
    The caps are the paper's. fits(prompt): whether the model can read it. What is left out of a
    prompt to make it fit is counted. drop_shortcuts: items with shortcut-like phrasing are dropped,
    not only counted (B.3).

    mode is one of three. "evolving": the memory of the paper. "transient": behaviors come from
    clusters of this step's problems only, and the caller ends every step with `forget`. "frozen":
    another run's memory, which is only read. Its steps and rollouts are that run's: all that lives
    in it is read from the first step on.

    Raises ValueError and OSError as Store does. A method that raises has changed nothing.
    """

    def __init__(
        self,
        path,
        embed,
        generate,
        abstractor=None,
        *,
        forms="nano",
        format="json",  # of replies: see runtime/formats.py
        embedder=None,
        mode="evolving",
        drop_shortcuts=False,
        query_feedback=False,
        max_successes=5,  # per problem, as the next two [paper]
        max_failures=3,  # [paper]
        max_insights=10,  # strategies, and as many lessons [Fig. 6]
        max_behaviors=500,  # of the bank [paper]
        response_novelty=0.95,  # cosine above which an attempt is a near-duplicate [ours]
        insight_novelty=0.85,  # cosine above which an insight or behavior is one [ours]
        clusters=16,  # of questions that behaviors are abstracted from [ours]
        cluster_problems=8,  # problems that a cluster's prompt shows [ours]
        cluster_insights=3,  # strategies, and as many lessons, of each of them [ours]
        known_behaviors=8,  # that an abstraction is shown [ours]
        retrieve_k=3,  # behaviors shown to the teacher [paper]
        seed=0,
        fits=lambda prompt: True,
    ):
        self.generate, self.abstractor, self.fits = generate, abstractor or generate, fits
        self.written_elsewhere = abstractor is not None
        self.forms, self.read = in_format(FORMS[forms], format)
        self.mode, self.seed = mode, seed
        self.drop_shortcuts, self.query_feedback = drop_shortcuts, query_feedback
        self.caps = {
            "success": max_successes,
            "failure": max_failures,
            "strategy": max_insights,
            "lesson": max_insights,
            "behavior": max_behaviors,
        }
        self.novelty = {
            "experience": response_novelty,
            "insight": insight_novelty,
            "behavior": insight_novelty,
        }
        self.clusters, self.cluster_problems = clusters, cluster_problems
        self.cluster_insights, self.known_behaviors = cluster_insights, known_behaviors
        self.retrieve_k = retrieve_k
        super().__init__(path, embed, embedder, frozen=mode == "frozen", caps=self.caps)

    # -- writing

    def add_problems(self, problems):
        """Embeds and clusters the training questions, once, before step 1.

        problems: objects with .id and .prompt.
        """
        if self.query("SELECT 1 FROM problem LIMIT 1"):
            return
        vectors = self.vectors([p.prompt for p in problems])
        labels = self._clustered(vectors, self.clusters)
        rows = [
            (p.id, clean(p.prompt), int(label), vector.tobytes())
            for p, label, vector in zip(problems, labels, vectors, strict=True)
        ]
        with self.writing():
            self.db.executemany("INSERT INTO problem VALUES (?, ?, ?, ?)", rows)

    def _clustered(self, vectors, k):
        """(n,) labels: k-means on question embeddings [ours]."""
        k = min(k, len(np.unique(vectors, axis=0)))
        return KMeans(k, n_init=4, random_state=self.seed).fit_predict(vectors)

    def record(self, step, rollouts):
        """Tier 1, Eq. 2: keeps this step's attempts behind the novelty gate.

        rollouts: objects with .id (str), .problem (.id), .text, .reward, .feedback.
        """
        items = []
        for r in rollouts:
            kind = "success" if r.reward >= SUCCESS else "failure"
            items.append(
                Item(
                    0,
                    "experience",
                    kind,
                    r.problem.id,
                    None,
                    clean(r.text),
                    r.reward,
                    clean(r.feedback),
                    json.dumps([r.id]),
                    policy_step=step - 1,
                )
            )
            self.events[r.problem.id, kind] += 1
        vectors = self.embedded(items)
        with self.writing(step):
            self.contradict(step, items)
            self._admit(step, items, vectors)

    def reflect(self, step, problems):
        """Tier 2, Eq. 2: the model reads the experience of each problem and writes its insight.

        All prompts of the step go out as one batch. Insights accumulate behind the gate, and at
        their cap the most redundant ends.
        """
        jobs = self._reflection_jobs(step, problems)
        replies = self.generate([prompt for *_, prompt in jobs]) if jobs else []
        written = []
        for (problem, attempts, _), reply in zip(jobs, replies, strict=True):
            self.events[problem.id, "reflection"] += 1
            if was_cut(reply):
                self.events[problem.id, "reflection_truncated"] += 1
            found = self.read(reply)
            strategies, odd_strategies = items_under(found, "strategies", "title", "content")
            lessons, odd_lessons = items_under(found, "lessons", "title", "content")
            if not strategies and not lessons:
                self.events[problem.id, "reflect_parse_failure"] += 1
            self.events[problem.id, "insight_rejected"] += odd_strategies + odd_lessons
            for kind, outcome, items in (
                ("strategy", "success", strategies),
                ("lesson", "failure", lessons),
            ):
                evidence = [a for a in attempts if a.kind == outcome]
                ids = json.dumps([a.id for a in evidence])
                for title, content in items:
                    item = Item(
                        0,
                        "insight",
                        kind,
                        problem.id,
                        title,
                        content,
                        evidence=ids,
                        policy_step=step - 1,
                    )
                    wanted = self._measured(item) and evidence and not is_echo(content)
                    if wanted and self.accepts_insight(item, evidence):
                        written.append(item)
                    else:
                        self.events[problem.id, "insight_rejected"] += 1
        vectors = self.embedded(written)
        with self.writing(step):
            self._admit(step, written, vectors)

    def _reflection_jobs(self, step, problems):
        """[(problem, attempts, prompt)] of this step's reflections.

        Where a prompt is too long for the model, the oldest attempt of the more frequent kind goes.
        """
        ids = [p.id for p in problems]
        experience = self.living_of("experience", ids)
        insights = self.living_of("insight", ids)
        first = step if self.mode == "transient" else 0  # there memory ends with the step
        solved = self.success_fractions(ids, first)
        jobs = []
        for p in problems:
            for attempts in self.evidence_sets(experience[p.id], insights[p.id]):
                prompt = self._reflection_prompt(p, attempts, solved)
                while attempts and not self.fits(prompt):
                    kinds = [a.kind for a in attempts]
                    del attempts[kinds.index(max(sorted(set(kinds)), key=kinds.count))]
                    self.events[p.id, "reflection_cut"] += 1
                    prompt = self._reflection_prompt(p, attempts, solved)
                if attempts:
                    jobs.append((p, attempts, prompt))
        return jobs

    def _reflection_prompt(self, problem, attempts, solved) -> str:
        successes = [a.text for a in attempts if a.kind == "success"]
        failures = [(a.text, a.feedback) for a in attempts if a.kind == "failure"]
        return reflection_prompt(
            self.forms, problem.prompt, successes, failures, *solved[problem.id]
        )

    def abstract(self, step):
        """Tier 3, Eq. 3: the insights of each cluster of similar questions become behaviors.

        An empty bank is filled from nothing (cold start). Later the nearest existing behaviors are
        shown, and the reply decides which are new, updated or removed. A behavior's name is its
        key: a new one of a known name updates it, and an update that the gate refuses leaves the
        old one as it was. Removals come first, whatever the order of a reply: a behavior that is to
        take the place of others must not be refused for being like them.
        """
        bank = self.living("behavior")
        jobs = self._abstraction_jobs(step, bank)
        replies = self.abstractor([prompt for _, prompt in jobs]) if jobs else []
        by_name = {b.title: b.id for b in bank}
        written, removed = [], set()
        for (strategies, _), reply in zip(jobs, replies, strict=True):
            self.events["", "abstraction"] += 1
            if was_cut(reply):
                self.events["", "abstraction_truncated"] += 1
            taken = decisions(self.read(reply))
            if taken is None:
                self.events["", "abstract_parse_failure"] += 1
                continue
            writes, removes, unread = taken
            removed.update(name for name in removes if name in by_name)
            unknown = sum(name not in by_name for name in removes)
            self.events["", "behavior_rejected"] += unread + unknown
            for name, instruction in writes:
                sources = self.supporters(instruction, strategies)
                item = Item(
                    0,
                    "behavior",
                    "behavior",
                    "",
                    name,
                    instruction,
                    evidence=json.dumps(sources),
                    policy_step=None if self.written_elsewhere else step - 1,
                )
                wanted = self._measured(item) and name.startswith("behavior_")
                if wanted and len(sources) >= self.SUPPORTERS and not is_echo(instruction):
                    written.append(item)
                else:
                    self.events["", "behavior_rejected"] += 1
        vectors = self.embedded(written)
        with self.writing(step):
            self.end(step, "behavior", [by_name[name] for name in removed])
            self._admit(step, written, vectors)

    def _abstraction_jobs(self, step, bank):
        """[({problem id: its strategies}, prompt)] for each cluster that something is remembered
        of.
        """
        clusters = self._remembered_clusters(step)
        shown = [id for ids in clusters for id in ids]
        questions = self.questions(shown)
        prompts = {id: text for id, text, _ in questions}
        vectors = {id: vector for id, _, vector in questions}
        insights = self.living_of("insight", shown)
        experience = self.living_of("experience", shown)
        jobs = []
        for ids in clusters:
            center = np.mean([vectors[id] for id in ids], axis=0, keepdims=True)
            (known,) = nearest(center, bank, self.known_behaviors)
            known = [(b.title, b.text) for b in known]
            summary = [(prompts[id], self._digest(insights[id], experience[id])) for id in ids]
            prompt = abstraction_prompt(self.forms, summary, known)
            while summary and not self.fits(prompt):
                summary.pop()  # too long for the model: the last problem goes
                self.events["", "abstraction_cut"] += 1
                prompt = abstraction_prompt(self.forms, summary, known)
            if summary:
                strategies = {
                    id: [i.text for i in insights[id] if i.kind == "strategy"]
                    for id in ids[: len(summary)]
                }
                jobs.append((strategies, prompt))
        return jobs

    def _digest(self, insights, attempts) -> list[str]:
        """A problem's lines in an abstraction prompt: its newest insights, or its raw attempts."""
        lines = []
        for kind in ("strategy", "lesson"):
            newest = [i for i in insights if i.kind == kind][-self.cluster_insights :]
            lines += [f"- {i.title}: {i.text}" for i in newest]
        if lines:
            return lines
        verdict = {"success": self.forms.correct, "failure": self.forms.wrong}
        return [f"{verdict[a.kind]}\n{a.text}" for a in attempts]

    def _remembered_clusters(self, step) -> list[list[str]]:
        """Problem ids by cluster, of those that something is remembered of.

        Problems with strategies come first, those with lessons next, in an order drawn for the
        step, so that a large cluster shows others each time.
        """
        insights, attempts = self.tally("insight"), self.tally("experience")
        remembered = sorted({problem for problem, _ in [*insights, *attempts]})
        random.Random(f"{self.seed} abstract {step}").shuffle(remembered)
        remembered.sort(key=lambda p: (not insights[p, "strategy"], not insights[p, "lesson"]))
        if self.mode == "transient":
            labels = self._labels_of(remembered)
        else:
            labels = dict(self.query("SELECT id, cluster FROM problem"))
        clusters = defaultdict(list)
        for id in remembered:
            if id in labels and len(clusters[labels[id]]) < self.cluster_problems:
                clusters[labels[id]].append(id)
        return [ids for _, ids in sorted(clusters.items())]

    def _labels_of(self, problems) -> dict[str, int]:
        """{id: cluster} of some problems clustered by themselves: a transient memory knows no
        others.
        """
        questions = self.questions(problems)
        if not questions:
            return {}
        vectors = np.stack([vector for *_, vector in questions])
        labels = self._clustered(vectors, math.ceil(len(questions) / self.cluster_problems))
        return {id: int(label) for (id, *_), label in zip(questions, labels, strict=True)}

    def _measured(self, item) -> bool:
        """Notes a proposed item and shortcut-like phrasing in it; False if it is dropped for
        that.
        """
        families = shortcuts(f"{item.title}. {item.text}")
        item.shortcuts = " ".join(families)
        self.events[item.problem, f"{item.tier}_proposed"] += 1
        for family in families:
            self.events[item.problem, f"shortcut_{family}"] += 1
        if families:
            self.events[item.problem, "shortcut"] += 1
        return not (families and self.drop_shortcuts)

    def _admit(self, step, items, vectors):
        """Puts items of one tier, with their embeddings, through the gate of their problem and
        kind.
        """
        if not items:
            return
        tier = items[0].tier
        held = self.living_of(tier, {i.problem for i in items}, WITH_EMBEDDING)
        groups = defaultdict(list)
        for item, vector in zip(items, vectors, strict=True):
            item.embedding = vector
            groups[item.problem, item.kind].append(item)
        admitted, lost = [], []
        for (problem, kind), new in groups.items():
            old = [i for i in held[problem] if i.kind == kind]
            table = np.stack([i.embedding for i in old + new])
            texts = np.array([plain(i.text) for i in old + new], object)
            names = [i.title for i in old + new] if tier == "behavior" else None
            stay, refused, updates = gate(
                table @ table.T,
                len(old),
                self.caps[kind],
                self.novelty[tier],
                texts[:, None] == texts,
                names,
            )
            lost += [old[i].id for i in set(range(len(old))) - set(stay)]
            admitted += [new[i - len(old)] for i in stay if i >= len(old)]
            evicted = len(old) + len(new) - len(stay) - refused - updates
            self.events[problem, f"{tier}_duplicate"] += refused
            self.events[problem, f"{tier}_evicted"] += evicted
            self.events[problem, f"{tier}_updated"] += updates
        self.end(step, tier, lost)
        self.insert(step, tier, admitted)

    # -- what nano.grounded.GroundedMemory replaces (deviation 7)

    SUPPORTERS = 0  # problems whose strategies a behavior needs

    def evidence_sets(self, attempts, insights) -> list[list[Item]]:
        """The sets of a problem's attempts of which each is reflected on: all together (B.1)."""
        return [list(attempts)] if attempts else []

    def accepts_insight(self, insight, evidence) -> bool:
        return True

    def supporters(self, instruction, strategies) -> list[str]:
        """The ids of the problems that a behavior comes from. strategies: {problem id: texts}."""
        return list(strategies)

    def contradict(self, step, attempts):
        """Ends the insights that these attempts contradict: none here."""

    def note_support(self, step, rollout, items):
        """Counts what a teacher was offered: nothing here."""

    # -- reading

    def contexts(self, rollouts, step, tiers=TIERS, refreshed=False) -> list[dict]:
        """What the teacher may read for each rollout, as keyword arguments of `compose` (Eq. 4).

        A problem's own experience and insight after this step's update. Behaviors from the bank as
        it was at the end of the step before (`refreshed`: after this step's refresh, as in
        Algorithm 1, lines 11 to 14). The most recent stored success that is not the rollout's own.
        `tiers` hides blocks for the ablations and changes no extraction; solution and feedback are
        those of experience (Table 4's modes).

        Of a frozen memory all behaviors and all successes: its steps and rollouts are another
        run's, even where the numbers and ids are alike.
        """
        problems = {r.problem.id: r.problem for r in rollouts}
        insights = self.living_of("insight", problems if "insight" in tiers else ())
        attempts = self.living_of("experience", problems if "experience" in tiers else ())
        bank = []
        if "behavior" in tiers:
            now = refreshed or self.frozen
            bank = self.living("behavior") if now else self.as_of(step - 1, "behavior")
        contexts = []
        for r, behaviors in zip(rollouts, self._skills(rollouts, bank), strict=True):
            successes = [
                a.text
                for a in attempts[r.problem.id]
                if a.kind == "success" and (self.frozen or r.id not in a.sources)
            ]
            contexts.append(
                {
                    **as_context(insights[r.problem.id], behaviors),
                    "solution": successes[-1] if successes else "",
                    "feedback": r.feedback if "experience" in tiers else "",
                }
            )
            self.note_support(step, r, insights[r.problem.id] + behaviors)
        if self.events:
            with self.writing(step):
                pass  # only the events
        return contexts

    def _skills(self, rollouts, bank) -> list[list[Item]]:
        """The behaviors nearest to each rollout's question, or to question and feedback (B.5:
        optional).
        """
        if self.query_feedback and bank:
            queries = [f"{r.problem.prompt}\n{clean(r.feedback)}" for r in rollouts]
            return nearest(self.vectors(queries), bank, self.retrieve_k)
        vectors = self.question_vectors([r.problem for r in rollouts])
        return nearest(vectors, bank, self.retrieve_k)

    def inference_contexts(self, problems, tiers=TIERS) -> list[dict]:
        """What may be put into the PROMPT of held-out problems, as keyword arguments of `compose`.

        They have no memory of their own, so they read the insight and the latest success of their
        retrieve_k nearest training problems, by question embedding, and as many behaviors. A
        problem that was trained on (see `own_problems`) reads nothing of itself: the next nearest
        takes its place. Ours: the paper says "top-3" (Table 4), and not of what.
        """
        known = self.query("SELECT id, text, embedding FROM problem ORDER BY id")
        vectors, own = self.vectors([p.prompt for p in problems]), self.own_problems(problems)
        table = np.array([np.frombuffer(vector, np.float32) for *_, vector in known])
        table = table.reshape(len(known), vectors.shape[1])
        order = np.argsort(-(vectors @ table.T), axis=1, kind="stable")
        near = [
            [known[i] for i in row if not is_own[i]][: self.retrieve_k]
            for row, is_own in zip(order, own, strict=True)
        ]
        ids = {id for row in near for id, *_ in row}
        insights = self.living_of("insight", ids if "insight" in tiers else ())
        attempts = self.living_of("experience", ids if "experience" in tiers else ())
        bank = self.living("behavior") if "behavior" in tiers else []
        contexts = []
        for row, behaviors in zip(near, nearest(vectors, bank, self.retrieve_k), strict=True):
            examples = []
            for id, text, _ in row:
                successes = [a.text for a in attempts[id] if a.kind == "success"]
                examples += [(text, success) for success in successes[-1:]]
            read = [item for id, *_ in row for item in insights[id]]
            contexts.append(as_context(read, behaviors) | {"examples": examples})
        return contexts

    # -- time

    def truncate_after(self, step):
        """Goes back to the end of `step`. There a transient memory is empty, also of another
        run's.
        """
        super().truncate_after(step)
        if self.mode == "transient":
            self.forget(step)


def as_context(insights, behaviors) -> dict:
    """Items as keyword arguments of `compose`."""
    return {
        "strategies": [(i.title, i.text) for i in insights if i.kind == "strategy"],
        "lessons": [(i.title, i.text) for i in insights if i.kind == "lesson"],
        "behaviors": [(b.title, b.text) for b in behaviors],
    }
