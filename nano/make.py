"""The embedded world: a tiny chat model that knows how to learn, and worlds whose secret only experience reveals.

    python nano/make.py model --seed 0                 # tokenizer and checkpoint, into this folder (about 20 CPU-minutes)
    python nano/make.py world --seed 3                 # task files, into nano/worlds/3 (instant)
    python nano/make.py probe                          # what the checkpoint can do, as a table

A problem is a name of one to three syllables and four distinct digits: `Apply vo mi to 3 1 7 4`. Each syllable hides one
of eight operations on the digits. An answer repeats the digits, then names the operation it uses for each syllable and
writes the digits after it: `3 1 7 4 vo vo=rev 4 7 1 3 mi mi=inc 5 8 2 4`. Which syllable hides which operation is drawn
per WORLD, after the model has been trained, so that only experience can reveal it; names share syllables, so what one
problem teaches holds for others.

Before that, the model is trained on endless worlds drawn afresh for every example, so that nothing about any of them can
be memorised, to (1) attempt problems, guessing operations it was not told; (2) use memory in its prompt, in the words of
memory.compose, 4% of whose lines are wrong; (3) write strategies and lessons from attempts, and (4) behaviors from
insights, in the words and the JSON of memory.py. It is a Qwen3 decoder and an ordinary Hugging Face folder.

The verifier compares the digits after EVERY step: with the final digits alone most successes of long names would be
accidents, and a memory turns accidents into rules.
"""

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import memory as mem  # noqa: E402  (the prompts' words come from the very code that will use them)

HIDDEN = "ba de fi go ha ju ka le mi no pu ra se ti vo wu xa ye zi lo ku ma ne ro".split()
KNOWN = {"ki": "rev", "zo": "inc", "du": "flip", "pa": "dec"}  # in the weights after pre-training, and in no world: so
SYLLABLES = HIDDEN + list(KNOWN)  # the model learns to hold facts in its weights and to keep them beside a memory
OPERATIONS = {
    "rev": lambda d: d[::-1],
    "rol": lambda d: d[1:] + d[:1],
    "ror": lambda d: d[-1:] + d[:-1],
    "swap": lambda d: [d[1], d[0], d[3], d[2]],
    "flip": lambda d: d[2:] + d[:2],
    "inc": lambda d: [(x + 1) % 10 for x in d],
    "dec": lambda d: [(x - 1) % 10 for x in d],
    "neg": lambda d: [9 - x for x in d],
}
WRONG = 0.04  # share of memory lines that are wrong on purpose in pre-training
NAMES = ((1, 8), (2, 14), (3, 18))  # names of each length in a world: 3% of uniform guesses succeed
INPUTS = 4  # inputs per name, in train and again in test


def problem_text(name, digits):
    return f"Apply {' '.join(name)} to {' '.join(map(str, digits))}"


def attempt_text(name, operations, digits, slip=None):
    """The completion that applies `operations` in turn; with `slip` a rng that miscalculates one step."""
    words, wrong_at = list(map(str, digits)), slip.randrange(len(name)) if slip else -1
    for i, (syllable, op) in enumerate(zip(name, operations, strict=True)):
        digits = OPERATIONS[op](digits)
        if i == wrong_at:
            digits = [(x + 1) % 10 if j == 0 else x for j, x in enumerate(digits)]
        words += [syllable, f"{syllable}={op}", *map(str, digits)]
    return " ".join(words)


def answer_text(name, operations, digits):
    """What the verifier compares: the completion with the names of the operations left open."""
    return " ".join(w.split("=")[0] + "=*" if "=" in w else w for w in attempt_text(name, operations, digits).split())


# ---------------------------------------------------------------------------------------------------------------------
# Worlds
# ---------------------------------------------------------------------------------------------------------------------

def make_world(seed, names=NAMES, inputs=INPUTS, shared=True):
    """(train rows, test rows): 40 names, each with 4 train and 4 other test inputs, and the secret map behind them.

    Syllables come in three tiers of eight; the first alone forms the one-syllable names, the second appears only in
    longer names, the third only in the longest: a natural curriculum. A row's `hidden` is read by diagnostics only.

    The study turns these knobs: names, (length, how many) pairs by length; inputs, per name and split; shared, whether
    names share syllables (if not, there have to be enough of them).
    """
    rng = random.Random(f"nano world {seed}")
    order = rng.sample(HIDDEN, len(HIDDEN))
    secret = {s: rng.choice(list(OPERATIONS)) for s in HIDDEN}
    tiers, unused = [order[:8], order[8:16], order[16:]], iter(order)
    counts, names = names, []
    for length, _ in counts:
        pool = sum(tiers[: length - 1], [])
        while len(names) < sum(c for n, c in counts if n <= length):
            if not shared:
                names.append([next(unused) for _ in range(length)])
                continue
            newest = tiers[length - 1][len(names) % 8]  # every syllable of the tier in turn, so that each is shared
            used = Counter(sum(names, []))  # partners: those used least so far, so that each is shared
            name = sorted(pool, key=lambda s: (used[s], rng.random()))[: length - 1] + [newest]
            rng.shuffle(name)
            if name not in names:
                names.append(name)
    train, test = [], []
    for name in names:
        drawn = set()
        while len(drawn) < 2 * inputs:
            drawn.add(tuple(rng.sample(range(10), 4)))
        for i, digits in enumerate(sorted(drawn, key=lambda d: rng.random())):
            operations = [secret[s] for s in name]
            row = {"id": f"{'-'.join(name)}-{''.join(map(str, digits))}", "prompt": problem_text(name, list(digits)),
                   "answer": answer_text(name, operations, list(digits)), "verifier": "steps",
                   "hidden": " ".join(f"{s}={o}" for s, o in zip(name, operations, strict=True))}
            (train if i < inputs else test).append(row)
    return train, test


def write_world(seed, folder, **knobs):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(("train", "test"), make_world(seed, **knobs), strict=True):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training examples: (prompt, reply) texts, each from a world of its own
# ---------------------------------------------------------------------------------------------------------------------

def draw(rng, lengths=(1, 2, 2, 3, 3)):
    return rng.sample(SYLLABLES, rng.choice(lengths)), draw_secret(rng), rng.sample(range(10), 4)


def draw_secret(rng):
    return {s: rng.choice(list(OPERATIONS)) for s in HIDDEN} | KNOWN


def told(rng, syllable, secret):
    """A memory's word on a syllable: true but for WRONG of the time."""
    return f"{syllable}={rng.choice(list(OPERATIONS)) if rng.random() < WRONG else secret[syllable]}"


def failed(rng, name, secret, n=1):
    """Up to n different attempts (operations) with at least one wrong, of a policy that knows some syllables better."""
    skill, found = {s: rng.choice((0.0, 0.0, 0.5, 0.95)) for s in name}, []
    for _ in range(8 * n):
        operations = [secret[s] if rng.random() < skill[s] else rng.choice(list(OPERATIONS)) for s in name]
        if operations != [secret[s] for s in name] and operations not in found:
            found.append(operations)
    return found[:n] if found or not n else failed(rng, name, secret, n)


def trap(name, operations):
    return " ".join(f"{s}!{o}" for s, o in zip(name, operations, strict=True))


def plain(rng):
    name, secret, digits = draw(rng)
    return problem_text(name, digits), attempt_text(name, [secret[s] for s in name], digits)


def with_memory(rng):
    name, secret, digits = draw(rng)
    truth = attempt_text(name, [secret[s] for s in name], digits)
    shown = set(rng.choice("s b e x s b e x sb se be sx sbe sbx l bl sl sel sbel sblx".split()))
    some = name if rng.random() < 0.7 else rng.sample(name, rng.randint(1, len(name)))
    relevant = [s for s in name if rng.random() < 0.85]
    others = rng.sample([s for s in SYLLABLES if s not in name], 3)
    bank = (relevant + others)[:3]
    rng.shuffle(bank)
    # another problem of the same name, or one that shares a syllable
    other, other_digits = name if rng.random() < 0.8 else [rng.choice(name), *others[:1]], rng.sample(range(10), 4)
    prompt = mem.compose(
        problem_text(name, digits),
        strategies=[("rule", told(rng, s, secret)) for s in some] if "s" in shown else [],
        lessons=[("trap", trap(name, f)) for f in failed(rng, name, secret, rng.choice((1, 2, 3, 5, 7, 10)))]
        if "l" in shown else [],
        behaviors=[(f"behavior_{s}", told(rng, s, secret)) for s in bank] if "b" in shown else [],
        examples=[(problem_text(other, other_digits), attempt_text(other, [secret[s] for s in other], other_digits))]
        if "x" in shown else [],
        solution=truth if "e" in shown else "")
    return prompt, truth


def items_json(strategies, lessons):
    return json.dumps({"strategies": [{"title": "rule", "content": s} for s in strategies],
                       "lessons": [{"title": "trap", "content": t} for t in lessons]})


def reflection(rng):
    name, secret, digits = draw(rng)
    n_failed = rng.choice((0, 1, 1, 1, 2, 3))
    wins = 0 if n_failed and rng.random() < 0.4 else 1
    truth = [secret[s] for s in name]
    tries = [truth if rng.random() < 0.1 else ops for ops in failed(rng, name, secret, n_failed)]
    losses = [(attempt_text(name, ops, digits, slip=rng if ops == truth or rng.random() < 0.05 else None), "")
              for ops in tries]
    solved, total = rng.randint(wins, 8), 8
    prompt = mem.reflection_prompt(mem.NANO, problem_text(name, digits), [attempt_text(name, truth, digits)] * wins,
                                   losses, solved, total)
    rules = [f"{s}={o}" for s, o in zip(name, truth, strict=True)] if wins else []
    return prompt, items_json(rules, [trap(name, ops) for ops in tries])


def abstraction(rng):
    """Behaviors of a cluster: a rule that two problems hold becomes one (an update where one of its name is known), a
    known one that a lesson of a one-syllable name excludes is removed."""
    names = [draw(rng)[0] for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    if len(names) > 1:  # names of a cluster share syllables
        names[1] = [names[0][0], *(s for s in names[1] if s != names[0][0])][:3]
    secret = draw_secret(rng)
    cluster, support, excluded = [], {}, set()
    for _ in range(rng.randint(1, 8)):
        name = rng.choice(names)
        rules = [told(rng, s, secret) for s in name] if rng.random() < 0.7 else []
        n_traps = rng.choice((0, 0, 1, 2, 3) if rules else (1, 2, 3))
        traps = [trap(name, f) for f in failed(rng, name, secret, n_traps)]
        for rule in rules:
            support[rule] = support.get(rule, 0) + 1
        excluded |= {t.replace("!", "=") for t in traps if len(name) == 1}
        lines = [f"- rule: {r}" for r in rules] + [f"- trap: {t}" for t in traps]
        cluster.append((problem_text(name, rng.sample(range(10), 4)), lines))
    found = {}  # syllable -> its rule with two supports or more, in order of appearance
    for rule, n in support.items():
        syllable = rule.split("=")[0]
        if n >= 2 and n > support.get(found.get(syllable), 0):
            found[syllable] = rule
    known = {}
    if rng.random() < 0.5:
        about = sorted({s for name in names for s in name}) + rng.sample(SYLLABLES, 4)
        for s in rng.sample(about, min(len(about), rng.randint(1, 8))):
            known[s] = f"{s}={secret[s] if rng.random() < 0.6 else rng.choice(list(OPERATIONS))}"
    prompt = mem.abstraction_prompt(mem.NANO, cluster, [(f"behavior_{s}", r) for s, r in known.items()])
    if not known:
        reply = {"behaviors": [{"name": f"behavior_{s}", "instruction": r} for s, r in found.items()]}
    else:
        actions = [{"action": "update" if s in known else "new", "name": f"behavior_{s}", "instruction": r}
                   for s, r in found.items()]
        actions += [{"action": "remove", "name": f"behavior_{s}", "instruction": r}
                    for s, r in known.items() if r in excluded and s not in found]
        reply = {"actions": actions}
    return prompt, json.dumps(reply)


MIX = ((with_memory, 0.48), (plain, 0.14), (reflection, 0.18), (abstraction, 0.20))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: words; the prompts' fixed lines and the pieces of the JSON frame are single, ordinary tokens
# ---------------------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}")

JSON_FRAME = [
    '{"strategies": [{"title": "rule", "content": "', '"}, {"title": "rule", "content": "',
    '"}], "lessons": [{"title": "trap", "content": "', '{"strategies": [], "lessons": [{"title": "trap", "content": "',
    '"}, {"title": "trap", "content": "', '"}], "lessons": []}', '{"strategies": [], "lessons": []}', '"}]}',
    '{"behaviors": [{"name": "', '", "instruction": "', '"}, {"name": "', '{"behaviors": []}', '{"actions": []}',
    *(f'{{"actions": [{{"action": "{a}", "name": "' for a in ("new", "update", "remove")),
    *(f'"}}, {{"action": "{a}", "name": "' for a in ("new", "update", "remove"))]


def make_tokenizer():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    form_lines = [v for k, v in vars(mem.NANO).items() if k not in ("key_term", "confidence", "literal")]
    form_lines += [mem.NANO.confidence.format(label=label) for label in ("low", "medium", "high")]
    phrases = [*form_lines, mem.STRATEGIES, mem.LESSONS, mem.BEHAVIORS, mem.EXAMPLES, mem.SOLUTION, mem.FEEDBACK,
               mem.CLOSING, *JSON_FRAME]
    words = ["system", "user", "assistant", "Apply", "to", "-", "rule:", "trap:", "1.", "2.", "3."]
    words += [str(d) for d in range(10)] + SYLLABLES + list(OPERATIONS)
    words += [f"{s}{sign}{o}" for sign in "=!" for s in SYLLABLES for o in OPERATIONS]
    words += [f"behavior_{s}{colon}" for colon in ("", ":") for s in SYLLABLES]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    vocab = {w: i for i, w in enumerate(special + words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_tokens([AddedToken(p, special=False, normalized=False) for p in dict.fromkeys(phrases)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        unk_token="<|unk|>", additional_special_tokens=["<|im_start|>"],
                                        clean_up_tokenization_spaces=False, model_max_length=1024)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

def make_model(tokenizer, seed, hidden_size=96, layers=4):
    """A Qwen3 decoder of about 0.5M parameters. A pair's embedding (`vo=rev`) starts as the sum of its parts: with that,
    using memory in context forms within hundreds of steps; without it, not within thousands."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, head_dim=32,  # 32: vLLM's least on a CPU
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.1, use_cache=True)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        table, ids = model.get_input_embeddings().weight, tokenizer.get_vocab()
        not_ = {o: torch.randn(config.hidden_size) * config.initializer_range for o in OPERATIONS}
        for s in SYLLABLES:
            for o in OPERATIONS:  # "not rev" gets a direction of its own, or a lesson would advertise what it warns of
                table[ids[f"{s}={o}"]] = table[ids[s]] + table[ids[o]]
                table[ids[f"{s}!{o}"]] = table[ids[s]] + not_[o]
    return model


def encode(tokenizer, pairs):
    """(ids, length of the prompt) of each (prompt, reply) pair, the reply closed by EOS."""
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
               for p, _ in pairs]
    sides = [tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, [r for _, r in pairs])]
    return [(p + r + [tokenizer.eos_token_id], len(p)) for p, r in zip(*sides, strict=True)]


def pretrain(seed, steps, batch_size, folder, hidden_size=96, layers=4):
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    torch.set_num_threads(1)
    rng, tokenizer = random.Random(f"nano model {seed}"), make_tokenizer()
    model = make_model(tokenizer, seed, hidden_size, layers)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    kinds, shares = zip(*MIX, strict=True)
    bar = tqdm(range(1, steps + 1), mininterval=5)
    for step in bar:
        rate = 3e-3 * min(1.0, step / 100, 2.0 * (1 - step / (steps + 1)))  # warm-up, constant, linear decay by half time
        for group in optimizer.param_groups:
            group["lr"] = rate
        kinds_drawn = rng.choices(kinds, shares, k=batch_size)
        optimizer.zero_grad()
        batches = [encode(tokenizer, [one(rng) for _ in range(n)]) for one, n in Counter(kinds_drawn).items()]
        total, loss = sum(len(ids) - start for rows in batches for ids, start in rows), 0.0
        for rows in batches:  # kind by kind: like lengths, little padding
            tokens = torch.full((len(rows), max(len(ids) for ids, _ in rows)), tokenizer.pad_token_id)
            labels = torch.full_like(tokens, -100)
            for i, (ids, start) in enumerate(rows):
                tokens[i, : len(ids)] = torch.tensor(ids)
                labels[i, start: len(ids)] = torch.tensor(ids[start:])
            hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]  # right padding, causal: no mask is needed
            wanted = labels[:, 1:] != -100
            part = F.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted], reduction="sum") / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps:
            scores = probe(model, tokenizer, n=64)
            bar.write(f"{step} loss {loss:.3f} " + " ".join(f"{k} {v:.2f}" for k, v in scores.items()))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Probes
# ---------------------------------------------------------------------------------------------------------------------

def generate(model, tokenizer, prompts, max_new_tokens=96):
    """Greedy replies, as texts."""
    import torch

    tokenizer.padding_side = "left"
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
             for p in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
                             max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)


def probe(model, tokenizer, n=256, seed=10_000):
    """What the checkpoint can do, as shares of n problems of unseen worlds (greedy replies).

    execution: the digits follow the operation it named. strategy, behavior, sibling, example: solves a problem whose
    operations only that block tells; an example is another problem of that name. reflect_win, reflect_loss: the insight of
    one attempt is exactly what it holds; contrastive: of one success and one failure. abstract: the behaviors of a cluster,
    exactly. weights: solves what it holds in its weights; weights_beside_lessons: also with lessons of failed attempts in
    the prompt. entropy: nats over the operations of a syllable it was told nothing about (ln 8 = 2.08 is calibrated
    ignorance).
    """
    import torch

    rng, scores = random.Random(seed), {}
    draws = [draw(rng) for _ in range(n)]
    truths = [attempt_text(name, [secret[s] for s in name], digits) for name, secret, digits in draws]
    problems = [problem_text(name, digits) for name, _, digits in draws]

    def executes(text, name, digits):
        operations = [w.split("=")[1] for w in text.split() if "=" in w]
        return (len(operations) == len(name) and all(o in OPERATIONS for o in operations)
                and text == attempt_text(name, operations, digits))

    replies = generate(model, tokenizer, problems)
    scores["execution"] = sum(executes(r, name, d) for r, (name, _, d) in zip(replies, draws, strict=True)) / n
    rules = [[("rule", f"{s}={secret[s]}") for s in name] for name, secret, _ in draws]
    banks = []
    for name, secret, _ in draws:
        bank = (name + rng.sample([s for s in SYLLABLES if s not in name], 3))[:3]
        banks.append([(f"behavior_{s}", f"{s}={secret[s]}") for s in rng.sample(bank, 3)])
    for kind, prompts in {
            "strategy": [mem.compose(p, strategies=r) for p, r in zip(problems, rules, strict=True)],
            "behavior": [mem.compose(p, behaviors=b) for p, b in zip(problems, banks, strict=True)],
            "sibling": [mem.compose(p, solution=t) for p, t in zip(problems, truths, strict=True)],
            "example": [mem.compose(p, examples=[(problem_text(name, d[::-1]),
                                                  attempt_text(name, [secret[s] for s in name], d[::-1]))])
                        for p, (name, secret, d) in zip(problems, draws, strict=True)]}.items():
        scores[kind] = sum(r == t for r, t in zip(generate(model, tokenizer, prompts), truths, strict=True)) / n

    def same(reply, wanted):
        fields = {"strategies": ("title", "content"), "lessons": ("title", "content"),
                  "behaviors": ("name", "instruction"), "actions": ("action", "name", "instruction")}
        found, wanted = mem.parse(reply), json.loads(wanted)
        return found is not None and found.keys() == wanted.keys() and all(
            mem.parse_items(found, k, *pair) == mem.parse_items(wanted, k, *pair)
            for k in wanted for pair in zip(fields[k], fields[k][1:], strict=False))

    failures = [failed(rng, name, secret)[0] for name, secret, _ in draws]
    lost = [attempt_text(name, f, d) for (name, _, d), f in zip(draws, failures, strict=True)]
    traps = [trap(name, f) for (name, _, _), f in zip(draws, failures, strict=True)]
    contents = [[c for _, c in r] for r in rules]
    for kind, prompts, wanted in (
            ("reflect_win", [mem.reflection_prompt(mem.NANO, p, [t], [], 1, 8)
                             for p, t in zip(problems, truths, strict=True)], [items_json(c, []) for c in contents]),
            ("reflect_loss", [mem.reflection_prompt(mem.NANO, p, [], [(t, "")], 0, 8)
                              for p, t in zip(problems, lost, strict=True)], [items_json([], [t]) for t in traps]),
            ("contrastive", [mem.reflection_prompt(mem.NANO, p, [t], [(x, "")], 1, 8)
                             for p, t, x in zip(problems, truths, lost, strict=True)],
             [items_json(c, [t]) for c, t in zip(contents, traps, strict=True)])):
        replies = generate(model, tokenizer, prompts)
        scores[kind] = sum(same(r, w) for r, w in zip(replies, wanted, strict=True)) / n
    prompts, wanted = zip(*[abstraction(rng) for _ in range(n)], strict=True)
    scores["abstract"] = sum(same(r, w) for r, w in zip(generate(model, tokenizer, prompts), wanted, strict=True)) / n

    known = [([s, t], [3, 1, 7, 4]) for s in KNOWN for t in KNOWN if s != t]
    truths = [attempt_text(name, [KNOWN[s] for s in name], digits) for name, digits in known]
    for kind, lessons in (("weights", 0), ("weights_beside_lessons", 6)):
        prompts = [mem.compose(problem_text(name, digits), lessons=[
            ("trap", trap(name, f)) for f in failed(rng, name, KNOWN, lessons)[:lessons]]) for name, digits in known]
        replies = generate(model, tokenizer, prompts)
        scores[kind] = sum(r == t for r, t in zip(replies, truths, strict=True)) / len(known)

    choices = torch.tensor([[tokenizer.get_vocab()[f"{s}={o}"] for o in OPERATIONS] for s in HIDDEN])
    rows = encode(tokenizer, [(problem_text([s], [3, 1, 7, 4]), f"3 1 7 4 {s}") for s in HIDDEN])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1] for ids, _ in rows])).logits[:, -1].log_softmax(-1)
    logp = logits.gather(1, choices)
    scores["entropy"] = float(-(logp.exp() * logp).sum(1).mean())
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("model", "world", "probe"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder to write to (default: nano/, or nano/worlds/SEED)")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--hidden_size", type=int, default=96, help="with --layers: the study's other sizes")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    if args.what == "world":
        write_world(args.seed, args.out or HERE / "worlds" / str(args.seed))
    elif args.what == "model":
        pretrain(args.seed, args.steps, args.batch_size, args.out or HERE, args.hidden_size, args.layers)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = args.out or HERE
        found = probe(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        print("\n".join(f"{k:14s} {v:.3f}" for k, v in found.items()))
