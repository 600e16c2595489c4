"""The bug zoo of the precision certificate: what bf16 should not do must fail it, clean models of every family must pass."""
from functools import lru_cache

import pytest
import torch
from transformers import TrainingArguments

import llmops_kit.training.invariance as invariance_module
import llmops_kit.training.precision as precision_module
from conftest import DOCSTRINGS, few
from llmops_kit.data.examples import load_examples
from llmops_kit.models.families import FAMILIES
from llmops_kit.models.load import load_model
from llmops_kit.training.batching import token_rows
from llmops_kit.training.loss import token_nll
from llmops_kit.training.precision import precision
from llmops_kit.training.sft import CompletionTrainer
from test_zoo_invariance import layers, rows_of, small


def in_bf16(): return torch.is_autocast_enabled("cpu")

@lru_cache
def own_rows(n=6): # the longest: far positions are what bf16 cannot count
    examples, tokenizer = load_examples(DOCSTRINGS).train, load_model("tiny").tokenizer
    lengths = token_rows(examples, tokenizer, 200).lengths
    return token_rows(examples.select(sorted(range(len(lengths)), key=lambda i: -lengths[i])[:n]), tokenizer, 200)

def tiny(): return load_model("tiny"), own_rows() # which is trained, and its own rows

def random_llama(): return small(), rows_of()

def random_experts(): return small("qwen3_moe", "lora"), rows_of()


# -- planted bugs, only where the computation is in bf16

def rotary_positions_in_bf16(patch, lm):
    rotary = lm.model.model.rotary_emb
    forward = rotary.forward
    def wrong(hidden, position_ids):
        if not in_bf16(): return forward(hidden, position_ids)
        angles = position_ids[..., None].bfloat16()*rotary.inv_freq.bfloat16()
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
    rotary.forward = wrong

def norm_summed_in_bf16(patch, lm):
    for norm in [*layers(lm, "layernorm"), lm.model.model.norm]:
        forward = norm.forward
        def wrong(hidden, norm=norm, forward=forward):
            if not in_bf16(): return forward(hidden)
            x = hidden.bfloat16()
            total = torch.zeros_like(x[..., :1])
            for i in range(x.shape[-1]): total = total + x[..., i:i + 1].square()
            return (norm.weight.bfloat16()*(x*torch.rsqrt(total/x.shape[-1] + norm.variance_epsilon))).to(hidden.dtype)
        norm.forward = wrong

def loss_in_bf16(patch, lm): # log of a sum of 4,096 terms in bf16
    def wrong(model, batch, head=None):
        if not in_bf16(): return token_nll(model, batch, head)
        targets = batch["labels"][:, 1:]
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1][targets != -100].bfloat16()
        return -(logits - logits.exp().sum(-1, keepdim=True).log()).gather(1, targets[targets != -100][:, None])[:, 0].float()
    patch.setattr(precision_module, "token_nll", wrong)

def activations_in_eight_bits(patch, lm):
    for o in layers(lm, "_proj"): o.register_forward_hook(lambda m, args, out: out.to(torch.float8_e4m3fn).to(out.dtype) if in_bf16() else out)

def trainer_with(patch, **methods): patch.setattr(invariance_module, "CompletionTrainer", type("Wrong", (CompletionTrainer,), methods))

def weights_kept_in_bf16(patch, lm):
    def create_optimizer(self, *args):
        optimizer = CompletionTrainer.create_optimizer(self, *args)
        if self.args.bf16 or any(p.dtype == torch.bfloat16 for p in self.model.parameters()):
            trained = [p for p in self.model.parameters() if p.requires_grad]
            @torch.no_grad()
            def rounded(*args):
                for p, before in zip(trained, self.kept):  # what a bf16 weight makes of the same step
                    p.copy_((before.bfloat16() + (p - before).bfloat16()).float() + (before - before.bfloat16().float()))
                self.kept = [p.detach().clone() for p in trained]
            self.kept = [p.detach().clone() for p in trained]
            optimizer.register_step_post_hook(rounded)
        return optimizer
    trainer_with(patch, create_optimizer=create_optimizer)

def small_gradients_lost(patch, lm): # as in fp16 without a loss scale
    def training_step(self, *args, **kwargs):
        loss = CompletionTrainer.training_step(self, *args, **kwargs)
        if self.args.bf16:
            for p in self.model.parameters(): p.grad[p.grad.abs() < 6e-5] = 0
        return loss
    trainer_with(patch, training_step=training_step)

def bf16_not_used(patch, lm):
    patch.setattr(invariance_module, "TrainingArguments", lambda **given: TrainingArguments(**given | {"bf16": False}))

PLANTS = [(rotary_positions_in_bf16, tiny), (norm_summed_in_bf16, tiny), (loss_in_bf16, random_llama), (activations_in_eight_bits, random_llama),
          (activations_in_eight_bits, random_experts), (weights_kept_in_bf16, tiny), (weights_kept_in_bf16, random_llama), (small_gradients_lost, random_llama), (bf16_not_used, random_llama)]

@pytest.mark.parametrize("plant,made", few(PLANTS, [o for o in PLANTS if o != (weights_kept_in_bf16, tiny)]), ids=lambda o: o.__name__)
def test_planted_bug_is_caught(plant, made, monkeypatch):
    lm, rows = made()
    plant(monkeypatch, lm)
    found = precision(lm, rows, lr=2e-5, examples=6)
    assert found.passed is False and found.details[0]["ratio"] > 1.2, found

def test_weights_kept_in_bf16_lose_progress(monkeypatch):
    lm, rows = random_llama()
    weights_kept_in_bf16(monkeypatch, lm)
    found = precision(lm, rows, lr=2e-5, steps=10, examples=6)
    lost = next(o for o in found.details if o["what"].startswith("progress"))
    assert not found.passed and lost["ratio"] > 2, found.details


# -- clean controls

@pytest.mark.parametrize("family, method", few([(o, m) for o in FAMILIES for m in ("full", "lora")], [("llama", "full"), ("qwen3_moe", "lora")]))
def test_clean_family_passes(family, method):
    found = precision(small(family, method), rows_of(), examples=6)
    assert found.passed and found.details[0]["ratio"] < 0.8, found

@pytest.mark.parametrize("seed", few(range(24), [7, 21]))
def test_a_token_that_goes_to_another_expert_is_no_fault(seed): # in some of these bf16 sends one elsewhere
    found = precision(small("qwen3_moe", "lora", seed % 4), rows_of(seed), examples=6)
    assert found.passed and found.details[0]["ratio"] < 0.8, found

@pytest.mark.parametrize("seed", few(range(4), [0]))
def test_clean_seed_passes_a_paired_training(seed):
    found = precision(small(seed=seed), rows_of(seed), lr=1e-3, steps=10, examples=6)
    assert found.passed and found.details[0]["ratio"] < 0.8, found
    assert any(o["what"].startswith("progress") for o in found.details)

def test_bundled_model_passes_and_stays_as_it_is():
    lm, rows = tiny()
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    assert precision(lm, rows, lr=1e-3, examples=6).passed
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    assert "forward" not in vars(lm.model) and not hasattr(lm.model, "_original_forward")  # no bf16 left around it


if __name__ == "__main__":
    torch.set_num_threads(1)
    def line(name, o): print(f"{name:45} {o.verdict:7} {o.details[0]['ratio']:10.3g}  {o.details[0]['what']}")
    for plant, made in PLANTS:
        with pytest.MonkeyPatch.context() as patch:
            lm, rows = made()
            plant(patch, lm)
            line(f"{plant.__name__} {made.__name__}", precision(lm, rows, lr=2e-5, examples=6))
    for family in FAMILIES:
        for method in ("full", "lora"): line(f"clean {family} {method}", precision(small(family, method), rows_of(), examples=6))
