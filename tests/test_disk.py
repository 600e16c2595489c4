"A disk that is full: the run fails with a message that names the fix, and the record and the notebook stay whole."
import json, subprocess
import nbformat, pytest
from conftest import llmops, run_command

@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path/"disk"
    folder.mkdir()
    def mount(size):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True)
        if done.returncode: pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        return folder
    yield mount
    subprocess.run(["umount", folder], capture_output=True)

@pytest.mark.parametrize("size, message", [("1m", "Could not save dataset"), ("60k", "is full")])
def test_a_full_disk_while_saving(size, message, small_disk, tmp_path, warm):
    rows = [{"prompt": f"question {n} " + "word " * 60, "completion": f"answer {n}"} for n in range(6000)]
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows))
    runs = small_disk(size)/"runs"
    env = warm | {"LLMOPS_RUNS": str(runs)}
    done = run_command("llmops", "run", "prepare", "-p", "data", tmp_path/"rows.jsonl", "-p", "wandb", "off", env=env)
    assert done.returncode == 1 and message in done.stderr and "LLMOPS_RUNS" in done.stderr and "Traceback" not in done.stderr
    record = json.loads(llmops("runs", "--json", env=env))[0]
    assert record["status"] == "failed"
    notebook = nbformat.read(runs/record["id"]/"notebook.ipynb", 4)
    nbformat.validate(notebook)
    assert not list((runs/record["id"]/"artifacts").glob("*dataset*"))  # no half of one
