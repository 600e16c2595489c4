"""Statistics: promises kept under the null and not by planted bugs; runs that cannot be paired are refused; the gate and `llmops diff` say what was decided."""
import json, random
from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest
from conftest import run_command

from llmops_kit.evaluation.anytime import betting_capital, betting_sequence, first_refuted, matched_evidence, until_decided
from llmops_kit.evaluation.gate import gate, read_policy
from llmops_kit.evaluation.metrics import likelihood_metrics, mean_metric, text_metrics
from llmops_kit.evaluation.multiplicity import benjamini_hochberg, holm, pointwise_confidence, simultaneous_differences
from llmops_kit.evaluation.paired_runs import compare_models, load_models, saved_model, verdict_lines
from llmops_kit.evaluation.sample_size import examples_needed, standard_error
from llmops_kit.evaluation.statistics import bootstrap_interval, by_group, paired_difference
from llmops_kit.evaluation.tests_of_difference import mcnemar_test, permutation_test
from llmops_kit.runs.artifacts import Artifact, canonical_json
from llmops_kit.runs.errors import UserError
from llmops_kit.runs.job import resolve_references
from llmops_kit.runs.ledger import create_record, new_run_id, update_record

N, GROUPS = 80, 16
IDS = [f"e{i:03}" for i in range(N)]
MEMBERS = [f"g{i%GROUPS:02}" for i in range(N)]


def scores(values, **kwargs): return mean_metric("rouge_l", IDS, values, **kwargs)
def losses(rng, gain=0.0):
    tokens, difficulty = rng.integers(4, 30, N), rng.normal(3, 0.7, N)
    return [likelihood_metrics(IDS, tokens*(difficulty - g + rng.normal(0, 0.3, N)), tokens)["perplexity"] for g in (0, gain)]
def matches(rng):
    easy, luck = rng.random(N) < 0.1, rng.random((2, N)) < 0.1
    return [mean_metric("exact_match", IDS, easy | o, proportion=True) for o in luck]
def clustered(rng):
    luck, own, at = rng.normal(0, 0.12, (2, GROUPS)), rng.normal(0, 0.15, (2, N)), np.arange(N)%GROUPS
    return [scores(0.4 + l[at] + o) for l, o in zip(luck, own)]
def family(rng):
    shared, own = rng.normal(0, 0.15, (2, N)), rng.normal(0, 0.1, (2, 7, N))
    return {f"m{k}": tuple(scores(shared[side] + own[side, k]) for side in (0, 1)) for k in range(7)}


def rate(test, simulations=300, seed=0):
    rng = np.random.default_rng(seed)
    return float(np.mean([bool(test(rng)) for _ in range(simulations)]))


# -- tests: what they are by definition

def test_permutation_is_its_definition_for_metrics_of_sums():
    rng = random.Random(0)
    words = "return the name of a file and close it".split()
    texts = [[" ".join(rng.choices(words, k=8)) for _ in range(9)] for _ in range(3)]
    for name in ("bleu", "rouge_l", "exact_match"):
        a, b = (text_metrics(IDS[:9], t, texts[2])[name] for t in texts[:2])
        def difference(swap):
            at = np.array(swap)[:, None]
            return abs(a.of(np.where(at, a.statistics, b.statistics).sum(0)) - a.of(np.where(at, b.statistics, a.statistics).sum(0)))
        found = [difference(swap) for swap in product([0, 1], repeat=9)]
        assert permutation_test(a, b) == pytest.approx(np.mean([o >= found[0]*(1 - 1e-9) for o in found]))


def test_random_swaps_come_near_the_exact_test():
    rng = np.random.default_rng(1)
    a = scores(rng.random(N)); change = np.where(np.arange(N) < 12, rng.normal(0.1, 0.2, N), 0)
    b = scores(a.each + change)
    assert permutation_test(a, b, draws=4000) == pytest.approx(permutation_test(a, b, draws=5000), abs=0.025)  # 4,096 swaps: all, against 4,000 drawn


def test_mcnemar_is_the_sum_of_the_coin():
    right = lambda gained, lost: [mean_metric("exact_match", IDS, o, proportion=True) for o in ((np.arange(N) >= N - lost) , (np.arange(N) < gained))]
    for gained, lost in [(9, 2), (3, 3), (0, 5), (1, 0), (0, 0)]:
        n, tail = gained + lost, min(gained, lost)
        exact = float(min(Fraction(1), 2*sum(Fraction(comb(n, k), 2**n) for k in range(tail + 1))))
        assert mcnemar_test(*right(gained, lost)) == pytest.approx(exact)
        assert permutation_test(*right(gained, lost)) == pytest.approx(exact)


def test_corrections():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}
    assert holm(p) == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert benjamini_hochberg(p) == pytest.approx({"a": 0.04, "b": 0.16/3, "c": 0.16/3, "d": 0.5})
    same = scores(np.random.default_rng(0).random(N)), scores(np.random.default_rng(1).random(N))
    assert pointwise_confidence({k: same for k in "abcdef"}) == pytest.approx(0.95, abs=0.012)  # six times one metric is one metric


# -- promises: 300 test sets; 5 % and three standard errors of simulation are 8.8 %

def test_equal_models_are_seldom_told_apart():
    assert rate(lambda rng: permutation_test(*losses(rng), draws=300) <= 0.05) < 0.09
    assert rate(lambda rng: mcnemar_test(*matches(rng)) <= 0.05) < 0.05  # exact tests of few examples are conservative
    assert rate(lambda rng: permutation_test(*clustered(rng), MEMBERS, draws=300) <= 0.05) < 0.09
    assert rate(lambda rng: paired_difference(*clustered(rng), resamples=300, groups=MEMBERS).excludes_zero) < 0.12  # 16 groups are few


def test_planted_clustered_examples_taken_for_independent_ones():
    assert rate(lambda rng: permutation_test(*clustered(rng), draws=300) <= 0.05) > 0.15
    assert rate(lambda rng: paired_difference(*clustered(rng), resamples=300).excludes_zero) > 0.15
    covered = lambda rng, groups: (lambda i: i.low <= 0.4 <= i.high)(bootstrap_interval(by_group(clustered(rng)[0], MEMBERS) if groups else clustered(rng)[0], resamples=300))
    assert rate(lambda rng: covered(rng, True)) > 0.88 and rate(lambda rng: covered(rng, False)) < 0.85


def test_planted_seven_metrics_without_a_correction():
    p = lambda rng: {k: permutation_test(*pair, draws=200) for k, pair in family(rng).items()}
    assert rate(lambda rng: min(p(rng).values()) <= 0.05, 150) > 0.1
    assert rate(lambda rng: min(holm(p(rng)).values()) <= 0.05, 150) < 0.11
    assert rate(lambda rng: any(i.excludes_zero for i in simultaneous_differences(family(rng), resamples=300).values()), 150) < 0.11


def test_planted_unpaired_answers_lose_the_difference():
    def pair(rng):
        shared = rng.beta(0.5, 1.5, N)
        return [scores(shared + g + rng.normal(0, 0.1, N)) for g in (0, 0.06)]
    shuffled = lambda rng: (lambda a, b: (a, scores(rng.permutation(b.each))))(*pair(rng))
    assert rate(lambda rng: permutation_test(*pair(rng), draws=300) <= 0.05, 150) > 0.85
    assert rate(lambda rng: permutation_test(*shuffled(rng), draws=300) <= 0.05, 150) < 0.5


def equal(rng, n=400): return rng.beta(0.5, 1.5, n) - rng.beta(0.5, 1.5, n)


def test_looking_at_any_time_is_allowed_to_the_anytime_comparison_alone():
    def peeking(rng):
        d, t = equal(rng), np.arange(1, 401)
        mean, square = np.cumsum(d)/t, np.cumsum(d*d)/t
        return (abs(mean)*np.sqrt(t)/np.sqrt(square - mean**2 + 1e-12))[19::10].max() > 1.96
    assert rate(peeking) > 0.2
    assert rate(lambda rng: first_refuted(equal(rng), 0, 0.05)) < 0.09
    def tosses(rng): w = rng.random(400) < 0.5; return (matched_evidence(np.cumsum(w), np.cumsum(~w)) >= 20).any()
    assert rate(tosses) < 0.09
    truth = lambda rng: (lambda low, high: (low <= 0.1).all() and (high >= 0.1).all())(*betting_sequence(rng.choice([-0.5, 0.3, 0.5], 150), 0.1))
    assert rate(truth, 60) > 0.9


def test_a_stake_that_saw_its_example_is_caught():
    "Planted: a gambler who bets after the example wins without a difference. The capital of a fair game stays 1 on average."
    rng = np.random.default_rng(2)
    end = [betting_capital(equal(rng, 30), 0, 0.2).sum(0)[-1] for _ in range(3000)]
    cheating = [betting_capital(np.sort(equal(rng, 30)), 0, 0.2).sum(0)[-1] for _ in range(300)]
    assert abs(np.mean(end) - 1) < 4*np.std(end)/3000**0.5 and not abs(np.mean(cheating) - 1) < 4*np.std(cheating)/300**0.5


def test_a_large_difference_ends_early_and_either_way():
    rng = np.random.default_rng(3)
    for sign, better, word in ((1, "higher", "better"), (-1, "higher", "worse"), (-1, "lower", "better")):
        found = until_decided(([d] for d in np.clip(equal(rng, 3000) + 0.2*sign, -1, 1)), 0.05, better)
        assert found.verdict == word and found.examples < 200
    with pytest.raises(UserError, match="no example"): until_decided([], 0.05)


def test_as_many_examples_as_were_asked_for_find_the_difference():
    rng = np.random.default_rng(4)
    error = np.mean([standard_error(*losses(rng), resamples=500) for _ in range(10)])
    assert examples_needed(error, N, 2.8016*error) == pytest.approx(N, abs=1)
    assert examples_needed(error, N, 1.4008*error) == pytest.approx(4*N, abs=2)


# -- runs

WORDS = "return the name of a file and close it when no one reads from its queue again".split()


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path/"runs"))
    def made(name, errs, seed, rows=120, metrics=None, likelihood=True, second=None, **changes):
        luck, lines, id = random.Random(0), [], new_run_id("evaluate")
        drawn = {"tuned" if second else "model": (errs, random.Random(seed)), **({"base": (second, random.Random(99))} if second else {})}
        for n in range(rows):
            reference, shared = " ".join(luck.choices(WORDS, k=9)), luck.gauss(0, 3)
            line = {"id": f"m{n%24:02}:f{n:03}", "group": f"m{n%24:02}", "prompt": f"What does f{n} do?", "reference": reference}
            for label, (e, own) in drawn.items():
                line[label] = " ".join(w if own.random() > e else own.choice(WORDS) for w in reference.split())
                if likelihood: line |= {f"{label}_nll": 20 + 10*e + shared + own.gauss(0, 1), f"{label}_tokens": 10.0}
            lines.append(line | changes)
        path = create_record({"id": id, "job": "evaluate", "name": name, "status": "finished", "outputs": [], "metrics": metrics or {}})/"artifacts/predictions.jsonl"
        path.write_text("".join(canonical_json(o) + "\n" for o in random.Random(seed).sample(lines, len(lines))))
        update_record(id, outputs=[Artifact.of(path, path.name, "predictions", run=id).as_dict() | {"path": "artifacts/predictions.jsonl"}])
        return id
    made.folder = tmp_path
    return made


def test_saved_metrics_are_those_that_were_measured(ledger):
    "Any order of the file; each metric as `evaluate` computes it."
    model = saved_model(ledger("one", 0.4, 1))
    texts = text_metrics(model.ids, [o["model"] for o in model.rows], [o["reference"] for o in model.rows])
    assert model.ids == sorted(model.ids) and set(model.metrics) == {"loss", "perplexity", "bits_per_byte", *texts}
    assert all(model.metrics[k].value == m.value for k, m in texts.items())
    assert set(saved_model(ledger("old", 0.4, 1, likelihood=False)).metrics) == set(texts)


def test_runs_that_cannot_be_paired_are_refused_with_the_difference(ledger):
    a = ledger("a", 0.4, 1)
    for other, says in ((ledger("longer", 0.4, 2, rows=122), "2, m00:f120, m01:f121"), (ledger("edited", 0.4, 2, prompt="Why?"), "120 of 120 examples have the same id")):
        with pytest.raises(UserError, match=says): compare_models(load_models(f"{a},{other}"))
    with pytest.raises(UserError, match="no base beside"): load_models(a)
    with pytest.raises(UserError, match="named twice"): load_models(f"{a}, {a}")
    with pytest.raises(UserError, match="Did you mean group"): compare_models(load_models(f"{a},{ledger('b', 0.4, 3)}"), cluster="groups")


def test_verdicts_of_better_worse_and_equal_runs(ledger):
    runs = [ledger(name, errs, seed) for name, errs, seed in (("used", 0.4, 1), ("better", 0.25, 2), ("worse", 0.6, 3), ("equal", 0.4, 4))]
    comparison = compare_models(load_models(",".join(runs)))
    assert {k: o["rouge_l"].verdict for k, o in comparison.results.items()} == {"better": "better", "worse": "worse", "equal": "not decided"}
    assert {k: o["perplexity"].verdict for k, o in comparison.results.items()} == {"better": "better", "worse": "worse", "equal": "not decided"}
    assert comparison.groups and comparison.flat()["groups"] == 24 and comparison.flat()["3/verdict/loss"] == -1
    assert all(o.together.low <= o.difference.low and o.together.high >= o.difference.high and o.corrected >= o.p_value for found in comparison.results.values() for o in found.values())
    assert verdict_lines(runs[0], runs[1])["bleu"][2].startswith("better (+") and verdict_lines(runs[0], ledger("longer", 0.4, 1, rows=121)) == {}
    own = compare_models(load_models(ledger("adapter", 0.2, 5, second=0.5)))
    assert own.results["tuned"]["rouge_l"].verdict == "better"


def test_a_list_of_runs_is_resolved(ledger):
    a, b = ledger("a", 0.4, 1), "20200101-000000-evaluate-0000"
    values, references = resolve_references({"runs": f"{b}, latest:evaluate", "text": "one, two"})
    assert values == {"runs": f"{b},{a}", "text": "one, two"} and references == {"runs": f"{b}, latest:evaluate"}


def test_the_gate_blocks_a_worse_adapter_and_passes_a_better_one(ledger):
    used, better, worse = (ledger(name, errs, seed, second=0.7, metrics={"cost/latency_p95_seconds": 1.5}) for name, errs, seed in (("used", 0.4, 1), ("better", 0.25, 2), ("worse", 0.5, 3)))
    policy = ledger.folder/"policy.yaml"
    policy.write_text(f"baseline: {used}\nrules:\n- {{metric: rouge_l, largest_loss: 0.02}}\n- {{metric: perplexity, largest_loss: 0.05}}\n- {{metric: cost/latency_p95_seconds, maximum: 2}}\n"
                      "- {metric: rouge_l, slice: {group: m03}, minimum: 0.2}\n- {metric: rouge_l, minimum: 0.3, largest_loss: 0, baseline: base}\n")
    assert len(gate(better, policy)["rules"]) == 6 and gate(better, policy)["passed"]
    found = gate(worse, policy)
    assert [o["passed"] for o in found["rules"]] == [False, False, True, True, True, True] and "what was seen is more" in found["rules"][0]["reason"]
    env = {"LLMOPS_RUNS": str(ledger.folder/"runs")}
    passed, blocked, wrong = (run_command("llmops", "gate", run, "--policy", policy, "--json", env=env) for run in (better, worse, used))
    assert (passed.returncode, blocked.returncode, wrong.returncode) == (0, 1, 2) and json.loads(blocked.stdout) == found
    assert "is the run itself" in wrong.stderr and "Traceback" not in wrong.stderr


def test_planted_a_gate_that_goes_by_the_point_lets_luck_pass(ledger):
    "An equal model on 16 examples: its point is within the limit as often as not, its interval is not."
    a, b = ledger("used", 0.4, 1, rows=24), ledger("small", 0.4, 2, rows=24)
    policy = read_policy(_policy(ledger, f"- {{metric: rouge_l, largest_loss: 0.05, baseline: {a}}}"))
    by_point = saved_model(b).metrics["rouge_l"].value >= saved_model(a).metrics["rouge_l"].value - 0.05
    found, = gate(b, ledger.folder/"p.yaml")["rules"]
    assert policy["rules"] and by_point and not found["passed"] and "not decided with 24 examples" in found["reason"]


def _policy(ledger, text):
    (ledger.folder/"p.yaml").write_text(text)
    return ledger.folder/"p.yaml"


@pytest.mark.parametrize("rule, says", [("{metric: rougel, minimum: 1}", "Did you mean rouge_l?"), ("{metric: bleu, minimum: 1, slice: {grop: m01}}", "Did you mean group?"),
                                        ("{metric: bleu, minimum: 1, slice: {group: m99}}", "No example"), ("{metric: cost/seconds, maximum: 1}", "recorded no cost/seconds"),
                                        ("{metric: bleu, largest_loss: 1, baseline: base}", "no base beside"), ("{metric: bleu, largest_loss: -1, baseline: base}", "negative")])
def test_a_wrong_policy_names_its_fix(ledger, rule, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")): gate(ledger("a", 0.4, 1), _policy(ledger, f"rules: [{rule}]"))
