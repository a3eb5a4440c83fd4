"""Decoding that can write nothing but the JSON of a schema, by llguidance.

vLLM has the same library behind its structured outputs, so that both samplers follow one grammar.
"""

import functools

import llguidance
import llguidance.hf
import llguidance.numpy  # its torch module compiles at import, which takes seconds
import numpy as np
import torch
from transformers import LogitsProcessor

from runtime.errors import RunError


@functools.cache
def reader_of(tokenizer, size):
    """Returns llguidance's form of a tokenizer. size: of the model's vocabulary.

    Raises ValueError if llguidance can't read the tokenizer.
    """
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=size)


class Guide(LogitsProcessor):
    """Leaves each row the tokens that may follow under its schema, and the ends where it is whole.

    tokenizer, size: see reader_of. eos: the ids that end a text. schemas: one a row, of JSON; a row
    with None is left as it is.
    """

    def __init__(self, tokenizer, size, eos, schemas):
        reader = reader_of(tokenizer, size)
        self.matchers, self.eos, self.begun = [], sorted(eos), False
        for schema in schemas:
            matcher = None
            if schema:
                grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
                matcher = llguidance.LLMatcher(reader, grammar)
            self.matchers.append(matcher)

    def __call__(self, input_ids, scores):
        if self.begun:  # the last token was drawn from the scores before
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                if matcher and not matcher.is_stopped():
                    matcher.consume_token(token)
        self.begun = True
        mask = llguidance.numpy.allocate_token_bitmask(*scores.shape)
        for row, matcher in enumerate(self.matchers):
            if matcher and not matcher.is_stopped():
                llguidance.numpy.fill_next_token_bitmask(matcher, mask, row)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, count=scores.shape[1], bitorder="little")
        allowed = torch.from_numpy(bits).bool()  # (B, V)
        for row, matcher in enumerate(self.matchers):
            if not matcher:
                continue
            if matcher.get_error():
                raise RunError(
                    f"--memory_format guided failed ({matcher.get_error()}); use json or lines"
                )
            if matcher.is_stopped():  # the reply is whole
                allowed[row] = False
                allowed[row, self.eos] = True
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)
