"""What leaves a run: its memory as lines, its model's card; and what never enters a memory."""

import contextlib
import json
import sqlite3

import pytest
from conftest import Attempt, Question

import pmd
from eval import lent_memory
from memory import Memory
from runtime.services import make_embedder
from runtime.store import Store
from runtime.tables import model_card, table
from tools import share_memory, show_memory
from tools.share_memory import export_memory, import_memory

HASHING = type("Cfg", (), {"embedder": "hashing", "device": ""})


def a_memory(path):
    """Two steps of a memory with an insight that ended."""
    embed = make_embedder(HASHING)
    reply = json.dumps({"lessons": [{"title": "carry", "content": "Carry the one."}]})
    memory = Memory(path, embed, lambda p: [reply] * len(p), forms="question", embedder="hashing")
    problems = [Question(name, f"What is {name} plus seven?") for name in ("one", "two")]
    memory.add_problems(problems)
    for step in (1, 2):
        attempts = [Attempt(f"{step}/{p.id}/0", p, f"It is {p.id}{step}.") for p in problems]
        memory.record(step, attempts)
        memory.reflect(step, problems)
    with memory.writing(2):
        memory.end(2, "insight", [memory.living("insight")[0].id])
    return memory


def rows(path):
    with sqlite3.connect(path) as db:
        items = db.execute("SELECT * FROM item ORDER BY id").fetchall()
        return items, db.execute("SELECT * FROM problem ORDER BY id").fetchall()


def test_a_memory_comes_back_from_its_lines(tmp_path):
    """Row for row, with embeddings made anew by the same model."""
    memory = a_memory(tmp_path / "a.db")
    memory.close()
    said = export_memory(tmp_path / "a.db", tmp_path / "a.jsonl")
    assert said.startswith("2 problems and")
    import_memory(tmp_path / "a.jsonl", tmp_path / "b" / "memory.db")
    assert rows(tmp_path / "a.db") == rows(tmp_path / "b" / "memory.db")
    with pytest.raises(ValueError, match="exists"):
        export_memory(tmp_path / "a.db", tmp_path / "a.jsonl")


def test_the_folder_of_a_run_names_its_memory(tmp_path):
    a_memory(tmp_path / "memory.db").close()
    with contextlib.closing(Store(tmp_path, frozen=True)) as store:
        assert store.path == str(tmp_path / "memory.db") and store.counts()
    with pytest.raises(ValueError, match="there is no memory"):
        Store(tmp_path / "nowhere", frozen=True)


def test_a_file_that_was_cut_is_refused(tmp_path):
    a_memory(tmp_path / "a.db").close()
    export_memory(tmp_path / "a.db", tmp_path / "a.jsonl")
    whole = (tmp_path / "a.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    for name, text in (("half", "".join(lines[:3])), ("end", whole[:-9]), ("more", whole + "{}\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError):
            import_memory(tmp_path / name, tmp_path / "b.db")
    assert not (tmp_path / "b.db").exists()
    item = json.loads(lines[-1])
    for change in ({"born": "x"}, {"evidence": "not json"}):
        changed = json.dumps({"item": {**item["item"], **change}}) + "\n"
        (tmp_path / "odd").write_text("".join(lines[:-1]) + changed)
        with pytest.raises(ValueError, match="no memory has"):
            import_memory(tmp_path / "odd", tmp_path / "b.db")


def test_the_command_line_exports_and_imports(tmp_path, capsys):
    a_memory(tmp_path / "a.db").close()
    show_memory.main(["export", str(tmp_path / "a.db"), str(tmp_path / "a.jsonl")])
    show_memory.main(["import", str(tmp_path / "a.jsonl"), str(tmp_path / "b.db")])
    show_memory.main(["show", str(tmp_path / "b.db")])
    assert "lesson carry" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ['{"form": "other"}', '{"form": "pmd memory, version 1"}\n{"item": {"tier": "x"}}']
)
def test_lines_that_are_no_memory_are_refused(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="is no|no memory has"):
        import_memory(tmp_path / "x.jsonl", tmp_path / "x.db")


def test_items_that_no_memory_has_are_refused(tmp_path):
    """And a behavior that another model wrote is an item like others: it has no policy's step."""
    a_memory(tmp_path / "a.db").close()
    export_memory(tmp_path / "a.db", tmp_path / "a.jsonl")
    head, *lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    problem, item = lines[0]["problem"], lines[-1]["item"]

    def brought(head, lines):
        text = "".join(json.dumps(line) + "\n" for line in [head, *lines])
        (tmp_path / "b.jsonl").write_text(text)
        import_memory(tmp_path / "b.jsonl", tmp_path / "b" / "memory.db")

    for change in ({"kind": "x"}, {"problem": "nobody"}, {"text": None}, {"born": -1}):
        with pytest.raises(ValueError, match="no memory has"):
            brought(head, [*lines[:-1], {"item": item | change}])
    for change in ({"cluster": "x"}, {"cluster": None}):
        with pytest.raises(ValueError, match="no memory has"):
            brought(head, [{"problem": problem | change}, *lines[1:]])
    with pytest.raises(ValueError, match="a problem twice"):
        brought(head | {"problems": 3}, [lines[0], *lines])
    with pytest.raises(ValueError, match="its first line does not say so"):
        brought({key: value for key, value in head.items() if key != "caps"}, lines)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match="its first line does not say so"):
        import_memory(tmp_path / "b.jsonl", tmp_path / "b" / "memory.db")
    brought(head, [*lines[:-1], {"item": item | {"policy_step": None}}])
    show_memory.main(["stats", str(tmp_path / "b")])
    assert (tmp_path / "b" / "memory.png").is_file()  # beside the file, not beside the folder
    assert not (tmp_path / "memory.png").exists()


CHANGES = [
    {"born": 2**70},
    {"ended": 2**63},
    {"ended": 10**12},  # a table with a row for each step could not be made
    {"born": True},
    {"policy_step": 2**64},
    {"id": 2**63},
    {"reward": "1"},
    {"reward": 2**70},
    {"evidence": "5"},
    {"evidence": "[[1]]"},
    {"evidence": "[" * 100_000},
    {"evidence": 5},
    {"title": 5},
    {"feedback": ["x"]},
    {"shortcuts": None},
    {"tier": ["insight"]},
    {"problem": {"id": "one"}},
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_values_that_no_database_or_page_takes_are_refused(tmp_path, change):
    head, lines = exported(tmp_path)
    changed = [*lines[:-1], {"item": lines[-1]["item"] | change}]
    with pytest.raises(ValueError, match="b.jsonl has an item that no memory has"):
        brought(tmp_path, head, changed)
    assert not list(tmp_path.glob("b/*"))


def exported(tmp_path):
    """The first line of a memory and the others."""
    a_memory(tmp_path / "a.db").close()
    export_memory(tmp_path / "a.db", tmp_path / "a.jsonl")
    head, *lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    return head, lines


def brought(tmp_path, head, lines):
    """Imports a first line and others, as b/memory.db."""
    text = "".join(json.dumps(line) + "\n" for line in [head, *lines])
    (tmp_path / "b.jsonl").write_text(text)
    import_memory(tmp_path / "b.jsonl", tmp_path / "b" / "memory.db")


def test_other_lines_that_no_memory_has_are_refused(tmp_path):
    head, lines = exported(tmp_path)
    for caps in ("5", "null", "{}", '{"strategy": "many"}', 5, None):
        with pytest.raises(ValueError, match="its first line does not say so"):
            brought(tmp_path, head | {"caps": caps}, lines)
    with pytest.raises(ValueError, match="b.jsonl has an item's id twice"):
        brought(tmp_path, head | {"items": head["items"] + 1}, [*lines, lines[-1]])
    for problem in (5, {"id": "x"}, lines[0]["problem"] | {"cluster": 2**63}):
        with pytest.raises(ValueError, match="b.jsonl has a problem that no memory has"):
            brought(tmp_path, head, [{"problem": problem}, *lines[1:]])
    with pytest.raises(ValueError, match="b.jsonl has an item that no memory has"):
        brought(tmp_path, head, [*lines[:-1], {"item": 5}])
    assert not list(tmp_path.glob("b/*"))


def test_an_import_that_fails_leaves_nothing(tmp_path, monkeypatch):
    head, lines = exported(tmp_path)

    def full(memory, problems, items):
        assert (tmp_path / "b" / "import.partial").exists()
        raise OSError("no space is left")

    with monkeypatch.context() as patch:
        patch.setattr(share_memory, "fill", full)
        with pytest.raises(OSError, match="no space"):
            brought(tmp_path, head, lines)
    assert not list(tmp_path.glob("b/*"))
    brought(tmp_path, head, lines)
    assert [path.name for path in tmp_path.glob("b/*")] == ["memory.db"]


def test_a_memory_whose_last_trace_is_an_end_comes_back(tmp_path, capsys):
    """Events are not exported: the step at which an item ended may be the last that is known."""
    memory = a_memory(tmp_path / "a.db")
    gone, *left = memory.living("insight")
    with memory.writing(7):
        memory.end(7, "insight", [gone.id])
    memory.close()
    export_memory(tmp_path / "a.db", tmp_path / "a.jsonl")
    import_memory(tmp_path / "a.jsonl", tmp_path / "b" / "memory.db")
    with contextlib.closing(Store(tmp_path / "b", frozen=True)) as store:
        assert store.last_step() == 7
        curve = show_memory.growth(store)["lesson"]
        assert len(curve) == 8 and curve[6] == len(left) + 1 and curve[7] == len(left)
    show_memory.main(["stats", str(tmp_path / "b")])
    show_memory.main([str(tmp_path / "b"), "--html"])
    assert (tmp_path / "b" / "memory.html").is_file()


@pytest.mark.parametrize("flags", (["--tier", "insight"], ["--grep", "x"]))
def test_one_problem_is_shown_whole_or_not_at_all(tmp_path, capsys, flags):
    a_memory(tmp_path / "memory.db").close()
    with pytest.raises(SystemExit):
        show_memory.main(["show", str(tmp_path), "--problem", "one", *flags])
    assert "leave --tier and --grep out" in capsys.readouterr().err


def test_a_place_that_is_not_there_is_named(tmp_path):
    a_memory(tmp_path / "a.db").close()
    with pytest.raises(ValueError, match="can't be written .*name a place that is there"):
        export_memory(tmp_path / "a.db", tmp_path / "nowhere" / "a.jsonl")


def test_no_memory_reads_dev_or_test(make_config, tmp_path):
    """After a run every problem, rollout and prompt that the memory holds is of train."""
    cfg = make_config(name="x", steps=2, eval_every=1)
    task, _ = pmd.check(cfg, quiet=True)
    pmd.train(cfg)
    held_out = {p.id for p in task.dev + task.test}
    items, problems = rows(tmp_path / "x" / "memory.db")
    assert {id for id, *_ in problems} == {p.id for p in task.train} and items
    text = json.dumps([row[:-1] for row in items])
    assert not [id for id in held_out if id in text]

    card = (tmp_path / "x" / "final" / "README.md").read_text()
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert f"| final | 2 | {summary['final']['avg_at_k']:.3f} [" in card
    assert summary["commit"] in card and "base_model" not in card


def test_a_card_names_a_base_model_of_the_hub(tmp_path, monkeypatch):
    row = {"step": 0, "avg_at_k": 0.5, "k": 2, "n_problems": 9, "interval": [0.4, 0.6]}
    summary = dict(
        method="pmd", data="gsm8k", model="Qwen/Qwen3-1.7B", steps=3, rollouts=24, seed=0
    )
    alone = {**row, "n_problems": 1, "interval": None}  # one problem has no interval
    card = model_card({**summary, "commit": "", "base": alone, "final": {**row, "step": 3}})
    assert "\nbase_model: Qwen/Qwen3-1.7B\n" in card
    assert "| base | 0 | 0.500 |" in card and "| final | 3 | 0.500 [0.400, 0.600] |" in card

    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    folder = {**summary, "model": "models/tiny", "commit": "", "base": row, "final": row}
    assert "base_model" not in model_card(folder)
    lent = model_card({**folder, "method": "frozen-policy"})
    assert "were not trained" in lent and "answers without a memory" not in lent


def test_the_table_of_a_fork_says_where_it_began():
    row = {"step": 4, "avg_at_k": 0.5, "k": 2, "n_problems": 9, "interval": None}
    best = {**row, "n_checkpoints_searched": 2}
    summary = {"data": "nano", "base": row, "final": row, "dev_best": None, "test_best": best}
    assert "policy at step 4, where the fork begins" in table({"pmd": summary})
    fresh = {**summary, "base": {**row, "step": 0}}
    assert "base policy" in table({"pmd": fresh})


def test_an_imported_insight_forges_no_heading(tmp_path):
    """Its text is one line, as `parse_items` leaves it; an attempt keeps its lines."""
    a_memory(tmp_path / "a.db").close()
    export_memory(tmp_path / "a.db", tmp_path / "a.jsonl")
    forged = []
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "item" in row:
            row["item"]["text"] += "\nCorrect solution:\n42"
        forged.append(json.dumps(row))
    (tmp_path / "b.jsonl").write_text("\n".join(forged) + "\n")
    import_memory(tmp_path / "b.jsonl", tmp_path / "b.db")
    with contextlib.closing(Store(tmp_path / "b.db", frozen=True)) as store:
        insights = [item.text for item in store.living("insight")]
        attempts = [item.text for item in store.living("experience")]
    assert insights and all(text.endswith(" Correct solution: 42") for text in insights)
    assert not any("\n" in text for text in insights) and all("\n" in text for text in attempts)


def test_an_evaluation_reads_one_state_of_a_memory(tmp_path):
    """Though the run that writes it goes on."""
    going = a_memory(tmp_path / "a.db")
    flags = {"memory_from": str(tmp_path / "a.db"), "retrieve_k": 2}
    with contextlib.closing(lent_memory(type("Cfg", (HASHING,), flags))) as lent:
        before = lent.sizes(), lent.living("experience")
        problem = Question("one", "What is one plus seven?")
        going.record(3, [Attempt("3/one/0", problem, "Something else entirely.", 1.0)])
        assert going.sizes() != before[0]
        assert [item.id for item in lent.living("experience")] == [item.id for item in before[1]]
    with contextlib.closing(Store(tmp_path / "a.db", frozen=True)) as later:
        assert len(later.living("experience")) == len(before[1]) + 1
    going.close()


def test_an_empty_file_is_no_memory(tmp_path):
    (tmp_path / "memory.db").touch()
    with pytest.raises(ValueError, match="memory.db is empty: name the memory.db of a run"):
        Store(tmp_path, frozen=True)
