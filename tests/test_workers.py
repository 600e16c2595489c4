"Training in several real processes: what they see, how they fail, and that none is left behind."
import json, os, pickle, random, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmops_kit.models.families import random_lm
from llmops_kit.runs.artifacts import sha256_of
from llmops_kit.runs.errors import UserError
from llmops_kit.training.batching import TokenRows
from llmops_kit.training.loop import LossNotFinite
from llmops_kit.training.resumable import Stopped
from llmops_kit.training.sft import finetune
from llmops_kit.training.workers import WorkerFailed, _failure, in_workers

HERE = Path(__file__).parent
WORDS = "the of a file and returns name object value is for list key path with line error index count type".split()


def conversations(n, seed):
    rng = random.Random(seed)
    def text(low, high): return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    return [dict(id=f"{i:03}", messages=[dict(role="user", content=text(2, 30)), dict(role="assistant", content=text(1, 8))]) for i in range(n)]


EXAMPLES = SimpleNamespace(train=conversations(41, 1), validation=conversations(9, 2))
SMALL = dict(lr=1e-2, epochs=2, eval_every=3, tokens_per_batch=128, gradient_accumulation=3, lora_r=4, lora_dropout=0., precision="fp32")


@pytest.fixture(scope="module")
def lm(tmp_path_factory): return random_lm(folder=tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch): monkeypatch.syspath_prepend(str(HERE))  # where the workers find this module


def workers_of(pid=None):
    "Processes that work for this one, or for nobody any more."
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try: command, environment = (place/"cmdline").read_bytes(), (place/"environ").read_bytes()
        except OSError: continue
        if b"llmops_kit.training.workers" in command and f"WORKERS_OF={pid or os.getpid()}".encode() in environment: found.append(int(place.name))
    return found


@pytest.fixture(autouse=True)
def nobody_left(monkeypatch):
    monkeypatch.setenv("WORKERS_OF", str(os.getpid()))
    yield
    assert not workers_of()


# -- the same training

def recorded(base, examples, *, folder, **settings):
    "`finetune`, with the rows that each process read, in their order, in `seen-<rank>.json`."
    seen, read = [], TokenRows.__getitem__
    def noted(self, i):
        if len(self) == 41: seen.append(i)
        return read(self, i)
    TokenRows.__getitem__ = noted
    try: return finetune(base, examples, folder=folder, **settings)
    finally:
        TokenRows.__getitem__ = read
        (Path(folder)/f"seen-{os.environ.get('RANK', 'one')}.json").write_text(json.dumps(seen))


def test_two_processes_are_one_training(lm, tmp_path):
    lines, told = [], []
    import test_workers  # under the name by which the workers find it
    two = in_workers(test_workers.recorded, 2, lm, EXAMPLES, folder=tmp_path/"two", on_log=lambda values, step: lines.append({"step": step, **values}),
                     on_progress=lambda *args: told.append(args), **SMALL)
    one = recorded(lm, EXAMPLES, folder=tmp_path/"one", **SMALL)
    # two epochs: every row twice, by whichever process
    seen = {k: json.loads((tmp_path/f"{'one' if k == 'one' else 'two'}/seen-{k}.json").read_text()) for k in ("one", "0", "1")}
    assert sorted(seen["0"] + seen["1"]) == sorted(seen["one"]) == sorted(2*list(range(41)))
    assert min(len(seen["0"]), len(seen["1"])) > 30
    assert one.metrics["train/steps"] > 6 and one.metrics["train/steps"] % 2 == 0
    for k in ("train/steps", "train/tokens", "train/trained_tokens", "train/best_step", "train/examples", "parameters/trained", "base/loss"):
        assert two.metrics[k] == pytest.approx(one.metrics[k], rel=1e-6), k
    assert set(two.metrics) == set(one.metrics) and two.history == lines and told[-1][0] == told[-1][1] == one.metrics["train/steps"]
    for name in ("train/loss", "validation/loss"):
        curves = [[o[name] for o in run.history if name in o] for run in (one, two)]
        assert len(curves[0]) > 2 and curves[1] == pytest.approx(curves[0], rel=1e-4), name
    assert [(o["step"], sorted(o)) for o in two.history] == [(o["step"], sorted(o)) for o in one.history]
    # what comes back is what one process returns
    assert two.lm.base is lm and two.base == one.base and two.kind == "adapter" and not two.lm.model.training
    ids = torch.arange(20)[None]
    with torch.no_grad(): assert torch.allclose(two.lm.model(ids).logits, one.lm.model(ids).logits, atol=1e-3) and not torch.allclose(two.lm.model(ids).logits, lm.model(ids).logits, atol=1e-3)
    assert {k for k, p in two.lm.model.named_parameters() if p.requires_grad} == {k for k, p in one.lm.model.named_parameters() if p.requires_grad}
    best = tmp_path/f"two/checkpoint-{two.best_step}/adapter_model.safetensors"
    assert sha256_of(two.save(tmp_path/"saved")/"adapter_model.safetensors") == sha256_of(best)
    assert not (tmp_path/"two/workers").exists() and list((tmp_path/"two").glob("checkpoint-*")) == [best.parent]


# -- how it fails

def dying(base, examples, *, folder, how, **settings):
    "`finetune`, in which the second process comes to an end after two steps."
    on_log = settings.pop("on_log")
    rank = int(os.environ["RANK"])
    def watched(values, step):
        on_log(values, step)
        if step == 2 and rank == 1 and "train/loss" in values:
            if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises": raise ZeroDivisionError("a mistake of the second process")
    return finetune(base, examples, folder=folder, on_log=watched, **settings)


@pytest.mark.parametrize("how,error,said,name", [("killed", WorkerFailed, r"Worker 1 of 2 .* was killed by SIGKILL", "SIGKILL"),
                                                pytest.param("raises", WorkerFailed, r"(?s)Worker 1 of 2 .* ZeroDivisionError: a mistake of the second process.*in watched", None, marks=pytest.mark.slow)])
def test_a_death_is_told_at_once(lm, tmp_path, how, error, said, name):
    import test_workers
    last = []
    with pytest.raises(error, match=said) as found:
        in_workers(test_workers.dying, 2, lm, EXAMPLES, folder=tmp_path, how=how, on_log=lambda values, step: last.append(time.monotonic()), **SMALL | {"max_steps": 1000})
    assert time.monotonic() - last[-1] < 10
    assert (found.value.rank, found.value.signal) == (1, name)
    assert not (tmp_path/"workers/inputs").exists() and list(tmp_path.glob("workers/logs/*/attempt_0/1/stderr.log"))


def test_the_users_mistake_reads_as_in_one_process(tmp_path):
    for mistake in (UserError("There is no method lora2."), LossNotFinite("The loss is gone."), Stopped("Stopped after step 3.")):
        raised = _failure(1, (pickle.dumps(mistake), "short", "long"), 1, 2, tmp_path)
        assert type(raised) is type(mistake) and str(raised) == str(mistake)


def test_what_cannot_go_is_refused_here(lm, tmp_path):
    with pytest.raises(UserError, match="There cannot be 0 processes"): in_workers(finetune, 0, lm, EXAMPLES, folder=tmp_path)
    with pytest.raises(UserError, match="cannot be given these settings"): in_workers(finetune, 2, lm, EXAMPLES, folder=tmp_path, reward=lambda o: 0)
    def here(base, examples, **settings): pass
    here.__module__ = "__main__"
    with pytest.raises(UserError, match="defined in the notebook"): in_workers(here, 2, lm, EXAMPLES, folder=tmp_path)


# -- nobody is left behind

PARENT = """
import os, sys
os.environ["WORKERS_OF"] = str(os.getpid())
sys.path.insert(0, {here!r})
import test_workers as t
lm = t.random_lm(folder={folder!r} + "/model")
print("began", flush=True)
t.in_workers(t.finetune, 2, lm, t.EXAMPLES, folder={folder!r} + "/run", on_log=lambda values, step: print(step, flush=True), **t.SMALL | dict(max_steps=100000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_when_the_notebook_goes_the_workers_go(tmp_path, how):
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(here=str(HERE), folder=str(tmp_path))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in parent.stdout:
            if line.strip() == "3": break
        else: raise AssertionError(parent.stderr.read())
        assert len(workers_of(parent.pid)) == 2
        parent.send_signal(how)
        _, said = parent.communicate(timeout=40)
        deadline = time.monotonic() + 10
        while workers_of(parent.pid) and time.monotonic() < deadline: time.sleep(0.1)
        assert not workers_of(parent.pid)
        if how == signal.SIGINT:  # asked to stop, they saved first
            assert "Stopped by SIGTERM after step" in said and list(tmp_path.glob("run/resume/step-*/state.json"))
    finally: parent.kill()
