"""The embedded world: a tiny chat model that knows how to learn, and worlds whose secret only
experience reveals.

    python nano/make.py model --seed 0             # tokenizer and checkpoint (30 to 70 CPU-minutes)
    python nano/make.py world --seed 3 [--plain]   # task files, into nano/worlds/[plain/]3
    python nano/make.py probe                      # what the checkpoint reads and can do

world.py says what a problem is. Every training example has a world of its own (examples.py), so
that nothing about a world can be memorised. The model learns to

- attempt problems, and guess the operations that it was not told;
- use a memory in its prompt, in the words of memory.compose, lessons of both forms included;
- write strategies and lessons from attempts, and behaviors from insights, in the words and the
  JSON of memory.py;
- read the prompts of other methods: a critique, the beginning of a solution, a cue to revise, a
  second message;
- say how sure it is.

It is a Qwen3 decoder in an ordinary Hugging Face folder. probes.py compares its beliefs with those
of an exact reader.
"""

import argparse
import random
import re
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import memory as mem  # noqa: E402
from nano.examples import LEVELS, OPS, PHASES, Example, draw_examples, prompt_ids  # noqa: E402
from nano.probes import probe, reading, table  # noqa: E402
from nano.world import OPERATIONS, SYLLABLES, write_world  # noqa: E402

LENGTHS = (800, 600, 1400, 1800, 1900)  # steps of the phases
RATES = (3e-3, 3e-3, 2e-3, 2e-3, 2e-3)  # their learning rates
FALLING = (3, 4)  # the phases at whose end the rate is 0
COMPARING = 1  # the phase that goes on until the model compares whole combinations
LONGER = 3000  # the most steps by which it goes on
ROUND = 200  # steps between two looks at whether it does
KEEP_EVERY = 100  # steps, after which an interrupted training can go on
COMPARES = 0.2  # what then is left at most on the operations that they warn of

# --------------------------------------------------------------------------------------------------
# Tokenizer: words; the prompts' fixed lines and the pieces of the JSON frame are single tokens
# --------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)

JSON_FRAME = [
    '{"strategies": [{"title": "rule", "content": "',
    '"}, {"title": "rule", "content": "',
    '"}], "lessons": [{"title": "trap", "content": "',
    '{"strategies": [], "lessons": [{"title": "trap", "content": "',
    '"}, {"title": "trap", "content": "',
    '"}], "lessons": []}',
    '{"strategies": [], "lessons": []}',
    '"}]}',
    '{"behaviors": [{"name": "',
    '", "instruction": "',
    '"}, {"name": "',
    '{"behaviors": []}',
    '{"actions": []}',
    *(f'{{"actions": [{{"action": "{a}", "name": "' for a in ("new", "update", "remove")),
    *(f'"}}, {{"action": "{a}", "name": "' for a in ("new", "update", "remove")),
]


def whole_lessons():
    """(pattern, replacement) pairs that make `trap: vo!rev mi!inc ku!rol` into `trap: vo &rev mi
    &rev&inc ku &rev&inc%rol`.

    In a lesson about a whole combination each operation so becomes a token that also names the
    operations before it: only together do they say what the lesson excludes, and where. The last
    one has a sign of its own.
    """
    follows = "(?=[a-z]{3,4} [a-z]{2}!)"
    rules = [(f"(?<=trap: [a-z]{{2}})!{follows}", " &")]
    for o in OPERATIONS:
        second = f"(?<=[a-z] &{o} [a-z]{{2}})!"
        rules += [(second + follows, f" &{o}&"), (second, f" &{o}%")]
    for o in OPERATIONS:
        rules += [(f"(?<= &{o}&{p} [a-z]{{2}})!", f" &{o}&{p}%") for p in OPERATIONS]
    return rules


def later_steps():
    """(pattern, replacement) pairs that make `vo=rev 4 7 1 3 mi mi=inc 5 8 2 4 ku` in an attempt
    into `vo=rev 4 7 1 3 rev>mi mi=inc 5 8 2 4 rev>inc>ku`.

    A later step's syllable so becomes a token that also names the operations before it, as the
    tokens of a lesson do: the two can be compared as directly as the syllables of a problem and of
    a lesson about one step. The decoder removes what is added.
    """
    digits = r" \d \d \d \d"
    rules = [(f"(?<=={o}{digits}) (?=[a-z]{{2}}(?![a-z]))", f" {o}>") for o in OPERATIONS]
    for o in OPERATIONS:
        rules += [
            (f"(?<= {o}>[a-z]{{2}} [a-z]{{2}}={p}{digits}) {p}>", f" {o}>{p}>") for p in OPERATIONS
        ]
    return rules


def phrases() -> list[str]:
    """The prompts' fixed lines and the pieces of the JSON frame: each is one token."""
    form_lines = [
        v for k, v in vars(mem.NANO).items() if k not in ("key_term", "confidence", "literal")
    ]
    form_lines += [mem.NANO.confidence.format(label=label) for label in ("low", "medium", "high")]
    return [
        *form_lines,
        mem.STRATEGIES,
        mem.LESSONS,
        mem.BEHAVIORS,
        mem.EXAMPLES,
        mem.SOLUTION,
        mem.FEEDBACK,
        mem.CLOSING,
        mem.CRITIQUE,
        mem.BEGINNING,
        mem.REVISE_WRONG,
        mem.REVISE_RIGHT,
        mem.AGAIN,
        mem.CRITIC,
        mem.ASK_CONFIDENCE,
        *JSON_FRAME,
    ]


def words() -> list[str]:
    """All other tokens but the special ones."""
    words = "system user assistant Apply to - rule: trap: 1. 2. 3.".split()
    words += [mem.CONFIDENCE, *LEVELS]
    words += [str(d) for d in range(10)] + SYLLABLES + list(OPERATIONS)
    words += [f"{s}{sign}{o}" for sign in "=!" for s in SYLLABLES for o in OPERATIONS]
    words += [f"&{o}" for o in OPERATIONS]
    words += [f"&{o}{sign}{p}" for sign in "&%=" for o in OPERATIONS for p in OPERATIONS]
    words += [
        f"&{o}&{p}{sign}{q}"
        for sign in "%="
        for o in OPERATIONS
        for p in OPERATIONS
        for q in OPERATIONS
    ]
    words += [f"{o}>{s}" for o in OPERATIONS for s in SYLLABLES]
    words += [f"{o}>{p}>{s}" for o in OPERATIONS for p in OPERATIONS for s in SYLLABLES]
    words += [f"behavior_{s}{colon}" for colon in ("", ":") for s in SYLLABLES]
    return words


def make_tokenizer():
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    vocab = {w: i for i, w in enumerate(special + words())}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    rules = [*whole_lessons(), *later_steps()]
    core.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(pattern), new) for pattern, new in rules]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # a space between words
    core.decoder = decoders.Sequence(
        [decoders.Replace(Regex("[a-z]+>"), ""), decoders.WordPiece(prefix="##", cleanup=False)]
    )
    core.add_tokens(
        [AddedToken(p, special=False, normalized=False) for p in dict.fromkeys(phrases())]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


def make_model(tokenizer, seed, hidden_size=96, layers=4):
    """A Qwen3 decoder of about 0.86M parameters, its weights drawn at random."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,  # 32: vLLM's least on a CPU
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
        use_cache=True,
    )
    return Qwen3ForCausalLM(config)


class Parts:
    """The embeddings of pre-training: those of words with parts are sums, of vo and =rev for
    vo=rev, of vo and !rev for vo!rev, of vo and "behavior" for behavior_vo. So what is learned of
    one pair holds for all 224, and using memory in context forms within hundreds of steps; with
    rows of their own that start at random, not within thousands. The checkpoint holds the sums as
    an ordinary table.
    """

    def __init__(self, tokenizer, table):
        """table: (vocabulary, H), the model's, tied to its output; it is overwritten with sums of
        parts.
        """
        import torch

        vocabulary = tokenizer.get_vocab()  # in another order in every process
        parts_of = {token: parts(token) for token in sorted(vocabulary, key=vocabulary.get)}
        each = dict.fromkeys(part for found in parts_of.values() for part in found)
        number = {part: i for i, part in enumerate(each)}
        self.table = table
        self.sums = torch.zeros(len(table), len(number))  # (V, parts): which parts each token has
        for token, i in tokenizer.get_vocab().items():
            self.sums[i, [number[part] for part in parts_of[token]]] = 1.0
        weight = torch.randn(len(number), table.shape[1]) * 0.1
        warning = torch.randn(table.shape[1]) * 0.1
        # what brings an operation into an answer then also keeps one out of it
        for o in OPERATIONS:
            weight[number[f"!{o}"]] = weight[number[f"%{o}"]] = warning - weight[number[f"={o}"]]
            # a lesson is compared with an attempt by these, among all else that its tokens hold
            for place in (1, 2):
                weight[number[f"{place}{o}"]] *= 2
        self.weight = torch.nn.Parameter(weight)
        self.fill()

    def take_gradient(self):
        """From the table's, which is used up."""
        self.weight.grad, self.table.grad = self.sums.T @ self.table.grad, None

    def fill(self):
        self.table.data.copy_(self.sums @ self.weight.data)


def parts(token) -> tuple:
    """`vo=rev` -> vo, =rev, =; `behavior_vo:` -> vo, behavior_:; `&rev&inc%rol` -> 1rev, 2inc,
    %rol, and 3 for its place; `rev>inc>ku` -> ku, 1rev, 2inc; any other token is whole.
    """
    pair = re.fullmatch(r"([a-z]+)(([=!])[a-z]+)", token)
    name = re.fullmatch(r"(behavior_)([a-z]+)(:?)", token)
    if pair:
        return pair.groups()
    if name:
        return name[2], name[1] + name[3]
    steps = re.findall(r"[&%=][a-z]+", token)
    if not steps and ">" in token and "<" not in token:
        *ops, syllable = token.split(">")
        return (syllable, *(f"{i}{o}" for i, o in enumerate(ops, 1)))
    if not steps:
        return (token,)
    before = [f"{i}{step[1:]}" for i, step in enumerate(steps[:-1], 1)]
    return (*before, steps[-1], f"place {len(steps)}")


def encode(tokenizer, pairs):
    """(ids, length of the prompt) of each Example or (prompt, reply) pair, the reply closed by
    EOS.
    """
    examples = [e if isinstance(e, Example) else Example(*e) for e in pairs]
    replies = tokenizer([e.reply for e in examples], add_special_tokens=False)["input_ids"]
    return [
        (p + r + [tokenizer.eos_token_id], len(p))
        for p, r in zip(prompt_ids(tokenizer, examples), replies, strict=True)
    ]


def loss_of(model, tokenizer, examples):
    """(summed cross-entropy of the replies, their tokens): to the reader's distribution where an
    operation is named.
    """
    import torch
    import torch.nn.functional as F

    rows, vocabulary = encode(tokenizer, examples), tokenizer.get_vocab()
    tokens = torch.full((len(rows), max(len(ids) for ids, _ in rows)), tokenizer.pad_token_id)
    labels = torch.full_like(tokens, -100)
    where, choices, shares = [], [], []
    for i, (example, (ids, start)) in enumerate(zip(examples, rows, strict=True)):
        tokens[i, : len(ids)] = torch.tensor(ids)
        labels[i, start : len(ids)] = torch.tensor(ids[start:])
        # a reply with operations is one token a word
        for word, syllable, distribution in example.targets():
            where.append((i, start + word - 1))
            choices.append([vocabulary[f"{syllable}={o}"] for o in OPS])
            shares.append(distribution)
            labels[i, start + word] = -100
    # right padding, causal: no mask is needed
    hidden = model.model(input_ids=tokens).last_hidden_state
    wanted = labels[:, 1:] != -100
    loss = F.cross_entropy(
        model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted], reduction="sum"
    )
    if where:
        logprobs = (
            model.lm_head(hidden[tuple(torch.tensor(where).T)])
            .log_softmax(-1)
            .gather(1, torch.tensor(choices))
        )
        loss = loss - (torch.tensor(np.array(shares), dtype=logprobs.dtype) * logprobs).sum()
    return loss, int(wanted.sum()) + len(where)


class Training:
    """A model with the optimizer and the examples of its phase."""

    def __init__(self, seed, batch_size, hidden_size, layers, lengths):
        self.seed, self.batch_size, self.taken = seed, batch_size, 0
        self.settings = [seed, batch_size, hidden_size, layers, lengths]
        self.tokenizer = make_tokenizer()
        self.model = make_model(self.tokenizer, seed, hidden_size, layers)
        table = self.model.get_input_embeddings().weight
        self.embeddings = Parts(self.tokenizer, table)
        self.trained = [p for p in self.model.parameters() if p is not table]
        self.trained.insert(0, self.embeddings.weight)

    def begin(self, phase):
        import torch

        self.phase = phase
        later = f", phase {phase}" if phase else ""
        self.rng = random.Random(f"nano model {self.seed}{later}")
        self.optimizer = torch.optim.AdamW(self.trained, betas=(0.9, 0.98), weight_decay=0.01)

    def step(self, rate) -> float:
        """Takes a step at a learning rate, and gives its loss."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = rate
        examples = draw_examples(self.rng, self.batch_size, PHASES[self.phase])
        examples.sort(key=lambda e: len(e.prompt) + len(e.given))  # little padding
        parts = [examples[i : i + 16] for i in range(0, self.batch_size, 16)]
        self.optimizer.zero_grad()
        losses = [loss_of(self.model, self.tokenizer, part) for part in parts]
        loss = sum(part for part, _ in losses) / sum(n for _, n in losses)
        loss.backward()
        self.embeddings.take_gradient()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.embeddings.fill()
        self.taken += 1
        return loss.item()

    def compares(self) -> bool:
        """Says whether whole combinations are read, by questions that no table asks."""
        found = reading(self.model, self.tokenizer, 128, seed=20_000, blocks=("lessons, whole",))
        return max(row["warned"][0] for row in found.values()) <= COMPARES

    def looks(self) -> str:
        """A line of probes."""
        found = reading(self.model, self.tokenizer, n=32)
        scores = probe(self.model, self.tokenizer, n=32)
        warned = " ".join(f"{k} {v['warned'][0]:.3f}" for k, v in found.items() if "warned" in v)
        distance = " ".join(f"{k} {v['distance']:.3f}" for k, v in found.items())
        shares = " ".join(f"{k} {v:.2f}" for k, v in scores.items())
        return f"warned {warned}; distance {distance}; {shares}"

    def save(self, folder):
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def keep(self, path, done):
        """Writes all that `go_on` needs. done: steps of the phase so far."""
        import torch

        state = {"made by": self.settings, "phase": self.phase, "done": done, "taken": self.taken}
        state |= {"rng": self.rng.getstate(), "parts": self.embeddings.weight.data}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(path)

    def go_on(self, path) -> tuple[int, int]:
        """Takes up what `keep` wrote; returns the phase, and its steps so far.

        Raises ValueError if another training wrote it.
        """
        import torch

        state = torch.load(path)
        if state["made by"] != self.settings:
            raise ValueError(
                f"{path} is of a training with other settings; remove it, or give them"
            )
        self.begin(state["phase"])
        self.taken = state["taken"]
        self.rng.setstate(state["rng"])
        self.model.load_state_dict(state["model"])
        self.embeddings.weight.data.copy_(state["parts"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["phase"], state["done"]


def pretrain(seed, folder, shorter=1, batch_size=32, hidden_size=96, layers=4, look_every=1300):
    """Trains a checkpoint into `folder`, with a line of probes every so often; says how much CPU
    time it took. What was interrupted in the same folder goes on. shorter: divides the phases, for
    a try.

    PHASES: first all that is short, until what is told is copied; then what holds after certain
    steps only, until it is compared with the steps before; then mostly warnings, which are slow to
    learn; then everything, at a rate that falls to 0; then everything again, with more of what was
    not exact yet.
    """
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    started = time.process_time()
    lengths = [length // shorter for length in LENGTHS]
    training = Training(seed, batch_size, hidden_size, layers, lengths)
    size = sum(p.numel() for p in training.model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, {len(training.tokenizer)} tokens")
    folder.mkdir(parents=True, exist_ok=True)
    kept, first, done = folder / "training.pt", 0, 0
    if kept.exists():
        first, done = training.go_on(kept)
    bar = tqdm(total=sum(lengths), initial=training.taken, mininterval=60)
    for phase in range(first, len(lengths)):
        if not done:
            training.begin(phase)
        length = lengths[phase]
        longest = length + (LONGER // shorter if phase == COMPARING else 0)
        for i in range(done, longest):
            if i >= length:
                if (i - length) % ROUND == 0 and training.compares():
                    break
                if i == longest - 1:
                    bar.write("whole combinations are not compared: a seed to leave out")
                bar.total += 1
            left = (length - i) / length if phase in FALLING else 1.0
            loss = training.step(RATES[phase] * min(1, (i + 1) / 50, left))
            bar.update()
            if training.taken % look_every == 0:
                spent = time.process_time() - started
                bar.write(f"{training.taken} loss {loss:.3f} CPU {spent:.0f} s, {training.looks()}")
                training.save(folder)
            if training.taken % KEEP_EVERY == 0:
                training.keep(kept, i + 1)
        done = 0
    training.save(folder)
    kept.unlink(missing_ok=True)
    bar.write(training.looks())
    spent = time.process_time() - started
    print(f"{training.taken} steps, {spent:.0f} seconds of one core")
    return training.model, training.tokenizer


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("model", "world", "probe"), help="what to make, or to probe the model")
    seed = "of the model's training, or the number of the world (default: 0)"
    add("--seed", type=int, default=0, help=seed)
    add("--plain", action="store_true", help="world: its verifier gives no feedback")
    out = (
        "the folder that is written or probed. Without it `model` replaces the model that ships"
        " (default: nano/, nano/worlds/SEED or nano/worlds/plain/SEED)"
    )
    add("--out", type=Path, help=out)
    shorter = "model: divides the steps of each phase, for a try (default: 1)"
    add("--shorter", type=int, default=1, help=shorter)
    add("--batch_size", type=int, default=32, help="model: examples a step (default: 32)")
    sizes = "model: its width (default: 96). study/README.md has the other sizes of the study"
    add("--hidden_size", type=int, default=96, help=sizes)
    add("--layers", type=int, default=4, help="model: its decoder layers (default: 4)")
    add("-n", type=int, default=256, help="probe: problems for each row (default: 256)")
    args = parser.parse_args()
    folder = args.out or HERE
    if args.what == "world":
        kind = HERE / "worlds" / "plain" if args.plain else HERE / "worlds"
        write_world(args.seed, args.out or kind / str(args.seed), speaks=not args.plain)
    elif args.what == "model":
        sizes = args.batch_size, args.hidden_size, args.layers
        try:
            pretrain(args.seed, folder, args.shorter, *sizes)
        except ValueError as error:
            sys.exit(f"make.py: {error}")
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder)
        print(table(model, AutoTokenizer.from_pretrained(folder), args.n))


if __name__ == "__main__":
    main()
