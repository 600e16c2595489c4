"What several tests share."
import fcntl, gc, json, os, shutil, subprocess, sys, sysconfig, time
from contextlib import contextmanager
from pathlib import Path
import pytest

PROJECT = Path(__file__).resolve().parent.parent
os.environ["LLMOPS_WARM"] = "0" # a test says itself when it wants a warm parent
GIVEN = frozenset(os.environ)
DOCSTRINGS = f"{sysconfig.get_path('stdlib')}/asyncio" # a part of `docstrings`, which takes seconds to read

# longest first, so that none of them is begun when the others are done; the second needs nothing of the first, which makes the chain
LONG = ["test_jobs", "test_studies", "test_training_jobs", "test_resume", "test_prepare_job", "test_lab", "test_kills", "test_engine", "test_zoo_agreement", "test_workers", "test_zoo_continuation",
        "test_preference", "test_training", "test_estimate", "test_zoo_equivalence", "test_people_and_judges", "test_distill", "test_crash", "test_scoring_engine", "test_classify", "test_ledger",
        "test_zoo_invariance", "test_zoo_precision", "test_cli"]

def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"): config.option.loadscopereorder = False # pytest-xdist would begin with the files of many tests

def pytest_collection_modifyitems(items): items.sort(key=lambda o: LONG.index(o.path.stem) if o.path.stem in LONG else len(LONG))

def pytest_collection_finish():
    "What is imported by now stays; full collections, which accelerate asks for at every training, would go through all of it."
    gc.collect()
    gc.freeze()

def surroundings(): # what libraries set while they are imported here is not the user's, and a warm parent is another one with it
    return {k: v for k, v in os.environ.items() if k in GIVEN or not k.startswith(("HF_", "KMP_", "RAY_", "TORCH"))}

def run_command(*command, cwd=None, env=None):
    "Run a command as one would with the environment activated; what it printed and its exit code."
    env = {**surroundings(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **(env or {})}
    return subprocess.run([*map(str, command)], cwd=cwd or PROJECT, env=env, text=True, capture_output=True)

def checked(*command, cwd=None, env=None):
    "Run a command that has to work; its stdout, or a failure that shows what it said."
    done = run_command(*command, cwd=cwd, env=env)
    assert done.returncode == 0, f"{' '.join(map(str, command))} exited {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout

def llmops(*arguments, env=None):
    "Run the `llmops` command; its stdout, or a failure that shows what it said."
    return checked("llmops", *arguments, env=env)

def copy_of_tree(folder):
    "Copy what git has or would add (tracked files, and untracked ones that are not ignored) into `folder`, as a fresh clone would have it."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        source, target = PROJECT/name, folder/name
        if not source.exists() and not source.is_symlink(): continue  # deleted, and not committed yet
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    return folder

def start_llmops(*arguments, env=None):
    "Start the `llmops` command in the background."
    return subprocess.Popen([str(Path(sys.executable).parent/"llmops"), *map(str, arguments)], cwd=PROJECT, env={**os.environ, **(env or {})},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

def wait_until(condition, process, seconds=180):
    "Wait for what a process in the background does; the wait leaves it the processor."
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before that"
        assert time.monotonic() < deadline, "it never came to that"
        try: process.wait(0.1)
        except subprocess.TimeoutExpired: pass

def kill_tree(process):
    "SIGKILL a process and all that it started."
    import psutil
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for o in tree:
        try: o.kill()
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(tree, timeout=30)
    process.wait()

def few(every, kept):
    "Parameters of which the short version of a test takes those that are kept."
    return [o if o in kept else pytest.param(*(o if isinstance(o, tuple) else (o,)), marks=pytest.mark.slow) for o in every]

def options(values): return [str(o) for k, v in values.items() for o in ("-p", k, v)]

def run_job(job, values, env, *more):
    "A run of a job; its record."
    return json.loads(llmops("run", job, *options(values), *more, "--json", env=env))

# -- what all workers of one session share

@contextmanager
def locked(path, how):
    with open(path, "w") as file:
        fcntl.flock(file, how)
        yield file

@pytest.fixture(scope="session")
def common(tmp_path_factory):
    "A folder that every worker of this session sees, and no other session."
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base)/"common"
    folder.mkdir(exist_ok=True)
    return folder

@pytest.fixture(scope="session")
def warm(common):
    """Variables with which the runs of the tests fork their kernels from one warm parent: importing takes longer than most of these runs.
    Tests of clean starts, of kills and of memory go without."""
    # a parent refuses kernels with other values of what libraries read while they were imported, so all have these; CI: nobody starts another one
    env = {"LLMOPS_WARM": "1", "JUPYTER_RUNTIME_DIR": str(common), "WANDB_MODE": "offline", "CI": "1"}
    with locked(common/"warm.users", fcntl.LOCK_SH) as users:
        llmops("warm", env=env)
        yield env
        try: fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError: return # another worker may still need it, and will be the last
        llmops("warm", "--stop", env=env)

CHAIN = {
    "prepare": {"limit": 300, "contaminated": "off"}, # the ledger knows more evaluation sets with each run, and some compare with these runs
    "finetune": {"data": "latest:prepare", "max_steps": 12, "eval_every": 4, "max_new_tokens": 4, "train_examples": 120, "validation_examples": 20, "certify": "off"},
    "evaluate": {"adapter": "latest:finetune", "examples": 20, "max_new_tokens": 8, "slices": "answer_length,group", "price_per_hour": 1.5, "resamples": 200},
}

@pytest.fixture(scope="session")
def chain(common, warm):
    "prepare, finetune and evaluate, run once for all: their folder of runs, which nobody writes to, and their records."
    folder = common/"chain"
    with locked(common/"chain.lock", fcntl.LOCK_EX):
        if not (folder/"records.json").exists():
            records = {job: run_job(job, values, warm | {"LLMOPS_RUNS": str(folder/"runs")}) for job, values in CHAIN.items()}
            (folder/"records.json").write_text(json.dumps(records))
    return folder/"runs", json.loads((folder/"records.json").read_text())

@pytest.fixture(scope="module")
def chain_copy(chain, tmp_path_factory):
    "A folder of runs that begins with those of the chain, and the records of these."
    runs, records = chain
    return shutil.copytree(runs, tmp_path_factory.mktemp("runs")/"runs", symlinks=True), records
