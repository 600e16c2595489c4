"""The bug zoo of the invariance and precision certificates: planted bugs must fail them, clean models of every family must pass.

`python tests/test_zoo_invariance.py` prints the table of all of them: worst difference over tolerance."""
import random
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

import llmops_kit.training.invariance as invariance_module
import llmops_kit.training.sft as sft
from conftest import few
from llmops_kit.models.families import FAMILIES, random_lm
from llmops_kit.training.batching import TokenRows
from llmops_kit.training.invariance import invariance
from llmops_kit.training.loss import token_nll
from llmops_kit.training.sft import CompletionTrainer, trainable

collate, collate_packed = invariance_module.collate, invariance_module.collate_packed


def rows_of(seed=0, lengths=(7, 12, 19, 30, 44, 60)):
    "Rows of random ids; the second part of each is trained, a different share in each."
    rng, found = random.Random(seed), TokenRows([], [])
    for n in lengths:
        start = rng.randint(1, n - 2)
        found.ids.append([rng.randrange(10, 4000) for _ in range(n)])
        found.mask.append([i >= start for i in range(n)])
    return found


@lru_cache(maxsize=4)
def random_base(family, seed): return random_lm(family, seed=seed)

def small(family="llama", method="full", seed=0):
    "A random model as it would be trained; matrix B of an adapter is random, so that the adapter counts."
    base = random_base(family, seed)
    lm = trainable(replace(base, model=deepcopy(base.model)), method, 4, 8, 0. if family == "qwen3_moe" else 0.1, "all-linear")  # experts take no dropout
    generator = torch.Generator().manual_seed(seed)
    for name, p in lm.model.named_parameters():
        if "lora_B" in name: p.data = torch.randn(p.shape, generator=generator)*0.05
    return lm


# -- planted bugs: each takes a monkeypatch and the model

def forward_with(lm, change):
    "The model with other arguments."
    forward = lm.model.forward
    lm.model.forward = lambda *args, **kwargs: forward(*args, **change(kwargs))


def set_both(patch, name, value):
    patch.setattr(invariance_module, name, value)
    patch.setattr(sft, name, value)


def loss_by(patch, loss):
    "A trainer with another loss: gets the losses of the trained tokens, the batch, the trained tokens of the step and its batches."
    class Wrong(CompletionTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.count = getattr(self, "count", 0) + 1
            return loss(token_nll(model, inputs, self.head), inputs, num_items_in_batch, self.args.gradient_accumulation_steps, self.count)
    patch.setattr(invariance_module, "CompletionTrainer", Wrong)


def left_padded(batch, mask=True):
    "The same batch with its padding on the left."
    shift = (batch["attention_mask"] == 0).sum(1)
    moved = {k: torch.stack([o.roll(int(s)) for o, s in zip(v, shift)]) for k, v in batch.items()}
    return moved if mask else moved | {"attention_mask": torch.ones_like(moved["attention_mask"])}


def blocks(position_ids, reach=0):
    "The 4D mask of packed examples; `reach`: tokens before the border that are seen, too."
    example = (position_ids[0] == 0).cumsum(0)
    n = torch.arange(len(example))
    seen = (example[:, None] == example[None]) | (n[None] >= (n - position_ids[0])[:, None] - reach)
    return (seen & (n[:, None] >= n[None]))[None, None]


def mask_leaks_between_packed(patch, lm):
    forward_with(lm, lambda o: o | {"attention_mask": torch.ones_like(o["input_ids"])} if "position_ids" in o else o)

def mask_one_token_too_wide(patch, lm):
    forward_with(lm, lambda o: o | {"attention_mask": blocks(o["position_ids"], reach=1)} if "position_ids" in o else o)

def positions_not_reset(patch, lm): # so transformers sees no borders
    patch.setattr(invariance_module, "collate_packed", lambda rows: (lambda o: o | {"position_ids": torch.arange(o["input_ids"].shape[1])[None]})(collate_packed(rows)))

def positions_not_reset_but_mask_right(patch, lm): # gpt2: positions are absolute
    forward_with(lm, lambda o: o | {"attention_mask": blocks(o["position_ids"]), "position_ids": torch.arange(o["input_ids"].shape[1])[None]} if "position_ids" in o else o)

def use_cache_leaks(patch, lm):
    forward_with(lm, lambda o: o | {"use_cache": True})

def first_token_of_a_packed_example_is_trained(patch, lm):
    def wrong(rows):
        batch = collate_packed(rows)
        return batch | {"labels": torch.where(batch["position_ids"] == 0, batch["input_ids"], batch["labels"])}
    patch.setattr(invariance_module, "collate_packed", wrong)

def padding_seen_by_attention(patch, lm):
    set_both(patch, "collate", lambda rows, pad_token_id: left_padded(collate(rows, pad_token_id), mask=False))

def position_offset_by_padding(patch, lm): # gpt2: positions are absolute
    set_both(patch, "collate", lambda rows, pad_token_id: left_padded(collate(rows, pad_token_id)))

def trained_mask_includes_padding(patch, lm):
    def wrong(rows, pad_token_id):
        batch = collate(rows, pad_token_id)
        return batch | {"labels": torch.where(batch["attention_mask"] == 0, batch["input_ids"], batch["labels"])}
    set_both(patch, "collate", wrong)

def labels_shifted_twice(patch, lm):
    set_both(patch, "token_nll", lambda model, batch, head=None: token_nll(model, batch | {"labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}, head))

def labels_not_shifted(patch, lm):
    set_both(patch, "token_nll", lambda model, batch, head=None: token_nll(model, batch | {"labels": F.pad(batch["labels"], (1, 0), value=-100)[:, :-1]}, head))

def mean_of_means(patch, lm): loss_by(patch, lambda nll, batch, tokens, batches, count: nll.mean()/batches)
def normalized_by_examples(patch, lm): loss_by(patch, lambda nll, batch, tokens, batches, count: nll.sum()/len(batch["labels"])/batches)
def divided_by_batch_size(patch, lm): loss_by(patch, lambda nll, batch, tokens, batches, count: nll.sum()/tokens/len(batch["labels"]))
def divided_by_accumulation_again(patch, lm): loss_by(patch, lambda nll, batch, tokens, batches, count: nll.sum()/tokens/batches)
def divided_by_all_tokens(patch, lm): loss_by(patch, lambda nll, batch, tokens, batches, count: nll.sum()/batch["attention_mask"].sum()/batches)
def last_batch_of_a_step_lost(patch, lm): loss_by(patch, lambda nll, batch, tokens, batches, count: nll.sum()/tokens*(count < batches or batches == 1))
def last_batch_counts_a_thousandth_more(patch, lm): loss_by(patch, lambda nll, batch, tokens, batches, count: nll.sum()/tokens*(1 + 1e-3*(count == batches > 1)))
def label_smoothing_of_a_thousandth(patch, lm): loss_by(patch, lambda nll, batch, tokens, batches, count: (nll*0.999 + 0.001*8.317).sum()/tokens)

def layers(lm, kind): return [m for name, m in lm.model.named_modules() if name.endswith(kind)]

def dropout_left_on(patch, lm):
    for o in layers(lm, "mlp"): o.register_forward_hook(lambda m, args, out: F.dropout(out, 0.05, training=True))

def dropout_hardly_left_on(patch, lm):
    for o in layers(lm, "mlp"): o.register_forward_hook(lambda m, args, out: F.dropout(out, 0.001, training=True))

def normalized_over_the_batch(patch, lm):
    for o in layers(lm, "mlp"): o.register_forward_hook(lambda m, args, out: (out - out.mean((0, 1)))/(out.std((0, 1)) + 1e-2))

def batch_norm_layer(patch, lm): # as in vision: its statistics are those of the batch while it trains
    for o in layers(lm, "input_layernorm"):
        o.norm = torch.nn.BatchNorm1d(64)
        o.register_forward_hook(lambda m, args, out: m.norm(out.flatten(0, 1)).view_as(out))

def leak(size):
    "A share of the mean over the whole batch in every embedding."
    def plant(patch, lm):
        lm.model.get_input_embeddings().register_forward_hook(lambda m, args, out: out + size*(out.mean((0, 1), keepdim=True) - out))
    plant.__name__ = f"leak_of_{size:g}"
    return plant

GPT2 = positions_not_reset_but_mask_right, position_offset_by_padding
PLANTS = [mask_leaks_between_packed, mask_one_token_too_wide, positions_not_reset, positions_not_reset_but_mask_right, use_cache_leaks, first_token_of_a_packed_example_is_trained,
          padding_seen_by_attention, position_offset_by_padding, trained_mask_includes_padding, labels_shifted_twice, labels_not_shifted, mean_of_means, normalized_by_examples,
          divided_by_batch_size, divided_by_accumulation_again, divided_by_all_tokens, last_batch_of_a_step_lost, last_batch_counts_a_thousandth_more, label_smoothing_of_a_thousandth,
          dropout_left_on, dropout_hardly_left_on, normalized_over_the_batch, batch_norm_layer, leak(1e-2), leak(1e-3), leak(1e-4)]


def caught(plant, patch, **options):
    lm = small("gpt2" if plant in GPT2 else "llama")
    plant(patch, lm)
    return invariance(lm, rows_of(), examples=6, **options)

# one of each kind, and of a kind the smallest
SHORT = {"mask_one_token_too_wide", "positions_not_reset_but_mask_right", "use_cache_leaks", "first_token_of_a_packed_example_is_trained", "padding_seen_by_attention", "trained_mask_includes_padding",
         "labels_not_shifted", "divided_by_accumulation_again", "last_batch_counts_a_thousandth_more", "label_smoothing_of_a_thousandth", "dropout_hardly_left_on", "batch_norm_layer", "leak_of_0.0001"}

@pytest.mark.parametrize("plant", few(PLANTS, [o for o in PLANTS if o.__name__ in SHORT]), ids=lambda o: o.__name__)
def test_planted_bug_is_caught(plant, monkeypatch):
    found = caught(plant, monkeypatch)
    assert found.passed is False and found.details[0]["ratio"] > 3, found

def test_the_worst_form_names_the_bug(monkeypatch):
    def failed(plant):
        with monkeypatch.context() as patch: return {o["form"].removeprefix("hot path, ") for o in caught(plant, patch).details if o["ratio"] > 1}
    assert failed(mask_leaks_between_packed) == {"packed", "packed, other order"}
    assert failed(mean_of_means) == {"step in 2 batches, gradient", "step in 2 batches, loss"}
    found = failed(position_offset_by_padding)
    assert found >= {"padded", "mixed"} and not found & {"alone", "packed"}

def test_a_bug_that_is_only_in_bf16_is_caught(monkeypatch):
    "As of a kernel for bf16 alone."
    def only_bf16(o): return mask(o) if "position_ids" in o and torch.is_autocast_enabled("cpu") else o
    mask = lambda o: o | {"attention_mask": torch.ones_like(o["input_ids"])}
    lm = small()
    for p in lm.model.parameters(): p.data = p.data*3  # a leak has to be larger than what bf16 rounds away
    forward_with(lm, only_bf16)
    found = invariance(lm, rows_of(), bf16=True, examples=6)
    assert {(o["format"], o["form"].removeprefix("hot path, ")) for o in found.details if o["ratio"] > 1} == {("bf16", "packed")}, found.details


# -- clean controls

@pytest.mark.parametrize("family, method", few([(o, m) for o in FAMILIES for m in ("full", "lora")], [("llama", "lora"), ("gpt2", "full"), ("qwen3_moe", "lora")]))
def test_clean_family_passes_in_fp32_and_bf16(family, method):
    found = invariance(small(family, method), rows_of(), bf16=True, examples=6)
    assert found.passed and found.details[0]["ratio"] < 0.5, found
    assert {o["format"] for o in found.details} == {"fp32", "bf16"} and "packed" in {o["form"] for o in found.details}

@pytest.mark.parametrize("seed", few(range(8), [1]))
def test_clean_seed_passes(seed):
    found = invariance(small(seed=seed), rows_of(seed), examples=6)
    assert found.passed and found.details[0]["ratio"] < 0.5, found

def padding_on_the_left_with_a_mask(patch, lm): position_offset_by_padding(patch, lm)  # harmless where positions are relative
def padding_on_the_right_unmasked(patch, lm): set_both(patch, "collate", lambda rows, pad_token_id: (lambda o: o | {"attention_mask": torch.ones_like(o["attention_mask"])})(collate(rows, pad_token_id)))
def a_mask_of_our_own(patch, lm): forward_with(lm, lambda o: o | {"attention_mask": blocks(o["position_ids"])} if "position_ids" in o else o)
def dropout_that_belongs_there(patch, lm):
    for o in layers(lm, "mlp"):
        o.drop = torch.nn.Dropout(0.5)
        o.register_forward_hook(lambda m, args, out: m.drop(out))
HARMLESS = padding_on_the_left_with_a_mask, padding_on_the_right_unmasked, a_mask_of_our_own, dropout_that_belongs_there, leak(0.)

@pytest.mark.parametrize("change", HARMLESS, ids=lambda o: o.__name__)
def test_harmless_change_passes(change, monkeypatch):
    found = caught(change, monkeypatch)
    assert found.passed and found.details[0]["ratio"] < 0.5, found

def test_nothing_is_left_behind():
    lm, rows = small(method="lora"), rows_of()
    lm.model.eval()
    before, states = {k: v.clone() for k, v in lm.model.state_dict().items()}, (torch.get_rng_state(), random.getstate())
    dropout = [m.p for m in lm.model.modules() if isinstance(m, torch.nn.Dropout)]
    invariance(lm, rows, examples=6)
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items()) and all(p.grad is None for p in lm.model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not any(m.training for m in lm.model.modules()) and dropout == [m.p for m in lm.model.modules() if isinstance(m, torch.nn.Dropout)] != []


if __name__ == "__main__":
    torch.set_num_threads(1)
    def line(name, o): print(f"{name:45} {o.verdict:7} {o.details[0]['ratio']:12.3g}  {o.details[0]['form']}")
    for plant in (*PLANTS, *HARMLESS):
        with pytest.MonkeyPatch.context() as patch: line(plant.__name__, caught(plant, patch))
    for family in FAMILIES:
        for method in ("full", "lora"):
            for bf16 in (False, True): line(f"clean {family} {method} {'bf16' if bf16 else 'fp32'}", invariance(small(family, method), rows_of(), bf16=bf16, examples=6))
    for seed in range(8): line(f"clean llama seed {seed}", invariance(small(seed=seed), rows_of(seed), examples=6))
