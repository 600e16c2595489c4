"""Evaluation: the numbers are those of the reference libraries, batches change nothing, intervals keep their promise."""
import math, random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from conftest import few
from llmops_kit.evaluation.evaluate import Evaluation, compare, evaluate, trained_on
from llmops_kit.evaluation.metrics import bleu_of_sums, bleu_statistics, exact_match, likelihood_metrics, mean_metric, perplexity, text_metrics
from llmops_kit.evaluation.report import prediction_rows, verdict_text
from llmops_kit.evaluation.scoring import generate, score
from llmops_kit.evaluation.statistics import (bootstrap_interval, metric_interval, paired_difference, resample_counts, resampled_values,
                                              verdict, wilson_interval)
from llmops_kit.models.chat import render, render_prompt
from llmops_kit.models.load import LanguageModel, load_model
from llmops_kit.runs.errors import UserError

WORDS = "return the a name of file close open for reading . , queue size None is not 3.5 don't e.g. \"quoted\" (x)".split()


def sentence(rng, longest=14): return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))


def noisy(rng, text):
    words = [w if rng.random() < 0.7 else rng.choice(WORDS) for w in text.split()]
    return " ".join(words[:rng.randint(0, len(words))] if rng.random() < 0.2 else words)


PLANTED = [(["the same text here."], ["the same text here."]), ([""], ["something"]), (["a"], ["a"]), (["x y z w"], ["a b c d"]),
           (["the cat sat on the mat", ""], ["the cat sat on a mat", "b"]), (["a b c d e f g h"], ["a b"]), (["a b"], ["a b c d e f g h"])]


def corpora(n=150):
    rng = random.Random(0)
    for _ in range(n):
        references = [sentence(rng) for _ in range(rng.randint(1, 12))]
        yield [noisy(rng, r) for r in references], references


# -- metrics

def test_bleu_is_sacrebleus():
    from sacrebleu.metrics import BLEU
    largest = 0
    for predictions, references in [*PLANTED, *corpora()]:
        theirs = BLEU(force=True).corpus_score(predictions, [references]).score
        ours = text_metrics([str(i) for i in range(len(references))], predictions, references)["bleu"].value
        largest = max(largest, abs(ours - theirs))
    assert largest < 1e-10


def test_resampled_bleu_is_bleu_of_the_resampled_texts():
    from sacrebleu.metrics import BLEU
    rng = random.Random(1)
    references = [sentence(rng) for _ in range(30)]
    predictions = [noisy(rng, r) for r in references]
    metric = text_metrics([str(i) for i in range(30)], predictions, references)["bleu"]
    values, counts = resampled_values(metric, resamples=20), np.concatenate(list(resample_counts(30, 20)))
    for value, count in zip(values, counts.astype(int)):
        again = [np.repeat(np.array(texts, dtype=object), count).tolist() for texts in (predictions, references)]
        assert abs(BLEU(force=True).corpus_score(again[0], [again[1]]).score - value) < 1e-10


def test_rouge_is_rouge_scores():
    from rouge_score.rouge_scorer import RougeScorer
    scorer, names = RougeScorer(["rouge1", "rouge2", "rougeL"]), {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    for predictions, references in [*PLANTED, *corpora(50)]:
        ours = text_metrics([str(i) for i in range(len(references))], predictions, references)
        for name, theirs in names.items():
            expected = [scorer.score(r, p)[theirs].fmeasure for p, r in zip(predictions, references)]
            assert ours[name].each.tolist() == expected
            assert ours[name].value == pytest.approx(np.mean(expected), abs=1e-12)


def test_exact_match_normalises_as_stated():
    pairs = [("Close  the file.", "close the\nfile", 1), ("ﬁle", "file", 1), ("STRASSE", "straße", 1), ("a+b", "ab", 0), ("file..", "file", 0), ("", "file", 0)]
    assert exact_match([p for p, _, _ in pairs], [r for _, r, _ in pairs]).tolist() == [m for _, _, m in pairs]


@pytest.mark.parametrize("ids, predictions, references, says", [
    (["a", "b"], ["x", "y"], ["x", "  "], "'b'"), (["a"], ["x", "y"], ["x"], "do not pair up"), ([], [], [], "no example")])
def test_what_cannot_be_compared_is_refused(ids, predictions, references, says):
    with pytest.raises(UserError, match=says): text_metrics(ids, predictions, references)


# -- scoring and generation

SMALL = dict(vocab_size=4096, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
FAMILIES = {"llama": lambda: LlamaConfig(**SMALL), "qwen3": lambda: Qwen3Config(head_dim=12, **SMALL),
            "mistral": lambda: MistralConfig(sliding_window=16, **SMALL),
            "gemma2": lambda: Gemma2Config(head_dim=12, sliding_window=16, query_pre_attn_scalar=12, final_logit_softcapping=5.0, **SMALL),
            "gpt2": lambda: GPT2Config(vocab_size=4096, n_embd=48, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1)}


@pytest.fixture(scope="module")
def tiny(): return load_model("tiny")


def small_model(tiny, family="llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.mul_(4)  # decided predictions: a tie would be broken by rounding
    model.generation_config.eos_token_id = tiny.tokenizer.eos_token_id
    return LanguageModel(model, tiny.tokenizer, family, tiny.artifact, 256)


def conversations(n=14):
    rng = random.Random(2)
    return [{"id": f"row-{i}", "messages": [{"role": "user", "content": " ".join(sentence(rng) for _ in range(rng.randint(1, 7)))},
                                            {"role": "assistant", "content": sentence(rng)}]} for i in range(n)]


def plain_nll(lm, row):
    "transformers' own loss, one conversation at a time, no padding, all logits."
    r = render(lm.tokenizer, row["messages"], lm.max_length)
    labels = torch.tensor([[i if m else -100 for i, m in zip(r.ids, r.mask)]])
    with torch.no_grad(): loss = lm.model(input_ids=torch.tensor([r.ids]), labels=labels).loss
    return float(loss)*sum(r.mask[1:]), sum(r.mask[1:])


def plain_text(lm, row, new):
    prompt = torch.tensor([render_prompt(lm.tokenizer, row["messages"], lm.max_length - new)])
    out = lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=lm.tokenizer.pad_token_id)
    return lm.tokenizer.decode(out[0, prompt.shape[1]:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", few(FAMILIES, ["llama", "gemma2", "gpt2"]))
def test_scores_and_generations_are_transformers_own(tiny, family):
    lm, rows = small_model(tiny, family), conversations()
    scores, plain = score(lm, rows), [plain_nll(lm, row) for row in rows]
    assert scores.tokens.tolist() == [tokens for _, tokens in plain]
    assert scores.nll == pytest.approx([nll for nll, _ in plain], rel=1e-4)
    assert perplexity(scores.nll, scores.tokens) == pytest.approx(math.exp(sum(n for n, _ in plain)/sum(t for _, t in plain)), rel=1e-4)
    assert generate(lm, rows, max_new_tokens=12).texts == [plain_text(lm, row, 12) for row in rows]


def same_in_company(lm, rows):
    "Does every row get alone what it gets among others, for scores and for texts?"
    together, texts = score(lm, rows, tokens_per_batch=10_000), generate(lm, rows, 12, tokens_per_batch=10_000).texts
    alone, own = score(lm, rows, tokens_per_batch=1), generate(lm, rows, 12, tokens_per_batch=1).texts
    return bool(np.allclose(together.nll, alone.nll, rtol=1e-4)), texts == own


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batch_size_and_order_change_nothing(tiny, family):
    lm, rows = small_model(tiny, family), conversations()
    assert same_in_company(lm, rows) == (True, True)
    order = random.Random(3).sample(range(len(rows)), len(rows))
    shuffled = [rows[i] for i in order]
    assert score(lm, shuffled).nll.tolist() == score(lm, rows).nll[order].tolist()  # bit for bit
    texts = generate(lm, rows, 12).texts
    assert generate(lm, shuffled, 12).texts == [texts[i] for i in order]


def test_an_adapter_that_is_switched_off_is_the_base(tiny):
    from peft import LoraConfig, get_peft_model
    from llmops_kit.models.load import shared_copy
    base, rows = small_model(tiny), conversations()
    torch.manual_seed(1)
    adapted = replace(base, model=get_peft_model(shared_copy(base.model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")))
    alone, tuned = score(base, rows), score(adapted, rows)
    with adapted.model.disable_adapter(): off = score(adapted, rows)
    assert off.nll.tolist() == alone.nll.tolist() == score(base, rows).nll.tolist()
    assert not np.allclose(tuned.nll, alone.nll)


def test_truncation_is_counted_and_answers_stay_whole(tiny):
    lm, rows = small_model(tiny), conversations()
    short = replace(lm, max_length=80)
    scores, answers = score(short, rows), generate(short, rows, 12)
    assert scores.truncated == sum(len(render(lm.tokenizer, row["messages"]).ids) > 80 for row in rows) > 0
    assert answers.truncated == sum(len(render_prompt(lm.tokenizer, row["messages"])) > 68 for row in rows) > 0
    assert scores.tokens.tolist() == score(lm, rows).tokens.tolist()


def test_bad_likelihoods_and_rows_are_named(tiny):
    lm, rows = small_model(tiny), conversations(6)
    only = "Zanzibar"
    rows[4]["messages"][0]["content"] = only
    new = set(render(lm.tokenizer, rows[4]["messages"]).ids) - {i for r in rows[:4] + rows[5:] for i in render(lm.tokenizer, r["messages"]).ids}
    with torch.no_grad(): lm.model.get_input_embeddings().weight[sorted(new)] = math.nan
    with pytest.raises(UserError, match="'row-4' is nan"): score(lm, rows)
    with pytest.raises(UserError, match="'row-0'"): score(replace(lm, max_length=4), rows)
    with pytest.raises(UserError, match="leaves no room"): generate(lm, rows, max_new_tokens=256)
    with pytest.raises(UserError, match="'open'.*assistant turn"): evaluate(lm, [{"id": "open", "messages": rows[0]["messages"][:1]}])
    empty = {"id": "void", "messages": [rows[0]["messages"][0], {"role": "assistant", "content": " "}]}
    with pytest.raises(UserError, match="'void'"): evaluate(lm, [rows[0], empty])


def test_progress_reaches_its_end(tiny):
    told = []
    evaluate(small_model(tiny), conversations(), max_new_tokens=4, resamples=50, on_progress=lambda *o: told.append(o))
    assert told == sorted(told, key=lambda o: o[0]) and told[-1][:2] == (28, 28)
    assert {text for _, _, text in told} == {"scoring", "generating"}


# -- statistics

def losses(rng, n):
    tokens = rng.integers(4, 30, n)
    return likelihood_metrics(range(n), tokens*rng.lognormal(1, 0.6, n), tokens)["perplexity"]


def coverage(draw, truth, find, n, simulations, seed=0):
    rng = np.random.default_rng(seed)
    found = [find(draw(rng, n)) for _ in range(simulations)]
    return np.mean([i.low <= truth <= i.high for i in found])


def test_bootstrap_intervals_cover_the_truth():
    "1,000 simulated test sets of 100 examples each: 95 % within three standard errors (2.1 points) of simulation, and one point for small samples."
    def boot(m): return bootstrap_interval(m, resamples=500)
    assert 0.92 < coverage(losses, math.exp(math.exp(1.18)), boot, 100, 1000) < 0.975
    def scores(rng, n): return mean_metric("rouge_l", range(n), rng.beta(0.3, 2, n))
    assert 0.92 < coverage(scores, 0.3/2.3, boot, 100, 1000) < 0.975


def test_wilson_covers_where_the_bootstrap_does_not():
    "1,000 simulated test sets of 60 examples with 1 % exact matches."
    def matches(rng, n): return mean_metric("exact_match", range(n), rng.random(n) < 0.01, proportion=True)
    assert coverage(matches, 0.01, lambda m: bootstrap_interval(m, resamples=200), 60, 1000) < 0.6
    assert coverage(matches, 0.01, metric_interval, 60, 1000) > 0.93


def two_models(rng, n, gain=0.0, shared=0.7):
    tokens, difficulty = rng.integers(4, 30, n), rng.normal(3, shared, n)
    first, second = (likelihood_metrics(range(n), tokens*(difficulty - g + rng.normal(0, 0.25, n)), tokens)["perplexity"] for g in (0, gain))
    return first, second


def matched(rng, n, rate=0.05):
    easy = rng.random(n) < rate
    return [mean_metric("exact_match", range(n), easy | (rng.random(n) < rate), proportion=True) for _ in range(2)]


@pytest.mark.parametrize("pair", [two_models, matched])
def test_equal_models_are_seldom_told_apart(pair):
    "1,000 pairs of equal models on 100 examples: 5 %, with three standard errors of simulation (2.1 points) and a point for small samples."
    rng = np.random.default_rng(4)
    alarms = np.mean([paired_difference(*pair(rng, 100), resamples=500).excludes_zero for _ in range(1000)])
    assert alarms < 0.08


def test_matched_differences_cover_the_truth():
    "1,000 pairs of models with 5 % and 12 % exact matches on 100 examples."
    def find(pair): return paired_difference(*pair)
    def pair(rng, n):
        luck = rng.random(n)
        right = luck < 0.05
        return [mean_metric("exact_match", range(n), o, proportion=True) for o in (right, np.where(rng.random(n) < 0.2, rng.random(n) < 0.12, luck < 0.12))]
    assert coverage(pair, 0.07, find, 100, 1000) > 0.93
    none = mean_metric("exact_match", range(100), np.zeros(100), proportion=True)
    assert paired_difference(none, none).low < 0 < paired_difference(none, none).high


def test_a_planted_difference_is_found_and_pairing_is_why():
    "200 pairs: the better model is told apart; separate intervals are far wider than the paired one."
    rng = np.random.default_rng(5)
    found, ratio = 0, []
    for _ in range(200):
        base, better = two_models(rng, 100, gain=0.15)
        d = paired_difference(base, better, resamples=500)
        found += verdict(d, "lower") == "better"
        apart = [bootstrap_interval(m, 500, seed=s) for s, m in enumerate((base, better))]
        ratio.append(math.hypot(*(i.high - i.low for i in apart))/(d.high - d.low))
    assert found > 180
    assert np.median(ratio) > 1.8


def test_same_seed_same_interval_and_blocks_do_not_matter():
    rng = np.random.default_rng(6)
    base, better = two_models(rng, 80, 0.1)
    assert paired_difference(base, better) == paired_difference(base, better)
    assert paired_difference(base, better) != paired_difference(base, better, seed=1)
    small, large = (np.concatenate(list(resample_counts(80, 100, block=b))) for b in (81, 10**6))
    assert (small == large).all()


def test_unpaired_examples_are_refused():
    rng = np.random.default_rng(7)
    a, b = two_models(rng, 20)
    with pytest.raises(UserError, match="1 only in the first, such as 'x'"): paired_difference(replace(a, ids=["x", *a.ids[1:]]), replace(b, ids=[*b.ids[1:], 0][::-1]))
    with pytest.raises(UserError, match="different orders"): paired_difference(a, replace(b, ids=b.ids[::-1]))
    with pytest.raises(UserError, match="two or more"): bootstrap_interval(replace(a, ids=a.ids[:1], statistics=a.statistics[:1]))


# -- the whole

def test_flat_names_and_rows(tiny):
    lm, rows = small_model(tiny), conversations()
    base, tuned = (evaluate(m, rows, max_new_tokens=6, resamples=100) for m in (lm, small_model(tiny, "gpt2")))
    comparison = compare(tuned, base, resamples=100)
    names = ["loss", "perplexity", "bits_per_byte", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l", "token_f1", "edit_similarity", "exact_match"]
    expected = {f"{s}/{n}{e}" for s in ("test", "base", "difference") for n in names for e in ("", "/low", "/high")}
    with_interval = ["latency_p50_seconds", "latency_p95_seconds", "latency_p99_seconds", "tokens_per_example"]
    expected |= {f"{c}/{n}" for c in ("cost", "cost/base") for n in ["seconds", "tokens_per_second", *(f"{n}{e}" for n in with_interval for e in ("", "/low", "/high"))]}
    flat = comparison.flat()
    assert set(flat) == expected | {"test/examples", "test/truncated", "test/cut"}
    assert all(flat[f"{k}/low"] <= flat[k] <= flat[f"{k}/high"] for k in flat if f"{k}/low" in flat)
    assert {k.split("/")[0] for k in compare(base).flat("validation")} == {"validation", "cost"}
    table = prediction_rows(rows, comparison)
    assert [o["id"] for o in table] == [r["id"] for r in rows] and table[0]["tuned"] == tuned.texts[0]
    assert table == prediction_rows(rows, compare(evaluate(small_model(tiny, "gpt2"), rows, max_new_tokens=6, resamples=100), base, resamples=100))
    assert "14 held-out examples" in verdict_text(comparison)
