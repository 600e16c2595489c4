"The certificate of resuming catches every way to forget something that we could think of, and passes on every family of models."
import os, random, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import few
from llmops_kit.models.families import FAMILIES, random_lm
from llmops_kit.training import continuation as module
from llmops_kit.training.continuation import continuation, go_on
from llmops_kit.training.loop import Watch
from llmops_kit.training.sft import CompletionTrainer, finetune

WORDS = "the of a file and returns name object value is for list key path with line error index count type".split()


def conversations(n, seed):
    rng = random.Random(seed)
    def text(low, high): return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    return [dict(id=str(i), messages=[dict(role="user", content=text(2, 30)), dict(role="assistant", content=text(1, 8))]) for i in range(n)]


EXAMPLES = SimpleNamespace(train=conversations(24, 1), validation=conversations(4, 2))


@pytest.fixture(scope="module")
def lm(): return random_lm()


def certified(lm, elsewhere=go_on, **settings):
    return continuation(lm, EXAMPLES, elsewhere=elsewhere, **{"lora_r": 4, "max_length": 128, "precision": "fp32", **settings})


# -- planted bugs: (where, name, what it does instead); each is a thing that people forget

def no_op(*args, **kwargs): pass

def only(*generators): # restores these and none else
    def load(self, checkpoint):
        states = torch.load(Path(checkpoint)/"rng_state.pth", weights_only=False)
        if "python" in generators: random.setstate(states["python"])
        if "numpy" in generators: np.random.set_state(states["numpy"])
        if "cpu" in generators: torch.random.set_rng_state(states["cpu"])
    return load

def optimizer_without_moments(self, checkpoint):
    self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint)/"scheduler.pt", weights_only=True))

def schedule_from_the_start(self, checkpoint):
    self.optimizer.load_state_dict(torch.load(Path(checkpoint)/"optimizer.pt", weights_only=True))

def epoch_from_the_start(self, *args): # the batches of the epoch once more
    epochs, _ = init_training_state(self, *args)
    return epochs, 0

def without_accumulation(self, *args): # counts steps where batches are counted
    epochs, batches = init_training_state(self, *args)
    return epochs, batches//self.args.gradient_accumulation_steps

def another_seed(self):
    self.args.seed += 1
    return train_dataloader(self)

def forgets_the_best(self, state):
    load_watch(self, state)
    self.best.step = self.best.loss = None

def forgets_the_curve(self, state): self.best.load_state_dict(state["best"])

def forgets_the_counters(self, name, value):
    if name not in ("tokens", "trained") or value == 0 or hasattr(self, "boundary"): object.__setattr__(self, name, value)

def untrained_weights(self, checkpoint, model=None): pass

def rounded_weights(self, checkpoint, model=None):
    load_weights(self, checkpoint)
    for p in self.model.parameters():
        if p.requires_grad: p.data = p.data.bfloat16().float()

init_training_state, train_dataloader = CompletionTrainer._init_training_state, CompletionTrainer.get_train_dataloader
load_watch, load_weights = Watch.load_state_dict, CompletionTrainer._load_from_checkpoint

BUGS = {
    "no generator restored": (CompletionTrainer, "_load_rng_state", no_op),
    "torch's generator not restored": (CompletionTrainer, "_load_rng_state", only("python", "numpy")),
    "python's generator not restored": (CompletionTrainer, "_load_rng_state", only("numpy", "cpu")),
    "numpy's generator not restored": (CompletionTrainer, "_load_rng_state", only("python", "cpu")),
    "optimizer's moments lost": (CompletionTrainer, "_load_optimizer_and_scheduler", optimizer_without_moments),
    "schedule from the start": (CompletionTrainer, "_load_optimizer_and_scheduler", schedule_from_the_start),
    "epoch from the start": (CompletionTrainer, "_init_training_state", epoch_from_the_start),
    "position counted in steps instead of batches": (CompletionTrainer, "_init_training_state", without_accumulation),
    "sampler with another seed": (CompletionTrainer, "get_train_dataloader", another_seed),
    "best checkpoint forgotten": (Watch, "load_state_dict", forgets_the_best),
    "curve forgotten": (Watch, "load_state_dict", forgets_the_curve),
    "token counters forgotten": (CompletionTrainer, "__setattr__", forgets_the_counters),
    "weights not loaded": (CompletionTrainer, "_load_from_checkpoint", untrained_weights),
    "weights rounded to bf16": (CompletionTrainer, "_load_from_checkpoint", rounded_weights),
}


def planted(name):
    "The rest of the training, with a bug in it."
    def elsewhere(folder):
        owner, attribute, bug = BUGS[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, bug, raising=False)
            random.seed(99); np.random.seed(99)  # as another process has them
            go_on(folder)
    return elsewhere


def draws(self, *args, **kwargs):
    "A training that also uses the generators of Python and NumPy."
    random.random(), np.random.rand()
    return training_step(self, *args, **kwargs)

training_step = CompletionTrainer.training_step


@pytest.fixture(scope="module")
def begun(lm, tmp_path_factory):
    "What the certificate has trained when it hands over to another process: the same for all bugs."
    kept = tmp_path_factory.mktemp("begun")/"work"
    def keep(folder):
        shutil.copytree(folder, kept)
        raise RuntimeError("this much, and no more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompletionTrainer, "training_step", draws)
        certified(lm, keep)
    return kept

@pytest.fixture
def shared(begun, monkeypatch):
    "The certificate takes that instead of training it again; the rest is trained."
    def only_the_rest(base, examples, *, folder, **settings):
        if folder.name != "whole": return finetune(base, examples, folder=folder, **settings)
        for o in ("whole", "killed"): shutil.copytree(begun/o, folder.parent/o)
    monkeypatch.setattr(CompletionTrainer, "training_step", draws)
    monkeypatch.setattr(module, "finetune", only_the_rest)

BEST = "best checkpoint forgotten"

@pytest.mark.parametrize("name", [o for o in BUGS if o != BEST])
def test_a_planted_bug_is_caught(name, lm, shared):
    certificate = certified(lm, planted(name))
    assert certificate.passed is False and certificate.value > 0, certificate

def test_without_a_bug_it_passes(lm, shared):
    certificate = certified(lm)
    assert certificate.passed and certificate.value == 0, certificate

def test_a_forgotten_best_is_caught_where_the_loss_rises(lm, monkeypatch):
    monkeypatch.setattr(CompletionTrainer, "training_step", draws)
    certificate = certified(lm, planted(BEST), lr=3., method="full")
    assert certificate.passed is False and certificate.value > 0, certificate


def in_a_new_process(name):
    "The same in a process of its own."
    def elsewhere(folder):
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_zoo_continuation as zoo; zoo.planted({name!r})({str(folder)!r})"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, capture_output=True)
    return elsewhere


@pytest.mark.parametrize("name", few(["torch's generator not restored", "optimizer's moments lost"], []))
def test_a_planted_bug_is_caught_in_a_new_process(name, lm): assert certified(lm, in_a_new_process(name)).passed is False


# -- clean controls

@pytest.mark.parametrize("family, method", few([(o, "lora") for o in FAMILIES] + [("llama", "full"), ("gpt2", "full"), ("qwen3_moe", "full")], [("llama", "full"), ("qwen3_moe", "lora")]))
def test_a_family_passes(family, method):
    certificate = certified(random_lm(family), method=method)
    assert (certificate.passed, certificate.value, certificate.tolerance) == (True, 0., 0.), certificate


SETTINGS = {"dora": dict(method="dora"), "bf16": dict(precision="bf16"), "decay and patience": dict(weight_decay=0.1, patience=1), "three epochs": dict(steps=7)}

@pytest.mark.parametrize("name", few(SETTINGS, ["bf16", "decay and patience"]))
def test_settings_pass(name, lm): assert certified(lm, **SETTINGS[name]).passed


def test_a_new_process_passes(lm):
    certificate = certified(lm, module.new_process)
    assert certificate.passed and certificate.value == 0
    assert {o["part"] for o in certificate.details} == {"weights", "optimizer", "schedule", "random states", "examples seen", "curve and best"}
    assert all(o["numbers"] > 0 for o in certificate.details)
