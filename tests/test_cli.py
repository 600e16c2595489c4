"The command line as scripts see it: exit codes, stdout, messages that name the fix, and nothing written by a wrong call."
import json
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook
from conftest import PROJECT, few, llmops, options, run_command, start_llmops, wait_until

@pytest.mark.parametrize("arguments, message", [
    (["-p", "lrr", "1e-3"], "Did you mean lr?"),
    (["-p", "lr", "fast"], "lr = 'fast' is not a finite number"),
    (["-p", "lr", "-1"], "lr = -1.0 is not a finite number in (0, 1]"),
    (["-p", "lora_r", "1.5"], "lora_r = '1.5' is not a whole number"),
    (["-f", "missing.yaml"], "Cannot read missing.yaml"),
    (["-p", "data", "latest:prepare"], "There is no finished run of prepare"),
])
def test_a_wrong_call_exits_2_and_writes_nothing(arguments, message, tmp_path):
    done = run_command("llmops", "run", "finetune", *arguments, cwd=tmp_path, env={"LLMOPS_RUNS": str(tmp_path/"runs")})
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []

def test_plain_papermill_stops_at_the_same_message(tmp_path):
    job = PROJECT/"nbs"/"jobs"/"finetune.ipynb"
    done = run_command("papermill", "--no-progress-bar", job, tmp_path/"out.ipynb", "-p", "lrr", "1e-3", cwd=tmp_path, env={"LLMOPS_RUNS": str(tmp_path/"runs")})
    assert done.returncode != 0 and "finetune has no parameter lrr. Did you mean lr?" in done.stderr
    assert not (tmp_path/"runs").exists()

def test_runs_that_cannot_be_written(tmp_path):
    (tmp_path/"runs").write_text("a file where a folder should be")
    done = run_command("llmops", "run", "prepare", cwd=tmp_path, env={"LLMOPS_RUNS": str(tmp_path/"runs")})
    assert done.returncode == 2 and "Cannot write a run to" in done.stderr and "set LLMOPS_RUNS" in done.stderr

def test_parameters_from_a_file(tmp_path, warm):
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n} times {n % 7}?", "completion": f"It is {n*(n % 7)}, as one counts."}) + "\n" for n in range(90)))
    (tmp_path/"p.yaml").write_text(f"data: {tmp_path}/rows.jsonl\nlimit: 50\nvalidation: 2e-1\nwandb: 'off'\n")
    record = json.loads(llmops("run", "prepare", "-f", tmp_path/"p.yaml", "-p", "limit", "60", "--name", "small", "--json", env=warm | {"LLMOPS_RUNS": str(tmp_path/"runs")}))
    assert (record["parameters"]["limit"], record["parameters"]["validation"], record["given"]) == (60, 0.2, ["data", "limit", "validation", "wandb"])
    assert (record["name"], record["status"]) == ("small", "finished")

@pytest.mark.parametrize("command", ["jobs", "run", "resume", "runs", "show", "graph", "export", "import", "replay", "diff", "gate", "estimate", "sync", "sweep", "tune", "report", "warm", "verify-notebooks", "demo"])
def test_every_command_has_help_and_json(command):
    assert "--json" in llmops(command, "--help")

def test_every_shipped_job_declares_itself():
    jobs = json.loads(llmops("jobs", "--json"))
    assert {"prepare", "pretrain", "finetune", "evaluate"} <= {o["job"] for o in jobs}
    for job in jobs:
        described = json.loads(llmops("jobs", job["job"], "--json"))
        assert job["summary"] and all(o["help"] for o in described["parameters"])
        assert {"seed", "wandb"} <= {o["name"] for o in described["parameters"]}

@pytest.mark.parametrize("job", few(["waits", "finetune"], ["waits"]))
def test_sigterm_ends_a_run_cleanly(job, tmp_path):
    env, values = {"LLMOPS_RUNS": str(tmp_path/"runs")}, {"wandb": "off"}
    if job == "finetune": values |= {"max_steps": 400, "certify": "off", "train_examples": 100, "validation_examples": 8}
    else:
        cells = [new_code_cell('seed: int = 0  # of all\nwandb: str = "off"  # where', metadata={"tags": ["parameters"]}),
                 new_code_cell("from llmops_kit.runs.job import Run\nimport threading\nrun = Run.start('waits')\nrun.log({'n': 1}, step=0)\nwhile True: threading.Event().wait(0.1)")]
        job = tmp_path/"waits.ipynb"
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), job)
    process = start_llmops("run", job, *options(values), env=env)
    wait_until(lambda: list((tmp_path/"runs").glob("*/metrics.jsonl")), process)
    process.terminate()
    _, told = process.communicate(timeout=60)
    record = json.loads(llmops("runs", "--json", env=env))[0]
    assert process.returncode == 1 and record["status"] == "killed" and "SIGTERM" in record["error"]["message"], told
