"Metrics that are the reference libraries' own, slices, cost and calibration: planted and random inputs, and what is refused."
import json, random, re, string
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_evaluation import PLANTED, WORDS, corpora, noisy, sentence

from llmops_kit.evaluation.calibration import calibration, ece
from llmops_kit.evaluation.chrf import chrf_of_sums, chrf_statistics
from llmops_kit.evaluation.cost import quantile_interval
from llmops_kit.evaluation.metrics import likelihood_metrics, mean_metric, text_metrics
from llmops_kit.evaluation.similarity import edit_similarity, levenshtein, token_f1
from llmops_kit.evaluation.slices import flat_slices, slice_columns, slice_picture, slice_rows, slice_table, slice_values, slices
from llmops_kit.evaluation.statistics import resample_counts, resampled_values
from llmops_kit.runs.errors import UserError

STRANGE = [(["打开文件", "é e\u0301"], ["打开 文件", "é"]), (["\u2003 a", "a"], ["a", "ab"]), (["🙂🙂"], ["🙂"]), ([" "], ["."])]


def test_chrf_is_sacrebleus():
    from sacrebleu.metrics import CHRF
    found = [(float(chrf_of_sums(chrf_statistics(p, r).sum(0))), CHRF().corpus_score(p, [r]).score) for p, r in [*PLANTED, *STRANGE, *corpora()]]
    assert max(abs(a - b) for a, b in found) < 1e-10  # the largest seen: 1.4e-14
    assert min(b for _, b in found) < 1 and max(b for _, b in found) > 50


def test_resampled_chrf_is_chrf_of_the_resampled_texts():
    from sacrebleu.metrics import CHRF
    rng = random.Random(1)
    references = [sentence(rng) for _ in range(20)]
    predictions = [noisy(rng, r) for r in references]
    metric = text_metrics([str(i) for i in range(20)], predictions, references)["chrf"]
    counts = np.concatenate(list(resample_counts(20, 10))).astype(int)
    for value, count in zip(resampled_values(metric, resamples=10), counts):
        p, r = (np.repeat(np.array(texts, dtype=object), count).tolist() for texts in (predictions, references))
        assert abs(CHRF().corpus_score(p, [r]).score - value) < 1e-10


def squad_f1(prediction, reference):
    "Written from the description of the SQuAD script: precision and recall over a bag of words."
    def bag(t): return Counter(w for w in "".join(c for c in re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in t.lower() if c not in string.punctuation))).split())
    said, due = bag(prediction), bag(reference)
    if not said or not due: return float(said == due)
    same = sum(min(n, due[w]) for w, n in said.items())
    if not same: return 0.0
    precision, recall = same/sum(said.values()), same/sum(due.values())
    return 2*precision*recall/(precision + recall)


def distance(a, b):
    "The textbook table."
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, c in enumerate(a):
        for j, d in enumerate(b): table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (c != d))
    return table[-1, -1]


def test_similarities_are_the_independent_formulas():
    pairs = [(p, r) for ps, rs in [*PLANTED, *STRANGE, *corpora(20)] for p, r in zip(ps, rs)]
    p, r = zip(*pairs)
    assert max(abs(a - squad_f1(*o)) for a, o in zip(token_f1(p, r), pairs)) < 1e-12
    expected = [1 - distance(a.strip(), b.strip())/max(len(a.strip()), len(b.strip()), 1) for a, b in pairs]
    assert max(abs(a - b) for a, b in zip(edit_similarity(p, r), expected)) == 0
    rng = random.Random(2)
    for n in (63, 64, 65, 200): # around the sizes of machine words
        a, b = ("".join(rng.choices("ab", k=n)) for _ in range(2))
        assert levenshtein(a, b) == levenshtein(b, a) == distance(a, b)


def test_bits_per_byte_counts_bytes_not_characters():
    metric = likelihood_metrics(["x", "y"], [2.0, 6.0], [3, 4], ["é", "abc"])["bits_per_byte"]
    assert metric.value == pytest.approx(8/np.log(2)/5, abs=1e-12) and metric.better == "lower"


@pytest.mark.parametrize("nll, tokens, says", [([1.0, np.nan], [1, 1], "first is of example 'b'"), ([1.0, np.inf], [1, 1], "'b'"), ([1.0, 2.0], [0, 1], "'a'"), ([1.0], [1], "do not pair up")])
def test_broken_likelihoods_are_refused(nll, tokens, says):
    with pytest.raises(UserError, match=says): likelihood_metrics(["a", "b"], nll, tokens, ["x", "y"])


def test_every_metric_has_a_signature():
    found = text_metrics(["a"], ["x y"], ["x z"]) | likelihood_metrics(["a"], [1.0], [2], ["x z"])
    assert all(m.signature for m in found.values()) and "version:" in found["chrf"].signature


# -- slices

def rows(n=90, few=5):
    rng = random.Random(3)
    return [{"id": f"r{i}", "label": "rare" if i < few else "even" if i % 2 else "odd", "made_from": {"method": "paraphrase"} if i % 3 else None,
             "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=1 + i % 30))}, {"role": "assistant", "content": sentence(rng)}]} for i in range(n)]


def metrics_of(rows, gain=lambda row: 0.0, seed=0):
    rng, ids = np.random.default_rng(seed), [row["id"] for row in rows]
    tokens, level = np.random.default_rng(9).integers(4, 30, len(rows)), np.random.default_rng(8).normal(3, 0.5, len(rows))
    return likelihood_metrics(ids, tokens*(level - [gain(row) for row in rows] + rng.normal(0, 0.05, len(rows))), tokens)


def test_a_slice_is_the_metric_of_its_examples_and_a_planted_one_is_found():
    given = rows()
    base, tuned = metrics_of(given), metrics_of(given, lambda row: -0.3*(row["label"] == "odd"), seed=1)
    found = slices(given, slice_columns("label, length,made_from.method", given), tuned, base)
    by_name = {s.name: s for s in found}
    assert {k: s.verdicts.get("loss", "few") for k, s in by_name.items() if s.column == "label"} == {"label=odd": "worse", "label=even": "not decided", "label=rare": "few"}
    odd = by_name["label=odd"]
    at = [i for i, row in enumerate(given) if row["label"] == "odd"]
    assert odd.ids == [given[i]["id"] for i in at]
    assert odd.intervals["loss"].value == pytest.approx(tuned["loss"].statistics[at, 0].sum()/tuned["loss"].statistics[at, 1].sum(), abs=1e-12)
    for column in ("label", "length", "made_from.method"): assert sorted(i for s in found if s.column == column for i in s.ids) == sorted(row["id"] for row in given)
    assert "too few" in slice_table(found).to_string() and json.dumps(flat_slices(found), allow_nan=False) and json.dumps(slice_rows(found), allow_nan=False)
    assert slice_picture(found, ["loss"]).png[:4] == b"\x89PNG"


def test_equal_models_seldom_differ_on_any_slice():
    "200 pairs of equal models, four parts each: together 5 %, with three standard errors of simulation (4.6 points)."
    given = rows(160, 0)
    alarms = [any("not decided" != s.verdicts["loss"] for s in slices(given, ["length"], metrics_of(given, seed=2*i), metrics_of(given, seed=2*i + 1), resamples=600)) for i in range(200)]
    assert np.mean(alarms) < 0.1


def test_slices_name_the_fix():
    given = rows()
    assert slice_columns("", given) == []
    with pytest.raises(UserError, match="Did you mean label"): slice_columns("lable", given)
    with pytest.raises(UserError, match="in their order"): slices(given[::-1], ["label"], metrics_of(given))
    with pytest.raises(UserError, match="20 examples or more"): slice_picture(slices(given[:9], ["label"], metrics_of(given[:9])))
    many = [row | {"module": f"m{i}"} for i, row in enumerate(given)]
    assert len(set(slice_values(many, "module"))) == 12 and "79 others" in slice_values(many, "module")


# -- cost and calibration

def test_quantile_intervals_cover_whatever_the_shape():
    "1,000 simulated sets of 200 latencies: 95 %, with three standard errors (2.1 points)."
    rng = np.random.default_rng(0)
    for draw, truth in ((lambda: rng.lognormal(0, 1, 200), np.exp(1.6448536)), (lambda: rng.random(200), 0.95)):
        found = [quantile_interval(draw(), 0.95) for _ in range(1000)]
        assert np.mean([i.low <= truth <= i.high for i in found]) > 0.929


def predictions(n=400, sharper=1.0, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.6]*3, size=n)
    truth = (p.cumsum(1) > rng.random((n, 1))).argmax(1)
    return [str(i) for i in range(n)], truth, p**sharper/(p**sharper).sum(1, keepdims=True)


def test_ece_is_the_formula_and_its_bins_are_scikit_learns():
    from sklearn.calibration import calibration_curve
    ids, truth, p = predictions()
    confidence, right = p.max(1), p.argmax(1) == truth
    bins = np.clip(np.ceil(confidence*15) - 1, 0, 14)
    plain = sum(abs(right[bins == b].mean() - confidence[bins == b].mean())*(bins == b).mean() for b in range(15) if (bins == b).any())
    assert abs(ece(ids, truth, p).value - plain) < 1e-12
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, strategy="uniform")
    found = calibration(ids, truth, p, resamples=100).bins
    assert np.allclose([b["accuracy"] for b in found], accuracy, atol=1e-12) and np.allclose([b["confidence"] for b in found], mean, atol=1e-12)


def test_calibrated_is_seldom_accused_and_bold_is_found():
    "100 calibrated classifiers: 5 % accused, with three standard errors (6.5 points)."
    said = [calibration(*predictions(seed=i), resamples=100).verdict for i in range(100)]
    assert np.mean([o != "not decided" for o in said]) < 0.12
    assert [calibration(*predictions(sharper=s), resamples=100).verdict for s in (3, 0.4)] == ["overconfident", "underconfident"]


def test_what_is_no_probability_is_refused():
    ids, truth, p = predictions(20)
    for bad, says in ((lambda: ece(ids, truth + 1, p), "outside the set"), (lambda: ece(ids, truth, p*2), "softmax"), (lambda: ece(ids, truth[:5], p), "pair up"),
                      (lambda: ece(ids, truth, np.where(p > 0.5, np.nan, p)), "softmax")):
        with pytest.raises(UserError, match=says): bad()
