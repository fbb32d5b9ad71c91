"""Run by check_wheel.sh in an environment that has acttail from a wheel: the commands of a first hour.

python wheel_smoke.py FOLDER     (an empty folder to work in)
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path


def tiny(folder):
    """A random llama of byte tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["</s>", *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(alphabet) + 1, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def acttail(*arguments):
    command = [str(Path(sys.executable).with_name("acttail")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def main():
    work = Path(sys.argv[1])
    model, plan, page = work / "model", work / "plan.json", work / "report.html"
    tiny(model)
    acttail("analyze", model)
    acttail("plan", model, "--sparsity", 0.5, "-o", plan)
    acttail("generate", model, "--plan", plan, "--prompt", "hello", "--max-new-tokens", 4)
    acttail("report", model, "--plan", plan, "-o", page)
    assert "<svg" in page.read_text(encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("acttail")),
        "serve",
        str(model),
        "--plan",
        str(plan),
        "--port",
        "0",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = next(line.split()[-1] for line in server.stderr if line.startswith("chat page"))
        with urllib.request.urlopen(url) as answer:
            assert b"<textarea" in answer.read()
        body = {"model": "model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        request = urllib.request.Request(
            f"{url}v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.terminate()
        server.wait()
    print("analyze, plan, generate, report and serve run from the wheel")


if __name__ == "__main__":
    main()
