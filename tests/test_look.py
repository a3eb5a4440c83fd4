"""What is logged to be looked at, and the pages made of it, in a real browser."""

import ast
import json
import re
import shutil
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Attempt, Question
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import kernels
import pmd
from memory import compose
from runtime import run, samples
from runtime.files import read_lines
from runtime.samples import token_texts
from runtime.store import Item, Store
from tools import companion, memory_page, show_memory, show_run
from tools.page import write_page

HERE = Path(__file__).resolve().parent.parent
HOSTILE = (
    "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>{{ 7 * 7 }}\u2028"
)


def sample_of(cfg):
    pmd.train(cfg)
    return read_lines(Path(cfg.out, cfg.name, "samples.jsonl"))[-1]


# -- the log


def test_a_sample_says_how_far_the_teacher_pulled_each_token(make_config, policy, monkeypatch):
    """Against the definition, over the whole vocabulary, with the weights that began the step."""
    trained = []

    def watched(step, rows, tokenizer):
        trained.extend(rows)
        return samples.sample_of(step, rows, tokenizer)

    monkeypatch.setattr(run, "sample_of", watched)
    cfg = make_config(name="r", steps=1, micro_tokens=200)
    sample = sample_of(cfg)
    (row,) = [r for r in trained if r.id == sample["rollout"]]
    logits = []
    for prompt in (row.prompt_ids, row.teacher_ids):
        with torch.no_grad():
            found = policy(torch.tensor([prompt + row.ids])).logits[0]
        logits.append(found[len(prompt) - 1 : -1])
    wanted = kernels.oracle(*logits, cfg.alpha).tolist()
    assert sample["divergence"] == pytest.approx(wanted, rel=1e-3, abs=2e-6)
    assert max(wanted) > 1e-3 and sample["advantage"] is None
    assert sample["teacher_prompt"] == row.teacher_prompt != ""
    assert "".join(sample["tokens"]).startswith(sample["completion"])


def test_a_sample_says_how_its_row_was_trained(make_config):
    sample = sample_of(make_config(name="r", method="grpo", steps=1))
    assert sample["divergence"] is None and isinstance(sample["advantage"], float)
    sample = sample_of(make_config(name="s", method="avsd", steps=1))
    assert sample["divergence"] is None
    assert len(sample["advantage"]) == len(sample["tokens"])  # one a token
    assert len(sample["further_prompts"]) == 3


def test_the_texts_of_tokens_read_as_their_completion():
    """A tokenizer of bytes: a part of a character is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=letters, vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator(["the answer is right"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = fast("the answer is  right: \u20ac.")["input_ids"]
    texts = token_texts(fast, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "the answer is  right: \ufffd\ufffd\ufffd."
    assert token_texts(fast, []) == [] and token_texts(fast, ids[:1]) == [texts[0]]


# -- the pages


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, driven by its own chromedriver, which downloads nothing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        yield chrome


def opened(browser, path, place=""):
    """Opens a page as a double click does; returns the text that it shows."""
    browser.get("about:blank")
    browser.get(path.resolve().as_uri() + place)
    assert not browser.get_log("browser")  # no error, nothing that was refused or not found
    assert browser.execute_script("return window.ran") is None
    return browser.find_element("tag name", "body").text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with a memory, in which models wrote what browsers would run."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    folder.mkdir()
    config = {"method": "pmd", "task": "t", "model": "m", "seed": 0, "alpha": 0.5, "device": "cpu"}
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for step in range(1, 21):
        row = {"step": step, "reward": step / 40, "entropy": 2.0 / step**2, "sampler_gap": 1e-7}
        row |= {"completion_tokens": 100 / step, "memory_events": {"reflection": 4}}
        rows.append(row | {"memory": {"experience": step, "insight": step, "behavior": 1}})
        if step % 5 == 0:
            found = {"step": step, "split": "dev", "avg_at_k": 0.8 - abs(step - 10) / 20}
            rows.append(found | {"interval": [found["avg_at_k"] - 0.1, found["avg_at_k"] + 0.1]})
    rows[-2]["memory_events"]["reflect_parse_failure"] = 3
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    sample = {"step": 10, "problem": "p1", "rollout": "10/p1/0", "student_prompt": "Ask."}
    sample |= {"teacher_prompt": f"Ask.\n- {HOSTILE}", "completion": HOSTILE, "reward": 0.0}
    sample |= {"tokens": ["<b>", HOSTILE], "divergence": [0.25, 0.75], "advantage": None}
    sample |= {"further_prompts": [], "insight": []}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    fill_memory(folder / "memory.db", 3)
    return folder


def fill_memory(path, problems, insights=3, steps=20):
    """Writes a memory: each problem gets an insight a step, of which the last `insights` live."""
    memory = Store(path, lambda texts: np.ones((len(texts), 4)), "e", caps={"strategy": 10})
    vector = np.ones(4, np.float32) / 2
    rows = [(f"p{n}", f"Problem {n}. {HOSTILE}", 0, vector.tobytes()) for n in range(problems)]
    with memory.writing():
        memory.db.executemany("INSERT INTO problem VALUES (?, ?, ?, ?)", rows)
    for step in range(1, steps + 1):
        drawn = range(step % 3, problems, 3)
        new = []
        for n in drawn:
            said = f"what {step} taught {n} {HOSTILE}"
            new.append(Item(0, "insight", "strategy", f"p{n}", HOSTILE, said, embedding=vector))
            memory.events[f"p{n}", "success"] += step % 2
            memory.events[f"p{n}", "failure"] += 1
        old = f"tier = 'insight' AND ended IS NULL AND born < {step - 3 * insights + 1}"
        with memory.writing(step):
            memory.end(
                step, "insight", [id for (id,) in memory.query(f"SELECT id FROM item WHERE {old}")]
            )
            memory.insert(step, "insight", new)
    skill = {"tier": "behavior", "kind": "behavior", "problem": "", "embedding": vector}
    for step, text in ((5, "first text"), (9, "second text")):
        with memory.writing(step):
            memory.end(step, "behavior", [item.id for item in memory.living("behavior")])
            item = Item(0, title="behavior_a", text=text + HOSTILE, evidence='["p1"]', **skill)
            memory.insert(step, "behavior", [item])
    memory.close()


def test_a_runs_page(folder, browser):
    show_run.main([str(folder)])
    text = opened(browser, folder / "run.html")
    assert len(browser.find_elements("css selector", ".chart")) == 9
    tokens = browser.find_elements("css selector", ".tokens span")
    assert [token.get_attribute("title") for token in tokens] == ["0.25 nats", "0.75 nats"]
    strengths = [float(re.findall(r"[\d.]+", t.get_attribute("style"))[-1]) for t in tokens]
    assert strengths[0] < strengths[1]
    assert "The teacher pulled 1 nats over 2 tokens" in text
    for name, is_on in (
        ("collapse", True),  # dev fell from 0.8 to 0.3, its interval is 0.1 to each side
        ("length", True),
        ("entropy", True),
        ("parse failures", True),
        ("sampler gap", False),
    ):
        assert f"{'look' if is_on else 'fine'} {name} " in text.replace("\n", " ")


def test_what_a_model_wrote_stays_a_text(folder, browser):
    show_run.main([str(folder)])
    for page in ("run.html", "memory.html#p1", "memory.html#bank", "memory.html#" + HOSTILE[:30]):
        name, _, place = page.partition("#")
        text = opened(browser, folder / name, "#" + place)
        assert not browser.find_elements("tag name", "img"), page
        assert len(browser.find_elements("tag name", "script")) == 2, page
        assert HOSTILE[:50] in text or "#<" in page, page


def test_the_hostile_text_would_run_in_a_careless_page(tmp_path, browser):
    """That the test above can fail."""
    page = tmp_path / "careless.html"
    page.write_text(f"<body>{HOSTILE}</body>")
    browser.get(page.as_uri())
    assert browser.execute_script("return window.ran") is not None
    browser.get_log("browser")


def test_a_memorys_page_goes_through_time(folder, browser):
    show_memory.main([str(folder), "--html"])
    text = opened(browser, folder / "memory.html", "#bank")
    assert "Behaviors: 1" in text and "second text" in text
    move = "at('step').value = arguments[0]; at('since').value = arguments[1]; move()"
    browser.execute_script(move, 10, 7)
    body = browser.find_element("tag name", "body")
    assert "rewritten as behavior_a: second text" in body.text
    assert len(browser.find_elements("css selector", ".item.born")) == 1
    assert len(browser.find_elements("css selector", ".item.ended")) == 1
    browser.execute_script(move, 6, 6)
    assert "first text" in body.text and "second text" not in body.text
    browser.execute_script("location.hash = 'p1'; show()")
    shown = browser.find_element("id", "shown").text
    assert "Insights: 2" in shown and "what 4 taught 1" in shown and "what 7" not in shown
    assert "What its teachers had read" in shown and "1 nats over 2 tokens" in shown
    search = "at('search').value = 'taught 2'; at('search').dispatchEvent(new Event('input'))"
    browser.execute_script(search)
    time.sleep(0.5)
    assert browser.find_element("id", "count").text.startswith("1 of 3 problems")


def test_a_story_shows_the_prompt_that_a_teacher_was_offered(make_memory, tmp_path, browser):
    """Against memory.compose of what the memory itself says, step by step."""
    reply = {
        "strategies": [{"title": "a", "content": "think"}],
        "lessons": [{"title": "b", "content": "try"}],
    }
    memory = make_memory(lambda prompt: json.dumps(reply))
    problem = Question("p", "Why?")
    memory.add_problems([problem])
    wanted = {}
    for step, texts in enumerate((["no"], ["yes"], ["perhaps"]), 1):
        tries = [
            Attempt(f"{step}/p/{i}", problem, text, float(text == "yes"))
            for i, text in enumerate(texts)
        ]
        memory.record(step, tries)
        memory.reflect(step, [problem])
        (context,) = memory.contexts([Attempt(f"{step}/p/9", problem, "no")], step)
        wanted[step] = compose(problem.prompt, **context)
    memory.settle()
    path = memory_page.write_memory_page(memory.path).rename(tmp_path / "story.html")
    opened(browser, path)
    for step, text in wanted.items():
        script = "const p = problems[0]; return recomposed(p, p.visits.find((v) => v.step === arguments[0]))"
        assert browser.execute_script(script, step) == text
    assert "yes" in wanted[3] and "Lessons" in wanted[1]


@pytest.mark.slow
def test_ten_thousand_problems_stay_usable(tmp_path, browser):
    """60,000 items and more; the seconds are what a person would wait."""
    fill_memory(tmp_path / "memory.db", 10_000)
    show_memory.main([str(tmp_path), "--html"])
    path = tmp_path / "memory.html"
    begun = time.perf_counter()
    opened(browser, path)
    seconds = {"open": time.perf_counter() - begun}
    for name, script in {
        "slide": "at('step').value = 10; move()",
        "search": "words = 'taught 77'; list()",
        "sort": "words = ''; at('order').value = 'changed'; list()",
        "scroll": "at('list').scrollTop = 200000; paint()",
    }.items():
        begun = time.perf_counter()
        browser.execute_script(script)  # comes back when the page has drawn it
        seconds[name] = time.perf_counter() - begun
    rows = len(browser.find_elements("css selector", "#list .row"))
    print(f"{path.stat().st_size / 1e6:.1f} MB, {rows} rows in the page, seconds: {seconds}")
    assert rows < 60 and seconds.pop("open") < 20 and max(seconds.values()) < 3


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    for tool, flags, file in (
        (show_run, [], "metrics.jsonl"),
        (show_memory, ["--html"], "memory.db"),
    ):
        with pytest.raises(SystemExit, match=f"none of these has a {file}"):
            tool.main([str(tmp_path), *flags])
        assert f"{tmp_path}: no {file}, left out" in capsys.readouterr().out


def test_a_run_of_another_commit_is_shown_without_what_it_lacks(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    lacking = {"config.json": ["alpha"], "summary.json": ["commit"]}
    for name, keys in lacking.items():
        if (other / name).is_file():
            values = json.loads((other / name).read_text())
            kept = {key: value for key, value in values.items() if key not in keys}
            (other / name).write_text(json.dumps(kept))
    rows = read_lines(other / "metrics.jsonl")
    for row in rows:
        row.pop("sampler_gap", None)
        row.pop("memory_events", None)
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    show_run.main([str(other)])
    assert "it was not logged" in (other / "run.html").read_text()
    for text in ("{", "[]"):
        (other / "config.json").write_text(text)
        with pytest.raises(SystemExit, match="config.json .*remove it, and the page shows 3"):
            show_memory.main([str(other), "--html"])


def copied(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    return other


def changed(path, change, n=None):
    """Changes all rows of a file of JSON lines, or the row of one line."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | change if n in (None, i) else row for i, row in enumerate(rows, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ROW = {"step": 5, "avg_at_k": 0.5, "interval": None}
SUMMARY = {
    "base": ROW,
    "final": ROW | {"k": 4},
    "dev_best": None,
    "test_best": ROW,
    "seconds": 258.4,  # of the whole run, where a step's are by phase
    "memory": {"experience": 5},
}


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("config.json", {"method": 5}, "config.json has 5 as its method: it has to be a text"),
        ("config.json", {"retrieve_k": "3"}, 'config.json has "3" as its retrieve_k'),
        ("metrics.jsonl", {"step": None}, "line 1 has null as its step"),
        ("metrics.jsonl", {"avg_at_k": None}, "line 1 has null as its avg_at_k"),
        ("metrics.jsonl", {"interval": 5}, "line 1 has 5 as its interval"),
        ("metrics.jsonl", {"entropy": "x"}, 'line 1 has "x" as its entropy.* mend that line'),
        ("metrics.jsonl", {"memory_events": {"reflection": None}}, "as its memory_events"),
        ("summary.json", {"final": 5}, "summary.json has no scores as its final"),
        ("summary.json", {"test_best": {"step": 5}}, "test_best of .*summary.json has no avg_at_k"),
    ],
)
def test_values_of_another_type_are_named(folder, tmp_path, name, change, said):
    other = copied(folder, tmp_path)
    (other / "summary.json").write_text(json.dumps(SUMMARY))
    changed(other / name, change)
    with pytest.raises(SystemExit, match=f"show_run.py: .*{said}"):
        show_run.main([str(other)])


def test_a_run_without_what_its_page_says_is_named(folder, tmp_path):
    other = copied(folder, tmp_path)
    (other / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="config.json has no method"):
        show_run.main([str(other)])
    (other / "config.json").unlink()
    with pytest.raises(SystemExit, match="config.json can't be read .*name the folder of a run"):
        show_run.main([str(other)])


def test_a_run_without_interval_and_commit_has_its_page(folder, tmp_path, browser):
    """And a number that is no number is null to a browser, which does not know NaN."""
    other = copied(folder, tmp_path)
    rows = read_lines(other / "metrics.jsonl")
    for row in rows:
        row.pop("interval", None)
    rows[1] |= {"entropy": float("nan"), "grad_norm": float("inf")}
    rows[-1] |= {"split": "dev", "avg_at_k": float("nan")}
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed(other / "samples.jsonl", {"divergence": [0.5, float("nan")]})
    (other / "summary.json").write_text(json.dumps({**SUMMARY, "commit": None}))
    show_run.main([str(other)])
    embedded = re.search(r'id="data">(.*?)</script>', (other / "run.html").read_text(), re.S)[1]
    data = json.loads(embedded, parse_constant=pytest.fail)
    assert data["rows"][1]["entropy"] is None and data["rows"][1]["step"] == 2
    assert data["samples"][0]["divergence"] == [0.5, None]
    text = opened(browser, other / "run.html")
    assert "commit unknown" in text and "avg@4" in text


def test_a_problem_that_is_called_bank_does_not_hide_the_bank(folder, tmp_path, browser):
    other = copied(folder, tmp_path)
    with sqlite3.connect(other / "memory.db") as db:
        db.execute("UPDATE problem SET id = 'bank' WHERE id = 'p1'")
        db.execute("UPDATE item SET problem = 'bank' WHERE problem = 'p1'")
        db.execute("UPDATE event SET subject = 'bank' WHERE subject = 'p1'")
    show_memory.main([str(other), "--html"])
    opened(browser, other / "memory.html")
    shown = browser.find_element("id", "shown")
    browser.execute_script("at('bank').click(); show()")
    assert shown.text.startswith("The bank of behaviors")
    browser.execute_script("location.hash = encodeURIComponent('bank'); show()")
    assert shown.text.startswith("bank\n") and "The bank of behaviors" not in shown.text


def test_a_page_that_can_t_be_written_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="companion.py: .*x.html can't be written .*make its fold"):
        companion.main(["--out", str(tmp_path / "nowhere" / "x.html")])


def test_a_page_needs_nothing_from_outside(folder):
    show_run.main([str(folder)])
    for page in (folder / "run.html", folder / "memory.html"):
        markup = page.read_text()
        assert "default-src 'none'" in markup
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", markup)


# -- the companion page


@pytest.fixture(scope="module")
def lines(tmp_path_factory, browser):
    """The companion page: what it shows of each equation, of each block, and its code."""
    path = tmp_path_factory.mktemp("companion") / "c.html"
    companion.main(["--out", str(path)])
    opened(browser, path)
    return browser.execute_script("""
        const all = (query, of = document) => [...of.querySelectorAll(query)];
        const equations = all("li[id^=eq-]").map((place) => {
          const box = place.querySelector("math").getBoundingClientRect();
          return [place.id, {width: box.width, height: box.height,
            links: all("a", place).map((link) => link.hash.slice(1))}];
        });
        const blocks = all(".block").map((block) => [block.id, block.dataset.equations.split(" ")]);
        return {equations: Object.fromEntries(equations), blocks: Object.fromEntries(blocks),
          code: all(".code").map((block) => block.textContent).join("")};
    """)


def test_each_equation_that_the_code_names_has_its_place(lines):
    for file in ("pmd.py", "memory.py", "kernels.py"):
        for number in set(re.findall(r"Eq\. (\d)", (HERE / file).read_text())):
            place = lines["equations"][f"eq-{number}"]
            assert place["width"] > 60 and place["height"] > 10 and place["links"]
            for link in place["links"]:
                assert number in lines["blocks"][link]
    assert len(lines["equations"]) == 8


def test_the_page_holds_the_code_line_by_line(lines):
    ignored = r"[\s()\"',]"
    shown = re.sub(ignored, "", lines["code"])
    for file, name in (("pmd.py", "train"), ("memory.py", "gate"), ("kernels.py", "oracle")):
        tree = ast.parse((HERE / file).read_text())
        (function,) = [node for node in tree.body if getattr(node, "name", "") == name]
        for statement in ast.walk(function):
            if isinstance(statement, (ast.Assign, ast.Return, ast.AugAssign)):
                assert re.sub(ignored, "", ast.unparse(statement)) in shown


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("(Eq. 2, 3)", [2, 3]),
        ("(Eq. 6-8)", [6, 7, 8]),
        ("Eq. 2 to 5, B.1 to B.3", [2, 3, 4, 5]),
        ("Eq. 4 and 5; Eq. 1", [1, 4, 5]),
        ("no equation, Fig. 3", []),
    ],
)
def test_equations_in(text, numbers):
    assert companion.equations_in(text) == numbers


def test_a_template_gets_all_that_it_names(tmp_path):
    with pytest.raises(Exception, match="undefined"):
        write_page(tmp_path / "x.html", "run.html", title="x")


def test_a_finished_run_has_its_pages(make_config):
    """With the files that a run itself writes, not those that a test makes up."""
    cfg = make_config(name="whole", steps=2, log_every=1)
    pmd.train(cfg)
    folder = Path(cfg.out, "whole")
    assert (folder / "summary.json").is_file()
    show_run.main([str(folder)])
    show_memory.main([str(folder), "--html"])
    for name in ("run.html", "memory.html"):
        assert (folder / name).stat().st_size > 10_000
