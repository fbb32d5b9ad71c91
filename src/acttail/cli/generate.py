"""`acttail generate`: continue a prompt, dense or under a plan."""

import sys
import time
from typing import Annotated, Any

import typer

from acttail.cli.common import (
    Dtype,
    Json,
    Model,
    Prefill,
    TrustRemoteCode,
    err,
    load_model,
    print_json,
)
from acttail.errors import ActTailError


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    plan: Annotated[str | None, typer.Option(help="Plan file; dense without one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Dtype = "bfloat16",
    prefill: Prefill = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Generate text and say how fast."""
    import torch

    from acttail.plan import SparsityPlan
    from acttail.prefill import PrefillPolicy
    from acttail.sparsify import sparse_state, sparsify_

    if not prompt:
        raise ActTailError("the prompt is empty")
    policy = PrefillPolicy.parse(prefill or "all")
    loaded_plan = SparsityPlan.load(plan) if plan else None
    lm, tokenizer = load_model(model, dtype, trust_remote_code=trust_remote_code)
    if loaded_plan is not None:
        sparsify_(lm, loaded_plan, prefill=policy)
    inputs = _encode(tokenizer, prompt, chat=chat)
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments |= {"temperature": temperature, "top_p": top_p}
    if not json:
        from transformers import TextStreamer

        arguments["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    with torch.inference_mode():
        output = lm.generate(**inputs, **arguments, pad_token_id=_pad(lm, tokenizer))
    seconds = time.perf_counter() - started
    new = output[0, inputs["input_ids"].shape[1] :]
    state = sparse_state(lm)
    if json:
        print_json({
            "model": lm.acttail_source.name,
            "allocator": state.plan.allocator if state else None,
            "sparsity": state.plan.sparsity if state else 0.0,
            "engine": "transformers",
            "prompt": prompt,
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "tokens": len(new),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(len(new) / seconds, 2),
            "dtype": str(lm.dtype).removeprefix("torch."),
        })  # fmt: skip
        return
    sys.stdout.flush()
    how = f"sparsity {state.plan.sparsity:g}" if state else "dense"
    err.print(
        f"[dim]{len(new)} tokens, {len(new) / seconds:.1f} tokens/s with prefill, transformers, {how}[/dim]"
    )


def _encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    if not getattr(tokenizer, "chat_template", None):
        raise ActTailError("this model has no chat template; leave out --chat")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip


def _pad(model: Any, tokenizer: Any) -> int | None:
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.eos_token_id):
        if isinstance(value, int):
            return value
    return None
