"prepare, pretrain, finetune and evaluate at a small size, as a user runs them: the record, wandb, replay."
import json, re
from pathlib import Path
import nbformat, pytest
from conftest import CHAIN, PROJECT, few, llmops, options, run_command, run_job

SMALL = CHAIN | {
    "pretrain": {"data": PROJECT/"llmops_kit"/"runs", "steps": 4, "eval_every": 2, "eval_blocks": 2, "layers": 1, "hidden_size": 64, "intermediate_size": 128, "max_length": 128, "vocab_size": 512},
    "behaviour": {"adapter": "latest:finetune", "examples": 8, "max_new_tokens": 8, "resamples": 200},
    "compare": {"resamples": 200},
    "benchmark": {"tasks": "pick_docstring", "limit": 8},
    "label": {"labels": "stand-in", "pairs": 12, "resamples": 200},
    "judge": {"pairs": 3, "resamples": 200},
    "bench_statistics": {"simulations": 20, "resamples": 100},
    "prompt": {"data": "latest:prepare", "examples": 24, "generated": 4, "resamples": 200, "max_new_tokens": 8},
    "search_prompt": {"data": "latest:prepare", "budget": 300, "counts": "0", "resamples": 200},
    "bench_prepare": {"rows": 2000, "sample": 100, "processes": 1},
}

BENCHES = {"bench_statistics", "bench_prepare"} # in the long version

@pytest.fixture(scope="module")
def runs(chain_copy): return chain_copy[0]

@pytest.fixture(scope="module")
def env(runs, warm): return warm | {"LLMOPS_RUNS": str(runs)}

@pytest.fixture(scope="module")
def records(chain_copy, env): return chain_copy[1] | {job: run_job(job, values, env) for job, values in SMALL.items() if job not in CHAIN and job not in BENCHES}

@pytest.fixture
def record(job, records, env):
    if job not in records: records[job] = run_job(job, SMALL[job], env)
    return records[job]

def check_whole(record, folder, given):
    assert record["status"] == "finished" and record["error"] is None and record["given"] == sorted(given)
    for field in ("schema", "job_sha256", "environment", "seeds", "seconds", "peak_memory_bytes", "seal", "history", "tracking"): assert record[field], field
    assert record["environment"]["packages"]["torch"] and record["environment"]["kit"]["sha256"]
    assert record["outputs"] and all((folder/o["path"]).exists() for o in record["outputs"])
    assert all(isinstance(o, (int, float)) for o in record["metrics"].values())
    notebook = nbformat.read(folder/"notebook.ipynb", 4)
    nbformat.validate(notebook)
    assert any("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", ())), "the story has no picture"
    assert not [o for c in notebook.cells for o in c.get("outputs", ()) if "KB/s" in str(o.get("text", ""))]

@pytest.mark.parametrize("job", few(SMALL, SMALL.keys() - BENCHES))
def test_a_job_leaves_a_whole_record(job, record, runs): check_whole(record, runs/record["id"], SMALL[job])

def test_certificates_are_in_the_records(records):
    assert records["prepare"]["certificates"]["separation"]["passed"] is True
    for job in ("finetune", "evaluate"): assert records[job]["certificates"]["parity"]["passed"] is True and records[job]["certificates"]["parity"]["value"] == 0

def test_lineage(records):
    made = {o["sha256"]: name for name, r in records.items() for o in r["outputs"]}
    assert made[next(o["sha256"] for o in records["finetune"]["inputs"] if o["kind"] == "dataset")] == "prepare"
    assert made[next(o["sha256"] for o in records["evaluate"]["inputs"] if o["kind"] == "adapter")] == "finetune"
    assert next(o for o in records["finetune"]["inputs"] if o["kind"] == "dataset")["run"] == records["prepare"]["id"]
    assert records["finetune"]["references"] == {"data": "latest:prepare"} and records["finetune"]["parameters"]["data"] == records["prepare"]["id"]

def test_evaluate_has_every_metric_with_its_interval(records):
    metrics = records["evaluate"]["metrics"]
    for name in ("perplexity", "bleu", "rouge_l", "exact_match"):
        for group in ("base", "test", "difference"):
            low, value, high = (metrics[f"{group}/{name}{o}"] for o in ("/low", "", "/high"))
            assert low <= value <= high
        assert abs(metrics[f"test/{name}"] - metrics[f"base/{name}"] - metrics[f"difference/{name}"]) < 1e-9
    assert metrics["test/examples"] == 20

def check_wandb(record, folder):
    from llmops_kit.runs.tracking import read_offline_run
    read = read_offline_run(folder)
    assert not record["tracking"].get("error")
    assert read["state"] == "finished" and read["config"] == record["parameters"]
    history = [json.loads(o) for o in (folder/"metrics.jsonl").read_text().splitlines()] if record["history"]["lines"] else []
    assert all(o["run"] in read["notes"] for o in record["inputs"] if o.get("run"))
    lines = [o for o in read["history"] if not any(k.endswith("._type") for k in o)]  # a table is a line of its own
    assert lines == [{"step": o["step"], **o["values"]} for o in history]
    assert {k: read["summary"][k] for k in record["metrics"]} == record["metrics"]
    digests = {json.loads(o["metadata"])["sha256"] if isinstance(o.get("metadata"), str) else o["metadata"]["sha256"] for o in read["artifacts"] if o.get("metadata")}
    assert {o["sha256"] for o in record["outputs"] + record["inputs"]} <= digests
    kinds = {o["type"] for o in read["artifacts"]}
    assert "notebook" in kinds
    if record["job"] == "evaluate": assert "predictions" in read["summary"] or any("predictions" in o["name"] for o in read["artifacts"])

@pytest.mark.parametrize("job", few(SMALL, SMALL.keys() - BENCHES))
def test_wandb_holds_what_the_ledger_holds(job, record, runs): check_wandb(record, runs/record["id"])

@pytest.mark.parametrize("job", few(["prepare", "finetune", "evaluate"], ["finetune", "evaluate"])) # test_reuse runs prepare again
def test_replay_agrees_to_the_last_bit(job, records, env):
    told = json.loads(llmops("replay", records[job]["id"], "--json", env=env))
    assert told["agrees"] and told["differences"] == [] and told["environment"] == []

@pytest.mark.parametrize("job", few(["finetune", "evaluate", "compare"], ["compare"]))
def test_one_number_altered_by_hand_fails_the_replay(job, records, runs, env):
    path = runs/records[job]["id"]/"run.json"
    honest = path.read_text()
    name, value = next((k, v) for k, v in records[job]["metrics"].items() if isinstance(v, float) and not k.startswith("cost/"))
    assert honest.count(f'"{name}": {value!r}') == 1
    path.write_text(honest.replace(f'"{name}": {value!r}', f'"{name}": {value + 1e-6!r}'))
    done = run_command("llmops", "replay", records[job]["id"], env=env)
    path.write_text(honest)
    assert done.returncode == 1 and name in done.stdout and "changed after the run" in done.stdout

@pytest.mark.parametrize("job", ["evaluate", "compare"])
def test_a_report_is_one_file_with_the_verdict_first(job, records, env, tmp_path):
    page = Path(llmops("report", records[job]["id"], "--output", tmp_path/"page.html", env=env).strip()).read_text()
    at = [page.index(o) for o in ("mean a p-value of at most" if job == "compare" else "95 % interval of the paired difference", "data:image/png;base64,", "<summary>Numbers</summary>", 'id="code"')]
    assert at == sorted(at)
    assert not [o for o in re.findall(r'(?:src|href)="([^"]*)"', page) if not o.startswith(("data:", "#"))] and "<script" not in page

def test_diff_names_what_was_changed(records, env):
    other = run_job("prepare", {"data": records["prepare"]["id"], "limit": 200, "wandb": "off"}, env)
    found = json.loads(llmops("diff", records["prepare"]["id"], other["id"], "--json", env=env))
    assert {"limit", "wandb"} <= {o["name"] for o in found if o["part"] == "parameters"}
    assert any(o["part"] == "outputs" for o in found)

def test_plain_papermill_makes_the_same_record(records, env, tmp_path, runs):
    values = SMALL["finetune"] | {"data": records["prepare"]["id"]}
    done = run_command("papermill", "--no-progress-bar", PROJECT/"nbs"/"jobs"/"finetune.ipynb", tmp_path/"out.ipynb", *options(values), cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    record = json.loads(llmops("show", "latest:finetune", "--json", env=env))
    assert record["runner"] == "papermill" and record["id"] != records["finetune"]["id"]
    comparable = lambda r: {k: v for k, v in r["metrics"].items() if not k.startswith("cost/")}
    assert comparable(record) == comparable(records["finetune"])
    assert record["job_sha256"] == records["finetune"]["job_sha256"] and record["given"] == records["finetune"]["given"]
    assert {o["name"]: o["sha256"] for o in record["outputs"]} == {o["name"]: o["sha256"] for o in records["finetune"]["outputs"]}
    kept = nbformat.read(runs/record["id"]/"notebook.ipynb", 4)
    assert any("image/png" in o.get("data", {}) for c in kept.cells for o in c.get("outputs", ()))
