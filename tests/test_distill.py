"""What distillation promises, on small random models: the divergence is the plain one, the teacher stands still, the student is saved whole; bugs are planted to see that each test can fail."""
import copy, random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import few
from llmops_kit.models.families import FAMILIES, random_lm
from llmops_kit.models.load import load_model
from llmops_kit.runs.artifacts import sha256_of
from llmops_kit.runs.errors import UserError
from llmops_kit.runs.history import comparable
from llmops_kit.training import distill as module
from llmops_kit.training.batching import collate, token_rows
from llmops_kit.training.distill import DistillTrainer, check_vocabularies, distances, distill, divergence, half_of, token_losses, with_answers
from llmops_kit.training.loss import token_nll
from llmops_kit.training.resumable import Resumable

WORDS = "the of a file and returns name object value is for list key path with line error index count type".split()


def conversations(n, seed):
    rng = random.Random(seed)
    def text(low, high): return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    return [dict(id=str(i), messages=[dict(role="user", content=text(2, 20)), dict(role="assistant", content=text(1, 8))]) for i in range(n)]


EXAMPLES, TEST = SimpleNamespace(train=conversations(60, 1), validation=conversations(12, 2)), conversations(12, 3)
SMALL = dict(lr=3e-3, max_steps=8, eval_every=4, tokens_per_batch=256)
SHORT = "llama", "gpt2", "gemma3"


@pytest.fixture(scope="module")
def teacher():
    "Random, and sharp enough that its opinion is worth something."
    lm = random_lm("llama", layers=4)
    with torch.no_grad(): lm.model.get_output_embeddings().weight.mul_(20)
    return lm


@pytest.fixture
def student(): return random_lm("llama", seed=1)


def batch_of(lm, n=6):
    rows = token_rows(EXAMPLES.train[:n], lm.tokenizer, lm.max_length)
    return collate([rows[i] for i in range(len(rows))], lm.tokenizer.pad_token_id)


# -- the loss

def plain(student, teacher, batch, temperature, direction="teacher", padding=False):
    "All logits of both models, in double precision, by the definition; the named argument plants a bug."
    logits = [m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()/temperature for m in (teacher, student)]
    p, q = logits if direction == "teacher" else logits[::-1]
    each = (p.softmax(-1)*(p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    return each if padding else each[batch["labels"][:, 1:] != -100]


@pytest.mark.parametrize("family", few(FAMILIES, SHORT))
def test_divergence_is_the_plain_one_for_every_family(family):
    teacher, student = random_lm(family), random_lm(family, seed=1)
    batch = batch_of(student)
    with torch.no_grad():
        kl, nll = token_losses(student.model, teacher.model, batch, 2.)
        expected = plain(student.model, teacher.model, batch, 2.)
        assert kl.shape == expected.shape and float((kl - expected).abs().max()) < 1e-5*max(1, float(expected.max()))
        assert float((nll - token_nll(student.model, batch)).abs().max()) < 1e-4


def test_capped_logits_stay_capped():
    "A family whose forward does something after the head: it has to be done in the chunks, too."
    teacher, student = random_lm("gemma3"), random_lm("gemma3", seed=1)
    for lm in (teacher, student): lm.model.config.final_logit_softcapping = 0.05
    batch = batch_of(student)
    with torch.no_grad():
        kl, _ = token_losses(student.model, teacher.model, batch, 1., chunk=20_000)
        assert float((kl - plain(student.model, teacher.model, batch, 1.)).abs().max()) < 1e-6
        student.model.config.final_logit_softcapping = None  # planted: the cap is lost
        assert float((token_losses(student.model, teacher.model, batch, 1.)[0] - kl).abs().max()) > 1e-4


def test_chunks_give_the_same_gradient(teacher, student):
    batch, found = batch_of(student), []
    for chunk in (10**9, 5000):
        student.model.zero_grad()
        kl, nll = token_losses(student.model, teacher.model, batch, 2., chunk=chunk)
        (kl.sum() + nll.sum()).backward()
        found.append(torch.cat([p.grad.flatten() for p in student.model.parameters()]))
        assert all(p.grad is None for p in teacher.model.parameters())
    assert float((found[0] - found[1]).abs().max()) < 1e-4*float(found[0].abs().max())


def trainer_loss(trainer, batch): return float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=int((batch["labels"][:, 1:] != -100).sum())))


def trainer_for(teacher, student, folder, cls=DistillTrainer, temperature=3., alpha=0.7):
    from functools import partial
    from transformers import TrainingArguments
    rows = token_rows(EXAMPLES.train[:6], student.tokenizer, student.max_length)
    args = TrainingArguments(output_dir=str(folder), report_to="none", disable_tqdm=True, eval_strategy="no", use_cpu=True)
    return cls(student.model.eval(), args, partial(collate, pad_token_id=student.tokenizer.pad_token_id), rows, rows, tokens_per_batch=512,
               teacher=teacher.model, temperature=temperature, alpha=alpha)


def correct(teacher, student, loss):
    "Is it alpha * temperature^2 * KL(teacher||student) + (1 - alpha) * nll, as a mean over the trained tokens?"
    with torch.no_grad():
        batch = batch_of(student)
        expected = 0.7*9*float(plain(student.model, teacher.model, batch, 3.).mean()) + 0.3*float(token_nll(student.model, batch).mean())
    return abs(loss - expected) < 1e-4*expected


def test_the_loss_is_the_one_that_is_described(teacher, student, tmp_path):
    with torch.no_grad(): assert correct(teacher, student, trainer_loss(trainer_for(teacher, student, tmp_path), batch_of(student)))


BUGS = {
    "the square of the temperature is lost": lambda s, t, kl, nll: 0.7*kl + 0.3*nll,
    "the temperature once": lambda s, t, kl, nll: 0.7*3*kl + 0.3*nll,
    "the shares are swapped": lambda s, t, kl, nll: 0.3*9*kl + 0.7*nll,
}


@pytest.mark.parametrize("bug", BUGS)
def test_wrong_weights_are_caught(teacher, student, tmp_path, bug):
    class Planted(DistillTrainer):
        def mixed(self, model, inputs): return BUGS[bug](model, self.teacher, *token_losses(model, self.teacher, inputs, self.temperature))
    with torch.no_grad(): assert not correct(teacher, student, trainer_loss(trainer_for(teacher, student, tmp_path, Planted), batch_of(student)))


def test_the_other_direction_is_caught(teacher, student, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "divergence", lambda student, teacher, temperature=1.: divergence(teacher, student, temperature))
    with torch.no_grad(): assert not correct(teacher, student, trainer_loss(trainer_for(teacher, student, tmp_path), batch_of(student)))


def test_counted_padding_is_caught(teacher, student, tmp_path):
    class Planted(DistillTrainer):
        def mixed(self, model, inputs): return 0.7*9*plain(model, self.teacher, inputs, 3., padding=True).flatten() + 0.3*token_nll(model, inputs).mean()
    with torch.no_grad(): assert not correct(teacher, student, trainer_loss(trainer_for(teacher, student, tmp_path, Planted), batch_of(student)))


# -- the teacher

def noisy_teacher():
    from transformers import AutoModelForCausalLM
    lm = random_lm("gpt2")
    for module_ in lm.model.modules():
        if isinstance(module_, torch.nn.Dropout): module_.p = 0.5
    return lm


def opinions(teacher, student, folder, monkeypatch, bug=lambda model: None):
    "What the teacher says of one batch, twice, in the middle of a training run."
    said = []
    class Asking(DistillTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            bug(self.teacher)
            with torch.no_grad(): said.append([token_losses(model.eval(), self.teacher, inputs)[0] for _ in range(2)])
            return super().compute_loss(model.train(), inputs, **kwargs)
    monkeypatch.setattr(module, "DistillTrainer", Asking)
    distill(teacher, student, EXAMPLES, folder=folder, **SMALL | {"max_steps": 2})
    return all(torch.equal(a, b) for a, b in said)


def test_the_teacher_has_no_dropout_even_if_it_came_in_train_mode(tmp_path, monkeypatch):
    teacher, student = noisy_teacher(), random_lm("gpt2", seed=1)
    teacher.model.train()
    assert opinions(teacher, student, tmp_path, monkeypatch)


def test_a_teacher_in_train_mode_is_caught(tmp_path, monkeypatch):
    assert not opinions(noisy_teacher(), random_lm("gpt2", seed=1), tmp_path, monkeypatch, bug=lambda model: model.train())


def test_teacher_and_student_stay_as_they_are(teacher, student, tmp_path):
    before = [copy.deepcopy(lm.model.state_dict()) for lm in (teacher, student)]
    made = distill(teacher, student, EXAMPLES, folder=tmp_path, **SMALL)
    for lm, state in zip((teacher, student), before): assert all(torch.equal(v, state[k]) for k, v in lm.model.state_dict().items())
    assert made.kind == "model" and not torch.equal(made.lm.model.lm_head.weight, student.model.lm_head.weight)


# -- training

def test_the_student_comes_nearer_and_the_teacher_is_why(teacher, student, tmp_path):
    settings = SMALL | dict(max_steps=30, eval_every=10)
    made = distill(teacher, student, EXAMPLES, folder=tmp_path/"a", alpha=1., temperature=1., **settings)
    alone = distill(None, student, EXAMPLES, folder=tmp_path/"b", **settings)
    far = [distances(lm, teacher, TEST)[1][:, 0].sum() for lm in (student, made.lm, alone.lm)]
    assert far[1] < 0.9*far[0] and far[1] < far[2]


def test_distances_do_not_depend_on_the_batch_and_a_model_is_at_none_from_itself(teacher, student):
    ids, whole = distances(student, teacher, TEST)
    assert ids == [row["id"] for row in TEST] and np.allclose(distances(student, teacher, TEST, tokens_per_batch=1)[1], whole, rtol=1e-4)
    assert np.abs(distances(teacher, teacher, TEST)[1][:, 0]).max() < 1e-4
    nll = [float(token_nll(student.model, collate([token_rows([row], student.tokenizer, 512)[0]], 0)).sum()) for row in TEST]
    assert np.allclose(whole[:, 1], nll, rtol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_same_seed_same_bytes_and_it_loads(teacher, method, tmp_path):
    def run(name, seed):
        made = distill(teacher, random_lm("llama", seed=1), EXAMPLES, folder=tmp_path/name/"checkpoints", method=method, seed=seed, **SMALL)
        made.save(tmp_path/name/"saved")
        return made, sha256_of(tmp_path/name/"saved")
    (made, first), (_, second), (_, other) = run("a", 0), run("b", 0), run("c", 1)
    assert first == second != other
    if method == "lora": return
    again, batch = load_model(str(tmp_path/"a/saved")), batch_of(teacher)
    with torch.no_grad(): assert torch.equal(token_nll(again.model, batch), token_nll(made.lm.model, batch))


def test_killed_and_called_again_it_ends_with_the_same_bytes(teacher, tmp_path, monkeypatch):
    class Killed(BaseException): pass
    def kill(values, step):
        if step == 5 and "train/loss" in values: raise Killed
    def run(name, **more): return distill(teacher, random_lm("llama", seed=1), EXAMPLES, folder=tmp_path/name, method="lora", lora_dropout=0.1, **SMALL | {"eval_every": 3}, **more)
    monkeypatch.setattr(Resumable, "_must_save", lambda self: True)  # after every step
    with pytest.raises(Killed): run("killed", on_log=kill)
    assert [o.name for o in (tmp_path/"killed/resume").glob("step-*")] == ["step-4"]
    resumed, whole = run("killed"), run("whole")
    assert sha256_of(resumed.save(tmp_path/"a")) == sha256_of(whole.save(tmp_path/"b")) and list(map(comparable, resumed.history)) == list(map(comparable, whole.history))


# -- a student of the teacher's layers

@pytest.mark.parametrize("family", few(FAMILIES, SHORT))
def test_half_of_every_family(family):
    teacher = random_lm(family, layers=4)
    small = half_of(teacher)
    assert small.model.config.get_text_config().num_hidden_layers == 2 and small.parameters < teacher.parameters
    layers = lambda lm: getattr(lm.model.base_model, "layers", None) or lm.model.base_model.h
    for ours, theirs in zip(layers(small), (layers(teacher)[0], layers(teacher)[3])):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    with torch.no_grad(): assert torch.isfinite(token_losses(small.model, teacher.model, batch_of(small))[0]).all()
    from llmops_kit.evaluation.scoring import generate
    assert len(generate(small, TEST[:2], 3).texts) == 2  # the cache knows the new numbers of the layers


def test_half_of_an_adapter_keeps_what_it_learned(teacher):
    from llmops_kit.training.sft import add_lora
    torch.manual_seed(0)
    tuned = add_lora(teacher, 4, dropout=0.)
    with torch.no_grad():
        for name, p in tuned.model.named_parameters():
            if "lora_B" in name: p.normal_(std=0.1)
    assert not torch.equal(half_of(tuned).model.model.layers[0].mlp.up_proj.weight, half_of(teacher).model.model.layers[0].mlp.up_proj.weight)
    assert any("lora_" in name for name, _ in tuned.model.named_parameters())  # and the adapter is still one
    with pytest.raises(UserError, match="one layer"): half_of(random_lm("llama", layers=1))


# -- what is refused

def test_other_words_are_refused_and_said(teacher, student):
    other = copy.deepcopy(student.tokenizer)
    other.add_tokens(["<extra>"])
    strange = SimpleNamespace(tokenizer=other, name="other")
    with pytest.raises(UserError, match="different vocabularies.*outputs"): check_vocabularies(teacher, strange, TEST)
    template = copy.deepcopy(student.tokenizer)
    template.chat_template = template.chat_template.replace("<|assistant|>", "<|assistant|>:")
    with pytest.raises(UserError, match="chat templates differ"): check_vocabularies(teacher, SimpleNamespace(tokenizer=template, name="other"), TEST)


def test_impossible_settings_are_refused(teacher, student, tmp_path):
    for wrong in (dict(alpha=1.5), dict(temperature=0.)):
        with pytest.raises(UserError, match="make no loss"): distill(teacher, student, EXAMPLES, folder=tmp_path, **wrong)
    with pytest.raises(UserError, match="no validation examples"): distill(teacher, student, SimpleNamespace(train=EXAMPLES.train, validation=[]), folder=tmp_path)


def test_the_teachers_answers_take_the_place_of_the_datas():
    rows = with_answers(TEST[:3], ["first", " ", "third"])
    assert [row["id"] for row in rows] == ["0", "2"] and [row["messages"][-1]["content"] for row in rows] == ["first", "third"]
    assert TEST[0]["messages"][-1]["content"] != "first"
