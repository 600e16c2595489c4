"What several tests share."
import os, shutil, subprocess, sys, time
from pathlib import Path
import pytest

PROJECT = Path(__file__).resolve().parent.parent
os.environ["LLMOPS_WARM"] = "0" # a test says itself when it wants a warm parent

def run_command(*command, cwd=None, env=None):
    "Run a command as one would with the environment activated; what it printed and its exit code."
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **(env or {})}
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
