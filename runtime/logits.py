"""What an architecture does to its logits, by its configuration: a scale, and a bound."""


def logit_scale(config) -> float:
    """Gives the number that a model multiplies its logits by: Cohere's, Falcon-H1's, Granite's.

    Hidden states are multiplied by it in place of the logits, which the kernels form.
    """
    text = config.get_text_config()
    scale = 1.0
    for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        value = getattr(text, name, None)
        if isinstance(value, (int, float)):
            scale *= value**power
    return scale


def softcap_of(config) -> float | None:
    """Gives the cap of a model whose logits are cap tanh(logits / cap): Gemma 2's, nanochat's."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)
