"Bugs of training in several processes, planted in two real ones, that the agreement certificate must catch; and clean trainings that it must pass."
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard

from conftest import few
from llmops_kit.models.families import FAMILIES, random_lm
from llmops_kit.training import sft, shares
from llmops_kit.training.agreement import agreement, compare, differences, noisy, trace
from llmops_kit.training.sft import CompletionTrainer, finetune
from llmops_kit.training.workers import in_workers
from test_workers import conversations, lm, nobody_left, on_the_path  # noqa: F401 (fixtures)

EXAMPLES = SimpleNamespace(train=conversations(14, 1), validation=conversations(4, 2))
BASIC = dict(lr=1e-2, max_steps=5, eval_every=5, tokens_per_batch=160, lora_r=4, lora_dropout=0., precision="fp32")

# -- the bugs, each a context in which a process trains

@contextmanager
def mean_of_the_processes_means():
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None): return self.nll(model, inputs, self.head).mean() * shares.share_weight(inputs)
    with patch.object(CompletionTrainer, "compute_loss", compute_loss): yield

@contextmanager
def averaged_once_too_often(): # what Adam forgives, and weight decay and clipping do not
    right = CompletionTrainer.compute_loss
    with patch.object(CompletionTrainer, "compute_loss", lambda self, *args, **kwargs: right(self, *args, **kwargs) / self.accelerator.num_processes): yield

@contextmanager
def gradients_not_synchronized():
    with patch.object(Accelerator, "prepare_model", lambda self, model, **kwargs: model): yield

@contextmanager
def every_process_sees_the_same_rows():
    with patch.object(shares.Shares, "__init__", lambda self, *args, right=shares.Shares.__init__: right(self, args[0], args[1], 0, args[3])): yield

@contextmanager
def odd_rows_are_dropped():
    def even(batches, processes): return [[o[:min(map(len, round))] for o in round] for round in right(batches, processes)]
    right = shares.divide
    with patch.object(shares, "divide", even): yield

@contextmanager
def the_end_of_an_epoch_is_dropped():
    def whole(self): return iter(list(right(self))[:-1])
    right = shares.Shares.__iter__
    with patch.object(shares.Shares, "__iter__", whole), patch.object(shares.Shares, "__len__", lambda self: len(self.batch_sampler) - 1): yield

@contextmanager
def batches_dealt_out_by_accelerate():
    class Dealt(BatchSamplerShard):
        def __init__(self, batches, accumulation, rank, processes): super().__init__(batches, processes, rank)
        def set_epoch(self, epoch): self.batch_sampler.set_epoch(epoch)
    with patch.object(shares, "Shares", Dealt): yield

@contextmanager
def adapters_begin_differently():
    from torch.nn.parallel import DistributedDataParallel as DDP
    def own(*args):
        if shares.process_count() > 1: torch.manual_seed(100 + torch.distributed.get_rank())
        return right(*args)
    right, init = sft.trainable, DDP.__init__
    with patch.object(sft, "trainable", own), patch.object(DDP, "__init__", lambda self, *args, **kwargs: init(self, *args, **kwargs | {"init_sync": False})): yield

@contextmanager
def a_dropout_of_its_own():
    def dropping(*args): return right(*args[:-2], 0.2, args[-1])
    right = sft.trainable
    with patch.object(sft, "trainable", dropping): yield

@contextmanager
def clean(): yield

PLANTS = [mean_of_the_processes_means, averaged_once_too_often, gradients_not_synchronized, every_process_sees_the_same_rows, odd_rows_are_dropped,
          the_end_of_an_epoch_is_dropped, batches_dealt_out_by_accelerate, adapters_begin_differently, a_dropout_of_its_own]
CONTROLS = {"basic": {}, "accumulated": {"gradient_accumulation": 3}, "a row in each batch": {"tokens_per_batch": 8}, "every weight": {"method": "full", "lr": 1e-3},
            "dora, decay": {"method": "dora", "weight_decay": 0.1, "max_grad_norm": 0.5}}


def several(base, examples, *, folder, cases, on_log=None, on_progress=None):
    "Traces of many trainings, one after the other: name -> (plant's name, family, settings)."
    found = {}
    for n, (name, (plant, family, settings)) in enumerate(cases.items()):
        with globals()[plant](): found[name] = trace(random_lm(family) if family else base, examples, folder=Path(folder)/str(n), **settings)
    return found


def certified(lm, folder, settings, traced):
    "The certificate of a trace from two processes."
    one = trace(lm, EXAMPLES, folder=folder/"one", **settings)
    control = []
    for seed in range(2):
        rounding, other = noisy(lm, seed)
        with rounding: control.append(differences(one, trace(other, EXAMPLES, folder=folder/f"rounded-{seed}", **settings)))
    return [compare(one, o, control, 2) for o in traced]


SHORT = ["basic", "accumulated", "a row in each batch", "qwen3_moe"]
CASES = {o.__name__: (o.__name__, None, BASIC) for o in PLANTS} | {k: ("clean", None, BASIC | v) for k, v in CONTROLS.items()}
CASES |= {k: ("clean", k, BASIC) for k in FAMILIES if k != "llama"}  # which is the basic one


def launched(folder, names):
    import test_zoo_agreement
    with pytest.MonkeyPatch.context() as set:
        set.syspath_prepend(str(Path(__file__).parent))
        return in_workers(test_zoo_agreement.several, 2, random_lm(), EXAMPLES, folder=folder, cases={k: CASES[k] for k in names})


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    "One launch for all of the short version."
    return launched(tmp_path_factory.mktemp("several"), [o for o in CASES if o in SHORT or CASES[o][0] != "clean"])


@pytest.fixture(scope="module")
def more(tmp_path_factory): return launched(tmp_path_factory.mktemp("more"), [o for o in CASES if o not in SHORT and CASES[o][0] == "clean"])


def test_every_bug_is_caught(traces, tmp_path):
    lm = random_lm()
    *found, right = certified(lm, tmp_path, BASIC, [*(traces[o.__name__] for o in PLANTS), traces["basic"]])
    assert right.passed, right
    missed = [o.__name__ for o, certificate in zip(PLANTS, found) if certificate.passed]
    assert not missed, missed


@pytest.mark.parametrize("name", few([o for o in CONTROLS if o != "basic"], SHORT))
def test_clean_trainings_pass(request, tmp_path, name):
    certificate, = certified(random_lm(), tmp_path, BASIC | CONTROLS[name], [request.getfixturevalue("traces" if name in SHORT else "more")[name]])
    assert certificate.passed, certificate.details


@pytest.mark.parametrize("family", few([o for o in FAMILIES if o != "llama"], SHORT))
def test_every_family_passes(request, tmp_path, family):
    certificate, = certified(random_lm(family), tmp_path, BASIC, [request.getfixturevalue("traces" if family in SHORT else "more")[family]])
    assert certificate.passed, certificate.details


def stale(base, examples, *, folder, **settings):
    with gradients_not_synchronized(): return finetune(base, examples, folder=folder, **settings)


def test_the_certificate_itself(lm, on_the_path, nobody_left):
    import test_zoo_agreement
    found = agreement(lm, EXAMPLES, steps=5, train=test_zoo_agreement.stale, lr=1e-2, tokens_per_batch=160, lora_r=4, epochs=3, lora_dropout=0.3)
    assert found.passed is False and "do not train as one does" in found.about and "weights" in found.about
