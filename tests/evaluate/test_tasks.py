"""Downstream tasks offline, against a plain scoring loop; paired intervals."""

import json

import numpy as np
import pytest
import torch
from byte_tokens import byte_tokenizer
from test_sensitivity import tiny

from acttail.errors import ActTailError
from acttail.evaluate.tasks import evaluate_tasks, find_data, paired_interval

pytest.importorskip("lm_eval")

ITEMS = [
    {"goal": f"to {a} a {b}", "sol1": f"use the {b}", "sol2": f"never {a} it", "label": i % 2}
    for i, (a, b) in enumerate([("cut", "pie"), ("fix", "car"), ("eat", "egg"), ("sew", "hat")] * 3)
]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "piqa" / "plain"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    boolq = tmp_path / "data" / "boolq"
    boolq.mkdir()
    rows = [
        {"question": f"is {i} even", "passage": "numbers", "answer": i % 2 == 0} for i in range(6)
    ]
    (boolq / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def continuation(model, tokenizer, context, ending):
    a = tokenizer(context, add_special_tokens=False)["input_ids"]
    b = tokenizer(ending, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([a + b])).logits[0].float(), -1)
    return sum(float(log_p[len(a) - 1 + i, t]) for i, t in enumerate(b))


def test_piqa_equals_a_plain_loop(data):
    model, tokenizer = tiny(), byte_tokenizer()
    (result,) = evaluate_tasks(model, tokenizer, ["piqa"], data=data)
    expected, expected_norm = [], []
    for item in ITEMS:
        context = f"Question: {item['goal']}\nAnswer:"
        scores = [continuation(model, tokenizer, context, f" {item[s]}") for s in ("sol1", "sol2")]
        lengths = [len(item[s]) for s in ("sol1", "sol2")]
        expected.append(float(np.argmax(scores) == item["label"]))
        expected_norm.append(float(np.argmax(np.array(scores) / lengths) == item["label"]))
    assert result.metrics["acc"][0] == pytest.approx(np.mean(expected))
    assert result.metrics["acc_norm"][0] == pytest.approx(np.mean(expected_norm))
    assert result.items == expected_norm
    (few,) = evaluate_tasks(model, tokenizer, ["piqa"], data=data, limit=5)
    assert few.items == expected_norm[:5]


def test_boolq_in_its_original_form(data):
    (result,) = evaluate_tasks(tiny(), byte_tokenizer(), ["boolq"], data=data)
    # A model that always says the same is right half of the time, never zero.
    assert result.metrics["acc"][0] > 0


def test_errors(data, tmp_path):
    with pytest.raises(ActTailError, match=r"no data of the task hellaswag.*boolq, piqa"):
        evaluate_tasks(tiny(), byte_tokenizer(), ["hellaswag"], data=data)
    with pytest.raises(ActTailError, match="no such folder"):
        evaluate_tasks(tiny(), byte_tokenizer(), ["piqa"], data=tmp_path / "absent")
    (data / "nonesuch").mkdir()
    (data / "nonesuch" / "test.jsonl").write_text('{"a": 1}')
    with pytest.raises(ActTailError, match="knows no task 'nonesuch'"):
        evaluate_tasks(tiny(), byte_tokenizer(), ["nonesuch"], data=data)
    assert find_data(data, "nonesuch")[1] == "test"


def test_command_line(run, tiny_folder, data):
    code, out, _ = run(
        "eval", tiny_folder, "--tasks", "piqa", "--task-data", data, "--limit", 4, "--json"
    )
    row = json.loads(out)
    assert code == 0
    assert row["tasks"]["piqa"]["n"] == 4
    assert 0 <= row["tasks"]["piqa"]["metrics"]["acc"]["value"] <= 1
    code, _, err = run("eval", tiny_folder)
    assert code == 2
    assert "--tasks" in err


def test_paired_interval():
    rng = np.random.default_rng(0)
    a = rng.random(400)
    mean, low, high = paired_interval(a + 0.1, a)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    noise = rng.normal(0, 1, 400)
    mean, low, high = paired_interval(a + noise, a)
    width = 2 * 1.96 * noise.std(ddof=1) / 20
    assert high - low == pytest.approx(width, rel=0.1)
    assert low < mean < high
    with pytest.raises(ActTailError, match="same items"):
        paired_interval([1.0], [1.0])
