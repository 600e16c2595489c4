"What several tests share."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

PROJECT = Path(__file__).resolve().parent.parent

def checked(*command, cwd, env=None, **kwargs):
    "Run a command as one would with the environment activated; its text, or a failure that shows it."
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **(env or {})}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))} exited {done.returncode}:\n{done.stdout}"
    return done.stdout

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

def run_command(*command, cwd=None, env=None):
    "Run a command as one would with the environment activated; what it printed and its exit code."
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **(env or {})}
    return subprocess.run([*map(str, command)], cwd=cwd or PROJECT, env=env, text=True, capture_output=True)

def llmops(*arguments, env=None):
    "Run the `llmops` command; its stdout, or a failure that shows what it said."
    done = run_command("llmops", *arguments, env=env)
    assert done.returncode == 0, f"llmops {' '.join(map(str, arguments))} exited {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
