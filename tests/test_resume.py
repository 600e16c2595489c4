"A run that is killed at any moment, and resumed, ends like one that was not: the same adapter, metrics and history."
import json, os, random, signal, sys
from pathlib import Path

import pytest

from conftest import CHAIN, few, kill_tree, llmops, options, run_command, run_job, start_llmops, wait_until
from test_training import EXAMPLES, SMALL, random_lm
from llmops_kit.runs.artifacts import sha256_of
from llmops_kit.runs.history import comparable
from llmops_kit.training import sft
from llmops_kit.training.loop import LossNotFinite
from llmops_kit.training.resumable import Stopped
from llmops_kit.training.robust import OutOfMemory
from llmops_kit.training.sft import finetune


def final(tuned, folder):
    "What two equal trainings have in common."
    return sha256_of(tuned.save(folder)), comparable(tuned.metrics), [comparable(o) for o in tuned.history], tuned.best_step


def train(folder, on_log=lambda values, step: None, **settings):
    tuned = finetune(random_lm(), EXAMPLES, folder=folder, on_log=on_log, **{**SMALL, "max_steps": 9, "gradient_accumulation": 2, "save_every": 2, **settings})
    return final(tuned, folder/"out")


class Cut(BaseException): pass


def cut_at(at):
    def on_log(values, step):
        if step == at and "train/loss" in values: raise Cut
    return on_log


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return train(tmp_path_factory.mktemp("whole"))


# -- in one process

@pytest.mark.parametrize("step", few([1, 4, 5, 9], [1, 9])) # those between are cut off below
def test_cut_off_and_called_again(step, whole, tmp_path):
    with pytest.raises(Cut): train(tmp_path, cut_at(step))
    told = []
    assert train(tmp_path, lambda values, step: told.append({"step": step, **comparable(values)})) == whole
    assert told == whole[2]


def test_saving_changes_nothing(whole, tmp_path):
    assert train(tmp_path/"never", save_every=1000) == whole
    assert train(tmp_path/"always", save_every=1) == whole


def test_cut_off_again_and_again(whole, tmp_path):
    for step in 3, 5, 6, 8:
        with pytest.raises(Cut): train(tmp_path, cut_at(step))
    assert train(tmp_path) == whole
    assert train(tmp_path) == whole  # nothing left to do
    assert sorted(o.name for o in tmp_path.glob("*") if o.is_dir()) == sorted(["out", "resume", f"checkpoint-{whole[3]}"])


def test_early_stopping_survives(tmp_path, monkeypatch):
    losses = {0: 3.0, 2: 2.0, 4: 2.5, 6: 2.4, 8: 1.0}
    monkeypatch.setattr(sft, "mean_nll", lambda *args: next(scripted))
    def attempt(name, cut=None):
        nonlocal scripted
        saved = max((int(o.name[5:]) for o in (tmp_path/name/"resume").glob("step-*")), default=-1)
        scripted = iter([v for k, v in losses.items() if k > saved])
        return train(tmp_path/name, cut_at(cut), patience=2)
    scripted = None
    expected = attempt("whole")
    for step in 3, 5, 6:
        with pytest.raises(Cut): attempt("cut", step)
    assert attempt("cut") == expected and expected[1]["train/steps"] == 6 and expected[3] == 2


def test_other_settings_start_afresh_and_say_so(tmp_path):
    with pytest.raises(Cut): train(tmp_path, cut_at(5))
    tuned = finetune(random_lm(), EXAMPLES, folder=tmp_path, **{**SMALL, "lr": 2e-2})
    assert "started afresh" in tuned.warnings[0] and "lr was 0.01 and is 0.02" in tuned.warnings[0]


# -- killed while saving

MOMENTS = "the optimizer's state is half written", "all is written, but not renamed", "the one before is half removed"


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    "Folders of trainings in processes that really died there: forks of one that has imported what they need, and exit codes."
    folders = {o: tmp_path_factory.mktemp("died") for o in MOMENTS}
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_resume as t
from pathlib import Path
from llmops_kit.training import checkpoints, resumable
from llmops_kit.training.sft import CompletionTrainer
replace, rename, save, rmtree = os.replace, Path.rename, CompletionTrainer._save_scaler, checkpoints.shutil.rmtree
def half(self, folder):
    if self.state.global_step == 4:
        place = Path(folder)/"optimizer.pt"
        place.write_bytes(place.read_bytes()[:1000])
        os._exit(9)
    return save(self, folder)
def not_renamed(source, target):
    if Path(target).name == "step-4": os._exit(9)
    return replace(source, target)
def half_removed(folder, *args, **kwargs):
    if Path(folder).name == ".step-2.gone" and Path(folder).exists():
        next(Path(folder).rglob("*.pt")).unlink()
        os._exit(9)
    return rmtree(folder, *args, **kwargs)
for moment, folder in {[(k, str(v)) for k, v in folders.items()]!r}:
    if pid := os.fork():
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    if "optimizer" in moment: CompletionTrainer._save_scaler = half
    elif "renamed" in moment: checkpoints.os.replace = not_renamed
    else: checkpoints.shutil.rmtree = half_removed
    try: t.train(Path(folder))
    finally: os._exit(1)
"""
    done = run_command(sys.executable, "-c", code)
    codes = [o.split()[1] for o in done.stdout.splitlines() if o.startswith("ended ")] # libraries may have said something, too
    return {o: (folder, code) for (o, folder), code in zip(folders.items(), codes, strict=True)}, done.stdout + done.stderr


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_saving(moment, died, whole):
    (folder, code), said = died[0][moment], died[1]
    assert code == "9", said[-2000:]
    assert [o.name for o in (folder/"resume").glob("step-*")] == ["step-4" if "removed" in moment else "step-2"]
    assert train(folder) == whole
    assert not list(folder.rglob(".step-*"))


# -- asked to stop, and other trouble

def test_asked_to_stop(whole, tmp_path):
    def ask(values, step):
        if step == 5 and "train/loss" in values: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM after step [56] of 9"): train(tmp_path, ask, save_every=1000)
    assert train(tmp_path) == whole


def test_the_batch_that_broke_it_is_kept(tmp_path):
    with pytest.raises(LossNotFinite, match=r"in step \d+\. The batch that did it is in .*batches.jsonl") as error: train(tmp_path, lr=1e30, warmup_ratio=0., gradient_accumulation=1)
    file = next(tmp_path.glob("stopped-at-*/batches.jsonl"))
    assert str(file) in str(error.value)
    lines = [json.loads(o) for o in file.read_text().splitlines()]
    assert all(o["ids"] and o["text"] and len(o["losses"]) == len(o["ids"]) for o in lines)
    assert any(x == "NaN" for o in lines for x in o["losses"])


def test_a_loss_that_runs_away(tmp_path):
    with pytest.raises(LossNotFinite, match="more than 3 nats above its start .* for five steps.*batches of the last steps are in .*A lower lr"):
        train(tmp_path, lr=3., warmup_ratio=0., max_steps=60, eval_every=1000, max_grad_norm=0., method="full")


def small_memory(monkeypatch, limit, compute_loss=sft.CompletionTrainer.compute_loss):
    def tight(self, model, inputs, *args, **kwargs):
        if inputs["input_ids"].numel() > limit: raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes.")
        return compute_loss(self, model, inputs, *args, **kwargs)
    monkeypatch.setattr(sft.CompletionTrainer, "compute_loss", tight)


def test_out_of_memory(tmp_path, monkeypatch):
    settings = dict(lora_dropout=0., precision="fp32")
    enough = train(tmp_path/"enough", **settings)
    small_memory(monkeypatch, 200)
    with pytest.raises(OutOfMemory, match=r"on a batch of \d+ × \d+ tokens. Batches of \d+ tokens are likely to fit"): train(tmp_path/"stops", **settings)
    told = []
    retried = train(tmp_path/"retried", lambda values, step: told.append((step, *comparable(values))), retry_oom=True, **settings)
    assert told == [(o["step"], *(k for k in o if k != "step")) for o in enough[2]]  # no step twice, none left out
    assert retried[1]["train/tokens"] == enough[1]["train/tokens"]
    for a, b in zip(retried[2], enough[2]):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3) for k in b)
    small_memory(monkeypatch, 4)
    with pytest.raises(OutOfMemory, match="single example: lower max_length"): train(tmp_path/"hopeless", retry_oom=True, **settings)


# -- a run, killed and resumed from outside

JOB = {"max_steps": 60, "train_examples": 300, "validation_examples": 20, "eval_every": 20, "patience": 0, "tokens_per_batch": 256, "gradient_accumulation": 2, "max_new_tokens": 4, "wandb": "off", "certify": "off"}


def steps_done(folder):
    try: return max((json.loads(o)["step"] for o in (folder/"metrics.jsonl").read_text().splitlines()[:-1]), default=0)
    except FileNotFoundError: return 0


def outcome(record, folder):
    lines = [json.loads(o) for o in (folder/"metrics.jsonl").read_text().splitlines()]
    return ({o["name"]: o["sha256"] for o in record["outputs"]}, comparable(record["metrics"]),
            [(o["step"], comparable(o["values"])) for o in lines], record["history"]["sha256"])


def killed_and_resumed(kills, values, runs, env, rng, warm=None):
    "One run, killed so often at random steps, each time resumed, with a forked kernel at last where `warm` says how; its record at the end."
    process, id = start_llmops("run", "finetune", *options(values), "--fresh", env=env), None
    seen = set(runs.glob("2*"))
    for n, step in enumerate(sorted(rng.sample(range(1, values["max_steps"]), kills))):
        wait_until(lambda: set(runs.glob("*/run.json")) - {o/"run.json" for o in seen} or id, process)
        id = id or next(o.name for o in set(runs.glob("2*")) - seen)
        wait_until(lambda: steps_done(runs/id) >= step, process)
        kill_tree(process)
        if n < kills - 1: process = start_llmops("resume", id, env=env)
    return json.loads(llmops("resume", id, "--json", env=(warm or {}) | env))


@pytest.fixture(scope="module")
def env(tmp_path_factory): return {"LLMOPS_RUNS": str(tmp_path_factory.mktemp("runs")), "WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def uninterrupted(env):
    record = run_job("finetune", JOB, env)
    return outcome(record, Path(env["LLMOPS_RUNS"])/record["id"])


@pytest.mark.parametrize("kills", few([1, 2], [1]))
def test_sigkill_and_resume(kills, chain_copy, warm):
    runs, records = chain_copy
    env, whole, values = {"LLMOPS_RUNS": str(runs), "WANDB_MODE": "offline"}, records["finetune"], CHAIN["finetune"] | {"data": records["prepare"]["id"]}
    record = killed_and_resumed(kills, values, runs, env, random.Random(7), warm)
    assert outcome(record, runs/record["id"]) == outcome(whole, runs/whole["id"])
    assert [o["after"] for o in record["resumed"]] == ["killed"]*kills and record["status"] == "finished" and record["error"] is None
    assert [o["name"] for o in record["steps"]] == [o["name"] for o in whole["steps"]]
    told = run_command("llmops", "resume", record["id"], env=env)
    assert told.returncode == 2 and "is finished" in told.stderr


@pytest.mark.slow
def test_sigterm_saves_and_names_the_way_on(env, uninterrupted):
    runs = Path(env["LLMOPS_RUNS"])
    before = set(runs.glob("2*"))
    process = start_llmops("run", "finetune", *options(JOB), "--fresh", env=env)
    wait_until(lambda: any(steps_done(o) >= 20 for o in set(runs.glob("2*")) - before), process)
    id = (set(runs.glob("2*")) - before).pop().name
    refused = run_command("llmops", "resume", id, env=env)
    assert refused.returncode == 2 and "is still running" in refused.stderr
    process.terminate()
    process.communicate(timeout=60)
    record = json.loads(llmops("show", id, "--json", env=env))
    assert record["status"] == "killed" and "SIGTERM" in record["error"]["message"] and f"llmops resume {id}" in record["error"]["message"], record["error"]
    saved = int(next((runs/id/"steps/train/resume").glob("step-*")).name[5:])
    assert f"after step {saved} of 60" in record["error"]["message"] and saved >= 20
    assert outcome(json.loads(llmops("resume", id, "--json", env=env)), runs/id) == uninterrupted


@pytest.mark.slow
def test_twenty_sigkills(env, uninterrupted):
    "20 kills, each at a random step of the 60 and each resumed to the end: 20 of 20 end with the adapter of the uninterrupted run."
    runs, rng, agree = Path(env["LLMOPS_RUNS"]), random.Random(20), 0
    for _ in range(20):
        record = killed_and_resumed(1, JOB, runs, env, rng)
        agree += outcome(record, runs/record["id"]) == uninterrupted
        print(f"{agree} agree", flush=True)
    assert agree == 20
