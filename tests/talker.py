"""A tiny chat model that says what it is told to: which token follows is a property of the last one alone."""

import torch
from families import config
from transformers import AutoModelForCausalLM

# What begins the answer is the last character of the question.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if messages[-1].role == 'user' %}<assistant>{{ messages[-1].content[-1] }}{% endif %}"
)


def talker(folder, tokenizer, chains, *, context=20_000):
    """Write the model.

    Args:
        folder: to write to.
        tokenizer: of bytes; it gets a token per piece.
        chains: last character of a question -> pieces of the answer, each of them once in all chains; after
            the last comes the end, or the first again where the last is None.
    """
    pieces = [p for chain in chains.values() for p in chain if p is not None]
    tokenizer.add_tokens(pieces)
    tokenizer.chat_template = TEMPLATE
    cfg = config("llama")
    cfg.vocab_size, cfg.max_position_embeddings, cfg.tie_word_embeddings = 400, context, False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cfg)
    named = {p: tokenizer.convert_tokens_to_ids(p) for p in pieces}
    table = torch.nn.functional.normalize(torch.randn(cfg.vocab_size, cfg.hidden_size), dim=1)
    head = torch.zeros_like(table)
    for question, chain in chains.items():
        (at,) = tokenizer(question)["input_ids"]
        first = named[chain[0]] if chain else tokenizer.eos_token_id
        for piece in [*chain, "</s>"] if not chain or chain[-1] is not None else chain:
            follows = {None: first, "</s>": tokenizer.eos_token_id}.get(piece) or named[piece]
            head[follows] += 20 * table[at]  # so sure that it makes no difference how it is drawn
            at = follows
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table)
        model.lm_head.weight.copy_(head)
        for block in model.model.layers:  # nothing is added to the embedding on its way
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
