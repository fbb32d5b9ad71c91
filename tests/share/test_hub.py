"""Sparse models as citizens of Hugging Face: folders, pipelines, adapters, the Hub, lm-eval; other projects' forms."""

import base64
import csv
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from families import build
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import acttail
from acttail.cli import app
from acttail.errors import ActTailError, ModelError, PlanError
from acttail.plan import SparsityPlan
from acttail.share import hub
from acttail.share.export import FORMATS, read_target_map

ROWS = [
    {"allocator": None, "sparsity": 0.0, "realised_sparsity": 0.0, "perplexity": 9.0, "perplexity_stderr": 0.5, "text": "t"},
    {"allocator": "acttail", "sparsity": 0.5, "realised_sparsity": 0.5, "perplexity": 12.0, "perplexity_stderr": 0.6,
     "text": "t", "kl": 0.25, "top1": 0.8},
]  # fmt: skip


@pytest.fixture
def sparse(tiny_folder):
    model, tokenizer = acttail.load(str(tiny_folder), dtype="float32")
    acttail.sparsify_(model, acttail.make_plan(model, 0.5))
    return model, tokenizer


def logits(model):
    ids = torch.arange(3, 35)[None]
    with torch.inference_mode():
        return model(ids).logits


def test_saved_folder_comes_back_sparse(sparse, tmp_path):
    model, tokenizer = sparse
    hub.save(
        model,
        tokenizer,
        tmp_path / "m",
        repository="someone/sparse",
        results=ROWS,
        license_="apache-2.0",
    )
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(back), logits(model))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "m")("abc").input_ids == tokenizer("abc").input_ids
    )
    card = (tmp_path / "m" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    about = yaml.safe_load(header)
    assert about["license"] == "apache-2.0"
    assert about["pipeline_tag"] == "text-generation"
    assert "acttail" in about["tags"]
    assert 'from_pretrained("someone/sparse")' in body
    assert "12.00 ± 0.60" in body
    assert str(tmp_path) not in card, "no path of this machine"


def test_card_of_a_hub_model_names_its_base(sparse):
    model, _ = sparse
    plan = (
        model.config.quantization_config.plan
        if hasattr(model.config, "quantization_config")
        else None
    )
    made = hub.model_card(
        acttail.make_plan(build("llama"), 0.5) if not isinstance(plan, SparsityPlan) else plan,
        repository="a/b", base="org/base",
    )  # fmt: skip
    assert yaml.safe_load(made.split("---\n")[1])["base_model"] == "org/base"
    assert "Not measured" in made


def test_dense_models_are_refused(tiny_folder, tmp_path):
    model, tokenizer = acttail.load(str(tiny_folder))
    with pytest.raises(ModelError, match="dense"):
        hub.save(model, tokenizer, tmp_path / "m")


def test_pipeline(sparse, tmp_path):
    model, tokenizer = sparse
    hub.save(model, tokenizer, tmp_path / "m")
    pipe = pipeline("text-generation", model=str(tmp_path / "m"))
    said = pipe("The fox", max_new_tokens=8, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    ids = tokenizer("The fox", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert said == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_adapters_on_top(sparse, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = sparse
    before = logits(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    changed = logits(adapted)
    assert not torch.allclose(changed, before, atol=1e-4)
    # The base stays sparse under the adapter, and the adapter alone is trained.
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted.train()
    loss = adapted(torch.arange(3, 35)[None], labels=torch.arange(3, 35)[None]).loss
    loss.backward()
    optimiser.step()
    adapted.eval()
    later = adapted(torch.arange(3, 35)[None], labels=torch.arange(3, 35)[None]).loss
    assert float(later) < float(loss)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh, _ = acttail.load(model.config.name_or_path, dtype="float32")
    acttail.sparsify_(fresh, acttail.make_plan(fresh, 0.5))
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(adapted), atol=1e-5)


class _Hub(BaseHTTPRequestHandler):
    """The three calls of the Hub's protocol that a small upload makes."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        seen = self.server.seen
        seen.append(self.path)
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            answer = {"url": f"{self.server.url}/someone/{name.rpartition('/')[2]}", "name": name}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
            }
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            answer = {
                "commitUrl": f"{self.server.url}/someone/sparse/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            }
        else:
            answer = {}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_push_with_the_hubs_own_client(tiny_folder, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.seen, server.files = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    acttail.make_plan(str(tiny_folder), 0.5).save(tmp_path / "plan.json")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    # The client reads its endpoint when it is imported.
    import os

    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "acttail", "save", str(tiny_folder), "--plan", str(tmp_path / "plan.json"),
               "--push", "someone/sparse", "--results", str(tmp_path / "rows.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stdout
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(server.files)
    assert b"12.00" in server.files["README.md"]
    folder = tmp_path / "pulled"
    folder.mkdir()
    for name, content in server.files.items():
        (folder / name).write_bytes(content)
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert type(back.model.layers[0].mlp.down_proj).__name__ == "SparseLinear"


def test_push_that_fails_is_one_line(sparse, monkeypatch):
    from huggingface_hub import HfApi

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ActTailError, match=r"cannot push to a/b: .*no route"):
        hub.push(*sparse, "a/b")


def test_export_forms(tiny_folder, tmp_path):
    plan = acttail.make_plan(str(tiny_folder), 0.5)
    for name, write in FORMATS.items():
        assert write(plan, tmp_path / name if (tmp_path / name).mkdir() is None else tmp_path)
    with (tmp_path / "teal" / "layer-1" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    entry = plan.projections["model.layers.1.mlp.up_proj"]
    assert float(row["up"]) == pytest.approx(entry.sparsity, abs=1e-6)
    assert 0.3 < float(row["Effective Sparsity"]) < 0.7
    scopes = read_target_map(tmp_path / "nncf" / "target_sparsity_by_scope.json")
    for name, e in plan.projections.items():
        (found,) = {
            s
            for pattern, s in scopes.items()
            if re.fullmatch(pattern, f"LlamaForCausalLM/{name}/linear")
        }
        assert found == pytest.approx(e.sparsity, abs=1e-4)
    written = json.loads((tmp_path / "plain" / "projections.json").read_text())
    assert written["projections"].keys() == plan.projections.keys()


def test_teal_refuses_other_blocks(tmp_path):
    with pytest.raises(PlanError, match="TEAL knows blocks"):
        FORMATS["teal"](acttail.make_plan(build("phi3"), 0.5), tmp_path)


def test_commands(tiny_folder, tmp_path):
    from typer.testing import CliRunner

    runner = CliRunner()
    acttail.make_plan(str(tiny_folder), 0.5).save(tmp_path / "plan.json")
    plan = str(tmp_path / "plan.json")
    done = runner.invoke(app, ["export", plan, "--format", "nncf", "-o", str(tmp_path / "x")])
    assert done.exit_code == 0
    assert isinstance(
        runner.invoke(app, ["export", plan, "--format", "y", "-o", "z"]).exception, ActTailError
    )
    done = runner.invoke(app, ["save", str(tiny_folder), "--plan", plan, "-o", str(tmp_path / "m")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "m" / "README.md").exists()
    assert isinstance(
        runner.invoke(app, ["save", str(tiny_folder), "--plan", plan]).exception, ActTailError
    )


def test_model_of_lm_eval(tiny_folder, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from acttail.evaluate.harness import register

    plan = acttail.make_plan(str(tiny_folder), 0.5)
    plan.save(tmp_path / "plan.json")
    made = register()(
        str(tiny_folder), plan=str(tmp_path / "plan.json"), dtype="float32", device="cpu"
    )
    request = Instance("loglikelihood", {}, ("The fox", " jumps"), 0)
    ((found, _),) = made.loglikelihood([request])
    model, tokenizer = acttail.load(str(tiny_folder), dtype="float32")
    acttail.sparsify_(model, plan)
    ids = torch.tensor([tokenizer("The fox jumps").input_ids])
    with torch.inference_mode():
        log_p = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert found == pytest.approx(float(log_p[-6:].sum()), abs=1e-3)


@pytest.mark.slow
def test_lm_eval_command_line(tiny_folder, tmp_path):
    acttail.make_plan(str(tiny_folder), 0.5).save(tmp_path / "plan.json")
    (tmp_path / "data.jsonl").write_text(
        "".join(
            json.dumps({"q": f"{i} is", "a": ["odd", "even"], "gold": i % 2}) + "\n"
            for i in range(8)
        )
    )
    task = {
        "task": "parity", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "data.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{a}}",
        "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "parity.yaml").write_text(yaml.safe_dump(task))
    command = [sys.executable, "-m", "acttail", "lm-eval", "run", "--model", "acttail", "--model_args",
               f"pretrained={tiny_folder},plan={tmp_path / 'plan.json'}", "--tasks", str(tmp_path / "parity.yaml"),
               "--device", "cpu", "--batch_size", "4"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parity" in done.stdout
