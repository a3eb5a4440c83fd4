"""Other models that the memory asks: the embedder, and who writes behaviors."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from runtime.errors import RunError

EMBED_TOKENS = 4096  # a longer text is embedded by its start; approximate, and ours


@functools.cache
def load_embedder(name, device):
    """embed of a sentence-transformers model, float32 whatever type it was stored in; a ValueError
    if there is none of that name. Questions go in without the instruction Qwen3-Embedding knows for
    queries: gates and clusters compare like with like, and the paper has none.
    """
    # seconds to import, and nano does without
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name, device=device or None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--embedder {name} is neither a sentence-transformers folder nor a reachable name on"
            " the Hub; name another, or --embedder hashing, which needs no download"
        ) from error
    model.max_seq_length = min(model.max_seq_length or EMBED_TOKENS, EMBED_TOKENS)
    return lambda texts: unit_rows(
        model.encode(list(texts), normalize_embeddings=True, show_progress_bar=len(texts) > 999)
    )


def make_embedder(cfg):
    """embed(texts) -> (len(texts), D) float32, unit rows. hashing: words without digits and pairs
    of them.
    """
    if cfg.embedder != "hashing":
        return load_embedder(cfg.embedder, cfg.device)
    hasher = HashingVectorizer(
        n_features=1024, ngram_range=(1, 2), token_pattern=r"[^\W\d_]+", alternate_sign=False
    )
    return lambda texts: hasher.transform(texts).toarray().astype(np.float32)


def make_abstractor(cfg, check=False):
    """generate(prompts) -> texts for behaviors by `--abstractor openai:MODEL`, four requests at a
    time; None for the policy.

    check: asks for one word first. Raises ValueError if that fails, ConnectionError where the
    server stays silent later.
    """
    kind, _, model = cfg.abstractor.partition(":")
    if cfg.abstractor == "policy":
        return None
    if kind != "openai" or not model:
        raise ValueError(f"--abstractor is policy or openai:MODEL, not {cfg.abstractor!r}")
    from openai import OpenAI, OpenAIError  # a second to import

    def generate(
        prompts, timeout=120, retries=5
    ):  # seconds for one request; with growing pauses between
        def ask(prompt):
            reply = client.chat.completions.with_raw_response.create(
                model=model, messages=[{"role": "user", "content": prompt}]
            )
            return text_in(reply.text)

        try:
            # OPENAI_BASE_URL and OPENAI_API_KEY
            client = OpenAI(timeout=timeout, max_retries=retries)
            with ThreadPoolExecutor(4) as pool:
                return list(pool.map(ask, prompts))
        except (OpenAIError, ValueError) as error:
            raise ConnectionError(
                f"no answer for --abstractor {cfg.abstractor}: {error}; look at OPENAI_BASE_URL and"
                " OPENAI_API_KEY, or leave the flag out"
            ) from error

    if check:
        try:
            generate(["Say ready."], 20, 0)
        except ConnectionError as error:
            raise ValueError(str(error)) from error
    return generate


def text_in(body) -> str:
    """The text that a chat server's reply holds, given its body; "" where the model wrote none.

    Raises ValueError for what is no reply: some servers send their errors like one.
    """
    try:
        content = json.loads(body)["choices"][0]["message"].get("content") or ""
        if isinstance(content, list):  # of parts
            content = "".join(part.get("text") or "" for part in content)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        content = None
    if not isinstance(content, str):
        words = " ".join(body.split())[:200]
        raise ValueError(f"the server sent no reply of a model but {words!r}")
    return content


def unit_rows(rows) -> np.ndarray:
    """(n, D) numbers, in an array, lists or tensors of any type, as float32 rows of unit length.
    Zeros stay zeros.

    Raises RunError for what is no such table, and for numbers that are not finite.
    """
    try:
        # numpy: no bfloat16
        rows = [
            row.detach().float().cpu().numpy() if hasattr(row, "detach") else row for row in rows
        ]
        rows = np.array(rows, np.float64)
    except (TypeError, ValueError) as error:
        raise RunError(
            f"the embedder gave no table of numbers ({error}): name another --embedder"
        ) from error
    if rows.ndim != 2:
        raise RunError(
            f"the embedder gave an array of shape {rows.shape} where each text has to have a row:"
            " name another --embedder"
        )
    if not np.isfinite(rows).all():
        raise RunError(
            "the embedder gave numbers that are not finite, as float16 can: load it in float32, or"
            " name another --embedder"
        )
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    lengths[(lengths == 0) | (np.abs(lengths - 1) < 1e-6)] = (
        1  # what is of unit length stays as it is, to the bit
    )
    return (rows / lengths).astype(np.float32)
