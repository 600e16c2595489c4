"`llmops sync` with the real wandb and a server on loopback: every line arrives once, also when the sending is killed and repeated."
import json, threading
from pathlib import Path
import pytest
from conftest import kill_tree, llmops, run_command, start_llmops, wait_until
from llmops_kit.runs.history import append_history, read_history
from llmops_kit.runs.ledger import create_record, run_folder
from llmops_kit.runs.tracking import Tracker
from wandb_server import wandb_server

LOSSES = [2.5, 2.25, "NaN", 2.125, 1e-9]

@pytest.fixture
def offline(tmp_path, monkeypatch):
    "An environment, and a maker of runs that were tracked offline."
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path/"runs"))
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_SILENT"): monkeypatch.setenv(name, "")
    def make(id, status="finished", attempts=1):
        create_record({"id": id, "job": "finetune", "status": status, "outputs": [], "inputs": [], "parameters": {"lr": 1e-3}, "started": "2026-11-20T12:00:00+00:00"})
        folder = run_folder(id)
        for attempt in range(attempts):
            tracker = Tracker(id, "finetune", folder, {"lr": 1e-3}, "offline")
            for step, loss in enumerate(LOSSES[:2 if attempt < attempts - 1 else None]):
                if attempt == attempts - 1: append_history(folder, {"train/loss": loss}, step)
                tracker.log({"train/loss": loss}, step)
            tracker.finish()
        return folder
    return make

def of_ledger(folder): return [{"step": o["step"], **o["values"]} for o in read_history(folder)]

def test_killed_and_repeated_every_line_arrives_once(offline, tmp_path):
    folder = offline("20261120-120000-finetune-0001")
    held, free = threading.Event(), threading.Event()
    def hold(): held.set(); free.wait(60)  # the lines have arrived, and wandb does not hear of it
    with wandb_server(hold=hold) as (server, env):
        process = start_llmops("sync", env=env)
        wait_until(held.is_set, process)
        kill_tree(process)
        free.set()
        assert json.loads(llmops("sync", "--json", env=env)) == {folder.name: "sent"}
        assert server.history(folder.name) == of_ledger(folder)
        before = server.asked.copy(), server.received.copy()
        assert before[1][folder.name] == 2 * len(LOSSES)  # the first time was cut off
        assert json.loads(llmops("sync", "--json", env=env)) == {} == json.loads(llmops("sync", folder.name, "--json", env=env))
        assert (server.asked, server.received) == before

def test_what_is_sent(offline):
    resumed, killed = offline("20261120-120001-finetune-0002", attempts=2), offline("20261120-120002-finetune-0003", status="killed")
    with wandb_server() as (server, env):
        assert json.loads(llmops("sync", "--json", env=env)) == {resumed.name: "sent"}
        assert server.history(resumed.name) == of_ledger(resumed) and killed.name not in server.runs
        assert json.loads(llmops("sync", killed.name, "--json", env=env)) == {killed.name: "sent"}
        assert json.loads(server.runs[killed.name]["config"])["lr"]["value"] == 1e-3

def test_what_did_not_arrive_is_not_marked(offline, tmp_path):
    folder = offline("20261120-120003-finetune-0004")
    done = run_command("llmops", "sync", env={"WANDB_API_KEY": "", "NETRC": str(tmp_path/"netrc")})
    assert done.returncode == 2 and "wandb login" in done.stderr
    with wandb_server(refuse=True) as (server, env): # wandb itself marks the run as sent here
        done = run_command("llmops", "sync", "--json", env=env)
        assert done.returncode == 1 and "Fatal error while uploading" in json.loads(done.stdout)[folder.name]
    with wandb_server() as (server, env):
        assert json.loads(llmops("sync", "--json", env=env)) == {folder.name: "sent"}
        assert server.history(folder.name) == of_ledger(folder)
