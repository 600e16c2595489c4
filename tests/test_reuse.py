"What makes a run another run, and what does not: each row changes one thing of a finished run and says whether it may be taken."
import json, os, shutil
from pathlib import Path
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook
from conftest import CHAIN, run_job
from llmops_kit.runs import engine, reuse
from llmops_kit.runs.artifacts import sha256_of
from llmops_kit.runs.catalog import load_job
from llmops_kit.runs.history import history_digest
from llmops_kit.runs.job import first_record
from llmops_kit.runs.ledger import create_record, read_record, run_folder, update_record
from llmops_kit.runs.reuse import run_or_reuse

PARAMETERS = '''rows: str = "rows.txt"  # numbers
lr: float = 0.1  # rate
names: list[str] = ["a"]  # texts
api_token: str = "a-first-token"  # for a server
price_per_hour: float = 0.0  # of the machine
seed: int = 0  # of the generator
wandb: str = "off"  # where it is logged'''

def write(name="add", code="import doubling", parameters=PARAMETERS, prose="# Add"):
    cells = [nbformat.v4.new_markdown_cell(prose), new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(code)]
    nbformat.write(new_notebook(cells=cells), f"{name}.ipynb")
    return load_job(f"{name}.ipynb")

def fake_run(job, record, values, given, quiet): # what the engine would leave, without its kernel
    folder = run_folder(record["id"])
    (folder/"artifacts"/"out.txt").write_text("out")
    outputs = [{"name": "out", "kind": "file", "path": "artifacts/out.txt", "sha256": sha256_of(folder/"artifacts"/"out.txt")}]
    inputs = [{"name": "rows", "kind": "file", "path": values["rows"], "sha256": sha256_of(values["rows"])}, {"name": "more", "kind": "file", "path": "more.txt", "sha256": sha256_of("more.txt")}]
    return update_record(record["id"], status="finished", outputs=outputs, inputs=inputs, history=history_digest(folder), seconds=1.0)

@pytest.fixture(scope="module")
def surroundings(): return json.dumps(first_record("add", {}, {}, [], runner="llmops")["environment"])

@pytest.fixture
def place(tmp_path, monkeypatch, surroundings):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path/"runs"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(reuse, "execute_record", fake_run)
    now = json.loads(surroundings)
    monkeypatch.setattr("llmops_kit.runs.job.environment", lambda: json.loads(json.dumps(now)))
    for name, text in (("rows.txt", "1"), ("more.txt", "2"), ("doubling.py", "import helper"), ("helper.py", "x = 1")): Path(name).write_text(text)
    return now

def again(place, values=None, job=None, **more):
    job = job or write()
    return run_or_reuse(job, {k: p.default for k, p in job.parameters.items()} | (values or {}), list(values or {}), **more)

def changed_environment(place, path, value):
    *parts, last = path.split(".")
    for o in parts: place = place[o]
    place[last] = value

SAME = {
    "nothing": lambda place: again(place),
    "the run's name": lambda place: again(place, name="mine"),
    "no progress line": lambda place: again(place, quiet=True),
    "where wandb is": lambda place: again(place, {"wandb": "offline"}),
    "the machine's price": lambda place: again(place, {"price_per_hour": 2.0}),
    "a default, given": lambda place: again(place, {"lr": 0.1}),
    "another token": lambda place: again(place, {"api_token": "another-secret-token"}),
    "prose in the notebook": lambda place: again(place, job=write(prose="# Adds")),
    "a comment in the parameters cell": lambda place: again(place, job=write(parameters=PARAMETERS.replace("# rate", "# the rate"))),
    "the study it belongs to": lambda place: again(place, study="s", stage="t"),
    "the git commit": lambda place: (changed_environment(place, "git", {"commit": "0"*40, "dirty": True, "diff_sha256": None}), again(place))[1],
    "the host's name": lambda place: (changed_environment(place, "hardware.host", "another"), again(place))[1],
    "a module that nobody imports": lambda place: (Path("unused.py").write_text("1"), again(place))[1],
}
OTHER = {
    "--fresh": lambda place: again(place, fresh=True),
    "a parameter": lambda place: again(place, {"lr": 0.2}),
    "the seed": lambda place: again(place, {"seed": 1}),
    "one text of a list": lambda place: again(place, {"names": ["a", "b"]}),
    "a default": lambda place: again(place, job=write(parameters=PARAMETERS.replace("0.1", "0.3"))),
    "the job's code": lambda place: again(place, job=write(code="import doubling\n1")),
    "the file that a parameter names": lambda place: (Path("rows.txt").write_text("3"), again(place))[1],
    "another file of that content": lambda place: (shutil.copy("rows.txt", "copy.txt"), again(place, {"rows": "copy.txt"}))[1],
    "a file that the code names": lambda place: (Path("more.txt").write_text("3"), again(place))[1],
    "a module that the job imports": lambda place: (Path("doubling.py").write_text("import helper\n1"), again(place))[1],
    "a module that this module imports": lambda place: (Path("helper.py").write_text("x = 2"), again(place))[1],
    "the kit's code": lambda place: (changed_environment(place, "kit.sha256", "0"*64), again(place))[1],
    "Python": lambda place: (changed_environment(place, "python", "3.99.0"), again(place))[1],
    "a package": lambda place: (changed_environment(place, "packages.torch", "0.0"), again(place))[1],
    "the platform": lambda place: (changed_environment(place, "platform", "another"), again(place))[1],
    "the processor": lambda place: (changed_environment(place, "hardware.cpu", "another"), again(place))[1],
    "the threads": lambda place: again(place, threads=place["threads"] + 1),
    "an address": lambda place: again(place, {"names": ["https://example.com/v1"]}),
}

@pytest.mark.parametrize("change, taken", [*((o, True) for o in SAME), *((o, False) for o in OTHER)])
def test_what_makes_another_run(change, taken, place):
    first, reused = again(place)
    assert not reused
    record, reused = (SAME | OTHER)[change](place)
    assert reused is taken and (record["id"] == first["id"]) is taken

DAMAGED = {
    "not finished": lambda o: update_record(o["id"], status="killed"),
    "its record was changed by hand": lambda o: (run_folder(o["id"])/"run.json").write_text((run_folder(o["id"])/"run.json").read_text().replace('"seconds": 1.0', '"seconds": 2.0')),
    "an output was changed": lambda o: (run_folder(o["id"])/"artifacts"/"out.txt").write_text("other"),
    "an output is gone": lambda o: os.remove(run_folder(o["id"])/"artifacts"/"out.txt"),
    "its history was changed": lambda o: (run_folder(o["id"])/"metrics.jsonl").write_text('{"step": 1, "time": 0, "values": {}}\n'),
    "it was resumed with other packages": lambda o: update_record(o["id"], warnings=["The run was resumed with other package torch than it began with."]),
    "its model came from a hub, without a commit": lambda o: update_record(o["id"], inputs=[{"name": "model", "kind": "model", "sha256": "0", "path": "more.txt", "source": "owner/name"}]),
    "a parameter meant what there was then": lambda o: update_record(o["id"], references={"names": ["everything"]}),
}

@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_not_taken(damage, place):
    first, _ = again(place)
    DAMAGED[damage](first)
    assert again(place)[1] is False

@pytest.mark.parametrize("job", ["bench_add", "label"])
def test_what_nobody_can_repeat(job, place):
    assert [again(place, job=write(job))[1] for _ in range(2)] == [False, False]

def test_latest_means_the_run_of_now(place):
    source = again(place, job=write("source"))[0]
    use = write("use", parameters=PARAMETERS.replace('rows: str = "rows.txt"', 'rows: str = "rows.txt"\nof: str = "latest:source"'))
    assert [again(place, job=use)[1] for _ in range(2)] == [False, True]
    assert again(place, {"of": source["id"]}, job=use)[1] is True
    while again(place, job=write("source"), fresh=True)[0]["id"] < source["id"]: pass  # of the same second, chance decides which is newer
    assert again(place, job=use)[1] is False

def test_the_command_says_which_run_it_is(chain_copy, warm):
    "With a job of the kit: what it prints, and its exit code."
    env, first = warm | {"LLMOPS_RUNS": str(chain_copy[0])}, chain_copy[1]["prepare"]
    second = run_job("prepare", CHAIN["prepare"] | {"wandb": "off"}, env)
    assert (second["id"], first["reused"], second["reused"]) == (first["id"], False, True)
    third = run_job("prepare", CHAIN["prepare"] | {"wandb": "off"}, env, "--fresh")
    assert third["id"] != first["id"] and [o["sha256"] for o in third["outputs"] if o["kind"] == "dataset"] == [o["sha256"] for o in first["outputs"] if o["kind"] == "dataset"]
