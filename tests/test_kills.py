"prepare, finetune and evaluate, each killed at every boundary between two cells and at random moments, and resumed: what they end with is what they end with when nobody kills them."
import json, random, subprocess
from pathlib import Path
import pytest
from conftest import CHAIN, few, kill_tree, llmops, options, run_job, start_llmops, wait_until
from llmops_kit.runs.history import comparable
from llmops_kit.runs.tracking import read_offline_run

CERTIFIED = CHAIN | {"finetune": CHAIN["finetune"] | {"certify": "quick"}}
NEEDS = {"finetune": ("data", "prepare"), "evaluate": ("adapter", "finetune")}

@pytest.fixture(scope="module")
def env(chain_copy): return {"LLMOPS_RUNS": str(chain_copy[0]), "WANDB_MODE": "offline"}

def arguments(job, whole): # its input is the run that nobody killed
    values = {k: whole[job]["parameters"][k] for k in CERTIFIED[job]}
    if job in NEEDS: values[NEEDS[job][0]] = whole[NEEDS[job][1]]["id"]
    return [job, *options(values)]

@pytest.fixture(scope="module")
def whole(chain_copy): return chain_copy[1]

@pytest.fixture(scope="module")
def certified(env):
    "The same runs, with certificates in the fine-tuning."
    runs = {}
    for job, values in CERTIFIED.items():
        needed = {NEEDS[job][0]: runs[NEEDS[job][1]]["id"]} if job in NEEDS else {}
        runs[job] = run_job(job, values | needed, env)
    return runs

def outcome(record, env):
    folder = Path(env["LLMOPS_RUNS"])/record["id"]
    wandb = read_offline_run(folder)
    plain = lambda o: comparable({k: v for k, v in o.items()})
    return dict(status=record["status"], error=record["error"], tracking=record["tracking"].get("error"), outputs={o["name"]: o["sha256"] for o in record["outputs"]}, metrics=comparable(record["metrics"]), history=record["history"],
                certificates={k: (o["passed"], o["value"]) for k, o in record["certificates"].items()}, steps=[o["name"] for o in record["steps"]],
                # a table's line names the file that holds it, which carries a digest of itself
                wandb=([plain(o) for o in wandb["history"] if not any(k.endswith("._type") for k in o)], plain({k: v for k, v in wandb["summary"].items() if isinstance(v, (int, float))})))

def cells_done(folder):
    try: cells = json.loads((folder/"notebook.ipynb").read_text())["cells"]
    except (OSError, ValueError): return 0
    return sum(o.get("execution_count") is not None for o in cells)

def killed(job, whole, env, kill, warm=None):
    "A run of the job, killed by `kill(process, folder)` as soon as it has a record, and resumed, with a forked kernel where `warm` says how."
    runs = Path(env["LLMOPS_RUNS"])
    before = set(runs.glob("2*"))
    process = start_llmops("run", *arguments(job, whole), "--fresh", env=env)
    new = lambda: [o for o in runs.glob("2*") if o not in before and (o/"run.json").exists()]
    wait_until(new, process)
    folder = new()[0]
    kill(process, folder)
    if process.poll() is None: kill_tree(process)
    if json.loads((folder/"run.json").read_text())["status"] == "finished": return None
    return json.loads(llmops("resume", folder.name, "--json", env=(warm or {}) | env))

def at_boundary(n):
    def kill(process, folder): wait_until(lambda: cells_done(folder) >= n, process)
    return kill

def check(job, record, whole, env):
    if record: assert outcome(record, env) == outcome(whole[job], env)

@pytest.mark.parametrize("job", few(CHAIN, ["evaluate"])) # test_resume kills finetune, test_prepare what prepare does
def test_killed_in_the_middle(job, whole, env, warm):
    cells = cells_done(Path(env["LLMOPS_RUNS"])/whole[job]["id"])
    record = killed(job, whole, env, at_boundary(2*cells//3), warm)
    assert record and len(record["resumed"]) == 1
    check(job, record, whole, env)

@pytest.mark.slow
@pytest.mark.parametrize("job", CERTIFIED)
def test_killed_at_every_boundary(job, certified, env):
    cells = cells_done(Path(env["LLMOPS_RUNS"])/certified[job]["id"])
    resumed = 0
    for n in range(cells):
        record = killed(job, certified, env, at_boundary(n))
        check(job, record, certified, env)
        resumed += record is not None
    assert resumed >= cells - 2 # the last ones may have been over before the kill

@pytest.mark.slow
def test_killed_at_twenty_random_moments(certified, env):
    rng, resumed = random.Random(0), 0
    for _ in range(20):
        job = rng.choice(list(CERTIFIED))
        moment = rng.uniform(0, certified[job]["seconds"])
        def kill(process, folder):
            try: process.wait(moment)
            except subprocess.TimeoutExpired: pass
        record = killed(job, certified, env, kill)
        check(job, record, certified, env)
        resumed += record is not None
    assert resumed >= 12

@pytest.mark.slow
def test_wandb_after_three_kills(certified, env):
    "Killed, resumed, killed, resumed, killed, resumed: one run, each step once, each value as without."
    runs, before = Path(env["LLMOPS_RUNS"]), set(Path(env["LLMOPS_RUNS"]).glob("2*"))
    process = start_llmops("run", *arguments("finetune", certified), "--fresh", env=env)
    lines = lambda o: len((o/"metrics.jsonl").read_text().splitlines()) if (o/"metrics.jsonl").exists() else 0
    new = lambda: [o for o in runs.glob("2*") if o not in before and (o/"run.json").exists()]
    wait_until(new, process)
    folder = new()[0]
    for step in 3, 6, 9:
        wait_until(lambda: lines(folder) >= step, process)
        kill_tree(process)
        if step < 9: process = start_llmops("resume", folder.name, env=env)
    record = json.loads(llmops("resume", folder.name, "--json", env=env))
    assert len(record["resumed"]) == 3
    check("finetune", record, certified, env)
