"Studies: the same ledger wherever they run, workers and whole studies that are killed, and tuning that finds a front that is known."
import json, os, random, shutil, signal
from pathlib import Path
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook
from conftest import few, kill_tree, llmops, run_command, start_llmops, wait_until
from llmops_kit.runs import executors
from llmops_kit.runs.catalog import load_job
from llmops_kit.runs.history import append_history
from llmops_kit.runs.ledger import create_record, list_runs, read_record, run_folder, update_record
from llmops_kit.runs.sweep import read_axes, sweep
from llmops_kit.runs.study import read_study_record
from llmops_kit.runs.tune import best_rows, read_objective, tune

FRAGILE = '''from llmops_kit.runs.job import Run
from llmops_kit.runs.ledger import read_record
import os, signal, time
run = Run.start("fragile")
with run.step("work") as step:
    for n in range(4):
        run.log({"loss": 1/(n + 1 + x)}, step=n)
        if breaks and n == 2 and not (step.folder/"was_here").exists():
            (step.folder/"was_here").touch()
            os.kill(read_record(run.id)["process"]["pid"], signal.SIGKILL)
            time.sleep(600)
run.finish({"loss": 1/(4 + x)})'''

def write_job(folder, name, parameters, code):
    cells = [new_code_cell(parameters + '\nseed: int = 0  # of the generator\nwandb: str = "off"  # where it is logged', metadata={"tags": ["parameters"]}), new_code_cell(code)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), folder/f"{name}.ipynb")
    return load_job(str(folder/f"{name}.ipynb"))

@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path/"runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- where it runs

def needs_slurm(on):
    if on == "slurm" and not (shutil.which("sinfo") and run_command("sinfo").returncode == 0): pytest.skip("no Slurm answers here")

@pytest.fixture
def ray_ends():
    yield
    import ray
    if ray.is_initialized(): ray.shutdown()

@pytest.mark.parametrize("on", few(["local", "slurm-local", "slurm", "ray"], ["local", "slurm-local", "ray"]))
def test_the_same_sweep_anywhere_and_a_killed_worker_is_replaced(on, place, ray_ends):
    needs_slurm(on)
    job = write_job(place, "fragile", "x: float = 1.0  # where\nbreaks: bool = False  # the worker is killed, once", FRAGILE)
    record = sweep(job, read_axes(job, [["breaks", "false", "true"], ["x", "1.5"]], []), {}, on=on, workers=2, threads=1, quiet=True)
    assert record["status"] == "finished", record
    found = {k: read_record(o["run"]) for k, o in record["stages"].items()}
    assert {k: (o["parameters"]["x"], o["metrics"]["loss"], o["history"]["lines"], o["environment"]["threads"]) for k, o in found.items()} == {
        "breaks=False,x=1.5": (1.5, 1/5.5, 4, 1), "breaks=True,x=1.5": (1.5, 1/5.5, 4, 1)}
    assert [o["after"] for o in found["breaks=True,x=1.5"]["resumed"]] == ["killed"] and "resumed" not in found["breaks=False,x=1.5"]
    assert len(list_runs()) == 2 and {o["study"] for o in found.values()} == {record["name"]}


# -- a study that is killed

WAITS = '''from llmops_kit.runs.job import Run
from llmops_kit.runs.ledger import read_record
import os, time
run = Run.start("waits")
run.log({"n": n}, step=0)
while gate and not os.path.exists(gate + ".open"): time.sleep(0.05)
run.finish({"n": n + (read_record(after)["metrics"]["n"] if after else 0)})'''

def test_a_pipeline_killed_as_a_whole_goes_on_and_then_runs_nothing(place):
    write_job(place, "waits", 'n: int = 1  # a number\nafter: str = ""  # a run to add\ngate: str = ""  # waits for a file with this name and .open', WAITS)
    (place/"s.yaml").write_text(f"""
stages:
  first: {{job: {place}/waits.ipynb}}
  second: {{job: {place}/waits.ipynb, parameters: {{n: 2, after: stage:first, gate: {place}/gate}}}}
  third: {{job: {place}/waits.ipynb, parameters: {{after: stage:second}}}}
""")
    env = {"LLMOPS_RUNS": str(place/"runs")}
    process = start_llmops("run", place/"s.yaml", "--threads", "1", env=env)
    logged = lambda: [o for o in (place/"runs").glob("*/metrics.jsonl") if read_record(o.parent.name)["stage"] == "second"]
    wait_until(logged, process)
    kill_tree(process)
    (place/"gate.open").touch()
    again = json.loads(llmops("run", place/"s.yaml", "--json", env=env))
    assert {k: (o["state"], o["how"]) for k, o in again["stages"].items()} == {"first": ("reused", "reused"), "second": ("finished", "resumed"), "third": ("finished", "ran")}
    assert read_record(again["stages"]["third"]["run"])["metrics"]["n"] == 4
    once_more = json.loads(llmops("run", place/"s.yaml", "--json", env=env))
    assert {o["state"] for o in once_more["stages"].values()} == {"reused"} and len(list_runs()) == 3
    report = json.loads(llmops("run", "study", "-p", "wandb", "off", "--json", env=env))
    assert (report["metrics"]["stages"], report["metrics"]["stages/done"], report["parameters"]["study"]) == (3, 3, "s")
    pictures = [m for c in nbformat.read(place/"runs"/report["id"]/"notebook.ipynb", 4).cells for o in c.get("outputs", ()) for m in o.get("data", {})]
    assert pictures.count("image/png") == 2  # the graph, and the seconds
    llmops("graph", again["stages"]["second"]["run"], "--picture", place/"graph.svg", env=env)
    assert "<svg" in (place/"graph.svg").read_text()

YAML = """
name: stopped
stages:
  one: {job: %(job)s, parameters: {gate: %(gate)s}}
  two: {job: %(job)s, parameters: {gate: %(gate)s, n: 2}}
  three: {job: %(job)s, parameters: {gate: %(gate)s, n: 3}}
"""

@pytest.mark.parametrize("on, command, number", [("local", "run", "SIGTERM"), ("local", "tune", "SIGINT"), ("slurm-local", "run", "SIGINT"),
                                                 *few([("ray", "tune", "SIGTERM"), ("ray", "sweep", "SIGINT"), ("slurm", "sweep", "SIGTERM"), ("slurm", "run", "SIGINT")], [])])
def test_a_study_that_is_told_to_stop_stops_its_runs_and_goes_on(on, command, number, place, monkeypatch):
    if on == "ray": pytest.importorskip("ray", reason="needs the extra cluster")
    needs_slurm(on)
    import psutil
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would what is started here
    job = write_job(place, "waits", 'n: int = 1  # a number\nafter: str = ""  # a run to add\ngate: str = ""  # waits for a file with this name and .open', WAITS)
    (place/"s.yaml").write_text(YAML % {"job": job.path, "gate": place/"gate"})
    words = {"run": ["run", place/"s.yaml"], "sweep": ["sweep", job.path, "-p", "gate", place/"gate", "-g", "n", "1", "2", "3"],
             "tune": ["tune", job.path, "-p", "gate", place/"gate", "-s", "n", "1", "1000000", "--objective", "n:min", "--trials", "3", "--seeds", "1"]}[command] + ["--on", on, "--workers", "2", "--threads", "1"]
    env = {"LLMOPS_RUNS": str(place/"runs"), "RAY_ADDRESS": ""}
    process = start_llmops(*words, env=env)
    wait_until(lambda: len(list((place/"runs").glob("*/metrics.jsonl"))) == 2, process)
    kernels = [psutil.Process(o["kernel"]["pid"]) for o in list_runs()]
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(getattr(signal, number))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on" in said, said
    assert not [o for o in psutil.wait_procs([*kernels, *tree], timeout=15)[1]]
    assert {(o["status"], o["error"]["type"]) for o in list_runs()} <= {("killed", "Interrupted"), ("killed", "Killed")}
    study = read_study_record("")
    assert study["status"] == "stopped" and {o["state"] for o in study["stages"].values()} <= {"killed", "waiting"}, study
    (place/"gate.open").touch()
    again = json.loads(llmops(*words, "--json", env=env))
    assert again["status"] == "finished" and sorted(o["how"] for o in again["stages"].values()) == ["ran", "resumed", "resumed"]
    assert len(list_runs()) == 3

def test_a_signal_while_a_worker_is_being_started_leaves_none_behind(place, monkeypatch):
    job = write_job(place, "waits", 'n: int = 1  # a number\nafter: str = ""  # a run to add\ngate: str = ""  # waits for a file with this name and .open', WAITS)
    started, start = [], executors.LocalWorkers.start
    def start_and_signal(self, task):
        started.append(start(self, task))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]
    monkeypatch.setattr(executors.LocalWorkers, "start", start_and_signal)
    with pytest.raises(KeyboardInterrupt): sweep(job, read_axes(job, [["n", "1", "2"]], []), {"gate": str(place/"gate")}, workers=1, threads=1, quiet=True)
    assert [o.poll() is not None for o in started] == [True]
    assert read_study_record("")["status"] == "stopped"

def test_a_wrong_study_runs_nothing(place):
    (place/"s.yaml").write_text("stages:\n  prepare: {parameters: {limit: 10}}\n  finetune: {parameters: {data: 'stage:prepar'}}\n")
    done = run_command("llmops", "run", place/"s.yaml", env={"LLMOPS_RUNS": str(place/"runs")})
    assert done.returncode == 2 and "Did you mean prepare?" in done.stderr and not (place/"runs").exists()


# -- tuning: with workers that compute in this process, so that many trials take little

class Here:
    "Workers without processes: a run advances by one line of history each time it is asked for its result."
    killed_after = None # runs, before all is lost

    def __init__(self, *args): pass
    def start(self, task):
        _, record = executors._prepared(task)
        if found := executors.find_equal(record): return {"record": found, "how": "reused", "lines": iter(())}
        earlier = next((o["id"] for o in list_runs() if (o["study"], o["stage"], o["status"]) == (task["study"], task["stage"], "running")), None)
        if not earlier: create_record(record := record | {"kernel": None})
        return {"record": read_record(earlier or record["id"]), "how": "resumed" if earlier else "ran", "lines": iter(range(1, self.steps + 1))}
    def result(self, handle):
        id = handle["record"]["id"]
        step = next(handle["lines"], None)
        if step and read_record(id)["status"] == "running":
            append_history(run_folder(id), {"loss": self.loss(handle["record"]["parameters"], step)}, step)
            return None
        if read_record(id)["status"] == "running":
            update_record(id, status="finished", metrics=self.metrics(handle["record"]["parameters"]), seconds=1.0)
            if Here.killed_after is not None:
                Here.killed_after -= 1
                if not Here.killed_after: raise SystemExit  # before anybody is told
        o = read_record(id)
        return {"run": id, "status": o["status"], "how": handle["how"], "error": o["error"]}
    def stop(self, handle):
        if read_record(handle["record"]["id"])["status"] == "running" and Here.killed_after is None:
            update_record(handle["record"]["id"], status="killed", error={"type": "Interrupted", "message": "stopped"})

    steps = 0
    @staticmethod
    def metrics(p): # Schaffer's first problem; what is spent in vain is bad for both: the front is x in [0, 2] and waste 0
        noise = random.Random(f"{p['x']}{p['seed']}").uniform(0, 0.01)
        return {"f1": p["x"]**2 + p["waste"] + noise, "f2": (p["x"] - 2)**2 + p["waste"] + noise, "loss": (p["x"] - 1)**2}

class Steps(Here):
    steps = 27
    @staticmethod
    def loss(p, step): return (p["x"] - 1)**2 + 1/step

@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.setitem(executors.executors, "local", Here)
    monkeypatch.setattr("llmops_kit.runs.study.time.sleep", lambda seconds: None)
    surroundings = executors.new_record.__globals__["first_record"]("add", {}, {}, [], runner="llmops")["environment"] | {"packages": {}}
    monkeypatch.setattr("llmops_kit.runs.job.environment", lambda: json.loads(json.dumps(surroundings)))
    return write_job(place, "schaffer", "x: float = 3.5  # where, in [-4, 4]\nwaste: float = 0.5  # bad for both, in [0, 1]", "1")

def hypervolume(points, corner=(5.0, 5.0)):
    found, height = 0.0, corner[1]
    for a, b in sorted(o for o in points if o[0] < corner[0] and o[1] < corner[1]):
        if b < height: found, height = found + (corner[0] - a)*(height - b), b
    return found

def test_tune_recovers_a_front_that_is_known_after_two_kills(here):
    axes, both = read_axes(here, [["waste", "0", "0.5", "1"]], [["x", "-4", "4"]]), [read_objective("f1:min"), read_objective("f2:min")]
    call = lambda: tune(here, axes, {}, both, 60, seeds=3, quiet=True)
    for kill in 15, 20:
        Here.killed_after = kill
        with pytest.raises(SystemExit): call()
    Here.killed_after = None
    record = call()
    assert len(record["trials"]) == 60 and {o["state"] for o in record["trials"]} == {"complete"}
    assert len({o["run"] for k, o in record["stages"].items() if "," not in k}) == len([o for o in list_runs() if "," not in o["stage"]])  # none was run twice
    rows = best_rows(record)
    front = [o for o in rows if o["best"]]
    assert len(front) >= 8 and all(o["parameters"]["waste"] == 0 and -0.15 < o["parameters"]["x"] < 2.15 for o in front), front
    ideal = hypervolume([((n/500)**2, (n/500 - 2)**2) for n in range(1001)])
    reached = hypervolume([tuple(o["objectives"][k]["mean"] for k in ("f1", "f2")) for o in front])
    assert reached > 0.93*ideal, reached/ideal
    default = next(o for o in rows if o["default"])
    assert default["parameters"] == {"x": 3.5, "waste": 0.5} and not default["best"] and all(o["n"] == 3 and o["low"] < o["mean"] < o["high"] for r in rows for o in r["objectives"].values())
    count = len(list_runs())
    assert call()["best"] == record["best"] and len(list_runs()) == count

def tried(record): return [(o["number"], o["state"], o["parameters"], o["values"]) for o in record["trials"]]

def elsewhere(place, name, monkeypatch): monkeypatch.setenv("LLMOPS_RUNS", str(place/name))

@pytest.mark.parametrize("objectives", [["loss:min"], ["f1:min", "f2:min"]]) # drawn together, and one by one
def test_a_killed_study_tries_what_it_would_have_tried(objectives, here, place, monkeypatch):
    call = lambda: tune(here, read_axes(here, [["waste", "0", "0.5", "1"]], [["x", "-4", "4"]]), {}, [read_objective(o) for o in objectives], 16, seeds=1, quiet=True)
    whole = call()
    elsewhere(place, "killed", monkeypatch)
    for kill in 3, 10: # while Optuna draws at random, and when it does not any more
        monkeypatch.setattr(Here, "killed_after", kill)
        with pytest.raises(SystemExit): call()
    def die(*args, **more): raise SystemExit
    import optuna
    with monkeypatch.context() as first: # with one of two parameters drawn
        first.setattr(Here, "killed_after", None)
        first.setattr(optuna.Trial, "suggest_float", die)
        with pytest.raises(SystemExit): call()
    monkeypatch.setattr(Here, "killed_after", None)
    assert tried(call()) == tried(whole) and len({str(o["parameters"]) for o in whole["trials"]}) == 16

HALTS = '''from llmops_kit.runs.job import Run
import os, time
run = Run.start("halts")
run.log({"loss": x}, step=0)
while run.record["stage"] == "trial-001" and not os.path.exists(gate + ".open"): time.sleep(0.05)
run.finish({"loss": (x - 1)**2})'''

class Halts(Here):
    @staticmethod
    def metrics(p): return {"loss": (p["x"] - 1)**2}

def test_tune_killed_with_all_its_processes(place, monkeypatch):
    job = write_job(place, "halts", 'x: float = 3.5  # where\nchoice: str = "a"  # of no effect\ngate: str = ""  # the second trial waits for this file, with .open behind', HALTS)
    command = ["tune", place/"halts.ipynb", "-s", "x", "-4", "4", "-g", "choice", "a", "b", "c", "-p", "gate", place/"gate", "--objective", "loss:min", "--trials", "4", "--seeds", "1", "--threads", "1"]
    env = {"LLMOPS_RUNS": str(place/"runs")}
    process = start_llmops(*command, env=env)
    logged = lambda: {read_record(o.parent.name)["stage"]: o.parent.name for o in (place/"runs").glob("*/metrics.jsonl")}
    wait_until(lambda: "trial-001" in logged(), process)
    kill_tree(process)
    before = logged()
    (place/"gate.open").touch()
    record = json.loads(llmops(*command, "--json", env=env))
    runs = {o["stage"]: o for o in list_runs()}
    assert len(list_runs()) == len(runs) == 4 and {k: runs[k]["id"] for k in before} == before
    assert [len(runs[f"trial-00{n}"].get("resumed", [])) for n in range(4)] == [0, 1, 0, 0]
    elsewhere(place, "whole", monkeypatch)
    monkeypatch.setitem(executors.executors, "local", Halts)
    assert tried(record) == tried(tune(job, record["axes"], record["given"], [read_objective("loss:min")], 4, seeds=1, threads=1, quiet=True))

def test_hopeless_trials_are_stopped_and_the_others_never_started_over(here, monkeypatch):
    monkeypatch.setitem(executors.executors, "local", Steps)
    record = tune(here, read_axes(here, [], [["x", "-4", "4"]]), {"waste": 0.0}, [read_objective("loss:min")], 20, seeds=1, prune=3, workers=2, quiet=True)
    runs = {o["stage"]: (run_folder(o["id"])/"metrics.jsonl").read_text().count("\n") for o in list_runs()}
    states = {o["state"] for o in record["stages"].values()}
    assert states == {"finished", "pruned"} and record["status"] == "finished"
    assert all(runs[k] == (27 if o["state"] == "finished" else runs[k]) and "resumed" not in read_record(o["run"]) for k, o in record["stages"].items())
    assert sum(o["state"] == "pruned" for o in record["stages"].values()) >= 8 and sum(runs.values()) < 0.7*20*27
    assert abs(best_rows(record)[0]["parameters"]["x"] - 1) < 0.3
    assert read_study_record("")["name"] == record["name"]

class Lucky(Here):
    @staticmethod
    def metrics(p): return {"loss": -10. if (p["x"], p["seed"]) == (-3.5, 0) else (p["x"] - 1)**2 + random.Random(p["seed"]).uniform(0, 0.1)}

def test_a_setting_that_was_best_by_luck_is_not_told_as_best(here, monkeypatch):
    monkeypatch.setitem(executors.executors, "local", Lucky)
    record = tune(here, read_axes(here, [["x", "-3.5", "0", "1", "3.5"]], []), {}, [read_objective("loss:min")], 8, seeds=3, quiet=True)
    lucky = next(o["number"] for o in record["trials"] if o["parameters"]["x"] == -3.5)
    rows = best_rows(record)
    assert min(record["trials"], key=lambda o: o["values"])["number"] == lucky and lucky in record["best"] and len(record["best"]) == 3
    assert rows[0]["parameters"]["x"] == 1 and rows[0]["beside_default"]["loss"]["high"] < 0
    assert next(o for o in rows if o["trial"] == lucky)["beside_default"]["loss"]["low"] > 0, "paired over the seeds that did not choose it, it is worse"

def test_a_metric_that_no_run_has(here):
    from llmops_kit.runs.errors import UserError
    with pytest.raises(UserError, match="have no metric f3.* They have: f1, f2, loss"): tune(here, read_axes(here, [], [["x", "-4", "4"]]), {}, [read_objective("f3:min")], 5, quiet=True)
    with pytest.raises(UserError, match="--prune stops what is worse"): tune(here, read_axes(here, [], [["x", "-4", "4"]]), {}, [read_objective("f1:min"), read_objective("f2:min")], 5, prune=3, quiet=True)
