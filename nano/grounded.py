"""A memory that writes only what its evidence contains: `--ground_insights`, an addition to the
paper (deviation 7).

It cures a small model that miscopies its own attempts and then locks in on the mistake.
"""

import re

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from memory import Memory
from tasks.problem import SUCCESS


class GroundedMemory(Memory):
    """Rejects insights that their attempts do not contain, and ends those that later attempts
    contradict.

    Reflection reads one attempt at a time, until an insight came from it. An insight is rejected
    unless that attempt, with its feedback, contains it. A behavior is rejected unless the living
    strategies of two problems contain it. Contained: its key terms are.

    In nano a key term is a claim, such as zo=rev, and all of them must be there. A lesson holds
    either all claims of the attempt, or only such as its feedback names. A failure ends the
    strategies that its feedback names. Where it has no feedback, and is made of nothing but living
    strategies, it ends those. A success that holds all terms of a lesson ends the lesson.

    In plain text the key terms are the words of five letters or more that are no stop words, in
    lower case and without a plural s. Half of them must be there, and a failure that holds all of a
    strategy's terms ends it.

    Rejections are counted. How often an item was offered to the teacher of a later success or
    failure is counted too (events support_success and support_failure, before the token budget). It
    changes nothing.
    """

    SUPPORTERS = 2
    HALF = 0.5  # share of the key terms of plain text that must be there

    def terms(self, text) -> set[str]:
        found = re.findall(self.forms.key_term, text.lower())
        if self.forms.literal:
            return {term.replace("!", "=") for term in found}
        return {term.removesuffix("s") for term in found if term not in ENGLISH_STOP_WORDS}

    def contained(self, text, evidence) -> bool:
        terms = self.terms(text)
        share = 1 if self.forms.literal else self.HALF
        return bool(terms) and len(terms & self.terms(evidence)) >= share * len(terms)

    def evidence_sets(self, attempts, insights):
        done = {source for insight in insights for source in insight.sources}
        return [[attempt] for attempt in attempts if attempt.id not in done]

    def accepts_insight(self, insight, evidence) -> bool:
        return any(self.grounded(insight, attempt) for attempt in evidence)

    def grounded(self, insight, attempt) -> bool:
        """Whether an attempt, with its feedback, contains an insight.

        In nano a lesson is about all terms of the attempt, at least one of which is wrong, or about
        terms that its feedback names: nobody knows that the others failed.
        """
        if self.forms.literal and insight.kind == "lesson":
            terms = self.terms(insight.text)
            named = terms <= self.terms(attempt.feedback) or terms == self.terms(attempt.text)
            return bool(terms) and named
        return self.contained(insight.text, f"{attempt.text}\n{attempt.feedback}")

    def supporters(self, instruction, strategies) -> list[str]:
        return [
            problem
            for problem, texts in strategies.items()
            if any(self.contained(instruction, text) for text in texts)
        ]

    def contradict(self, step, attempts):
        insights = self.living_of("insight", {a.problem for a in attempts})
        for attempt in attempts:
            living = insights[attempt.problem]
            items = self.contradicted(attempt, living)
            if items:
                insights[attempt.problem] = [i for i in living if i not in items]
                self.end(step, "insight", [i.id for i in items])
                self.events[attempt.problem, "insight_contradicted"] += len(items)

    def contradicted(self, attempt, living):
        """The living insights of its problem that an attempt contradicts."""
        terms = self.terms(attempt.text)
        kind = "strategy" if attempt.kind == "failure" else "lesson"
        items = [
            i
            for i in living
            if i.kind == kind and self.terms(i.text) and self.terms(i.text) <= terms
        ]
        if not self.forms.literal:
            # a success that names a mistake need not have made it
            return items if kind == "strategy" else []
        if kind == "lesson":
            return items
        blamed = self.terms(attempt.feedback or "")
        if blamed:
            return [i for i in items if self.terms(i.text) <= blamed]
        used = set().union(*(self.terms(i.text) for i in items))
        return items if used == terms else []  # else something else that it did may be to blame

    def note_support(self, step, rollout, items):
        if self.frozen:
            return
        outcome = "support_success" if rollout.reward >= SUCCESS else "support_failure"
        for item in items:
            if item.born < step:
                self.events[f"#{item.id}", outcome] += 1
