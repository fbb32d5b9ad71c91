"""Calibration text sampled from the model itself, for those who have none."""

import hashlib
from typing import Any

import torch

from acttail.base.progress import Progress
from acttail.calibrate.text import Text
from acttail.errors import TextError
from acttail.model.weights import input_device

# Sequences sampled side by side: decoding is bound by reading the weights, so more rows cost little.
_BATCH = 16


def sample_text(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> Text:
    """Sample a text from a model at temperature 1, starting from its own first token.

    Args:
        model: a causal LM, dense.
        tokenizer: its tokenizer.
        tokens: about how many tokens.
        seed: of the sampling.
        progress: called with (tokens per sequence done, in all).

    Returns:
        A text named ``self@<hash>``.

    Raises:
        TextError: the tokenizer has no token to start from.
    """
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id)
    start = next((s for s in starts if isinstance(s, int)), None)
    if start is None:
        raise TextError("cannot sample a calibration text: the tokenizer has no BOS or EOS token")
    generator = torch.Generator(input_device(model)).manual_seed(seed)
    # A few more than asked: decoding and encoding again may merge tokens.
    length = -(-tokens * 5 // (4 * _BATCH))
    ids = torch.full((_BATCH, 1), start, device=input_device(model))
    cache, step = None, ids
    with torch.inference_mode():
        for i in range(length):
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            p = torch.softmax(output.logits[:, -1].float(), dim=-1)
            step = torch.multinomial(p, 1, generator=generator)
            ids = torch.cat([ids, step], dim=1)
            if progress is not None:
                progress(i + 1, length)
    parts = tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
    content = "\n\n".join(parts)
    return Text(f"self@{hashlib.sha256(content.encode()).hexdigest()[:12]}", content)
