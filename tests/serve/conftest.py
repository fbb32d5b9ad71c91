"""Fixtures of the server's tests: a small engine, and a server of it."""

import openai
import pytest
import torch
from families import config
from serving import TEMPLATE, serving
from transformers import AutoModelForCausalLM

import acttail
from acttail.engine import Engine


@pytest.fixture(scope="module")
def roomy_folder(tmp_path_factory, tokenizer):
    """A llama of byte tokens with a context long enough to keep a slot busy."""
    folder = tmp_path_factory.mktemp("roomy") / "roomy"
    cfg = config("llama")
    cfg.vocab_size, cfg.max_position_embeddings = 260, 2048
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(cfg).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(roomy_folder):
    return acttail.make_plan(str(roomy_folder), 0.5)


@pytest.fixture(scope="module")
def engine(roomy_folder, plan):
    found = Engine.from_pretrained(roomy_folder, plan, dtype="fp32", threads=1)
    found.tokenizer.chat_template = TEMPLATE
    # A random model would end at its first end-of-sequence token.
    found.eos = frozenset()
    return found


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, max_body=20_000, max_tokens=200) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
