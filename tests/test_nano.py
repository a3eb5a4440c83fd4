"""The embedded checkpoint reads what a comparison on it needs as an exact reader would, and knows
nothing it should not.
"""

import itertools
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import method_of
from transformers import AutoModelForCausalLM

import memory as mem
from nano import examples, make, probes
from nano.examples import OPS, WRONG, Reader
from nano.world import KNOWN, SYLLABLES, attempt_text, make_world, problem_text, trap
from runtime.chat import encode_prompt
from runtime.replies import parse
from tasks import load_task
from tasks.verdicts import verify

# `python nano/make.py probe` prints the figures. Were siblings used less well than strategies, SDPO
# would be handicapped.
AT_LEAST = {
    "execution": 0.95,
    "strategy": 0.9,
    "behavior": 0.9,
    "sibling": 0.9,
    "example": 0.9,
    "reflect_win": 0.9,
    "reflect_loss": 0.9,
    "reflect_feedback": 0.9,
    "contrastive": 0.9,
    "abstract": 0.5,
    "critic": 0.4,
    "confidence": 0.85,
    "weights": 0.95,
    "weights_beside_lessons": 0.9,
}

# What is not exact yet, by the table of nano/README.md. Everything else keeps to the bounds: 0.03 on
# what is excluded, 0.9 of the exact probability on what is told, a distance of 0.1.
NOT_YET = {"strategies + lessons, whole": 0.26, "revision, wrong": 0.035}  # warned of
DISTANCE = {"strategies + lessons, whole": 0.3}


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(make.HERE, dtype=torch.float32)


@pytest.fixture(scope="module")
def reading(model, tokenizer):
    return probes.reading(model, tokenizer)  # the questions of that table


# -- what the checkpoint reads


def test_lessons_and_feedback_are_warnings(reading):
    """Three operations that lessons warn of have at most 0.03 together, and one that feedback warns
    of.
    """
    warned = {block: row["warned"] for block, row in reading.items() if "warned" in row}
    assert len(warned) > 10 and all(exact < 0.02 for _, exact in warned.values())
    assert {
        block: model for block, (model, _) in warned.items() if model > NOT_YET.get(block, 0.03)
    } == {}
    assert warned["strategies + lessons, whole"][0] < 0.375  # what the three have without lessons


def test_what_a_block_tells_is_believed(reading):
    told = {block: row["right"] for block, row in reading.items() if "right" in row}
    assert (
        len(told) > 10
        and {block: row for block, row in told.items() if row[0] < 0.9 * row[1]} == {}
    )


def test_distributions_are_those_of_the_exact_reader(reading):
    assert {
        block: row["distance"]
        for block, row in reading.items()
        if row["distance"] > DISTANCE.get(block, 0.1)
    } == {}


def test_replies(model, tokenizer):
    scores = probes.probe(model, tokenizer)
    assert {k: v for k, v in scores.items() if v < AT_LEAST.get(k, 0)} == {}
    assert (
        abs(scores["strategy"] - scores["sibling"]) < 0.08
        and abs(scores["behavior"] - scores["sibling"]) < 0.08
    )
    assert 1.8 < scores["entropy"] <= 2.08  # nats over 8 operations it was not told; ln 8 = 2.079


def test_it_does_not_know_the_shipped_world(model, tokenizer):
    """Over operations, the truth is about as likely as any: the secret was drawn after the model
    was trained.
    """
    train, _ = make_world(0)
    secret = dict(pair.split("=") for row in train for pair in row["hidden"].split())
    found = probes.beliefs(model, tokenizer, probes.untold(secret))
    assert (
        np.mean([row[OPS.index(o)] for row, o in zip(found, secret.values(), strict=True)]) < 0.25
    )


def test_size_and_form(model):
    assert sum(p.numel() for p in model.parameters()) < 5e6 and model.config.model_type == "qwen3"
    assert sum(f.stat().st_size for f in make.HERE.rglob("*") if f.is_file()) < 20e6


def test_everything_it_reads_and_writes_is_in_its_vocabulary(tokenizer):
    rng = random.Random(3)
    for kind, _ in examples.MIX:
        for example in (kind(rng) for _ in range(100)):
            ((ids, start),) = make.encode(tokenizer, [example])
            assert tokenizer.unk_token_id not in ids
            decoded = tokenizer.decode(ids[start:-1])
            # the frame is ordinary vocabulary and survives the way back
            if example.reply.startswith("{"):
                assert parse(decoded).keys() == json.loads(example.reply).keys()
            else:
                assert decoded == example.reply
            if not example.turns and not example.given:
                assert ids[:start] == encode_prompt(tokenizer, example.prompt)
    fixed = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    # frame and bindings are never special
    assert fixed == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"}


@pytest.mark.parametrize("compared", [0, 1, None])  # at which look; None: at none
def test_a_phase_lasts_until_combinations_are_compared(tmp_path, monkeypatch, capsys, compared):
    looks = []

    def compares(training):
        looks.append(training.taken)
        return len(looks) - 1 == compared

    monkeypatch.setattr(make.Training, "compares", compares)
    monkeypatch.setattr(make.Training, "looks", lambda training: "")
    for name, value in dict(LENGTHS=(1, 2, 1, 1, 1), LONGER=5, ROUND=2).items():
        monkeypatch.setattr(make, name, value)
    make.pretrain(3, tmp_path, batch_size=2)
    out = capsys.readouterr().out
    further = {0: 0, 1: 2, None: 5}[compared]
    assert looks == [3, 5, 7][: further // 2 + 1]
    assert f"{6 + further} steps" in out and (compared is None) == ("not compared" in out)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("killed_after", [1, 5, 6, 9])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, killed_after):
    """Within a phase, at the end of the one that is prolonged, and before anything is kept."""
    monkeypatch.setattr(make.Training, "compares", lambda training: training.taken >= 7)
    monkeypatch.setattr(make.Training, "looks", lambda training: "")
    for name, value in dict(LENGTHS=(3, 2, 2, 2, 2), LONGER=4, ROUND=2, KEEP_EVERY=2).items():
        monkeypatch.setattr(make, name, value)
    make.pretrain(3, tmp_path / "whole", batch_size=2)
    step = make.Training.step

    def killed(training, rate):
        if training.taken == killed_after:
            raise KeyboardInterrupt
        return step(training, rate)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make.Training, "step", killed)
        make.pretrain(3, tmp_path / "killed", batch_size=2)
    if killed_after > 1:
        with pytest.raises(ValueError, match="of a training with other settings; remove it"):
            make.pretrain(4, tmp_path / "killed", batch_size=2)
    make.pretrain(3, tmp_path / "killed", batch_size=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "killed" / "training.pt").exists()


# -- the exact reader


def posterior(name, lines, named):
    """The step after `named`, by going through all maps of the name one by one; lines: (text, share
    of wrong ones).
    """
    found = dict.fromkeys(OPS, 0.0)
    for operations in itertools.product(OPS, repeat=len(name)):
        is_ = dict(zip(name, operations, strict=True))
        p = float(
            all(is_[s] == KNOWN[s] for s in name if s in KNOWN)
            and list(operations[: len(named)]) == named
        )
        for text, wrong in lines:
            warned = [w.split("!") for w in text.split() if "!" in w]
            if warned and all(s in is_ for s, _ in warned) and all(is_[s] == o for s, o in warned):
                p = 0.0
            for s, o in (w.split("=") for w in text.split() if "=" in w):
                if s in is_:
                    p *= wrong / 8 + (1 - wrong) * (is_[s] == o)
        found[operations[len(named)]] += p
    return np.array(list(found.values())) / sum(found.values())


def test_the_reader_is_exact():
    rng = random.Random(0)
    for _ in range(40):
        name, secret, digits = examples.draw(rng)
        context, reader = examples.some_context(rng, name, secret, digits)
        truth = [secret[s] for s in name]
        lines = [
            (text, WRONG)
            for block in ("strategies", "behaviors")
            for _, text in context.get(block, [])
        ]
        lines += [
            (text, 0.0) for _, text in context.get("lessons", []) + context.get("examples", [])
        ]
        lines += [
            (context.get(block, ""), 0.0)
            for block in ("solution", "beginning", "critique", "feedback")
        ]
        for step in range(len(name)):
            assert np.allclose(reader.next(truth[:step]), posterior(name, lines, truth[:step]))
        chances = [reader.next(truth[:i])[OPS.index(o)] for i, o in enumerate(truth)]
        assert np.isclose(reader.probability(truth), np.prod(chances))  # the chain rule


def test_a_whole_combination_excludes_little_until_the_rest_is_known():
    reader = Reader(["vo", "mi"]).believe("vo!rev mi!inc")
    assert np.isclose(reader.next([])[OPS.index("rev")], 7 / 63)
    assert reader.next(["rev"])[OPS.index("inc")] == 0 and np.allclose(reader.next(["rol"]), 1 / 8)
    # mi may be to blame
    assert Reader(["vo"]).believe("vo!rev mi!inc").next([]).tolist() == [1 / 8] * 8


# -- worlds


def test_the_shipped_files_are_world_0_of_both_kinds_which_differ_in_feedback_alone():
    for task, speaks in (
        ("nano", True),
        ("nano/0", True),
        ("nano/plain", False),
        ("nano/plain/0", False),
    ):
        train, test = make_world(0, speaks=speaks)
        found = load_task(task, dev=0)
        assert [p.id for p in found.train + found.test] == [row["id"] for row in train + test]
        assert all(p.extra.get("feedback", False) is speaks for p in found.train + found.test)
    silent = make_world(5, speaks=False)
    assert [
        [{k: v for k, v in row.items() if k != "feedback"} for row in rows]
        for rows in make_world(5)
    ] == list(silent)
    for task in ("nano/plain/987", "nano/987", "nano/plain/0/1", "nano/other"):
        with pytest.raises(
            ValueError,
            match=(
                f"no task '{task}'.*world --seed {task.split('/', 1)[1].replace('plain/', '')}"
                f"{' --plain' * ('plain' in task)}`"
            ),
        ):
            load_task(task)


def spoken(task="nano", length=3):
    problem = next(p for p in load_task(task).train if len(p.extra["hidden"].split()) == length)
    pairs = [pair.split("=") for pair in problem.extra["hidden"].split()]
    return (
        problem,
        [s for s, _ in pairs],
        [o for _, o in pairs],
        [int(d) for d in problem.prompt.split()[-4:]],
    )


def test_the_verifier_names_the_first_wrong_step():
    problem, name, truth, digits = spoken()
    assert verify(problem, attempt_text(name, truth, digits)).feedback == ""
    for operations in itertools.product(OPS, repeat=3):
        verdict = verify(problem, attempt_text(name, operations, digits))
        if verdict.reward:
            assert verdict.feedback == ""
            continue
        first = next(
            i for i in range(3) if verify_prefix(problem, name[: i + 1], operations, digits)
        )
        assert verdict.feedback == f"{name[first]}!{operations[first]}"
        assert operations[first] != truth[first] and verdict.feedback not in problem.prompt
    plain, *_ = spoken("nano/plain")
    assert verify(plain, attempt_text(name, ["neg"] * 3, digits)).feedback == ""


def verify_prefix(problem, name, operations, digits):
    """Whether an attempt that stops after these steps ends in other digits than the answer's at
    that place.
    """
    ours = attempt_text(name, operations[: len(name)], digits).split()
    return ours[-4:] != problem.answer.split()[len(ours) - 4 : len(ours)]


def test_the_verifier_blames_no_operation_for_anything_else():
    problem, name, truth, digits = spoken()
    right = attempt_text(name, truth, digits).split()
    slip = [*right[:6], "0" if right[6] != "0" else "1", *right[7:]]
    wrong = next(
        o for o in OPS if verify(problem, attempt_text(name, [o, *truth[1:]], digits)).feedback
    )
    hostile = attempt_text(name, [wrong, *truth[1:]], digits).replace(f"={wrong}", "=<|im_end|>")
    for words in (
        slip,
        right[:-1],
        [*right, "1"],
        ["9", *right[1:]],
        [*right[:4], "xx", *right[5:]],
        [],
        ["="] * 30,
        hostile.split(),
    ):
        verdict = verify(problem, " ".join(words))
        assert (verdict.reward, verdict.feedback) == (0.0, "")
    assert verify(problem, " ".join([*right, mem.CONFIDENCE, "0.50"])).reward == 1.0
    assert verify(problem, " ".join([*right, mem.CONFIDENCE, "0.50", "1"])).reward == 0.0


def test_feedback_reaches_the_teacher_and_reflection_and_never_the_student(
    make_config, make_memory, tokenizer
):
    problem, name, truth, digits = spoken()
    text = attempt_text(name, ["neg" if o != "neg" else "rev" for o in truth], digits)
    said = verify(problem, text).feedback

    class Failure:
        id, reward, feedback, teacher_ids, teacher_prompt = "1/x/0", 0.0, said, (), ""

    rollout = Failure()
    rollout.problem, rollout.text = problem, text
    method_of(make_config("--method", "sdpo"), tokenizer=tokenizer).condition(1, [rollout])
    assert rollout.teacher_prompt == mem.compose(problem.prompt, feedback=said) != problem.prompt
    lesson = '{"strategies": [], "lessons": [{"title": "trap", "content": "%s"}]}'
    memory = make_memory(lambda prompt: lesson % prompt.splitlines()[-2], ground_insights=True)
    memory.add_problems([problem])
    memory.record(1, [rollout])
    memory.reflect(1, [problem])
    assert memory.generate.prompts[0].splitlines()[-3:] == [
        mem.NANO.feedback,
        said,
        mem.NANO.lessons_only,
    ]
    assert [i.text for i in memory.living("insight")] == [said]


@pytest.mark.parametrize(
    ("said", "lesson", "kept"),
    [
        ("mi!inc", "mi!inc", True),
        ("mi!inc", "vo!rev mi!inc ku!rol", True),
        ("mi!inc", "vo!rev", False),
        ("mi!inc", "mi!inc ku!rol", False),
        ("", "vo!rev mi!inc ku!rol", True),
        ("", "mi!inc", False),
        ("", "vo!rev mi!inc", False),
        ("mi!inc", "mi!dec", False),
    ],
)
def test_a_lesson_about_some_steps_needs_feedback_that_names_them(make_memory, said, lesson, kept):
    """Nobody knows of the other steps of a failure that they were wrong: those before the first
    wrong one were right.
    """
    problem, reply = load_task("nano").train[0], {"lessons": [{"title": "trap", "content": lesson}]}
    memory = make_memory(lambda prompt: json.dumps(reply), ground_insights=True)
    memory.add_problems([problem])

    class Failure:
        id, reward, feedback = "1/x/0", 0.0, said
        text = attempt_text(["vo", "mi", "ku"], ["rev", "inc", "rol"], [3, 1, 7, 4])

    Failure.problem = problem
    memory.record(1, [Failure])
    memory.reflect(1, [problem])
    assert [i.text for i in memory.living("insight")] == [lesson] * kept
    assert memory.counts().get("insight_rejected", 0) == 1 - kept


@pytest.mark.parametrize(
    ("said", "left"),
    [("mi!inc", ["vo=rev"]), ("vo!rev", ["mi=inc"]), ("mi!dec", ["vo=rev", "mi=inc"]), ("", [])],
)
def test_feedback_ends_the_strategy_it_names_and_no_other(make_memory, said, left):
    problem = load_task("nano").train[0]
    reply = {
        "strategies": [
            {"title": "rule", "content": "vo=rev"},
            {"title": "rule", "content": "mi=inc"},
        ],
        "lessons": [],
    }
    memory = make_memory(lambda prompt: json.dumps(reply), ground_insights=True)
    memory.add_problems([problem])

    class Try:
        id, reward, feedback, text = (
            "1/x/0",
            1.0,
            "",
            attempt_text(["vo", "mi"], ["rev", "inc"], [3, 1, 7, 4]),
        )

    Try.problem = problem
    memory.record(1, [Try])
    memory.reflect(1, [problem])
    assert [i.text for i in memory.living("insight")] == ["vo=rev", "mi=inc"]
    Try.id, Try.reward, Try.feedback, Try.text = (
        "2/x/0",
        0.0,
        said,
        Try.text.replace("3 1 7 4", "4 7 1 3", 1),
    )
    memory.record(2, [Try])
    assert [i.text for i in memory.living("insight")] == left


# -- further prompts


def test_prompts_for_other_methods_are_what_the_model_was_trained_on(tokenizer):
    """Put together by hand as nano/README.md says; each fixed sentence is one token."""
    name, truth, digits = ["vo", "mi"], ["rev", "inc"], [3, 1, 7, 4]
    for sentence in (
        mem.CRITIQUE,
        mem.BEGINNING,
        mem.REVISE_WRONG,
        mem.REVISE_RIGHT,
        mem.AGAIN,
        mem.CRITIC,
        mem.ASK_CONFIDENCE,
        mem.CONFIDENCE,
        mem.FEEDBACK,
        mem.LESSONS,
    ):
        assert len(tokenizer(sentence)["input_ids"]) == 1
    problem, start = problem_text(name, digits), attempt_text(name[:1], truth[:1], digits)
    assert (
        mem.compose(problem, critique=start) == f"{problem}\n{mem.CRITIQUE}\n{start}\n{mem.CLOSING}"
    )
    assert (
        mem.compose(problem, beginning=start)
        == f"{problem}\n{mem.BEGINNING}\n{start}\n{mem.CLOSING}"
    )
    rng, seen = random.Random(1), set()
    for kind in (examples.revision, examples.second_attempt, examples.confidence, examples.critic):
        for example in (kind(rng) for _ in range(200)):
            seen |= {
                s for s in (mem.REVISE_WRONG, mem.REVISE_RIGHT) if example.given.endswith(f" {s}")
            }
            seen |= {s for s in (mem.AGAIN, mem.CRITIC) if example.prompt.startswith(f"{s}\n")}
            seen |= {s for s in (mem.ASK_CONFIDENCE,) if example.prompt.splitlines()[1:2] == [s]}
            assert example.turns == [] or [role for role, _ in example.turns] == [
                "user",
                "assistant",
            ]
    assert len(seen) == 5
    one = examples.Example("b", "c", turns=[("user", "vo"), ("assistant", "mi")], given="ku")
    conversation = [
        {"role": role, "content": text} for role, text in [*one.turns, ("user", one.prompt)]
    ]
    text = (
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        + "ku"
    )
    assert make.prompt_ids(tokenizer, [one]) == [
        tokenizer(text, add_special_tokens=False)["input_ids"]
    ]


def test_a_whole_combination_is_read_as_tokens_that_name_the_steps_before(tokenizer):
    """In lessons of prompts and nowhere else, for operations of three letters and of four."""
    rng = random.Random(4)
    for n, ops in ((n, [rng.choice(OPS) for _ in range(n)]) for n in (1, 2, 3) for _ in range(30)):
        name = ["vo", "mi", "ku"][:n]
        line = trap(name, ops)
        signs = ["&"] * (n - 1) + ["%"]
        marked = [line] if n == 1 else []
        for i in range(n if n > 1 else 0):
            before = "".join(f"&{o}" for o in ops[:i])
            marked += [name[i], f"{before}{signs[i]}{ops[i]}"]
        for prompt in (
            mem.compose("vo", lessons=[("trap", line), ("trap", "ro!inc")]),
            mem.abstraction_prompt(mem.NANO, [("vo", [f"- trap: {line}"])], []),
        ):
            words = tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, prompt))
            at = words.index("trap:") + 1
            assert words[at : at + len(marked)] == marked and tokenizer.unk_token not in words
        assert "ro!inc" in tokenizer.convert_ids_to_tokens(
            tokenizer(f"trap: {line}\n- trap: ro!inc")["input_ids"]
        )
        reply = examples.items_json([], [line])
        assert (
            parse(tokenizer.decode(tokenizer(reply)["input_ids"]))["lessons"][0]["content"].strip()
            == line
        )


def test_parts_name_the_steps_before_and_the_place():
    assert make.parts("vo=rev") == ("vo", "=rev", "=") and make.parts("vo!rev") == (
        "vo",
        "!rev",
        "!",
    )
    assert make.parts("behavior_vo:") == ("vo", "behavior_:") and make.parts("trap:") == ("trap:",)
    assert make.parts("&rev") == ("&rev", "place 1")
    assert make.parts("&rev&inc%rol") == ("1rev", "2inc", "%rol", "place 3")
    assert make.parts("&rev=inc") == ("1rev", "=inc", "place 2")
    assert make.parts("rev>inc>ku") == ("ku", "1rev", "2inc") and make.parts("<|im_end|>") == (
        "<|im_end|>",
    )


def test_rules_for_the_last_step_hold_after_their_steps_alone(tokenizer):
    rng, followed = random.Random(6), 0
    for example in (examples.conditional(rng) for _ in range(200)):
        *before, last = example.targets()
        told = example.reader.rules.get(
            tuple(w.split("=")[1] for w in example.reply.split() if "=" in w)[:-1]
        )
        followed += told is not None
        assert last[2].max() == (1 if told or last[1] in KNOWN else 1 / 8)
        assert all(row.max() == (1 if s in KNOWN else 1 / 8) for _, s, row in before)
        if told:
            assert last[2][OPS.index(told)] == 1
    assert 150 < followed < 200


def test_near_misses_agree_with_the_attempt_and_disagree(tokenizer):
    """What a whole combination excludes has to be told from what it names: half of them, roughly,
    exclude nothing.
    """
    rng, agree = random.Random(7), []
    for example in (examples.near_missed(rng) for _ in range(400)):
        named = [w.split("=")[1] for w in example.reply.split() if "=" in w]
        lessons = [
            line.split(": ")[1]
            for line in example.prompt.splitlines()
            if line.startswith("- trap: ")
        ]
        agree += [
            [pair.split("!")[1] for pair in line.split()][:-1] == named[:-1] for line in lessons
        ]
    assert 0.25 < np.mean(agree) < 0.75


def test_revisions_in_a_row_exclude_every_attempt_before():
    """The targets are what going through all maps finds."""
    rng, counts = random.Random(9), set()
    for example in (examples.revisions(rng) for _ in range(60)):
        *tries, rest = example.given.split(mem.REVISE_WRONG)
        counts.add(len(tries))
        pairs = [re.findall(r"\w+=\w+", text) for text in tries]
        lines = [(" ".join(found).replace("=", "!"), 0.0) for found in pairs]
        named = re.findall(r"=(\w+)", example.reply)
        assert rest == "" and len(set(map(tuple, pairs))) == len(tries)
        for i, (_, syllable, row) in enumerate(example.targets()):
            assert syllable == example.reader.name[i]
            assert np.allclose(row, posterior(example.reader.name, lines, named[:i]))
        assert row.max() == pytest.approx(1 / (8 - len(tries)))
    assert counts == {1, 2, 4, 6, 7}


def test_any_step_of_an_attempt_can_be_the_first_wrong_one():
    rng, firsts = random.Random(10), []
    for _ in range(300):
        name, secret, _ = examples.draw(rng, (3,))
        said = examples.first_wrong(name, examples.wrong_from(rng, name, secret), secret)
        firsts.append(name.index(said.split("!")[0]))
    assert min(firsts.count(step) for step in range(3)) > 70


def test_confirmed_strategies_are_contradicted_by_no_lesson():
    rng = random.Random(11)
    for example in (examples.confirmed(rng) for _ in range(60)):
        told = set(re.findall(r"\w+=\w+", example.prompt))
        warned = {pair.replace("!", "=") for pair in re.findall(r"\w+!\w+", example.prompt)}
        assert told and warned and not told & warned and told <= set(example.reply.split())
        about = {pair.split("=")[0] for pair in told}
        assert all(row.max() > 0.9 for _, s, row in example.targets() if s in about)


def test_a_later_syllable_of_an_attempt_is_a_token_that_names_the_steps_before(tokenizer):
    """Wherever an attempt stands, and in its text never."""
    rng = random.Random(8)
    for _ in range(60):
        name = rng.sample(SYLLABLES, 3)
        ops = [rng.choice(OPS) for _ in name]
        text = attempt_text(name, ops, rng.sample(range(10), 4))
        marked = text.split()
        marked[10], marked[16] = f"{ops[0]}>{name[1]}", f"{ops[0]}>{ops[1]}>{name[2]}"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == marked and tokenizer.decode(ids) == text
        begun = tokenizer(" ".join(text.split()[:17]))["input_ids"]
        assert begun == ids[:17]
        again = tokenizer(f"{text} {mem.REVISE_WRONG} {text}")["input_ids"]
        assert again[:22] == again[23:] == ids
        sure = tokenizer(f"{text} {mem.CONFIDENCE} 0.50")["input_ids"]
        assert sure[:22] == ids and tokenizer.decode(sure) == f"{text} {mem.CONFIDENCE} 0.50"


def test_targets_are_the_readers_and_stand_at_the_operations(tokenizer):
    name, truth = ["vo", "mi"], ["rev", "inc"]
    reader = Reader(name).believe(trap(name, ["rev", "dec"]))
    example = examples.Example(
        problem_text(name, [3, 1, 7, 4]), attempt_text(name, truth, [3, 1, 7, 4]), reader
    )
    assert [(i, s) for i, s, _ in example.targets()] == [(5, "vo"), (11, "mi")]
    assert example.targets()[1][2].tolist() == reader.next(["rev"]).tolist()

    class Uniform(
        torch.nn.Module
    ):  # over the vocabulary: every position costs ln V, whatever its target
        def model(self, input_ids):
            return type("Output", (), {"last_hidden_state": torch.zeros(*input_ids.shape, 4)})

        def lm_head(self, hidden):
            return hidden @ torch.zeros(4, len(tokenizer))

    loss, n = make.loss_of(Uniform(), tokenizer, [example])
    assert n == len(example.reply.split()) + 1 and loss.item() == pytest.approx(
        n * np.log(len(tokenizer)), rel=1e-5
    )


def test_embeddings_are_sums_of_parts_and_learn_as_such(tokenizer):
    """The gradient of the parts is that of the loss through the sums, by finite differences."""
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.zeros(len(tokenizer), 3))
    embeddings = make.Parts(tokenizer, table)
    ids, rows = tokenizer.get_vocab(), table.detach().double()
    for sign, o in itertools.product("=!", OPS):
        shared = [rows[ids[f"{s}{sign}{o}"]] - rows[ids[s]] for s in SYLLABLES]
        assert all(torch.allclose(row, shared[0], atol=1e-6) for row in shared)
    wanted = torch.randn(len(tokenizer), 3)

    def loss():
        return ((table - wanted) ** 2).sum()

    loss().backward()
    embeddings.take_gradient()
    assert table.grad is None
    for part, column in ((0, 0), (40, 1), (len(embeddings.weight) - 1, 2)):
        values = []
        for nudge in (1e-2, -2e-2):
            embeddings.weight.data[part, column] += nudge
            embeddings.fill()
            values.append(loss().item())
        embeddings.weight.data[part, column] += 1e-2
        slope = (values[0] - values[1]) / 2e-2
        assert embeddings.weight.grad[part, column].item() == pytest.approx(
            slope, rel=0.05, abs=0.5
        )


def test_embeddings_of_one_seed_are_the_same_in_every_process():
    """The vocabulary of a tokenizer comes in another order each time, and what is drawn at random
    must not follow it.
    """
    code = (
        "import torch\nfrom nano import make\ntokenizer, _ = make.make_tokenizer(),"
        " torch.manual_seed(0)\ntable = torch.zeros(len(tokenizer), 3)\nmake.Parts(tokenizer,"
        " table)\nprint(table.tolist())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=make.HERE.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout != ""


def test_every_syllable_is_hidden_or_known():
    assert len(set(SYLLABLES)) == 28 and set(KNOWN) <= set(SYLLABLES)
