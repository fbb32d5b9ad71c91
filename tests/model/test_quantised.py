"""Weights that another tool has quantised are refused by name, before anything is read of them."""

import json

import pytest
import torch
from gguf_files import blocky
from safetensors.torch import load_file, save_file
from test_contents import refused


@pytest.fixture
def folder(tmp_path, tokenizer):
    blocky().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


CONFIGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "mxfp4": {"quant_method": "mxfp4"},
    "of a name nobody knows": {"quant_method": "of a name nobody knows"},
    "a method that is not named": {"bits": 4},
}


@pytest.mark.parametrize("method", CONFIGS)
def test_by_the_config(folder, method):
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": CONFIGS[method]})
    )
    refused(folder, rf"the weights of m are quantised \({method}\).*GGUF")


NAME = "model.layers.1.mlp.up_proj"
TENSORS = {
    "weight_scale_inv": ({f"{NAME}.weight_scale_inv": torch.ones(3, 2)}, "FP8 in blocks: .*_scale_inv"),
    "weight_scale": ({f"{NAME}.weight_scale": torch.ones(96, 1)}, "compressed-tensors or FP8: "),
    "qweight": ({f"{NAME}.qweight": torch.zeros(8, 96, dtype=torch.int32)}, "GPTQ or AWQ: .*qweight"),
    "absmax": ({f"{NAME}.weight.absmax": torch.ones(9)}, "bitsandbytes: .*absmax"),
    "float8": (
        {f"{NAME}.weight": torch.zeros(96, 64).to(torch.float8_e4m3fn)}, "F8_E4M3 without a scale: .*up_proj"
    ),
    "int8": ({f"{NAME}.weight": torch.zeros(96, 64, dtype=torch.int8)}, "I8 without a scale: .*up_proj"),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_by_the_tensors(folder, what):
    """The config says nothing of them."""
    tensors, match = TENSORS[what]
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
    refused(folder, match)
