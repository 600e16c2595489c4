"Every way to train, at a small size, as a user runs it."
import json
import pytest
from conftest import run_job
from test_jobs import check_wandb, check_whole

TINY = {"data": "latest:prepare", "train_examples": 40, "validation_examples": 8, "max_steps": 2, "eval_every": 2}
SMALL = {
    "finetune": {**TINY, "max_new_tokens": 4},
    "finetune/dora": {**TINY, "max_new_tokens": 4, "method": "dora", "target_modules": "q_proj,v_proj", "certify": "off"},
    "finetune/full": {**TINY, "max_new_tokens": 4, "method": "full", "lr": 1e-4, "precision": "fp32"},
    "finetune/qlora": {**TINY, "max_new_tokens": 4, "quantize": "nf4", "certify": "off"},
    "finetune/qlora/certified": {**TINY, "max_new_tokens": 4, "quantize": "nf4"},
    "finetune/texts": {**TINY, "max_new_tokens": 4, "data": "texts", "certify": "off"},
    "finetune/processes": {**TINY, "max_new_tokens": 4, "processes": 2, "certify": "off"},
    "classify": {"data": "labels", "train_examples": 60, "max_steps": 4, "eval_every": 2, "resamples": 200},
    "classify/verbs": {"train_examples": 60, "max_steps": 4, "eval_every": 2, "resamples": 200},
    "distill": {"data": "latest:prepare", "train_examples": 60, "validation_examples": 20, "examples_held_out": 16, "max_steps": 4, "eval_every": 2, "max_new_tokens": 8, "resamples": 200},
    "convert": {"adapter": "latest:finetune", "examples": 4, "max_new_tokens": 4, "resamples": 100, "to": "bf16"},
    "prefer": {"data": "latest:prepare", "max_steps": 2, "train_examples": 16, "test_examples": 8, "validation_examples": 4, "eval_every": 2, "max_new_tokens": 8},
    "reward": {"data": "latest:prepare", "max_steps": 2, "train_examples": 16, "test_examples": 8, "validation_examples": 4, "eval_every": 2},
    "reinforce": {"data": "latest:prepare", "reward": "latest:reward", "max_steps": 2, "prompts_per_step": 2, "generations": 2, "max_new_tokens": 8, "test_examples": 8, "validation_examples": 4, "eval_every": 2},
}

@pytest.fixture(scope="module")
def runs(chain_copy): return chain_copy[0]

@pytest.fixture(scope="module")
def env(runs, warm): return warm | {"LLMOPS_RUNS": str(runs)}

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Data that no run has prepared, by the name that stands above."
    folder = tmp_path_factory.mktemp("files")
    chapters = [{"text": f"Chapter {n}. " + " ".join(f"In the {w} of year {n}, the river rose and the {w} fell." for w in ("spring", "summer", "autumn", "winter"))} for n in range(200)]
    labelled = [{"text": f"{what} number {n} of the {place} was {word}.", "label": label} for n, place in enumerate(("town", "river", "school", "harbour", "market"))
                for what in ("House", "Boat", "Street", "Garden") for word, label in (("lovely", "good"), ("splendid", "good"), ("awful", "bad"), ("broken", "bad"))]
    for name, rows in (("texts", chapters), ("labels", labelled)): (folder/f"{name}.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows))
    return folder

LONG = "finetune/processes", "finetune/dora", "finetune/full", "finetune/qlora/certified", "finetune/texts", "classify/verbs"

@pytest.mark.parametrize("name", [pytest.param(o, marks=pytest.mark.slow) if o in LONG else o for o in SMALL])
def test_it_runs_and_leaves_a_whole_record(name, env, runs, files):
    values = SMALL[name] | {k: files/f"{v}.jsonl" for k, v in SMALL[name].items() if v in ("texts", "labels")}
    record = run_job(name.split("/")[0], values, env)
    check_whole(record, runs/record["id"], values)
    check_wandb(record, runs/record["id"])
    found = record["certificates"]
    if name == "finetune":
        assert {k: o["passed"] for k, o in found.items()} == {"parity": True, "invariance": True, "precision": True, "continuation": None, "agreement": None, "equivalence": True}
    if values.get("certify") == "off": assert {o["passed"] for k, o in found.items() if k != "parity"} == {None}, "what is not tested is said"
    if name == "finetune/full": assert record["outputs"][0]["kind"] == "model" and found["invariance"]["passed"] and found["equivalence"]["passed"] is None
    if name == "finetune/qlora": assert record["outputs"][0]["kind"] == "adapter" and record["metrics"]["train/steps"] == 2
    if name == "finetune/qlora/certified": assert found["invariance"]["passed"]
    if name == "finetune/processes": assert record["metrics"]["train/steps"] == 2
