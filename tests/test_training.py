"""What the training notebooks promise, tested on a small random model, with bugs planted to see that each test can fail."""
import errno, json, os, random, subprocess, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers import Cohere2Config, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from llmops_kit.models.chat import render
from llmops_kit.models.load import LanguageModel, bundled_folder, load_adapter
from llmops_kit.runs.artifacts import Artifact, sha256_of
from llmops_kit.runs.errors import UserError
from llmops_kit.training import checkpoints, hotpath, sft
from llmops_kit.training.adapters import add_lora
from llmops_kit.training.batching import TokenRows, collate, padding_share, token_batches, token_rows
from llmops_kit.training.loop import LossNotFinite
from llmops_kit.training.loss import token_nll
from llmops_kit.training.sft import CompletionTrainer, finetune

WORDS = "the of a file and returns name object value is for list key path with line error index count type".split()


def conversations(n, seed):
    rng = random.Random(seed)
    def text(low, high): return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    return [dict(id=str(i), messages=[dict(role="user", content=text(2, 30)), dict(role="assistant", content=text(1, 8))]) for i in range(n)]


def random_lm():
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder())
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    return LanguageModel(AutoModelForCausalLM.from_config(config).eval(), tokenizer, "random", Artifact("model", "model", "0"*64), 128)


EXAMPLES = SimpleNamespace(train=conversations(60, 1), validation=conversations(16, 2))
SMALL = dict(lr=1e-2, max_steps=6, eval_every=2, tokens_per_batch=256, lora_r=4, lora_dropout=0.1, precision="fp32", save_every=1000)  # not by the clock


@pytest.fixture
def lm(): return random_lm()


def adapter_digest(folder, seed=0):
    tuned = finetune(random_lm(), EXAMPLES, folder=Path(folder)/"checkpoints", seed=seed, **SMALL)
    return sha256_of(tuned.save(Path(folder)/"adapter"))


# -- the same bits

def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    first, second, other = (adapter_digest(tmp_path/name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == second != other
    assert str(tmp_path) not in "".join(o.read_text() for o in (tmp_path/"a/adapter").iterdir() if o.suffix != ".safetensors")


def test_same_bytes_in_another_process(tmp_path):
    code = f"import sys, torch; torch.set_num_threads({torch.get_num_threads()}); sys.path.insert(0, {str(Path(__file__).parent)!r}); " \
           f"import test_training as t; print(t.adapter_digest({str(tmp_path/'there')!r}))"
    there = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True)
    assert there.stdout.split()[-1] == adapter_digest(tmp_path/"here")


def test_base_model_stays_as_it_is(lm, tmp_path):
    ids = torch.arange(20)[None]
    with torch.no_grad(): before = lm.model(ids).logits
    tuned = finetune(lm, EXAMPLES, folder=tmp_path, **SMALL)
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, before)
        assert not torch.equal(tuned.lm.model(ids).logits, before)


# -- the loss

def full_nll(model, batch):
    "The plain way: logits at every position."
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")


def n_trained(batch): return int((batch["labels"][:, 1:] != -100).sum())


def batches_of(lm, tokens_per_batch=256, seed=0):
    rows = token_rows(EXAMPLES.train, lm.tokenizer, lm.max_length)
    return [collate([rows[i] for i in o], lm.tokenizer.pad_token_id) for o in token_batches(rows.lengths, tokens_per_batch, seed)]


FAMILIES = {
    "llama": LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    "qwen3, tied": Qwen3Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2),
    "gemma2, capped logits": Gemma2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0),
    "cohere2, scaled logits": Cohere2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, logit_scale=0.25),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_only_at_trained_positions_is_the_plain_loss(lm, family):
    config = FAMILIES[family]
    config.vocab_size, config.pad_token_id = len(lm.tokenizer), lm.tokenizer.pad_token_id
    config.bos_token_id = config.eos_token_id = lm.tokenizer.eos_token_id
    torch.manual_seed(0)
    lm.model = AutoModelForCausalLM.from_config(config).eval()
    wrapped = add_lora(lm, 4).model.eval()
    for batch in batches_of(lm)[:3]:
        with torch.no_grad():
            nll, plain = token_nll(wrapped, batch), full_nll(wrapped, batch)
        assert len(nll) == n_trained(batch)
        assert float(nll.sum()) == pytest.approx(float(plain), rel=1e-5)


def trainer_for(lm, folder, accumulation, cls=CompletionTrainer):
    args = TrainingArguments(output_dir=str(folder), gradient_accumulation_steps=accumulation, report_to="none", disable_tqdm=True, eval_strategy="no")
    rows = token_rows(EXAMPLES.train, lm.tokenizer, lm.max_length)
    return cls(add_lora(lm, 4, dropout=0.).model, args, partial(collate, pad_token_id=lm.tokenizer.pad_token_id), rows, rows, tokens_per_batch=256)


class MeanOfMeans(CompletionTrainer):
    "A planted bug: each batch averaged by itself, then the averages."
    loss_is_scaled_for_ga = False
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None): return token_nll(model, inputs, self.head).mean()


def accumulated_against_whole(trainer):
    "Largest difference between the trainer's accumulated gradient and that of the plain mean over all trained tokens, relative to the largest gradient."
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = SimpleNamespace()
    batches, n = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 4, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(float(trainer.training_step(trainer.model, o, n)) for o in batches)
    ours = torch.cat([p.grad.flatten() for p in parameters])
    trainer.model.zero_grad()
    whole = sum(full_nll(trainer.model, o) for o in batches)/sum(map(n_trained, batches))
    whole.backward()
    plain = torch.cat([p.grad.flatten() for p in parameters])
    return float((ours - plain).abs().max()/plain.abs().max()), abs(loss - float(whole.detach()))


def test_accumulated_gradient_is_that_of_the_whole_batch(lm, tmp_path):
    gradient, loss = accumulated_against_whole(trainer_for(lm, tmp_path, 4))
    assert gradient < 1e-4 and loss < 1e-4


def test_mean_of_means_is_caught(lm, tmp_path):
    gradient, _ = accumulated_against_whole(trainer_for(lm, tmp_path, 4, MeanOfMeans))
    assert gradient > 1e-2


# -- what is trained

def trains_the_answers_only(tokenizer, rows, batch):
    "Do the labels of each row spell its answer, whatever the prompt?"
    return all([i for i in labels.tolist() if i != -100] == tokenizer(row["messages"][-1]["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
               for row, labels in zip(rows, batch["labels"]))


def planted(lm, change):
    rows = conversations(8, 3)
    tokens = token_rows(rows, lm.tokenizer, lm.max_length)
    tokens.mask = [change(o) for o in tokens.mask]
    return trains_the_answers_only(lm.tokenizer, rows, collate([tokens[i] for i in range(len(tokens))], lm.tokenizer.pad_token_id))


def test_only_answers_are_trained(lm): assert planted(lm, lambda mask: mask)


@pytest.mark.parametrize("bug", [lambda m: [True]*len(m), lambda m: m[1:] + [False], lambda m: [False] + m[:-1], lambda m: m[:-1] + [False]],
                         ids=["prompt trained", "shifted left", "shifted right", "end token left out"])
def test_a_wrong_mask_is_caught(lm, bug): assert not planted(lm, bug)


def test_prompts_do_not_change_what_is_trained(lm):
    answer = dict(role="assistant", content="returns the count of a key")
    def trained(prompt):
        rendered = render(lm.tokenizer, [dict(role="user", content=prompt), answer], lm.max_length)
        return [i for i, m in zip(rendered.ids, rendered.mask) if m]
    assert trained("the value") == trained("a list with an error " * 5) == trained("the path " * 200)


def test_padding_is_not_seen(lm):
    rows = token_rows(EXAMPLES.train[:8], lm.tokenizer, lm.max_length)
    rows = [rows[i] for i in range(len(rows))]
    with torch.no_grad():
        together = token_nll(lm.model, collate(rows, lm.tokenizer.pad_token_id))
        another = token_nll(lm.model, collate(rows, 5))
        alone = torch.cat([token_nll(lm.model, collate([o], 5)) for o in rows])
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(another, alone, atol=1e-5)


def test_nothing_to_train_is_refused(lm, tmp_path):
    with pytest.raises(UserError, match="No token is trained"): collate([dict(ids=[1, 2, 3], mask=[False]*3)]*2, 0)
    long = [dict(id="0", messages=[dict(role="user", content="the"), dict(role="assistant", content="value "*500)])]
    with pytest.raises(UserError, match="has a token to train on"): token_rows(long, lm.tokenizer, lm.max_length)
    with pytest.raises(UserError, match="no validation examples"): finetune(lm, SimpleNamespace(train=EXAMPLES.train, validation=[]), folder=tmp_path)


def test_token_batches():
    rng = random.Random(0)
    lengths = [rng.randint(3, 300) for _ in range(500)] + [5000]
    epochs = [token_batches(lengths, 1024, 0, epoch) for epoch in range(5)]
    for batches in epochs:
        assert sorted(i for o in batches for i in o) == list(range(len(lengths)))
        assert all(len(o)*max(lengths[i] for i in o) <= 1024 or o == [500] for o in batches)
        assert padding_share(lengths, batches) < 0.05
    assert len({len(o) for o in epochs}) == 1 and epochs[0] != epochs[1]
    assert token_batches(lengths, 1024) == token_batches(lengths, 1024)


# -- what goes wrong on the way

def poisoned_after(calls, monkeypatch):
    seen = []
    plain = CompletionTrainer.compute_loss
    def loss(self, *args, **kwargs):
        seen.append(1)
        return plain(self, *args, **kwargs)*(float("nan") if len(seen) > calls else 1)
    monkeypatch.setattr(CompletionTrainer, "compute_loss", loss)


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(lm, tmp_path, monkeypatch):
    whole = finetune(lm, EXAMPLES, folder=tmp_path/"whole", **SMALL | {"eval_every": 4})
    poisoned_after(5, monkeypatch)
    with pytest.raises(LossNotFinite, match=r"nan in step 6.* last good checkpoint \(step 4.*checkpoint-4") as error:
        finetune(lm, EXAMPLES, folder=tmp_path/"stopped", **SMALL | {"eval_every": 4})
    assert isinstance(error.value, UserError)
    kept = tmp_path/"stopped/checkpoint-4"
    assert [o.name for o in (tmp_path/"stopped").glob("checkpoint-*")] == ["checkpoint-4"]
    losses = {o["step"]: o["validation/loss"] for o in whole.history if "validation/loss" in o}
    tuned = load_adapter(str(kept), lm)
    assert f"{losses[4]:.4f}" in str(error.value)
    assert sft.mean_nll(tuned.model, [collate([o], 0) for o in map(token_rows(EXAMPLES.validation, lm.tokenizer, 128).__getitem__, range(16))]) == pytest.approx(losses[4], rel=1e-5)


def test_a_learning_rate_far_too_high_is_explained(lm, tmp_path):
    with pytest.raises(LossNotFinite, match="A lower lr usually helps"): finetune(lm, EXAMPLES, folder=tmp_path, **SMALL | {"lr": 1e30, "warmup_ratio": 0.})
    assert (tmp_path/"checkpoint-0/adapter_model.safetensors").exists()


def check_full_disk(lm, folder):
    with pytest.raises(UserError, match=r"The disk is full.* The last good checkpoint \(step \d+.* Free some space"):
        finetune(lm, EXAMPLES, folder=folder, **SMALL)
    assert len(left := list(folder.iterdir())) == 1
    load_adapter(str(left[0]), lm)  # complete


def test_full_disk_keeps_the_checkpoint_before(lm, tmp_path, monkeypatch):
    save, saved = checkpoints.save_adapter, []
    def save_until_full(lm, folder, base):
        if saved:
            (folder/"adapter_model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder/"adapter_model.safetensors"))
        saved.append(save(lm, folder, base))
    monkeypatch.setattr(checkpoints, "save_adapter", save_until_full)
    check_full_disk(lm, tmp_path)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root on Linux")
def test_a_disk_that_is_really_full(lm, tmp_path):
    one = finetune(lm, EXAMPLES, folder=tmp_path/"measure", **SMALL | {"max_steps": 1}).save(tmp_path/"one")
    kilobytes = int(sum(o.stat().st_size for o in one.iterdir())*1.5/1024)
    disk = tmp_path/"disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("mount is not allowed here")
    try: check_full_disk(lm, disk)
    finally: subprocess.run(["umount", disk], check=True)


def test_early_stopping_loads_the_best(lm, tmp_path, monkeypatch):
    losses, weights = iter([3.0, 2.0, 1.0, 1.5, 1.2, 0.5]), []
    def scripted(model, batches, head=None, nll=None):
        weights.append({k: v.clone() for k, v in model.state_dict().items() if "lora" in k})
        return next(losses)
    monkeypatch.setattr(sft, "mean_nll", scripted)
    tuned = finetune(lm, EXAMPLES, folder=tmp_path, patience=2, **SMALL | {"max_steps": 20, "eval_every": 1})
    assert tuned.metrics["train/steps"] == 4 and tuned.best_step == 2 and tuned.metrics["validation/loss"] == 1.0
    assert [o.name for o in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    now = {k: v for k, v in tuned.lm.model.state_dict().items() if "lora" in k}
    assert all(torch.equal(now[k], v) for k, v in weights[2].items())
    assert not all(torch.equal(now[k], v) for k, v in weights[4].items())


def test_no_step_better_than_the_base_is_said(lm, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(sft, "mean_nll", lambda *args: next(losses))
    tuned = finetune(lm, EXAMPLES, folder=tmp_path, **SMALL)
    assert tuned.best_step == 0 and "does nothing" in tuned.warnings[0]


def test_what_is_logged(lm, tmp_path):
    lines, told = [], []
    tuned = finetune(lm, EXAMPLES, folder=tmp_path, gradient_accumulation=2, on_log=lambda values, step: lines.append({"step": step, **values}),
                     on_progress=lambda *args: told.append(args), **SMALL)
    assert lines == tuned.history
    assert [o["step"] for o in lines if "train/loss" in o] == [1, 2, 3, 4, 5, 6]
    assert [o["step"] for o in lines if "validation/loss" in o] == [0, 2, 4, 6]
    assert {"train/loss", "train/lr", "train/grad_norm"} <= set(lines[1])
    assert told[-1][:2] == (6, 6) and "loss" in told[-1][2]
    assert tuned.metrics["validation/loss"] < tuned.metrics["base/loss"]
    assert json.loads((tuned.save(tmp_path/"adapter")/"base.json").read_text()) == {"name": "random", "sha256": "0"*64}


# -- the hot path is used only where it says the same

def hot(lm, batch, bf16=False):
    model = add_lora(lm, 4).model
    with hotpath.fast(hotpath.computing_copy(model) if bf16 else model, batch, model if bf16 else None, bf16) as nll: return nll


@pytest.mark.parametrize("bf16", [False, True])
def test_the_hot_path_says_the_same(lm, bf16):
    nll = hot(lm, batches_of(lm)[0], bf16)
    assert isinstance(nll, hotpath.HotPath) and nll.difference < nll.tolerance and set(nll.replaced) == {"norm", "adapter", "rotary", "last block"} | ({"attention"} if bf16 else set())


def leaking(layout): layout.token = layout.token.roll(1, 0)  # a row's keys are another row's
def stretched(layout): layout.positions = layout.positions*2  # that they go on from row to row would not matter to rotary positions
def shifted(layout): layout.place = layout.place.roll(1)
def short_of_a_token(layout): layout.flat[-1] = layout.flat[-2]

@pytest.mark.parametrize("bug", [leaking, stretched, shifted, short_of_a_token])
@pytest.mark.parametrize("rows", [1, None])
def test_rows_that_see_each_other_are_not_laid_end_to_end(lm, monkeypatch, bug, rows):
    class Wrong(hotpath.Layout):
        def __init__(self, mask):
            super().__init__(mask)
            bug(self)
    monkeypatch.setattr(hotpath, "Layout", Wrong)
    nll = hot(lm, {k: v[:rows] for k, v in batches_of(lm)[0].items()}, bf16=True)
    assert isinstance(nll, hotpath.HotPath) and not nll.end_to_end and "attention" not in nll.replaced


def test_attention_that_sees_what_comes_later_is_not_used(lm, monkeypatch):
    from llmops_kit.training import kernels
    monkeypatch.setattr(kernels, "seen", lambda length, window, like: like.new_zeros(length, length))
    nll = hot(lm, batches_of(lm)[0], bf16=True)
    assert isinstance(nll, hotpath.HotPath) and not nll.end_to_end


def test_a_kernel_that_is_a_little_wrong_is_not_used(lm, monkeypatch):
    right = hotpath.HeadNLL
    monkeypatch.setattr(hotpath, "HeadNLL", SimpleNamespace(apply=lambda *args: right.apply(*args)*1.001))
    assert hot(lm, batches_of(lm)[0]) is token_nll


def test_a_module_that_needs_every_position_is_not_narrowed(lm, monkeypatch):
    monkeypatch.setattr(hotpath, "last_block", lambda model: [model.model.layers[-1].self_attn.k_proj])
    nll = hot(lm, batches_of(lm)[0])
    assert isinstance(nll, hotpath.HotPath) and not nll.narrow and "last block" not in nll.replaced
