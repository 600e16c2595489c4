"A run that is killed at any moment: the ledger finds out, nothing that was logged is lost, and the next run works."
import json
import nbformat, pytest
from conftest import PROJECT, kill_tree, llmops, options, start_llmops, wait_until

SMALL = {"max_steps": 400, "train_examples": 100, "validation_examples": 8, "eval_every": 5, "wandb": "offline", "certify": "off"}

def _lines(run):
    try: return len((run/"metrics.jsonl").read_text().splitlines())
    except FileNotFoundError: return 0

# what must have happened before the kill
MOMENTS = {
    "the record was just made": lambda run: True,
    "the notebook was first written": lambda run: (run/"notebook.ipynb").exists(),
    "the kernel has started the run": lambda run: json.loads((run/"run.json").read_text())["inputs"],
    "a few steps were logged": lambda run: _lines(run) >= 3,
    "training is well under way": lambda run: _lines(run) >= 12,
}

SHORT = "training is well under way",

@pytest.mark.parametrize("moment", [o if o in SHORT else pytest.param(o, marks=pytest.mark.slow) for o in MOMENTS])
def test_sigkill_of_the_whole_tree(moment, tmp_path, warm):
    env, data = {"LLMOPS_RUNS": str(tmp_path/"runs")}, tmp_path/"rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {n} times {n % 7}?", "completion": f"It is {n*(n % 7)}, as one counts."}) + "\n" for n in range(150)))
    process = start_llmops("run", "finetune", *options(SMALL | {"data": data}), env=env)
    found = lambda: list((tmp_path/"runs").glob("*/run.json"))
    wait_until(lambda: found() and MOMENTS[moment](found()[0].parent), process)
    run = found()[0].parent
    logged = _lines(run)
    kill_tree(process)

    record = json.loads(llmops("runs", "--json", env=env))[0]
    assert record["status"] == "killed" and record["id"] == run.name
    shown = json.loads(llmops("show", run.name, "--json", env=env))
    assert shown["error"]["type"] == "Killed" and shown["parameters"]["max_steps"] == 400
    if (run/"notebook.ipynb").exists(): nbformat.validate(nbformat.read(run/"notebook.ipynb", 4))
    history = [json.loads(o) for o in (run/"metrics.jsonl").read_text().splitlines()] if logged else []
    assert len(history) >= logged  # what was there at the kill is there now, each line whole
    assert [o["step"] for o in history] == sorted(o["step"] for o in history)

    assert not [*PROJECT.glob("*-ipc-*")]  # a killed kernel's sockets are not the user's to sweep up

    following = json.loads(llmops("run", "prepare", "-p", "data", data, "-p", "limit", "60", "-p", "wandb", "off", "--json", env=warm | env))
    assert following["status"] == "finished"
