"""Perplexity: equal to the plain formula, with an honest error, on any text a user names."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import build, config
from transformers import AutoModelForCausalLM

from acttail import make_plan, perplexity, sparsify_
from acttail.calibrate.text import Text, bos_of, read_text, tokenize, windows
from acttail.errors import TextError
from acttail.maths.losses import clustered_mean, token_losses
from acttail.sparse.state import sparse_state


@pytest.fixture
def model():
    cfg = config("llama").__class__(**{**config("llama").to_dict(), "vocab_size": 260})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(cfg).eval()


TEXT = Text("test", "".join(chr(97 + (i * i) % 26) for i in range(500)))


def test_equals_the_plain_formula(model, tokenizer):
    result = perplexity(model, tokenizer, TEXT, window=40)
    ids = tokenize(TEXT, tokenizer)
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(ids) // 40):
            w = ids[i * 40 : (i + 1) * 40][None]
            total += F.cross_entropy(model(w).logits[0, :-1], w[0, 1:], reduction="sum").item()
            count += 39
    assert result.scored == count == 12 * 39
    assert result.tokens == 480
    assert result.nll == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.perplexity_stderr == pytest.approx(result.perplexity * result.nll_stderr)


def test_token_budget_and_single_window(model, tokenizer):
    result = perplexity(model, tokenizer, TEXT, window=40, tokens=100)
    assert (result.windows, result.tokens) == (2, 80)
    one = perplexity(model, tokenizer, TEXT, window=40, tokens=40)
    assert one.windows == 1
    assert one.nll_stderr is None


def test_stride_scores_each_token_once(model, tokenizer):
    result = perplexity(model, tokenizer, TEXT, window=40, stride=10)
    scored = torch.isfinite(result.token_nll)
    assert scored[0].sum() == 39
    assert (scored[1:].sum(1) == 10).all()
    assert result.scored == 39 + 10 * (result.windows - 1)


def test_clustered_error_equals_the_classical_one():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 8, generator=generator)
    mean, error = clustered_mean(values, torch.ones(50, 8, dtype=torch.bool))
    by_window = values.double().mean(1)
    assert mean == pytest.approx(values.double().mean().item())
    assert error == pytest.approx(by_window.std().item() / math.sqrt(50))


def test_losses_in_pieces():
    logits, targets = torch.randn(300, 17), torch.randint(0, 17, (300,))
    torch.testing.assert_close(
        token_losses(logits, targets), F.cross_entropy(logits, targets, reduction="none")
    )


def test_sparse_result_reports_what_was_realised(model, tokenizer):
    plan = make_plan(model, 0.5)
    sparsify_(model, plan)
    result = perplexity(model, tokenizer, TEXT, window=40)
    assert result.realised.model == pytest.approx(plan.realised_sparsity)
    half = perplexity(model, tokenizer, TEXT, window=40, prefill="last_fraction=0.5")
    assert half.realised.model == pytest.approx(plan.realised_sparsity / 2)
    assert half.prefill == "last_fraction=0.5"
    again = perplexity(model, tokenizer, TEXT, window=40)
    assert again.nll == result.nll


def test_decode_only_scores_the_second_half_after_a_dense_prefill(model, tokenizer):
    plan = make_plan(model, 0.6)
    dense = perplexity(model, tokenizer, TEXT, window=40)
    sparsify_(model, plan, prefill="decode_only")
    result = perplexity(model, tokenizer, TEXT, window=40)
    assert result.scored == 12 * 20
    # By hand: prefill 20 tokens dense, then feed the rest one by one through the cache.
    ids = tokenize(TEXT, tokenizer)[:40][None]
    with torch.inference_mode():
        out = model(input_ids=ids[:, :20], use_cache=True)
        losses = [F.cross_entropy(out.logits[0, -1:], ids[0, 20:21]).item()]
        for t in range(20, 39):
            out = model(
                input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True
            )
            losses.append(F.cross_entropy(out.logits[0, -1:], ids[0, t + 1 : t + 2]).item())
    torch.testing.assert_close(result.token_nll[0, 19:], torch.tensor(losses), rtol=1e-3, atol=1e-3)
    # The first scored token was predicted by the dense prefill.
    assert result.token_nll[0, 19] == pytest.approx(dense.token_nll[0, 19].item(), rel=1e-4)
    assert sparse_state(model).handle is not None


def test_broken_logits_are_not_averaged_away(model, tokenizer):
    model.model.norm.weight.data[0] = float("nan")
    result = perplexity(model, tokenizer, TEXT, window=40)
    assert math.isnan(result.perplexity)


def test_bos_only_if_the_tokenizer_adds_one(model, tokenizer):
    assert bos_of(tokenizer) is None
    ids = torch.arange(10, 40)
    cut = windows(ids, 10, None, None, 1, "t")
    assert (cut[:, 0] == 1).all()
    assert cut[:, 1:].flatten().tolist() == list(range(10, 37))
    assert windows(ids, 10, 20, None, 1, "t").shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"window": 1}, "at least 2"),
        ({"window": 40, "tokens": 10}, "fewer than one window"),
        ({"window": 128, "tokens": None}, None),
        ({"window": 40, "stride": 41}, "stride must be"),
        ({"window": 40, "stride": 0}, "stride must be"),
        ({"window": 4096}, "longer than the model's context of 128"),
    ],
)
def test_bad_windows(model, tokenizer, arguments, match):
    if match is None:
        assert perplexity(model, tokenizer, TEXT, **arguments).windows == 3
    else:
        with pytest.raises(TextError, match=match):
            perplexity(model, tokenizer, TEXT, **arguments)


def test_short_text(model, tokenizer):
    with pytest.raises(TextError, match="2 tokens, fewer than one window of 40"):
        perplexity(model, tokenizer, Text("short", "hi"), window=40)


def test_tokenizer_of_another_model(tokenizer):
    with pytest.raises(TextError, match="do not match"):
        perplexity(build("llama"), tokenizer, Text("other", "\u00e9" * 100), window=40)


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("two")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert read_text(tmp_path).content == "one\n\ntwo"
    marked = tmp_path / "sub" / "b.md"
    marked.write_bytes(b"\xef\xbb\xbftwo")
    assert read_text(marked).content == "two"
    assert read_text(tmp_path).content == "one\n\ntwo"
    assert read_text(tmp_path / "a.txt").name.startswith("a.txt@")
    for bad, match in (
        ("absent.txt", "no text"),
        (tmp_path / "c.bin", "not UTF-8"),
        (tmp_path / "empty", "no text"),
    ):
        with pytest.raises(TextError, match=match):
            read_text(bad)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(TextError, match="is empty"):
        read_text(tmp_path / "blank.txt")
    (tmp_path / "none").mkdir()
    with pytest.raises(TextError, match="holds no"):
        read_text(tmp_path / "none")


def test_python_docs_halves_do_not_meet():
    calibration, score = (read_text(f"python-docs:{h}").content for h in ("calibration", "score"))
    assert min(len(calibration), len(score)) > 50_000
    paragraphs = {p for p in calibration.split("\n\n") if len(p) > 200}
    assert not paragraphs & {p for p in score.split("\n\n") if len(p) > 200}


def test_datasets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "test.jsonl").write_text(
        '{"text": "first"}\n{"text": ""}\n{"text": "second"}\n'
    )
    assert read_text(f"hf:{tmp_path / 'd'}:test").content == "first\n\nsecond"
    with pytest.raises(TextError, match="no column 'body'"):
        read_text(f"hf:{tmp_path / 'd'}:test:body")
    with pytest.raises(TextError, match="cannot load the dataset"):
        read_text(f"hf:{tmp_path / 'absent'}:test")
