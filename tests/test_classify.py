"""What classification promises, on small random models: the right token, the right loss, the right label after reload; bugs are planted to see that each test can fail."""
import json, math, random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score

from conftest import few
from llmops_kit.data.docstrings import INSTRUCTION
from llmops_kit.data.examples import load_examples
from llmops_kit.data.verbs import nameless, verb_of
from llmops_kit.evaluation.classification import auc_interval, classification, label_metrics, label_scores, label_statistics, weighted_auc
from llmops_kit.models.families import FAMILIES, random_lm
from llmops_kit.models.load import load_model
from llmops_kit.runs.artifacts import sha256_of
from llmops_kit.runs.errors import UserError
from llmops_kit.runs.history import comparable
from llmops_kit.training import classify as module
from llmops_kit.training.resumable import Resumable
from llmops_kit.training.classify import class_logits, classify, collate_prompts, label_set, load_classifier, prompt_rows, with_label_head

WORDS = {"fruit": "apple pear plum cherry grape melon".split(), "metal": "iron copper zinc tin lead gold".split(), "tree": "oak beech birch pine fir elm".split()}
FILLER = "the a of and with some old new big small here there".split()


def rows(n, seed):
    rng, found = random.Random(seed), []
    for i in range(n):
        label = rng.choice(sorted(WORDS))
        words = rng.choices(WORDS[label], k=2) + rng.choices(FILLER, k=rng.randint(1, 30))
        rng.shuffle(words)
        found.append(dict(id=str(i), group=str(i), messages=[dict(role="user", content=" ".join(words)), dict(role="assistant", content=label)], label=label))
    return found


EXAMPLES, TEST, LABELS = SimpleNamespace(train=rows(120, 1), validation=rows(30, 2)), rows(30, 3), sorted(WORDS)
SMALL = dict(lr=1e-2, max_steps=30, eval_every=10, tokens_per_batch=512, lora_r=4)


@pytest.fixture(scope="module")
def lm(): return random_lm("llama")


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request, lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return classify(lm, EXAMPLES, folder=folder, method=request.param, **SMALL | dict(max_steps=50, lr=3e-3 if request.param == "full" else 1e-2))


# -- training

def test_it_learns_and_the_base_stays_as_it_is(trained, lm):
    assert trained.metrics["validation/loss"] < 0.7*math.log(3)
    assert np.mean([a == row["label"] for a, row in zip(trained.predict(TEST), TEST)]) > 0.7
    fresh = random_lm("llama")
    assert all(torch.equal(a, b) for a, b in zip(lm.model.state_dict().values(), fresh.model.state_dict().values()))


def test_same_seed_same_bytes_and_another_seed_others(lm, tmp_path):
    def digest(name, seed):
        made = classify(lm, EXAMPLES, folder=tmp_path/name/"checkpoints", seed=seed, **SMALL | {"max_steps": 6, "eval_every": 3, "lora_dropout": 0.1})
        return sha256_of(made.save(tmp_path/name/"saved"))
    first, second, other = (digest(name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == second != other


def test_killed_and_called_again_it_ends_with_the_same_bytes(lm, tmp_path, monkeypatch):
    class Killed(BaseException): pass
    def kill(values, step):
        if step == 5 and "train/loss" in values: raise Killed
    def run(name, **more): return classify(lm, EXAMPLES, folder=tmp_path/name, **SMALL | {"max_steps": 8, "eval_every": 3, "lora_dropout": 0.1}, **more)
    monkeypatch.setattr(Resumable, "_must_save", lambda self: True)  # after every step
    with pytest.raises(Killed): run("killed", on_log=kill)
    assert [o.name for o in (tmp_path/"killed/resume").glob("step-*")] == ["step-4"]
    resumed, whole = run("killed"), run("whole")
    assert sha256_of(resumed.save(tmp_path/"a")) == sha256_of(whole.save(tmp_path/"b")) and list(map(comparable, resumed.history)) == list(map(comparable, whole.history))


def test_reload_gives_the_same_probabilities(trained, lm, tmp_path):
    again = load_classifier(trained.save(tmp_path/"saved"), base=lm)
    assert again.labels == trained.labels and again.kind == trained.kind == ("adapter" if trained.lm.base else "model")
    assert np.array_equal(again.probabilities(TEST), trained.probabilities(TEST))


def same_answers(made, folder, base):
    "The check that a reload has to pass."
    return load_classifier(folder, base=base).predict(TEST) == made.predict(TEST)


def test_shuffled_labels_are_caught(trained, lm, tmp_path):
    folder = trained.save(tmp_path/"saved")
    assert same_answers(trained, folder, lm)
    about = json.loads((folder/"classes.json").read_text())
    (folder/"classes.json").write_text(json.dumps(about | {"labels": about["labels"][::-1]}))
    if trained.kind == "adapter": assert not same_answers(trained, folder, lm)
    else:
        with pytest.raises(UserError, match="in another order"): load_classifier(folder)


def test_a_lost_head_is_caught(lm, tmp_path):
    "A saved adapter without the head it was trained with would answer at random."
    from safetensors.torch import load_file, save_file
    made = classify(lm, EXAMPLES, folder=tmp_path/"checkpoints", **SMALL)
    file = made.save(tmp_path/"saved")/"adapter_model.safetensors"
    weights = load_file(file)
    assert any("score" in name for name in weights)
    save_file({k: torch.zeros_like(v) if "score" in k else v for k, v in weights.items()}, file)
    assert not same_answers(made, file.parent, lm)


def test_another_base_is_refused(lm, tmp_path):
    made = classify(lm, EXAMPLES, folder=tmp_path/"checkpoints", **SMALL | {"max_steps": 1})
    folder = made.save(tmp_path/"saved")
    with pytest.raises(UserError, match="other content"): load_classifier(folder, base=random_lm("llama", seed=1))
    with pytest.raises(UserError, match="does not fit"): load_classifier(folder, base=random_lm("llama", hidden_size=32))
    with pytest.raises(UserError, match="no classes.json"): load_classifier(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor a run"): load_classifier("nowhere")


# -- the token that is classified

def padded(found, left):
    batch = collate_prompts([found[i] for i in range(len(found))], found.pad)
    if not left: return batch
    width = batch["input_ids"].shape[1]
    ids = torch.tensor([[found.pad]*(width - len(o)) + o for o in found.ids])
    return batch | dict(input_ids=ids, attention_mask=torch.tensor([[0]*(width - len(o)) + [1]*len(o) for o in found.ids]))


def by_hand(model, ids):
    "The plain way: one text at a time, nothing padded, the head on its last hidden state."
    with torch.no_grad(): return torch.cat([model.score(model.base_model(torch.tensor([o])).last_hidden_state[:, -1]) for o in ids])


@pytest.mark.parametrize("family", few(FAMILIES, ["llama", "gpt2", "qwen3_moe"]))
def test_every_family_classifies_the_last_real_token(family, tmp_path):
    lm = random_lm(family)
    found = prompt_rows(TEST[:6], lm.tokenizer, lm.max_length, LABELS)
    found.pad = lm.tokenizer.pad_token_id
    torch.manual_seed(0)
    head = with_label_head(lm, LABELS, share=True).model
    with torch.no_grad():
        expected, right = by_hand(head, found.ids), class_logits(head, padded(found, left=False))
        assert (right - expected).abs().max() < 1e-5
        # a planted bug: the last position of the padded batch, whatever stands there
        last = head.score(head.base_model(**{k: v for k, v in padded(found, False).items() if k != "labels"}).last_hidden_state[:, -1])
        assert (last - expected).abs().max() > 1e-3
        if family != "gpt2":  # whose positions are absolute, so padding on the left would move them
            assert (class_logits(head, padded(found, left=True)) - expected).abs().max() < 1e-5
    made = classify(lm, EXAMPLES, folder=tmp_path, **SMALL | {"max_steps": 8, "eval_every": 4})
    assert made.metrics["validation/loss"] < made.metrics["untrained/loss"] and made.best_step
    again = load_classifier(made.save(tmp_path/"saved"), base=lm)
    assert np.array_equal(again.probabilities(TEST[:4]), made.probabilities(TEST[:4]))


def test_probabilities_do_not_depend_on_the_batch(trained):
    whole = trained.probabilities(TEST)
    for budget in (1, 100, 10_000): assert np.abs(trained.probabilities(TEST, tokens_per_batch=budget) - whole).max() < 1e-5
    order = np.random.default_rng(0).permutation(len(TEST))
    assert np.abs(trained.probabilities([TEST[i] for i in order]) - whole[order]).max() < 1e-5
    assert np.allclose(whole.sum(1), 1)


def test_the_answer_in_the_row_is_not_seen(trained, lm):
    "The label stands in the row as the assistant's turn; a classifier that saw it would be right for the wrong reason."
    bare = [row["messages"][0]["content"] for row in TEST]
    assert np.array_equal(trained.probabilities(bare), trained.probabilities(TEST))
    seen = prompt_rows([dict(messages=[*TEST[0]["messages"], dict(role="user", content="?")])], lm.tokenizer, 128).ids  # planted: the label is in the prompt
    assert seen != prompt_rows(TEST[:1], lm.tokenizer, 128).ids


def test_long_texts_are_cut_alike_and_counted(lm, tmp_path):
    long = SimpleNamespace(train=EXAMPLES.train, validation=EXAMPLES.validation)
    made = classify(lm, long, folder=tmp_path, max_length=20, **SMALL | {"max_steps": 2})
    longer = sum(len(o) > 20 for o in prompt_rows(long.train, lm.tokenizer, 10**6).ids)
    assert 0 < made.metrics["train/truncated"] == longer and "lost their beginning" in " ".join(made.warnings)
    assert load_classifier(made.save(tmp_path/"saved"), base=lm).max_length == 20
    assert max(prompt_rows(TEST, lm.tokenizer, 20).lengths) == 20


def test_a_prompt_that_ends_in_padding_is_refused(lm):
    import copy
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.pad_token = "<|assistant|>"
    with pytest.raises(UserError, match="pad_token of its own"): prompt_rows(TEST, tokenizer, 128)


# -- the loss

def gradient(lm, folder, accumulation, budget, monkeypatch, mean_of_means=False):
    "The gradient of the first optimizer step; the weights are not moved."
    kept = {}
    class Trainer(module.ClassTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if mean_of_means: num_items_in_batch = len(inputs["labels"])*accumulation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            take = optimizer.step
            def step(*args, **kwargs):
                kept.setdefault("g", torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]))
                return take(*args, **kwargs)
            optimizer.step = step
            return optimizer
    monkeypatch.setattr(module, "ClassTrainer", Trainer)
    few = SimpleNamespace(train=EXAMPLES.train[:24], validation=EXAMPLES.validation[:6])
    classify(lm, few, folder=folder, method="full", max_steps=1, gradient_accumulation=accumulation, tokens_per_batch=budget, max_grad_norm=1e9)
    return kept["g"]


def test_accumulated_gradient_is_that_of_the_whole_batch_and_mean_of_means_is_caught(lm, tmp_path, monkeypatch):
    found = prompt_rows(EXAMPLES.train[:24], lm.tokenizer, lm.max_length, LABELS)
    budget = 300
    batches = len(module.token_batches(found.lengths, budget, 0))
    sizes = {len(o) for o in module.token_batches(found.lengths, budget, 0)}
    assert batches > 1 and len(sizes) > 1  # batches of unequal size, or the bug would not show
    whole = gradient(lm, tmp_path/"a", 1, 10**6, monkeypatch)
    assert (gradient(lm, tmp_path/"b", batches, budget, monkeypatch) - whole).abs().max() < 1e-5*whole.abs().max() + 1e-6
    assert (gradient(lm, tmp_path/"c", batches, budget, monkeypatch, mean_of_means=True) - whole).abs().max() > 1e-3*whole.abs().max()


# -- what is refused

@pytest.mark.parametrize("change,message", [
    (lambda e: SimpleNamespace(train=[{k: v for k, v in o.items() if k != "label"} for o in e.train], validation=e.validation), "have no label"),
    (lambda e: SimpleNamespace(train=[o | {"label": "fruit"} for o in e.train], validation=e.validation), "nothing to tell apart"),
    (lambda e: SimpleNamespace(train=[o for o in e.train if o["label"] != "tree"], validation=e.validation), "no training example has: 'tree'"),
    (lambda e: SimpleNamespace(train=e.train, validation=[]), "no validation examples"),
    (lambda e: SimpleNamespace(train=[], validation=e.validation), "no training examples"),
])
def test_data_that_cannot_be_learned_is_refused(lm, tmp_path, change, message):
    with pytest.raises(UserError, match=message): classify(lm, change(EXAMPLES), folder=tmp_path)


def test_labels_are_sorted_whatever_the_order_of_the_rows():
    assert label_set(EXAMPLES.train[::-1], EXAMPLES.validation) == label_set(EXAMPLES.train, EXAMPLES.validation) == LABELS


def test_an_unknown_method_and_an_adapter_as_base_are_refused(lm, trained, tmp_path):
    with pytest.raises(UserError, match="no method"): classify(lm, EXAMPLES, folder=tmp_path, method="prefix")
    if trained.lm.base:
        with pytest.raises(UserError, match="Merge it"): with_label_head(trained.lm, LABELS, share=True)


# -- the metrics

def random_case(seed, n=60, labels=4):
    rng = np.random.default_rng(seed)
    truth = rng.integers(labels - seed % 2, size=n)  # in every second case the last label does not occur
    scores = np.round(rng.dirichlet(np.ones(labels), size=n) + 0.3*np.eye(labels)[truth], 1)  # with ties
    return truth, scores/scores.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(8))
def test_scikit_learn_says_the_same(seed):
    truth, scores = random_case(seed)
    said, present = scores.argmax(1), np.unique(truth)
    found = label_metrics([str(i) for i in range(60)], truth, said, 4)
    assert found["accuracy"].value == pytest.approx(accuracy_score(truth, said), abs=1e-12)
    for average, names in (("macro", ("precision_macro", "recall_macro", "f1_macro")),):
        for name, value in zip(names, precision_recall_fscore_support(truth, said, labels=present, average=average, zero_division=0)): assert found[name].value == pytest.approx(value, abs=1e-12)
    per_label = precision_recall_fscore_support(truth, said, labels=present, zero_division=0)[:3]
    assert np.allclose(label_scores(label_statistics(truth, said, 4).sum(0))[:, present], per_label, atol=1e-12)
    aucs = [roc_auc_score(truth == i, scores[:, i]) for i in present]
    assert auc_interval(truth, scores, 50).value == pytest.approx(np.mean(aucs), abs=1e-12)
    counts = np.random.default_rng(100 + seed).integers(3, size=(5, 60))
    assert np.allclose(weighted_auc(truth == 0, scores[:, 0], counts), [roc_auc_score(truth == 0, scores[:, 0], sample_weight=c) for c in counts], atol=1e-12)


def test_a_coin_is_not_better_than_the_majority_and_an_oracle_is():
    rng = np.random.default_rng(0)
    truth = ["a" if o else "b" for o in rng.random(200) < 0.6]
    ids, oracle = [str(i) for i in range(200)], np.array([[0.9, 0.1] if o == "a" else [0.1, 0.9] for o in truth])
    coin = classification(ids, truth, rng.dirichlet([1, 1], size=200), ["a", "b"], "a")
    best = classification(ids, truth, oracle, ["a", "b"], "a")
    assert not coin.differences["auc"].excludes_zero and coin.differences["accuracy"].high < 0.1
    assert best.differences["accuracy"].low > 0 and best.intervals["auc"].value == 1 and best.intervals["f1_macro"].value == 1


def test_odd_held_out_rows_are_said_plainly():
    flat = lambda n, k: np.tile(np.linspace(1, 0.1, k)/np.linspace(1, 0.1, k).sum(), (n, 1))
    one = classification([*"abc"], ["x"]*3, flat(3, 2), ["x", "y"], "x")
    assert "auc" not in one.intervals and any("there is no AUC" in o for o in one.notes) and any("gives every example" in o for o in one.notes)
    new = classification([*"abcd"], ["x", "y", "new", "new"], flat(4, 2), ["x", "y"], "x")
    assert new.intervals["accuracy"].value == 0.25 and new.labels == ["x", "y", "new"] and new.confusion.tolist() == [[1, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert any("never seen" in o and "new" in o for o in new.notes)
    assert all(math.isfinite(o) for found in (one, new) for o in found.flat().values())
    assert list(new.label_table().index) == new.labels and len(new.table()) == 6
    with pytest.raises(UserError, match="too few"): classification(["a"], ["x"], flat(1, 2), ["x", "y"], "x")
    with pytest.raises(UserError, match="no label"): classification([*"ab"], ["x", None], flat(2, 2), ["x", "y"], "x")
    with pytest.raises(UserError, match="shape"): classification([*"ab"], ["x", "y"], flat(2, 3), ["x", "y"], "x")


# -- the embedded labels

def test_the_name_of_a_function_does_not_give_its_label_away():
    code = "class Set:\n    @cached\n    def get_item(self, get):\n        return self.get_item(get) or other_get_item"
    assert nameless(code) == "class Set:\n    @cached\n    def f(self, get):\n        return self.f(get) or other_get_item"
    assert [verb_of(o) for o in ("Adds it.", "Returns it.", "Added.", "Parses it.", "", "Address of it.")] == ["add", None, None, "read", None, None]
