"papermill's own behaviour under the engine, with the real papermill beside it; kernels that are forked, that die, stop, hang, and cannot be saved."
import json, logging, subprocess, sys, tempfile
from pathlib import Path
import nbformat, papermill, psutil, pytest
from click.testing import CliRunner
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook
from papermill.__main__ import papermill as command
from conftest import kill_tree, llmops, run_command, start_llmops, wait_until
from llmops_kit.runs import engine
from llmops_kit.runs.forked import ask, kernel_environment, warm_place

PARENT = "import sys; from llmops_kit.runs.warm import Parent; Parent(sys.argv[1], ('numpy', 'pandas', 'threadpoolctl')).listen()"


def notebook(path, *cells, kernel="python3", language="python"):
    cells = [new_code_cell(o) if isinstance(o, str) else new_code_cell(o[0], metadata={"tags": [o[1]]}) for o in cells]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": kernel, "display_name": kernel, "language": language}}), path)
    return path


@pytest.fixture(scope="module")
def parent():
    "A warm parent with little in it, in a runtime folder of its own."
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for k, v in {"JUPYTER_RUNTIME_DIR": folder, "LLMOPS_WARM": "1", "OMP_NUM_THREADS": "1", "CI": "1"}.items(): patch.setenv(k, v)
        patch.delenv("JUPYTER_PLATFORM_DIRS", raising=False)
        env = kernel_environment()
        place = warm_place(env, [sys.executable])
        process = subprocess.Popen([sys.executable, "-c", PARENT, str(place)], env=env | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "JE_ARROW_MALLOC_CONF": "background_thread:false"}, cwd="/")
        wait_until(place.exists, process)
        yield place
        ask(place, {"stop": True})
        assert process.wait(30) == 0 and not place.exists()


# -- papermill with and without the engine

def told(path): # what a reader of the executed notebook sees
    found = nbformat.read(path, 4)
    def output(o): return {k: v for k, v in o.items() if k not in ("traceback", "metadata", "execution_count")}
    return [{"source": "".join(o.source), "tags": o.metadata.get("tags", []), "hidden": o.metadata.get("jupyter", {}).get("source_hidden"), "count": o.get("execution_count"),
             "status": o.metadata.get("papermill", {}).get("status"), "exception": o.metadata.get("papermill", {}).get("exception"),
             "outputs": [output(p) for p in o.get("outputs", [])]} for o in found.cells], found.metadata.papermill.get("exception"), sorted(found.metadata.papermill.parameters.items())

CASES = {
    "parameters": (["-p", "n", "5", "-r", "name", "007", "-y", "{deep: [1, 2]}"], [("n = 1\nname = ''\ndeep = []", "parameters"), "print(n, repr(name), deep)"]),
    "no parameters cell": (["-p", "n", "5"], ["print(n)"]),
    "an error": ([], ["1 + 1", "raise ValueError('bad')", "print('never')"]),
    "an error that is expected": ([], [("raise ValueError('bad')", "raises-exception"), "print('on')"]),
    "skipped by its tag": ([], [("raise ValueError('bad')", "skip-execution"), "print('on')"]),
    "displays": ([], ["import sys\nfrom IPython.display import display, clear_output\nprint('a'); print('b', file=sys.stderr)\nh = display('x', display_id=True); h.update('y')",
                      "print(1); clear_output(); print(2)\n{'k': 1}"]),
    "report mode": (["--report-mode", "-p", "n", "2"], [("n = 1", "parameters"), "print(n)"]),
    "prepare only": (["--prepare-only", "-p", "n", "2"], [("n = 1", "parameters"), "print(n)"]),
    "working directory": (["--cwd", "/usr"], ["import os\nprint(os.getcwd())"]),
    "the end of a kernel": ([], ["import os\nos._exit(3)"]),
}

@pytest.mark.parametrize("case", CASES)
def test_papermill_says_the_same_with_the_engine(case, tmp_path, parent):
    options, cells = CASES[case]
    source, seen = notebook(tmp_path/"in.ipynb", *cells), {}
    for name in ("nbclient", "llmops"):
        done = CliRunner().invoke(command, [str(source), str(tmp_path/f"{name}.ipynb"), "--no-progress-bar", "--engine", name, *options])
        seen[name] = done.exit_code, type(done.exception).__name__, told(tmp_path/f"{name}.ipynb") if case != "the end of a kernel" else None
    assert seen["llmops"] == seen["nbclient"]
    if case in ("an error", "the end of a kernel"): assert seen["llmops"][0] != 0
    if case != "prepare only": assert nbformat.read(tmp_path/"llmops.ipynb", 4).metadata.papermill.kernel == "forked"


def test_inspection(tmp_path):
    source = notebook(tmp_path/"in.ipynb", ("n: int = 1  # how many", "parameters"))
    shown = [CliRunner().invoke(command, ["--help-notebook", str(source), *more]) for more in ([], ["--engine", "llmops"])]
    assert shown[0].exit_code == shown[1].exit_code == 0 and shown[0].output == shown[1].output and "how many" in shown[1].output


def test_output_to_the_log_and_to_files(tmp_path, caplog, parent):
    source = notebook(tmp_path/"in.ipynb", "import sys\nprint('to stdout'); print('to stderr', file=sys.stderr)")
    with caplog.at_level(logging.INFO, "papermill"):
        done = CliRunner().invoke(command, [str(source), str(tmp_path/"out.ipynb"), "--engine", "llmops", "--log-output", "--stdout-file", str(tmp_path/"1"), "--stderr-file", str(tmp_path/"2")])
    assert done.exit_code == 0 and "to stdout" in caplog.text and "to stderr" in caplog.text
    assert ((tmp_path/"1").read_text(), (tmp_path/"2").read_text()) == ("to stdout\n", "to stderr\n")


def test_autosave(tmp_path, parent):
    out = tmp_path/"out.ipynb"
    wait = f"import time\nfrom pathlib import Path\nprint('ear' + 'ly')\nwhile 'early' not in Path({str(out)!r}).read_text(): print('.', flush=True); time.sleep(0.1)"
    assert CliRunner().invoke(command, [str(notebook(tmp_path/"in.ipynb", wait)), str(out), "--engine", "llmops", "--autosave-cell-every", "1", "--execution-timeout", "30"]).exit_code == 0


def test_timeouts(tmp_path, parent, monkeypatch):
    out = tmp_path/"out.ipynb"
    done = CliRunner().invoke(command, [str(notebook(tmp_path/"in.ipynb", "1", "# a long one\nimport time; time.sleep(600)")), str(out), "--engine", "llmops", "--execution-timeout", "1"])
    assert done.exit_code != 0 and isinstance(done.exception, CellTimeoutError) and str(done.exception) == "The cell ran for more than 1 seconds, in cell 2 of 2: # a long one"
    assert [o.metadata.papermill.status for o in nbformat.read(out, 4).cells] == ["completed", "failed"]
    (tmp_path/"kernels/never").mkdir(parents=True)
    (tmp_path/"kernels/never/kernel.json").write_text(json.dumps({"argv": ["sleep", "600"], "display_name": "never", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    done = CliRunner().invoke(command, [str(notebook(tmp_path/"in.ipynb", "1", kernel="never")), str(out), "--engine", "llmops", "--start-timeout", "1"])
    assert done.exit_code != 0 and "1 seconds" in str(done.exception)


@pytest.mark.parametrize("kernel, language, message", [("ir", "R", "written in R, for the kernel ir"), ("gone", "python", "There is no kernel gone on this machine, only ")])
def test_other_kernels_are_refused(kernel, language, message, tmp_path):
    done = CliRunner().invoke(command, [str(notebook(tmp_path/"in.ipynb", "1", kernel=kernel, language=language)), str(tmp_path/"out.ipynb"), "--engine", "llmops"])
    assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output and not (tmp_path/"out.ipynb").exists()


# -- a forked kernel is the one that a clean start would have made

PROBE = """import os, sys, json, signal, random, resource, threading, numpy
facts = {"argv": sys.argv[1:2], "path": sys.path, "flags": str(sys.flags), "cwd": os.getcwd(), "umask": os.umask(0o77), "session": os.getsid(0) == os.getpid(), "hash": hash("a"),
         "signals": [str(signal.getsignal(o)) for o in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)], "backend": os.environ["MPLBACKEND"], "main": sys.modules["__main__"].__name__,
         "limits": resource.getrlimit(resource.RLIMIT_NOFILE), "threads": sorted(o.name.split("-")[0] for o in threading.enumerate() if o.daemon is False),
         "env": {k: v for k, v in os.environ.items() if k not in ("LLMOPS_KERNEL", "JPY_PARENT_PID", "_")},
         "kit": [o for o in sys.modules if o.startswith("llmops_kit")],
         "columns": __import__("pandas").get_option("display.max_columns"),
         "handlers": [o.stream is sys.stderr for o in __import__("logging").getLogger("tornado").handlers]}
print(json.dumps(facts)); print(numpy.random.rand(), random.random())"""

def run(tmp_path, source, **options):
    papermill.execute_notebook(str(notebook(tmp_path/"in.ipynb", *source)), str(tmp_path/"out.ipynb"), engine_name="llmops", progress_bar=False, **options)
    found = nbformat.read(tmp_path/"out.ipynb", 4)
    return found.metadata.papermill.kernel, "".join(o.text for o in found.cells[-1].outputs)


def test_a_forked_kernel_is_like_a_clean_one(tmp_path, parent, monkeypatch):
    monkeypatch.setenv("MY_OWN", "here")
    forked, again = (run(tmp_path, [PROBE]) for _ in range(2))
    monkeypatch.setenv("LLMOPS_WARM", "0")
    clean = run(tmp_path, [PROBE])
    assert (forked[0], again[0], clean[0]) == ("forked", "forked", "LLMOPS_WARM is 0")
    seen = [json.loads(o[1].splitlines()[0]) for o in (forked, clean)]
    for o in seen: del o["env"]["LLMOPS_WARM"]
    for o in ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"):  # threadpoolctl sets them when it is imported: the clean kernel has not, this process may have
        for kernel in seen: kernel["env"].pop(o, None)
    assert seen[0] == seen[1] and seen[0]["env"]["MY_OWN"] == "here"
    assert not set(forked[1].splitlines()[1].split()) & set(again[1].splitlines()[1].split())  # its random numbers are its own


def test_a_run_that_a_cell_starts_is_forked_too(tmp_path, parent):
    "What ipykernel and imports have set in a kernel is no other surroundings."
    inner = notebook(tmp_path/"inner.ipynb", "1")
    said = run(tmp_path, [f"import sklearn, torch, torch._inductor.runtime.cache_dir_utils as o; o.cache_dir()\nimport subprocess, sys\n"
                          f"print(subprocess.run([sys.executable, '-m', 'papermill', {str(inner)!r}, {str(tmp_path/'made.ipynb')!r}, '--engine', 'llmops'], capture_output=True, text=True).stderr)"])
    assert nbformat.read(tmp_path/"made.ipynb", 4).metadata.papermill.kernel == "forked", said

@pytest.mark.parametrize("change, why", [({"PYTHONHASHSEED": "1"}, "PYTHONHASHSEED is not 0"), ({"OMP_NUM_THREADS": "two"}, "OMP_NUM_THREADS is not a number"),
                                         ({"MPLBACKEND": "agg"}, "libraries read MPLBACKEND"), ({"LD_PRELOAD": ""}, "no warm parent"), ({"CUDA_VISIBLE_DEVICES": "7"}, "no warm parent")])
def test_a_kernel_of_other_surroundings_starts_clean(change, why, tmp_path, parent):
    hold = ask(parent, {"env": kernel_environment(), "arguments": ["-f", str(tmp_path/"c.json")], "cwd": "/", "umask": 18}, [0, 2, 2])  # a parent with a kernel does not end for another caller
    assert run(tmp_path, ["print(6*7)"], env=kernel_environment() | change)[0].startswith(why)
    hold.kill()
    assert hold.wait() == -9


# -- kernels that do not go on

def test_a_kernel_that_is_stopped_and_one_that_hangs(tmp_path, parent):
    stops = ["1", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"]
    with pytest.raises(DeadKernelError, match=r"has not answered for 2 seconds.*, in cell 2 of 2: import os, signal"): run(tmp_path, stops, heartbeat_timeout=2)
    hangs = ["import threading, time\nfor _ in range(3): print('word'); time.sleep(0.7)\nthreading.Lock().acquire(); lock = threading.Lock(); lock.acquire(); lock.acquire()"]
    with pytest.raises(DeadKernelError, match="No output and no progress for 1.5 seconds, in cell 1 of 1: import threading"): run(tmp_path, hangs, silence_timeout=1.5)
    with pytest.raises(DeadKernelError, match="The kernel died of SIGKILL, in cell 1 of 1: import os"): run(tmp_path, ["import os\nos.kill(os.getpid(), 9)"])
    failed = nbformat.read(tmp_path/"out.ipynb", 4)
    assert failed.cells[0].metadata.papermill.status == "failed" and failed.cells[0].outputs[0].evalue.startswith("The kernel died of SIGKILL")


def test_a_long_computation_is_not_taken_for_a_stopped_kernel(tmp_path, parent):
    assert run(tmp_path, ["n = sum(range(120_000_000))\nprint(n)"], heartbeat_timeout=3)[1] == "7199999940000000\n"  # one call that never lets go of Python's lock


def test_output_that_is_not_on_the_disk_is_a_failure(tmp_path, parent, monkeypatch):
    (tmp_path/"there").mkdir()
    source = notebook(tmp_path/"in.ipynb", f"import shutil\nshutil.rmtree({str(tmp_path/'there')!r}); open({str(tmp_path/'there')!r}, 'w').close()", "print(2)")
    done = CliRunner().invoke(command, [str(source), str(tmp_path/"there/out.ipynb"), "--engine", "llmops"])
    assert done.exit_code != 0 and isinstance(done.exception, OSError)
    whole = engine.write_atomic
    monkeypatch.setattr(engine, "write_atomic", lambda path, text: whole(path, text[:len(text)//2]))
    with pytest.raises(OSError, match="was written, and cannot be read back"): run(tmp_path, ["1"])


# -- runs with forked kernels

LOOP = """from llmops_kit.runs.job import Run
import os, time
run = Run.start("loop")
for n in range(10_000):
    run.log({"pid": os.getpid()}, step=n)
    time.sleep(0.05)"""

@pytest.fixture
def loop(tmp_path, parent):
    "A job that logs for ever, started; its process, its kernel, its folder."
    job = notebook(tmp_path/"loop.ipynb", ('wandb: str = "off"  # where, in {off, offline}\nseed: int = 0  # of all', "parameters"), LOOP)
    env = {"LLMOPS_RUNS": str(tmp_path/"runs")}
    process = start_llmops("run", str(job), env=env)
    def lines(): return [o for p in (tmp_path/"runs").glob("*/metrics.jsonl") for o in p.read_text().splitlines()]
    wait_until(lambda: len(lines()) > 2, process)
    yield process, psutil.Process(int(json.loads(lines()[0])["values"]["pid"])), env
    if process.poll() is None: kill_tree(process)


def test_sigterm_interrupts_a_forked_kernel(loop):
    process, kernel, env = loop
    assert kernel.ppid() != process.pid  # forked from the parent
    process.terminate()
    process.communicate(timeout=60)
    record = json.loads(llmops("show", json.loads(llmops("runs", "--json", env=env))[0]["id"], "--json", env=env))
    assert process.returncode == 1 and record["status"] == "killed" and "SIGTERM" in record["error"]["message"] and record["kernel"]["start"] == "forked"
    psutil.wait_procs([kernel], timeout=30)
    assert not kernel.is_running()


def test_a_kernel_does_not_outlive_its_caller(loop, parent):
    process, kernel, env = loop
    process.kill()
    psutil.wait_procs([kernel], timeout=30)
    assert not kernel.is_running() and ask(parent, {"stop": False})["stopping"] is False
    assert json.loads(llmops("runs", "--json", env=env))[0]["status"] == "killed"


def test_silence_fails_a_run(tmp_path, parent):
    job = notebook(tmp_path/"silent.ipynb", ('wandb: str = "off"  # where, in {off, offline}\nseed: int = 0  # of all', "parameters"),
                   "from llmops_kit.runs.job import Run\nimport time\nrun = Run.start('silent')", "time.sleep(600)")
    process = start_llmops("run", str(job), "--silence-timeout", "1.5", env={"LLMOPS_RUNS": str(tmp_path/"runs")})
    process.communicate(timeout=60)
    record = json.loads(llmops("runs", "--json", env={"LLMOPS_RUNS": str(tmp_path/"runs")}))[0]
    assert process.returncode == 1 and record["status"] == "failed" and "No output and no progress for 1.5 seconds, in cell 3 of 3: time.sleep(600)" in record["error"]["message"]


def test_limits_hold_for_a_replay_and_a_resumption(tmp_path, parent):
    job = notebook(tmp_path/"waits.ipynb", ('wandb: str = "off"  # where, in {off, offline}\nseed: int = 0  # of all', "parameters"),
                   f"from llmops_kit.runs.job import Run\nimport os, time\nrun = Run.start('waits')\nif os.path.exists({str(tmp_path/'gate')!r}): time.sleep(600)\nrun.finish({{}})")
    env = {"LLMOPS_RUNS": str(tmp_path/"runs")}
    first = json.loads(llmops("run", str(job), "--silence-timeout", "5", "--cell-timeout", "300", "--json", env=env))
    (tmp_path/"gate").touch()
    for again in "replay", "resume":
        newest = lambda: json.loads(llmops("runs", "--json", env=env))[0]["id"]
        assert run_command("llmops", again, newest(), env=env).returncode == 1
        record = json.loads(llmops("show", newest(), "--json", env=env))
        assert record["limits"] == first["limits"] == {"cell_seconds": 300, "silence_seconds": 5} and "No output and no progress for 5 seconds" in record["error"]["message"]
    assert record["replay_of"] == first["id"] and len(record["resumed"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_replay_by_a_forked_kernel_gives_the_same_bytes(threads, tmp_path):
    with tempfile.TemporaryDirectory() as runtime:
        env = {"LLMOPS_RUNS": str(tmp_path/"runs"), "JUPYTER_RUNTIME_DIR": runtime, "OMP_NUM_THREADS": threads, "WANDB_MODE": "offline", "LLMOPS_WARM": "0"}
        small = {"max_steps": 6, "train_examples": 60, "validation_examples": 20, "eval_every": 3, "max_new_tokens": 4, "certify": "off"}
        clean = json.loads(llmops("run", "finetune", *(str(o) for k, v in small.items() for o in ("-p", k, v)), "--json", env=env))
        warm = env | {"LLMOPS_WARM": "1"}
        try:
            llmops("warm", env=warm)
            assert "agrees with" in llmops("replay", clean["id"], env=warm)
            again = json.loads(llmops("show", json.loads(llmops("runs", "--json", env=env))[0]["id"], "--json", env=env))
            assert (clean["kernel"]["start"], again["kernel"]["start"]) == ("LLMOPS_WARM is 0", "forked")
            assert clean["environment"]["threads_used"] == again["environment"]["threads_used"] == int(threads)
        finally: llmops("warm", "--stop", env=warm)
