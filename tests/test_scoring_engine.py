"""The scoring engine: planted bugs must fail its certificates, clean models of every family must pass; the cache never gives another model's answer; lm-eval's own numbers."""
import json, logging, random
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

import llmops_kit.evaluation.answer_store as answers_module
import llmops_kit.evaluation.decoding as decoding
import llmops_kit.evaluation.engine as engine
import llmops_kit.training.hotpath as hotpath
from conftest import few
from llmops_kit.evaluation.answer_store import Answers, loaded_digests
from llmops_kit.evaluation.batch_invariance import batch_invariance, cache_certificate
from llmops_kit.evaluation.decoding import Room, decode
from llmops_kit.evaluation.engine import log_likelihoods, plain_log_likelihood
from llmops_kit.evaluation.prefix_tree import PrefixTree
from llmops_kit.models.families import FAMILIES, random_lm
from llmops_kit.models.load import load_model
from llmops_kit.runs.errors import UserError


def contexts(seed=0, lengths=(4, 15, 37, 70)):
    rng = random.Random(seed)
    return [[rng.randrange(10, 4000) for _ in range(n)] for n in lengths]


@lru_cache(maxsize=4)
def family(name): return random_lm(name)


# -- batch invariance

@pytest.mark.parametrize("name", few(FAMILIES, ["llama", "gemma3", "gpt2"]))
def test_clean_models_pass(name):
    checked = batch_invariance(family(name), contexts(1))
    assert checked.passed, checked.about


@pytest.mark.skipif(not engine.bf16_pays(torch.device("cpu")), reason="the CPU does not multiply bf16")
def test_clean_bf16_passes():
    checked = batch_invariance(load_model("tiny"), contexts(2), precision="bf16")
    assert checked.passed, checked.about


def padding_attended(patch):
    plain = decoding.left_padded
    def all_visible(*args, **kwargs):
        batch = plain(*args, **kwargs)
        return batch | {"visible": torch.ones_like(batch["visible"])}
    patch.setattr(decoding, "left_padded", all_visible)

def positions_count_padding(patch):
    plain = decoding.left_padded
    def counted(*args, **kwargs):
        batch = plain(*args, **kwargs)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}
    patch.setattr(decoding, "left_padded", counted)

def padded_on_the_right(patch): # and continued as if on the left
    def right(prompts, pad_token_id, device="cpu"):
        width = max(map(len, prompts))
        visible = torch.tensor([[1]*len(p) + [0]*(width - len(p)) for p in prompts], dtype=torch.bool)
        return dict(input_ids=torch.tensor([p + [pad_token_id]*(width - len(p)) for p in prompts]), visible=visible, position_ids=(visible.cumsum(-1) - 1).clamp(min=0))
    patch.setattr(decoding, "left_padded", right)

def cache_not_selected(patch): # a row leaves, and its keys and values stay
    def leave(self, row): self.rows -= 1
    patch.setattr(Room, "leave", leave)

def siblings_seen(patch): # each choice looks at the choices before it
    patch.setattr(PrefixTree, "sees", lambda self, size: np.tri(size, dtype=bool))

def place_for_position(patch): # a choice's positions go on from the choice before it
    plain = PrefixTree.add
    def add(self, ids):
        plain(self, ids)
        self.depth = list(range(len(self.ids)))
        return self
    patch.setattr(PrefixTree, "add", add)

def prefix_of_another(patch): # a context that agrees in its length is taken for the same
    plain = PrefixTree.shared
    def shared(self, ids):
        n = plain(self, ids)
        return n + 1 if self.paths and n and n + 1 < min(len(ids), len(self.paths[-1])) else n
    patch.setattr(PrefixTree, "shared", shared)

def head_one_early(patch): # the logits of the position before
    plain = engine.Path.hidden
    patch.setattr(engine.Path, "hidden", lambda self, batch, at: plain(self, batch, (at - 1).clamp(min=0)))


SCORED, ANSWERED = (siblings_seen, place_for_position, prefix_of_another, head_one_early), (padding_attended, positions_count_padding, padded_on_the_right, cache_not_selected)

@pytest.mark.parametrize("plant", SCORED + ANSWERED)
def test_planted_bugs_fail(plant, monkeypatch):
    lm = family("gpt2" if plant is positions_count_padding else "llama")
    if plant is cache_not_selected: # the longest prompt, which is the first row, ends before others
        lm = replace(lm, tokenizer=deepcopy(lm.tokenizer))
        lm.tokenizer.eos_token_id = decoding.plain_decode(lm.model, contexts(3)[-1], 6, set())[1]
        assert batch_invariance(lm, contexts(3)).passed
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_differs", lambda *args: 0.) # the engine would notice by itself, and not use what is broken
        plant(patch)
        checked = batch_invariance(lm, contexts(3))
    assert checked.passed is False, checked.about
    forms = {o["form"].split()[0] for o in checked.details if not o["ratio"] <= 1}
    assert ("scored" in forms) == (plant in SCORED) and (plant in SCORED or "answered" in forms), forms


def test_the_engine_notices_broken_kernels_by_itself(monkeypatch):
    lm = family("llama")
    monkeypatch.setattr(hotpath, "norm_forward", lambda module: (lambda x: x) if "RMSNorm" in type(module).__name__ else None)
    with engine.scoring_path(lm) as path: assert path.replaced == {} and path.shares
    siblings_seen(monkeypatch)
    with engine.scoring_path(lm) as path: assert not path.shares
    assert batch_invariance(lm, contexts(4)).passed


# -- cache

@pytest.mark.parametrize("lost", [None, "weights", "adapter", "settings"])
def test_cache_certificate(lost, monkeypatch, tmp_path):
    from peft import LoraConfig, get_peft_model
    base = family("llama")
    torch.manual_seed(1)
    tuned = replace(base, model=get_peft_model(deepcopy(base.model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")))
    plain = answers_module.answer_keys
    def forgetful(digests, kind, requests, tokenizer="", **settings):
        return plain({k: v for k, v in digests.items() if k != lost}, kind, requests, tokenizer, **({} if lost == "settings" else settings))
    monkeypatch.setattr(answers_module, "answer_keys", forgetful)
    checked = cache_certificate(tuned, contexts(5), tmp_path)
    assert checked.passed is (lost is None), checked.about
    if lost is None:
        digests = loaded_digests(tuned)
        assert digests["weights"] != "" and loaded_digests(base)["adapter"] == ""
        module = next(m for m in tuned.model.modules() if isinstance(getattr(m, "scaling", None), dict))
        module.scaling["default"] *= 2
        assert loaded_digests(tuned)["adapter"] != digests["adapter"], "the scaling is part of an adapter"


def test_weights_swapped_under_the_same_path_never_hit(tmp_path):
    folder, requests = tmp_path/"model", [(c, [7, 8]) for c in contexts(6)]
    found = []
    for seed in (0, 1, 0):
        random_lm("llama", seed=seed, folder=folder)
        lm = load_model(str(folder))
        found.append(log_likelihoods(lm, requests, answers=Answers(lm, tmp_path/"a.sqlite")))
    assert [o.computed for o in found] == [len(requests), len(requests), 0]
    assert found[0].values.tolist() == found[2].values.tolist() != found[1].values.tolist()


def test_what_was_done_before_a_kill_is_not_done_again(tmp_path):
    lm, requests, prompts = family("llama"), [(c, [n]) for c in contexts(7) for n in (3, 4, 5)], contexts(8)
    def stop(done, total, text):
        if done >= total//2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): log_likelihoods(lm, requests, tokens_per_batch=40, answers=Answers(lm, tmp_path/"a"), on_progress=stop)
    with pytest.raises(KeyboardInterrupt): decode(lm, prompts, 4, {2}, tokens_per_batch=1, answers=Answers(lm, tmp_path/"a"), on_progress=stop)
    scored, said = log_likelihoods(lm, requests, answers=Answers(lm, tmp_path/"a")), decode(lm, prompts, 4, {2}, answers=Answers(lm, tmp_path/"a"))
    assert 0 < scored.computed < len(requests) and 0 < said.computed < len(prompts)
    assert scored.values == pytest.approx([plain_log_likelihood(lm.model, engine.Request(*o))[0] for o in requests], abs=1e-4)
    assert said.tokens == [decoding.plain_decode(lm.model, p, 4, {2}) for p in prompts]


def test_only_the_broken_request_is_named():
    lm = replace(family("llama"), model=deepcopy(family("llama").model))
    with torch.no_grad(): lm.model.get_input_embeddings().weight[4001] = float("nan")
    shared = contexts(9)[2]
    with pytest.raises(UserError, match="request 2 is nan"): log_likelihoods(lm, [(shared, [5, 6]), (shared, [7, 8]), (shared, [4001, 9])])


# -- lm-eval

COLOURS = dict(task="colours", dataset_path="json", output_type="multiple_choice", test_split="test", doc_to_text="{{question}}", doc_to_target="{{answer}}", doc_to_choice=["red", "green", "blue"])

def write_task(folder, documents, **changes):
    import yaml
    folder.mkdir(exist_ok=True)
    (folder/"colours.jsonl").write_text("".join(json.dumps(o) + "\n" for o in documents))
    (folder/"colours.yaml").write_text(yaml.safe_dump(COLOURS | {"dataset_kwargs": {"data_files": {"test": "colours.jsonl"}}} | changes))
    return str(folder)


def test_lm_eval_gives_its_own_numbers():
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'llmops_kit[bench]'")
    from lm_eval.models.huggingface import HFLM
    from llmops_kit.evaluation.harness import harness_lm, quiet_harness
    from llmops_kit.evaluation.tasks import QUESTIONS, load_tasks, run_tasks
    lm = load_model("tiny")
    with quiet_harness(): theirs = HFLM(pretrained=lm.model, tokenizer=deepcopy(lm.tokenizer), batch_size=8, max_length=lm.max_length)
    found = [run_tasks(o, load_tasks(",".join(QUESTIONS), 6), limit=6) for o in (harness_lm(lm), theirs)]
    assert {o["task"] for o in found[0].rows} == set(QUESTIONS)
    for mine, other in zip(*(o.rows for o in found)):
        assert mine["value"] == (other["value"] if "perplexity" not in mine["metric"] else pytest.approx(other["value"], rel=1e-5)) or mine["metric"] == "bits_per_byte"
    for task in QUESTIONS:
        for mine, other in zip(*(sorted(o.samples[task], key=lambda s: s["doc_id"]) for o in found)):
            if task == "complete_signature": assert mine["resps"] == other["resps"]
            elif task == "docstring_perplexity": assert np.ravel(mine["resps"]) == pytest.approx(np.ravel(other["resps"]), abs=1e-4)
            else:
                for a, b in zip(mine["resps"], other["resps"]): assert a[0][0] == pytest.approx(b[0][0], abs=1e-4) and a[0][1] == b[0][1]


@pytest.mark.parametrize("documents, changes, message", [
    ([{"question": "Grass is", "answer": "green"}], {"doc_to_txt": "x"}, "doc_to_txt.*Did you mean doc_to_text"),
    ([{"question": "Grass is", "answer": "purple"}], {}, "'purple', which is none of its 3 choices"),
    ([{"question": "Grass is", "answer": 3}], {}, "none of its choices"),
    ([{"question": "Grass is", "answer": "green"}], {"dataset_kwargs": {"data_files": {"test": "other.jsonl"}}}, "no such file"),
    ([{"question": "Grass is", "answer": "green"}], {"test_split": "testing"}, "does not load"),
])
def test_a_wrong_task_is_refused(documents, changes, message, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'llmops_kit[bench]'")
    from llmops_kit.evaluation.tasks import load_tasks
    with pytest.raises(UserError, match=message): load_tasks(write_task(tmp_path/"tasks", documents, **changes))


def test_too_long_contexts_are_refused_or_cut(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'llmops_kit[bench]'")
    from llmops_kit.evaluation.harness import harness_lm
    from llmops_kit.evaluation.tasks import load_tasks, run_tasks
    folder = write_task(tmp_path/"tasks", [{"question": "Grass is " * 600, "answer": "green"}])
    with pytest.raises(UserError, match="too_long=truncate"): run_tasks(harness_lm(load_model("tiny")), load_tasks(folder))
    lm = harness_lm(load_model("tiny"), too_long="truncate")
    assert run_tasks(lm, load_tasks(folder)).flat["colours/acc"] in (0., 1.) and lm.cut == 3
