"""The width that a device multiplies fastest."""

import pytest
import torch
from families import build

from acttail import load
from acttail.base.dtypes import FAST
from acttail.evaluate.sweep import SweepSpec
from acttail.model.precision import fast_dtype
from acttail.model.whole import dtype_of


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_a_processor_without_bfloat16_products_takes_float32(monkeypatch, known, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert fast_dtype() is fast_dtype("cpu") is expected
    assert dtype_of(FAST) is expected
    assert SweepSpec("model", "text", dtype=FAST).dtype == str(expected).removeprefix("torch.")


def test_what_is_not_a_processor_or_cuda_takes_float32():
    assert fast_dtype("meta") is torch.float32


def test_a_model_is_loaded_in_it(tmp_path):
    from byte_tokens import byte_tokenizer

    build("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load(str(tmp_path), dtype="fast")
    assert model.dtype is fast_dtype()
