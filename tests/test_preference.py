"Preferences, reward models and reinforcement: the tokens, the methods, what comes out, and mistakes planted to see that they are caught."
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import few
from llmops_kit.data.preferences import check_preferences, made_preferences
from llmops_kit.data.dataset import Examples
from llmops_kit.evaluation.scoring import generate, score
from llmops_kit.models.chat import render, render_prompt
from llmops_kit.models.families import random_lm
from llmops_kit.models.load import load_adapter
from llmops_kit.runs.artifacts import sha256_of
from llmops_kit.runs.errors import UserError
from llmops_kit.runs.history import comparable
from llmops_kit.training import preference, reinforce as grpo
from llmops_kit.training.pairs import pair_rows, pair_scores
from llmops_kit.training.preference import collate_kto, prefer
from llmops_kit.training.reinforce import Reward, judge, length_warning, load_any_reward, load_function, reinforce
from llmops_kit.training.resumable import Resumable
from llmops_kit.training.reward import load_reward, train_reward

WORDS = "the of a file and returns name object value is for list key path with line error index count type".split()


def turn(text, role="assistant"): return dict(role=role, content=text)


def preferences(n, seed):
    "The chosen answer says `value`, the rejected one `error`: what a small model can learn in a few steps."
    rng = random.Random(seed)
    def text(low, high): return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    return [dict(id=f"{seed}-{i}", group=str(i), messages=[turn(text(2, 12), "user"), turn(f"value {text(1, 3)}")], rejected=[turn(f"error {text(1, 3)}")]) for i in range(n)]


EXAMPLES = SimpleNamespace(train=preferences(48, 1), validation=preferences(12, 2))
SMALL = dict(lr=1e-2, max_steps=5, eval_every=5, batch_size=8, lora_r=4, precision="fp32")


@pytest.fixture(scope="module")
def lm(): return random_lm()


def swapped(row): return row | {"messages": row["messages"][:-1] + row["rejected"], "rejected": row["messages"][-1:]}


# -- the tokens

def seen(monkeypatch, lm, method, folder, **kwargs):
    "The batches that TRL's loss gets."
    batches, compute = [], preference._trl(method)[0].compute_loss
    made = preference._trl
    def spying(name):
        trainer, config = made(name)
        def compute_loss(self, model, inputs, *args, **kwargs):
            batches.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
            return super(spy, self).compute_loss(model, inputs, *args, **kwargs)
        spy = type("Spy", (trainer,), {"compute_loss": compute_loss})
        return spy, config
    monkeypatch.setattr(preference, "_trl", spying)
    prefer(lm, EXAMPLES, folder=folder, method=method, **SMALL | {"max_steps": 6} | kwargs)
    return batches


def rows_of(batch, prefix=""):
    "Token ids and trained ids of every row, without padding."
    mask = batch[f"{prefix}attention_mask"].bool()
    trained = batch[f"{prefix}labels"] != -100 if f"{prefix}labels" in batch else batch[f"{prefix}completion_mask"].bool()
    return [(tuple(ids[m].tolist()), tuple(ids[t].tolist())) for ids, m, t in zip(batch[f"{prefix}input_ids"], mask, trained)]


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_trl_trains_the_tokens_of_the_kit(lm, tmp_path, monkeypatch, method):
    batches = seen(monkeypatch, lm, method, tmp_path)
    def ours(messages):
        o = render(lm.tokenizer, messages, lm.max_length)
        assert o.ids.count(lm.tokenizer.bos_token_id) == 1 and o.ids[-1] == lm.tokenizer.eos_token_id
        return tuple(o.ids), tuple(i for i, m in zip(o.ids, o.mask) if m)
    good = sorted(ours(o["messages"]) for o in EXAMPLES.train)
    bad = sorted(ours(o["messages"][:-1] + o["rejected"]) for o in EXAMPLES.train)
    chosen, rejected = [], []
    for batch in batches:
        if method == "orpo": chosen, rejected = chosen + rows_of(batch, "chosen_"), rejected + rows_of(batch, "rejected_")
        elif method == "dpo":
            rows = rows_of(batch)
            chosen, rejected = chosen + rows[:len(rows)//2], rejected + rows[len(rows)//2:]
        else:
            for row, label in zip(rows_of(batch), batch["label"].tolist()): (chosen if label else rejected).append(row)
    assert sorted(chosen) == good and sorted(rejected) == bad


def test_kto_compares_with_answers_to_other_prompts(lm):
    pairs = pair_rows(EXAMPLES.train[:4], lm.tokenizer, lm.max_length)
    rows = [dict(answer=pairs[i][side], label=side == "chosen") for i in range(4) for side in ("chosen", "rejected")]
    batch = collate_kto(rows, lm.tokenizer.pad_token_id)
    own = {(ids[:len(ids) - len(a)], a) for ids, a in rows_of(batch)}
    other = {(ids[:len(ids) - len(a)], a) for ids, a in rows_of(batch, "KL_")}
    assert {p for p, _ in own} == {p for p, _ in other} and not own & other


def test_held_out_scores_are_those_of_evaluate(lm):
    pairs, rows = pair_rows(EXAMPLES.validation, lm.tokenizer, lm.max_length), EXAMPLES.validation
    scores = pair_scores(lm.model, pairs, lm.tokenizer.pad_token_id, tokens_per_batch=128)
    assert np.allclose(-scores.chosen, score(lm, rows).nll, atol=1e-4)
    assert np.allclose(-scores.rejected, score(lm, [swapped(o) for o in rows]).nll, atol=1e-4)


# -- the methods

def accuracy_after(lm, tuned):
    pairs = pair_rows(EXAMPLES.validation, lm.tokenizer, lm.max_length)
    now, then = (pair_scores(o.model, pairs, lm.tokenizer.pad_token_id) for o in (tuned, lm))
    return float((now.margin > then.margin).mean())


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_method_learns_and_its_adapter_reloads(lm, tmp_path, method):
    tuned = prefer(lm, EXAMPLES, folder=tmp_path/"work", method=method, **SMALL)
    assert accuracy_after(lm, tuned.lm) > 0.9 and tuned.metrics["validation/relative_accuracy"] > 0.9
    again = load_adapter(str(tuned.save(tmp_path/"saved")), lm)
    assert list(again.model.peft_config) == ["default"] and again.model.active_peft_config.r == 4
    ids = torch.tensor([render_prompt(lm.tokenizer, EXAMPLES.validation[0]["messages"])])
    with torch.no_grad(): assert torch.equal(again.model(ids).logits, tuned.lm.model(ids).logits)
    assert len(generate(again, EXAMPLES.validation[:2], 4).texts) == 2


def test_swapped_answers_are_caught(lm, tmp_path):
    bug = SimpleNamespace(train=[swapped(o) for o in EXAMPLES.train], validation=[swapped(o) for o in EXAMPLES.validation])
    assert accuracy_after(lm, prefer(lm, bug, folder=tmp_path, **SMALL).lm) < 0.1


def test_same_seed_same_adapter_and_another_seed_another(lm, tmp_path):
    def digest(name, seed): return sha256_of(prefer(lm, EXAMPLES, folder=tmp_path/name, seed=seed, **SMALL).save(tmp_path/f"{name} saved")/"adapter_model.safetensors")
    first, second, other = digest("a", 0), digest("b", 0), digest("c", 1)
    assert first == second != other


def test_a_fine_tuned_adapter_goes_on_and_is_the_reference(lm, tmp_path):
    first = prefer(lm, EXAMPLES, folder=tmp_path/"first", **SMALL)
    start = load_adapter(str(first.save(tmp_path/"sft")), lm)
    before = {k: v.clone() for k, v in start.model.state_dict().items()}
    tuned = prefer(start, EXAMPLES, folder=tmp_path/"second", **SMALL)
    assert all(torch.equal(before[k], v) for k, v in start.model.state_dict().items())
    assert tuned.metrics["base/margin"] == pytest.approx(first.metrics["validation/margin"], rel=1e-4)
    first_loss = next(o["train/loss"] for o in tuned.history if "train/loss" in o)
    assert first_loss == pytest.approx(np.log(2), abs=1e-4)  # nothing has changed yet: relative to itself, not to the base
    assert load_adapter(str(tuned.save(tmp_path/"saved")), lm).base is lm and tuned.base["sha256"] == lm.artifact.sha256


# -- refusals

def test_rows_that_are_no_preferences_are_refused(lm, tmp_path):
    row = EXAMPLES.train[0]
    def wrong(**changes): return [row | changes]
    for rows, text in ((wrong(rejected=[]), "no rejected answer"), (wrong(rejected=row["messages"][-1:]), "same answer"), (wrong(rejected=[turn("  ")]), "empty rejected"),
                       (wrong(messages=row["messages"][:-1] + [turn("")]), "empty chosen")):
        with pytest.raises(UserError, match=text): pair_rows(rows, lm.tokenizer, lm.max_length)
        with pytest.raises(UserError, match=text): check_preferences(Examples(dict(train=rows, validation=[], test=[]), "rows"))
    with pytest.raises(UserError, match="Did you mean dpo"): prefer(lm, EXAMPLES, folder=tmp_path, method="dop")
    with pytest.raises(UserError, match="no validation pairs"): prefer(lm, SimpleNamespace(train=EXAMPLES.train, validation=[]), folder=tmp_path)


def test_made_preferences_are_never_the_answer_itself():
    rows = [dict(id=str(i), group="g", messages=[turn("?", "user"), turn(text)]) for i, text in enumerate(["Same words here now.", "Same words here now.", "Two words"])]
    made = made_preferences(rows)
    assert len(made) == 3 and all(o["rejected"][0]["content"] != o["messages"][-1]["content"] for o in made)
    assert made_preferences([rows[2]]) == []  # nothing else in its group, and too short to be cut


# -- reward models

def test_a_reward_model_learns_reloads_and_is_refused_elsewhere(lm, tmp_path):
    made = train_reward(lm, EXAMPLES, folder=tmp_path/"work", **SMALL)
    good, bad = EXAMPLES.validation, [swapped(o) for o in EXAMPLES.validation]
    assert (made.score(good) > made.score(bad)).mean() > 0.9 and made.metrics["validation/accuracy"] > 0.9
    folder = str(made.save(tmp_path/"saved"))
    assert np.allclose(load_reward(folder, lm).score(good), made.score(good), atol=1e-6)
    assert np.allclose(made.score(good[:1]), made.score(good)[:1], atol=1e-5)  # whatever the batch
    with pytest.raises(UserError, match="no reward model"): load_reward(str(tmp_path/"work"), lm)
    rewarded = load_any_reward(folder, lm)
    assert np.allclose(rewarded([""], [good[0]["messages"][-1]["content"]], good[:1]), made.score(good[:1]), atol=1e-6)


# -- reinforcement

def test_grpo_learns_a_reward_and_its_adapter_reloads(lm, tmp_path):
    reward = Reward("capital", lambda prompts, completions, rows: [float(o[:1].isupper()) for o in completions])
    # a random model finds all words nearly equally likely; at a low temperature it has opinions that can change
    settings = dict(lr=3e-2, beta=1e-6, eval_every=8, prompts_per_step=2, generations=16, max_new_tokens=2, temperature=0.1, precision="fp32", validation_examples=6)
    tuned = reinforce(lm, EXAMPLES, reward, folder=tmp_path/"work", max_steps=8, **settings)
    rewards = [o["train/reward"] for o in tuned.history if "train/reward" in o]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.3 and tuned.metrics["validation/reward"] > tuned.metrics["base/reward"]
    assert [o["train/kl"] for o in tuned.history if "train/kl" in o][-1] > 0.1
    tuned.save(tmp_path/"saved")
    def short(name): return reinforce(lm, EXAMPLES, reward, folder=tmp_path/name, max_steps=2, **settings).history
    assert short("a") == short("b")
    again = load_adapter(str(tmp_path/"saved"), lm)
    found = judge(again, EXAMPLES.validation[:3], reward, reference=lm, max_new_tokens=8, temperature=1.)
    assert np.isfinite(found.kl).all()
    assert np.allclose(judge(lm, EXAMPLES.validation[:3], reward, reference=lm, max_new_tokens=8, temperature=1.).kl, 0)


def test_grpo_answers_the_prompts_of_the_kit(lm, tmp_path, monkeypatch):
    asked, answer = [], grpo.answers_to
    monkeypatch.setattr(grpo, "answers_to", lambda model, prompts, *args: asked.extend(map(tuple, prompts)) or answer(model, prompts, *args))
    reinforce(lm, EXAMPLES, Reward("zero", lambda p, c, r: [0.]*len(c)), folder=tmp_path, max_steps=1, eval_every=1, prompts_per_step=2, generations=2, max_new_tokens=4, validation_examples=2)
    ours = {tuple(render_prompt(lm.tokenizer, o["messages"])) for o in EXAMPLES.train + EXAMPLES.validation}
    assert asked and set(asked) <= ours


@pytest.mark.parametrize("body, text", [
    ("    return [len(o)/0 for o in completions]", "line 2: return .len.o./0 for o in completions.. ZeroDivisionError"),
    ("    return [1.0]", "gave 1 values for 2 completions"),
    ("    return [float('nan')]*2", "gave nan for the completion 'one'"),
    ("    return None", "not a list of numbers"),
    ("    return ['good', 'bad']", "not a list of numbers")])
def test_mistakes_in_a_reward_function_are_explained(tmp_path, body, text):
    (tmp_path/"mine.py").write_text(f"def of(prompts, completions, rows):\n{body}\n")
    with pytest.raises(UserError, match=text) as error: load_function(f"{tmp_path}/mine.py:of")(["", ""], ["one", "two"], [{}, {}])
    assert "mine.py" in str(error.value)


def test_a_reward_file_that_does_not_load_is_explained(tmp_path):
    (tmp_path/"mine.py").write_text("x = 1\ndef of(:\n")
    with pytest.raises(UserError, match="line 2, SyntaxError"): load_function(f"{tmp_path}/mine.py:of")
    with pytest.raises(UserError, match="There is no file"): load_function(f"{tmp_path}/other.py:of")
    with pytest.raises(UserError, match="Did you mean sentence"): load_any_reward("sentense", None)


# -- a kill

class Cut(BaseException): pass


@pytest.mark.parametrize("what", few(["dpo", "kto", "orpo", "reward"], ["dpo", "reward"]))
def test_cut_off_and_called_again(lm, tmp_path, monkeypatch, what):
    monkeypatch.setattr(Resumable, "_must_save", lambda self: self.state.global_step % 2 == 0)  # not when it is time, but every second step
    settings = SMALL | dict(max_steps=6, eval_every=3)
    def train(folder, cut=None):
        def on_log(values, step):
            if step == cut and "train/loss" in values: raise Cut
        if what == "reward": tuned = train_reward(lm, EXAMPLES, folder=folder, on_log=on_log, **settings)
        else: tuned = prefer(lm, EXAMPLES, folder=folder, method=what, on_log=on_log, **settings)
        return sha256_of(tuned.save(folder/"out")), comparable(tuned.metrics), [comparable(o) for o in tuned.history]
    whole = train(tmp_path/"whole")
    with pytest.raises(Cut): train(tmp_path/"cut", 5)
    assert list((tmp_path/"cut"/"resume").glob("step-4"))
    assert train(tmp_path/"cut") == whole
