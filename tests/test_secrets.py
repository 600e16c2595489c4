"Canaries in parameters, environment, outputs and tracebacks: none of them may be found in a run's folder, however it was run."
import json, os
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from conftest import checked, llmops, run_command

PARAMETER, VARIABLE, SHAPE = "canary-Zq8!\"quoted\"-parameter", "canary-environment-Xw7", "hf_CanaryCanaryCanaryCanary"
BODY = '''
from llmops_kit.runs.job import Run
import os, sys
from IPython.display import display, HTML
run = Run.start("leaky")
run.log({"loss": 1.0}, step=0)
print("printed", hub_token, os.environ["SERVICE_PASSWORD"])
sys.stdout.write(hub_token[:9]); sys.stdout.flush(); sys.stdout.write(hub_token[9:] + "\\n")
print("to stderr", hub_token, file=sys.stderr)
display(HTML(f"<b>{hub_token}</b> hf_CanaryCanaryCanaryCanary"))
run.table("rows", [{"text": "harmless"}])
run.warn(f"careful with {hub_token}")
{"headers": {"authorization": hub_token}}
'''
FAIL = 'raise RuntimeError(f"login failed with {hub_token} and {os.environ[\'SERVICE_PASSWORD\']}")'

@pytest.fixture
def leaky(tmp_path):
    def write(fails):
        parameters = 'hub_token: str = ""  # a secret\nmax_new_tokens: int = 64  # no secret\nwandb: str = "offline"  # where it is logged'
        cells = [new_markdown_cell("# Leaky"), new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(BODY),
                 new_code_cell(FAIL if fails else "run.finish({'loss': 1.0})")]
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path/"leaky.ipynb")
        return tmp_path/"leaky.ipynb"
    return write

def _leaks(folder):
    # split, so that this file's own text cannot be what is found
    canaries = [o.encode() for o in ("Zq8", "Xw7", "hf_" + "Canary")]
    return [(o.relative_to(folder), c) for o in folder.rglob("*") if o.is_file() and o.name != "leaky.ipynb" for c in canaries if c in o.read_bytes()]

@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("runner", ["llmops", "papermill"])
def test_no_canary_is_found(leaky, tmp_path, runner, fails):
    path, runs = leaky(fails), tmp_path/"runs"
    env = {"LLMOPS_RUNS": str(runs), "SERVICE_PASSWORD": VARIABLE}
    # the planted key shape stands in the job's source, which is the user's own file; the run's copy must not have it
    command = ["llmops", "run", path, "-p", "hub_token", PARAMETER] if runner == "llmops" else ["papermill", "--no-progress-bar", path, tmp_path/"out.ipynb", "-p", "hub_token", PARAMETER]
    done = run_command(*command, cwd=tmp_path, env=env)
    assert (done.returncode != 0) == fails, done.stderr
    record = json.loads(llmops("runs", "--json", env=env))[0]
    assert record["status"] == ("failed" if fails else "finished")
    assert record["parameters"]["hub_token"] == "<redacted:hub_token>" and record["parameters"]["max_new_tokens"] == 64
    if fails: assert "login failed with <redacted:hub_token> and <redacted:SERVICE_PASSWORD>" in record["error"]["message"]
    assert _leaks(runs) == []
    notebook = (runs/record["id"]/"notebook.ipynb").read_text()
    assert "printed <redacted:hub_token> <redacted:SERVICE_PASSWORD>" in notebook  # it ran, and was redacted
    if runner == "llmops": assert PARAMETER not in done.stdout + done.stderr and VARIABLE not in done.stdout + done.stderr
