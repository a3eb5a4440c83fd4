"""The memory's file: one SQLite database, append-only, in which every item has the step of its
birth and of its end.

Nothing is overwritten. `living` reads what lives now, `as_of(step)` what lived at the end of a
step, and `truncate_after(step)` goes back to it, which is how a run resumes. memory.py says what is
remembered.
"""

import contextlib
import json
import sqlite3
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runtime.chat import plain
from runtime.errors import RunError
from runtime.services import unit_rows

SCHEMA_VERSION = 2
KINDS = {  # of items, by tier
    "experience": ("success", "failure"),
    "insight": ("strategy", "lesson"),
    "behavior": ("behavior",),
}
TIERS = tuple(KINDS)
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE problem (id TEXT PRIMARY KEY, text TEXT, cluster INTEGER, embedding BLOB);
CREATE TABLE item (
    id INTEGER PRIMARY KEY,
    tier TEXT,            -- experience, insight, behavior
    kind TEXT,            -- success, failure / strategy, lesson / behavior
    problem TEXT,         -- '' for behaviors: one bank for all
    title TEXT,           -- an insight's title, a behavior's name
    text TEXT,            -- completion / content / instruction
    reward REAL, feedback TEXT,
    evidence TEXT,        -- JSON list: an experience's rollout, an insight's experience ids, a
                          -- behavior's problems
    shortcuts TEXT,       -- families of shortcut-like phrasing found in it, with spaces between
    born INTEGER, ended INTEGER,
    policy_step INTEGER,  -- the step at whose end the policy stood that wrote it; NULL for
                          -- another model
    embedding BLOB        -- float32; NULL of an experience or insight that ended: nothing needs it
);
CREATE INDEX living ON item (tier, problem, kind) WHERE ended IS NULL;
CREATE INDEX ending ON item (ended) WHERE ended IS NOT NULL;
CREATE INDEX birth ON item (born);
CREATE TABLE event (  -- subject: a problem's id, an item's id after '#', or ''
    step INTEGER, subject TEXT, kind TEXT, n INTEGER,
    PRIMARY KEY (subject, kind, step)) WITHOUT ROWID;
CREATE INDEX happening ON event (step)
"""
COLUMNS = (
    "id, tier, kind, problem, title, text, reward, feedback, evidence, shortcuts, born, ended,"
    " policy_step"
)
WITH_EMBEDDING = COLUMNS + ", embedding"
ENDED = (  # a teacher reads the bank of the step before
    "ended = ?, embedding = CASE tier WHEN 'behavior' THEN embedding END"
)
AMONG = "IN (SELECT value FROM json_each(?))"  # membership in a JSON list, given as one argument
CURES = {
    "SQLITE_BUSY": "another process is writing it; wait until it is done, or stop it",
    "SQLITE_READONLY": "make the file and its folder writable, or choose another folder",
    "SQLITE_CANTOPEN": "make its folder, writable for you, or choose another",
    "SQLITE_FULL": "free some space on the disk; all that was committed before is safe",
    "SQLITE_IOERR": "look at the disk and its quota; all that was committed before is safe",
    "SQLITE_NOTADB": "name another file, or remove it",
    "SQLITE_CORRUPT": "go back to a checkpoint's copy, or remove it",
    "SQLITE_ERROR": "it was made by something else; name another file, or remove it",
}


@dataclass
class Item:
    """One row of the memory; see TABLES for the fields. The embedding is None where the text alone
    was asked for, and where it was dropped as the item ended.
    """

    id: int
    tier: str
    kind: str
    problem: str
    title: str | None
    text: str
    reward: float | None = None
    feedback: str | None = None
    evidence: str = "[]"
    shortcuts: str = ""
    born: int = 0
    ended: int | None = None
    policy_step: int | None = 0
    embedding: np.ndarray | None = field(default=None, repr=False)

    @property
    def sources(self) -> list:
        """What it came from: an experience's rollout, an insight's experience ids, a behavior's
        problems.
        """
        return json.loads(self.evidence)  # only when asked: most readers of a row are not

    @property
    def embedded_text(self) -> str:
        """What its embedding is of."""
        return self.text if self.tier == "experience" else f"{self.title}: {self.text}"

    @classmethod
    def from_row(cls, row):
        item = cls(*row)
        if item.embedding is not None:
            item.embedding = np.frombuffer(item.embedding, np.float32)
        return item


class Store:
    """Items, problems and events in one SQLite file, with the embeddings of all living items.

    path: the file, or ":memory:". embed(texts) -> (n, D): the embedding model, None where nothing
    is embedded. embedder: its name, which is compared with the name in the file. frozen: the file
    is another run's and is only read. caps: noted in a new file for the viewer.

    Raises ValueError for a file that can't be a memory of this code and embedding model, and
    OSError where the file can't be opened, read or written. A method that raises has changed
    nothing.
    """

    def __init__(self, path, embed=None, embedder=None, frozen=False, caps=None):
        self.path, self.embed, self.frozen = str(path), embed, frozen
        self.meta = {}
        self.events = Counter()  # {(subject, kind): n} of the transaction that comes next
        self._sizes = Counter()  # living items of each tier
        with self._explained():
            self._connect()
            if not self.db.execute("SELECT 1 FROM sqlite_master").fetchone():
                if self.frozen:
                    raise ValueError(f"{self.path} is empty: name the memory.db of a run")
                self._create(embedder, caps)  # new, or killed while it was made
            self.meta = dict(self.db.execute("SELECT key, value FROM meta"))
        self._check(embedder)
        living = "SELECT tier, COUNT(*) FROM item WHERE ended IS NULL GROUP BY tier"
        self._sizes = Counter(dict(self.query(living)))

    def _connect(self):
        path = Path(self.path)
        if self.frozen and path.is_dir():  # of a run
            path /= "memory.db"
            self.path = str(path)
        if self.frozen and not path.is_file():
            raise ValueError(f"there is no memory {path}; name the memory.db of a run")
        mode = ""
        if self.frozen:
            # a log with commits: of a run that is still going, or was killed
            log = path.with_name(path.name + "-wal")
            mode = "?mode=ro" if log.is_file() and log.stat().st_size else "?immutable=1"
        address = self.path if self.path == ":memory:" else path.resolve().as_uri() + mode
        self.db = sqlite3.connect(address, uri=True)
        if not self.frozen:
            self.db.execute("PRAGMA page_size = 8192")  # a row with its embedding fits on one page
            self.db.execute("PRAGMA journal_mode = WAL")
            # with WAL a power cut may lose the last step, and never corrupts
            self.db.execute("PRAGMA synchronous = NORMAL")

    def _create(self, embedder, caps):
        self.db.execute("BEGIN IMMEDIATE")
        for statement in TABLES.split(";\n"):
            self.db.execute(statement)
        about = {
            "schema": SCHEMA_VERSION,
            "embedder": embedder or "",
            "dimension": self.vectors([" "]).shape[1],
            "caps": json.dumps(caps),
        }
        rows = [(key, str(value)) for key, value in about.items()]
        self.db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
        self.db.commit()

    def _check(self, embedder):
        """Raises ValueError for a file of another schema or embedding model."""
        for key in ("schema", "embedder", "dimension", "caps"):
            if key not in self.meta:
                raise ValueError(
                    f"{self.path} is no memory of this code: it does not say its {key}; name"
                    " another file, or remove it"
                )
        if self.meta["schema"] != str(SCHEMA_VERSION):
            raise ValueError(
                f"{self.path} has memory schema {self.meta['schema']}, this code reads "
                f"{SCHEMA_VERSION}: use the version that wrote it, or remove it"
            )
        written_by = self.meta["embedder"]
        if embedder is not None and written_by != embedder:
            raise ValueError(
                f"{self.path} was embedded by {written_by!r}, this run uses {embedder!r}: use"
                " that one"
            )
        if not self.embed:
            return
        dimension = self.vectors([" "]).shape[1]
        if dimension != int(self.meta["dimension"]):
            raise ValueError(
                f"{self.path} holds embeddings of {self.meta['dimension']} dimensions, {embedder!r}"
                f" gives {dimension}: use the model that wrote it"
            )

    @contextlib.contextmanager
    def _explained(self):
        """Turns errors of the database into one sentence that names the file and the cure."""
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            cure = next(
                (cure for code, cure in CURES.items() if name.startswith(code)), "report this"
            )
            kind = ValueError if name in ("SQLITE_NOTADB", "SQLITE_ERROR") else OSError
            raise kind(f"{self.path} can't be used as a memory ({error}): {cure}") from error

    @contextlib.contextmanager
    def writing(self, step=0):
        """Makes one transaction, which ends with the events noted so far: all of it or nothing."""
        before = self._sizes.copy()
        try:
            with self._explained(), self.db:
                yield
                rows = [(step, *key, n) for key, n in self.events.items() if n]
                self.db.executemany(
                    "INSERT INTO event VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n +"
                    " excluded.n",
                    rows,
                )
        except BaseException:
            self._sizes = before
            raise
        finally:
            self.events.clear()

    def query(self, statement, *args) -> list[tuple]:
        with self._explained():
            return self.db.execute(statement, args).fetchall()

    # -- embeddings

    def vectors(self, texts) -> np.ndarray:
        """(len(texts), D): the texts' embeddings as the store and all cosines need them."""
        if not texts:
            return np.zeros((0, int(self.meta["dimension"])), np.float32)
        vectors = unit_rows(self.embed(texts))
        if len(vectors) != len(texts):
            raise RunError(
                f"the embedder gave {len(vectors)} rows for {len(texts)} texts: name another"
                " --embedder"
            )
        return vectors

    def embedded(self, items) -> np.ndarray:
        """(len(items), D)"""
        return self.vectors([item.embedded_text for item in items])

    def question_vectors(self, problems) -> np.ndarray:
        """(n, D) embeddings of questions, from the file where it holds them."""
        ids = json.dumps([p.id for p in problems])
        stored = dict(self.query(f"SELECT id, embedding FROM problem WHERE id {AMONG}", ids))
        unknown = [p for p in problems if p.id not in stored]
        if unknown:
            vectors = self.vectors([p.prompt for p in unknown])
            stored |= {p.id: v.tobytes() for p, v in zip(unknown, vectors, strict=True)}
        return np.stack([np.frombuffer(stored[p.id], np.float32) for p in problems])

    def questions(self, ids) -> list[tuple[str, str, np.ndarray]]:
        """(id, prompt, embedding) of problems, in the order of their ids."""
        rows = self.query(
            f"SELECT id, text, embedding FROM problem WHERE id {AMONG} ORDER BY id",
            json.dumps(list(ids)),
        )
        return [(id, text, np.frombuffer(vector, np.float32)) for id, text, vector in rows]

    # -- writing, inside `writing`

    def insert(self, step, tier, items):
        """Puts new items, with their embeddings, into a tier."""
        self.db.executemany(
            f"INSERT INTO item ({WITH_EMBEDDING}) VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL,"
            " ?, ?)",
            [
                (
                    tier,
                    i.kind,
                    i.problem,
                    i.title,
                    i.text,
                    i.reward,
                    i.feedback,
                    i.evidence,
                    i.shortcuts,
                    step,
                    i.policy_step,
                    i.embedding.tobytes(),
                )
                for i in items
            ],
        )
        self._sizes[tier] += len(items)

    def end(self, step, tier, ids):
        """Ends items of a tier."""
        self.db.executemany(f"UPDATE item SET {ENDED} WHERE id = ?", [(step, id) for id in ids])
        self._sizes[tier] -= len(ids)

    # -- reading

    def living(self, tier, problem=None) -> list[Item]:
        """The living items of a tier, oldest first; of one problem if it is given."""
        where, args = ("AND problem = ?", (problem,)) if problem is not None else ("", ())
        rows = self.query(
            f"SELECT {WITH_EMBEDDING} FROM item WHERE tier = ? AND ended IS NULL {where}",
            tier,
            *args,
        )
        return in_order(rows)

    def living_of(self, tier, problems, columns=COLUMNS) -> dict[str, list[Item]]:
        """{problem id: living items of a tier, oldest first}, by default without their
        embeddings.
        """
        rows = self.query(
            f"SELECT {columns} FROM item WHERE tier = ? AND problem {AMONG} AND ended IS NULL",
            tier,
            json.dumps(list(problems)),
        )
        items = defaultdict(list)
        for item in in_order(rows):
            items[item.problem].append(item)
        return items

    def as_of(self, step, tier, problem=None) -> list[Item]:
        """The items of a tier that were alive at the END of `step`, oldest first."""
        where, args = ("AND problem = ?", (problem,)) if problem is not None else ("", ())
        select = f"SELECT {WITH_EMBEDDING} FROM item WHERE"
        born = f"+born <= ? AND tier = ? {where}"
        rows = self.query(f"{select} ended IS NULL AND {born}", step, tier, *args)
        rows += self.query(f"{select} ended > ? AND {born}", step, step, tier, *args)
        return in_order(rows)

    def holds(self, step) -> bool:
        """Whether anything was remembered at the end of `step`."""
        found = self.query(
            "SELECT 1 FROM item WHERE born <= ? AND (ended IS NULL OR ended > ?) LIMIT 1",
            step,
            step,
        )
        return bool(found)

    def last_step(self) -> int:
        """The last step that left a trace; 0 for none."""
        found = self.query("SELECT MAX(step) FROM event")
        found += self.query("SELECT MAX(born) FROM item")
        found += self.query("SELECT MAX(ended) FROM item WHERE ended IS NOT NULL")  # by its index
        return max(step or 0 for (step,) in found)

    def prompts(self) -> dict[str, str]:
        """{id: prompt} of the problems that are known."""
        return dict(self.query("SELECT id, text FROM problem"))

    def sizes(self) -> dict[str, int]:
        """Living items in each tier."""
        return {tier: self._sizes[tier] for tier in TIERS}

    def tally(self, tier) -> Counter:
        """{(problem id, kind): living items of a tier}"""
        rows = self.query(
            "SELECT problem, kind, COUNT(*) FROM item WHERE tier = ? AND ended IS NULL "
            "GROUP BY problem, kind",
            tier,
        )
        return Counter({(problem, kind): n for problem, kind, n in rows})

    def counts(self, step=None) -> dict[str, int]:
        """How often each kind of event happened, in all or in one step."""
        where, args = ("WHERE step = ?", (step,)) if step is not None else ("", ())
        return dict(
            self.query(f"SELECT kind, SUM(n) FROM event {where} GROUP BY kind ORDER BY kind", *args)
        )

    def own_problems(self, problems) -> np.ndarray:
        """(len(problems), training problems in the order of their ids): whether the one is the
        other.

        By its id, or by its prompt up to white space.
        """
        known = self.query("SELECT id, text FROM problem ORDER BY id")
        ids = np.array([id for id, _ in known], object)
        texts = np.array([plain(text) for _, text in known], object)
        own = [(ids == p.id) | (texts == plain(p.prompt)) for p in problems]
        return np.array(own, bool).reshape(len(problems), len(known))

    def overlap(self, problems) -> str:
        """Says which problems of `inference_contexts` were trained on; "" where there are none."""
        own = self.own_problems(problems)
        trained_on, alone = own.any(axis=1).sum(), own.all(axis=1).sum()
        if not trained_on:
            return ""
        said = (
            f"{trained_on} of {len(problems)} problems are ones that the memory in the prompt was"
            " written on (the same id or text): they read not their own insight and success but"
            " those of the nearest other problem"
        )
        if alone:
            said += f"; {alone} have no other and read behaviors alone"
        return said

    def success_fractions(self, problems, first) -> dict[str, tuple[int, int]]:
        """{problem id: (successes, attempts)} since step `first`."""
        rows = self.query(
            "SELECT subject, kind, SUM(n) FROM event WHERE kind IN ('success', 'failure') "
            f"AND step >= ? AND subject {AMONG} GROUP BY subject, kind",
            first,
            json.dumps(list(problems)),
        )
        n = Counter({(subject, kind): total for subject, kind, total in rows})
        return {p: (n[p, "success"], n[p, "success"] + n[p, "failure"]) for p in problems}

    # -- time

    def forget(self, step):
        """Ends everything that lives at `step`: a transient memory keeps nothing between steps."""
        with self.writing(step):
            self.db.execute(f"UPDATE item SET {ENDED} WHERE ended IS NULL", (step,))
            self._sizes.clear()

    def truncate_after(self, step):
        """Goes back to the end of `step`: what was born later is deleted, what ended later lives
        again.

        Embeddings that were dropped are made anew.
        """
        bare = in_order(
            self.query(
                f"SELECT {WITH_EMBEDDING} FROM item WHERE ended > ? AND born <= ? AND embedding IS"
                " NULL",
                step,
                step,
            )
        )
        vectors = self.embedded(bare) if self.embed else []
        with self.writing(step):
            # sizes by what changes, as elsewhere: to count all would take longer than the rest
            dead = self.db.execute(
                "SELECT tier FROM item WHERE born > ? AND +ended IS NULL", (step,)
            ).fetchall()
            self.db.execute("DELETE FROM item WHERE born > ?", (step,))
            revived = self.db.execute("SELECT tier FROM item WHERE ended > ?", (step,)).fetchall()
            self.db.execute("UPDATE item SET ended = NULL WHERE ended > ?", (step,))
            self.db.execute("DELETE FROM event WHERE step > ?", (step,))
            self.db.executemany(
                "UPDATE item SET embedding = ? WHERE id = ?",
                [(v.tobytes(), i.id) for i, v in zip(bare, vectors, strict=bool(self.embed))],
            )
            self._sizes.update(tier for (tier,) in revived)
            self._sizes.subtract(tier for (tier,) in dead)

    def copy_to(self, path):
        """Copies the file as it is now; a copy by hand may miss the last commits, which a log
        holds.
        """
        with self._explained(), contextlib.closing(sqlite3.connect(path)) as copy:
            self.db.backup(copy)

    def detach(self):
        """Reads from a copy in this process from now on: the run that writes the file may go on."""
        copy = sqlite3.connect(":memory:")
        with self._explained(), contextlib.closing(self.db) as file:
            file.backup(copy)
        self.db = copy

    def settle(self):
        """Has the disk hold all that was committed: what a checkpoint relies on."""
        if not self.frozen:
            self.query("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self):
        self.settle()
        self.db.close()


def memory_file(path) -> str:
    """Gives the file of a memory: that of a run, if a folder is named.

    One that is there has its absolute path, for records that are read elsewhere.
    """
    if not path:
        return ""
    file = Path(path, "memory.db") if Path(path).is_dir() else Path(path)
    return str(file.absolute() if file.is_file() else file)


def in_order(rows) -> list[Item]:
    """Items of rows, oldest first."""
    return sorted(map(Item.from_row, rows), key=lambda item: item.id)


def nearest(vectors, items, k) -> list[list[Item]]:
    """For each row of `vectors` (n, D) the k items nearest by cosine, best first; the older first
    among equals.
    """
    if not items:
        return [[] for _ in vectors]
    # (n, items)
    order = np.argsort(-(vectors @ np.stack([i.embedding for i in items]).T), axis=1, kind="stable")
    return [[items[i] for i in row[:k]] for row in order]


def describe(memory, problem, step=None, behaviors=3) -> str:
    """One problem's memory in readable form, at the end of `step` or now: experience, insight,
    retrieved behaviors.
    """
    step = 10**9 if step is None else step
    found = memory.query("SELECT text, embedding FROM problem WHERE id = ?", problem)
    if not found:
        raise ValueError(
            f"{memory.path} knows no problem {problem!r}; `show` without --problem lists some"
        )
    ((text, vector),) = found
    tiers = {tier: memory.as_of(step, tier, problem) for tier in ("experience", "insight")}
    (tiers["behavior"],) = nearest(
        np.frombuffer(vector, np.float32)[None], memory.as_of(step, "behavior"), behaviors
    )
    solved = dict(
        memory.query(
            "SELECT kind, SUM(n) FROM event WHERE subject = ? AND step <= ? AND kind IN "
            "('success', 'failure') GROUP BY kind",
            problem,
            step,
        )
    )
    lines = [
        f"problem {problem}: {text}",
        f"  solved in {solved.get('success', 0)} of {sum(solved.values())} attempts so far",
    ]
    for tier, items in tiers.items():
        lines += [
            f"  {tier}" + ("" if items else ": none yet"),
            *(f"    {line_of(i)}" for i in items),
        ]
    return printable("\n".join(lines))


def line_of(item):
    head = " ".join(x for x in (item.kind if item.tier != "behavior" else "", item.title) if x)
    seen = f" (feedback: {item.feedback})" if item.feedback else ""
    flags = f" [shortcut: {item.shortcuts}]" if item.shortcuts else ""
    return f"[step {item.born}] {head}: {item.text}{seen}{flags}".replace("\n", "\n      ")


def printable(text):
    """Without the control characters with which a model's text could steer a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
