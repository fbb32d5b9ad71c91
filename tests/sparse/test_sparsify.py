"""Sparse models: right on every family, undone exactly, and usable wherever transformers is."""

import copy
import io
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, MOE, build, config
from torch import nn

from acttail import densify_, make_plan, sparsify_
from acttail.errors import ActTailError, PlanError
from acttail.model.projections import find_projections
from acttail.sparse.backends import reference
from acttail.sparse.counting import counting
from acttail.sparse.modules import SparseLinear
from acttail.sparse.policy import PrefillPolicy
from acttail.sparse.state import sparse_state

DENSE_FAMILIES = [f for f in FAMILIES if f not in MOE]


def ids_for(model, batch=2, tokens=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator)


def logits(model, ids, **kwargs):
    with torch.inference_mode():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_masking_by_hooks(family):
    """An independent way to the same function: hooks that mask with the reference."""
    model, other = build(family), build(family)
    plan = make_plan(model, 0.5)
    ids = ids_for(model)
    dense = logits(model, ids)
    if family in MOE:
        for module in other.modules():
            if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
                _hook_experts(other, module, plan)
    for p in find_projections(other):
        if p.expert is None:
            k = plan.projections[p.name].k
            other.get_submodule(p.module).register_forward_pre_hook(
                lambda m, args, k=k: (reference.topk_mask(args[0], k),)
            )
    sparse = logits(sparsify_(model, plan), ids)
    torch.testing.assert_close(sparse, logits(other, ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse, dense, atol=1e-4)
    assert torch.equal(logits(densify_(model), ids), dense)


def _hook_experts(model, experts, plan):
    """Token by token, the plain formula of a gated expert."""
    path = next(n for n, m in model.named_modules() if m is experts)

    def forward(hidden, index, weights):
        out = torch.zeros_like(hidden)
        for t in range(hidden.shape[0]):
            for slot in range(index.shape[1]):
                e = int(index[t, slot])
                x = reference.topk_mask(hidden[t], plan.projections[f"{path}.gate_up_proj.{e}"].k)
                gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
                h = experts.act_fn(gate) * up
                h = reference.topk_mask(h, plan.projections[f"{path}.down_proj.{e}"].k)
                out[t] += weights[t, slot] * (experts.down_proj[e] @ h)
        return out

    experts.forward = forward


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_sparsity_changes_nothing(family):
    model = build(family)
    ids = ids_for(model)
    dense = logits(model, ids)
    sparsify_(model, make_plan(model, 0.0, allocator="uniform"))
    torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_densify_restores_classes_and_state(family):
    model = build(family)
    classes = [type(m) for m in model.modules()]
    keys = {n: set(vars(m)) for n, m in model.named_modules()}
    state = {k: v.data_ptr() for k, v in model.state_dict().items()}
    sparsify_(model, make_plan(model, 0.5), prefill="first_dense=2")
    assert [type(m) for m in model.modules()] != classes
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state
    densify_(model)
    assert [type(m) for m in model.modules()] == classes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == keys
    assert sparse_state(model) is None
    assert getattr(model.config, "quantization_config", None) is None
    densify_(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_padding_and_cache(family, dtype):
    """Greedy decoding of a padded batch equals each sequence alone: same masks at every step."""
    model = build(family, dtype=dtype)
    sparsify_(model, make_plan(model, 0.4))
    ids = ids_for(model, 2, 9)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, 12)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(input_ids=padded, attention_mask=mask, **arguments)[:, 12:]
    assert together.shape == (2, 6)
    if dtype == torch.float32:
        for row in range(2):
            alone = model.generate(input_ids=ids[row : row + 1], **arguments)[:, 9:]
            assert torch.equal(alone[0], together[row])


def test_decoding_with_cache_equals_one_pass(llama):
    sparsify_(llama, make_plan(llama, 0.5))
    ids = ids_for(llama, 1, 12)
    whole = logits(llama, ids)
    cache, steps = None, []
    with torch.inference_mode():
        for t in range(12):
            out = llama(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_compiles_without_graph_breaks(family):
    model = build(family)
    sparsify_(model, make_plan(model, 0.5))
    ids = ids_for(model)
    expected = logits(model, ids, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        logits(compiled, ids, use_cache=False), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_compiles_with_inductor(llama):
    sparsify_(llama, make_plan(llama, 0.5))
    ids = ids_for(llama)
    expected = logits(llama, ids, use_cache=False)
    compiled = torch.compile(llama, fullgraph=True)
    torch.testing.assert_close(
        logits(compiled, ids, use_cache=False), expected, rtol=1e-4, atol=1e-4
    )


def test_first_dense_and_last_fraction(llama):
    ids = ids_for(llama, 1, 10)
    dense = logits(llama, ids)
    plan = make_plan(llama, 0.6)
    some = logits(sparsify_(llama, plan, prefill="first_dense=4"), ids)
    torch.testing.assert_close(some[:, :4], dense[:, :4])
    assert not torch.allclose(some[:, 4], dense[:, 4], atol=1e-5)
    half = logits(sparsify_(llama, plan, prefill="last_fraction=0.6"), ids)
    torch.testing.assert_close(half, some)
    everything = logits(sparsify_(llama, plan, prefill="first_dense=0"), ids)
    torch.testing.assert_close(everything, logits(sparsify_(llama, plan), ids))


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt", "qwen2-moe"])
def test_policies_ignore_left_padding(family):
    model = build(family)
    sparsify_(model, make_plan(model, 0.6), prefill="first_dense=4")
    ids = ids_for(model, 1, 10)
    alone = logits(model, ids, attention_mask=torch.ones_like(ids))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(15) >= 5).long()[None]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if family == "opt" else {"position_ids": position}
    shifted = logits(model, padded, attention_mask=mask, **extra)[:, 5:]
    torch.testing.assert_close(shifted, alone, rtol=1e-3, atol=1e-4)


def test_decode_only(llama):
    plan = make_plan(llama, 0.6)
    ids = ids_for(llama, 1, 8)
    dense = logits(llama, ids)
    sparsify_(llama, plan, prefill="decode_only")
    torch.testing.assert_close(logits(llama, ids), dense)
    with torch.inference_mode(), counting(llama) as counter:
        cache = llama(input_ids=ids, use_cache=True).past_key_values
        assert counter.realised().model == pytest.approx(0)
        llama(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    # 8 dense tokens, then one sparse.
    assert counter.realised().model == pytest.approx(plan.realised_sparsity / 9)


def test_decode_only_takes_verified_tokens_for_decoded_ones(llama):
    """Assisted decoding draws several tokens and checks them in a pass: greedy text must be the same."""
    sparsify_(llama, make_plan(llama, 0.5), prefill="decode_only")
    ids = torch.randint(3, 9, (1, 6), generator=torch.Generator().manual_seed(1)).repeat(1, 3)
    run = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = llama.generate(ids, **run)
    shapes = []
    llama.register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assisted = llama.generate(ids, prompt_lookup_num_tokens=3, **run)
    assert any(n > 1 for n in shapes[1:]), "nothing was verified"
    assert torch.equal(assisted, plain)


def test_decode_only_keeps_a_prompt_in_chunks_dense(llama):
    ids = ids_for(llama, 1, 12)
    run = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": 5}
    sparsify_(llama, make_plan(llama, 0.5), prefill="decode_only")
    with counting(llama) as counter:
        llama.generate(ids, **run)
    assert counter.realised().model == pytest.approx(0)


@pytest.mark.parametrize(
    ("tokens", "past", "wanted", "expected"),
    [
        (9, 0, 1, False),
        (9, 0, 0, False),
        (1, 9, 1, True),
        (4, 9, 1, False),
        (4, 9, 0, False),
        (4, 9, 4, True),
        (9, 0, 4, [False] * 6 + [True] * 3),
        (5, 9, 3, [False] * 3 + [True] * 2),
    ],
)
def test_which_tokens_of_a_pass_are_decoded(tokens, past, wanted, expected):
    rows = PrefillPolicy("decode_only").sparse_rows(1, tokens, past, None, wanted)
    assert (rows if isinstance(rows, bool) else rows[0].tolist()) == expected


@pytest.mark.parametrize("text", ["all", "first_dense=3", "last_fraction=0.5", "decode_only"])
def test_policy_round_trip(text):
    assert str(PrefillPolicy.parse(text)) == text


@pytest.mark.parametrize("text", ["", "some", "first_dense", "first_dense=1.5", "first_dense=-1",
                                  "last_fraction=0", "last_fraction=2", "all=1", "last_fraction=x"])  # fmt: skip
def test_bad_policies(text):
    with pytest.raises(ActTailError, match="unknown prefill policy"):
        PrefillPolicy.parse(text)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_counters_see_what_was_dropped(family):
    model = build(family)
    plan = make_plan(model, 0.5)
    sparsify_(model, plan)
    with counting(model) as counter:
        logits(model, ids_for(model))
    realised = counter.realised()
    for name, value in realised.projections.items():
        assert value == pytest.approx(plan.projections[name].realised_sparsity)
    assert realised.model == pytest.approx(plan.realised_sparsity)
    assert sparse_state(model).counts is None
    with pytest.raises(PlanError, match="dense"), counting(densify_(model)):
        pass


def test_a_new_plan_replaces_the_old(llama):
    sparsify_(llama, make_plan(llama, 0.5))
    sparsify_(llama, make_plan(llama, 0.25, allocator="uniform"))
    assert llama.model.layers[0].self_attn.q_proj.acttail_rule.k == 36
    assert type(llama.model.layers[0].self_attn.q_proj) is SparseLinear
    assert "k=36" in repr(llama.model.layers[0].self_attn.q_proj)
    assert type(densify_(llama).model.layers[0].self_attn.q_proj) is nn.Linear


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_independent(llama, how):
    sparsify_(llama, make_plan(llama, 0.5))
    twin = COPIES[how](llama)
    densify_(twin)
    assert isinstance(llama.model.layers[0].mlp.up_proj, SparseLinear)
    assert type(twin.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_copy_works_out_its_own_rows(family, how):
    """The policy's hook must see the copy's passes, and the first model's must not touch the copy."""
    model = build(family)
    sparsify_(model, make_plan(model, 0.6), prefill="first_dense=4")
    ids = ids_for(model, 2, 9)
    expected = logits(model, ids)
    twin = COPIES[how](model)
    state = sparse_state(twin)
    assert state is not sparse_state(model)
    logits(model, ids[:, :2])
    assert torch.equal(logits(twin, ids), expected)
    logits(twin, ids[:, :2])
    assert torch.equal(logits(model, ids), expected)
    with counting(twin) as counter:
        logits(twin, ids[:, :4])
    assert counter.realised().model == pytest.approx(0)
    densify_(twin)
    assert not twin._forward_pre_hooks
    assert model._forward_pre_hooks
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_looks_through_its_own_gates(llama, how):
    plan = make_plan(llama, 0.3, allocator="uniform")
    gated = {
        name: replace(entry, threshold=1e-3 if entry.kind in ("up", "down") else None)
        for name, entry in plan.projections.items()
    }
    plan = replace(plan, rule="cats", projections=gated)
    sparsify_(llama, plan)
    ids = ids_for(llama, 2, 9)
    expected = logits(llama, ids)
    twin = COPIES[how](llama)
    logits(llama, ids_for(llama, 1, 3, seed=1))
    assert torch.equal(logits(twin, ids), expected)
    densify_(llama)
    assert torch.equal(logits(twin, ids), expected)
    densify_(twin)
    assert torch.equal(logits(twin, ids), logits(llama, ids))


def test_a_copy_of_a_native_layout_gives_the_same(llama):
    sparsify_(llama, make_plan(llama, 0.5), native=True)
    ids = ids_for(llama, 1, 1)
    twin = copy.deepcopy(llama)
    torch.testing.assert_close(logits(twin, ids), logits(llama, ids), rtol=1e-4, atol=1e-5)


def test_linear_subclasses_keep_their_behaviour(llama):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    llama.model.layers[0].mlp.up_proj.__class__ = Doubled
    ids = ids_for(llama)
    dense = logits(llama, ids)
    sparsify_(llama, make_plan(llama, 0.0, allocator="uniform"))
    torch.testing.assert_close(logits(llama, ids), dense, rtol=1e-5, atol=1e-5)
    assert type(densify_(llama).model.layers[0].mlp.up_proj) is Doubled


def test_accelerate_hooks_see_the_sparse_forward(llama):
    accelerate = pytest.importorskip("accelerate")
    ids = ids_for(llama)
    plan = make_plan(llama, 0.6)
    expected = logits(sparsify_(copy.deepcopy(llama), plan), ids)
    for module in llama.modules():
        if isinstance(module, nn.Linear):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    dense = logits(llama, ids)
    sparsify_(llama, plan)
    torch.testing.assert_close(logits(llama, ids), expected)
    torch.testing.assert_close(logits(densify_(llama), ids), dense)


def test_gradients_flow(llama):
    sparsify_(llama, make_plan(llama, 0.5))
    ids = ids_for(llama)
    llama(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in llama.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_give_identical_logits(family, tmp_path):
    """In a process of its own: plain transformers after `import acttail`."""
    model = build(family)
    ids = ids_for(model)
    sparsify_(model, make_plan(model, 0.5))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "sparse")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert sparse_state(loaded).plan == sparse_state(model).plan
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again, ids), expected, rtol=0, atol=0)
    assert again.half().dtype == torch.float16  # not a quantized model: casts are allowed


def test_plain_transformers_after_import_acttail(llama, tmp_path):
    sparsify_(llama, make_plan(llama, 0.5))
    llama.save_pretrained(tmp_path / "sparse")
    for order in ("import acttail, transformers", "import transformers; import acttail"):
        code = f"""
{order}
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "sparse")!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.stdout.strip() == "SparseLinear"


def test_checkpoint_with_other_weights_is_refused(llama, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    sparsify_(llama, make_plan(llama, 0.5))
    llama.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj differ"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_peft_like_wrapping_sees_linear(llama):
    sparsify_(llama, make_plan(llama, 0.5))
    assert all(isinstance(m, nn.Linear) for n, m in llama.named_modules() if n.endswith("_proj"))


def test_config_of_an_unlucky_size_is_fine():
    model = build("llama-odd")
    plan = make_plan(model, 0.5)
    assert plan.solved_sparsity == pytest.approx(0.5, abs=1e-3)
    assert config("llama-odd").intermediate_size == 67
    logits(sparsify_(model, plan), ids_for(model))
