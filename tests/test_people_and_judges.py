"People and judges: no answer is lost, agreement is that of the reference libraries, a judge's habits are found, and what it may cost is kept."
import itertools, json, random, re, threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import llmops, run_command
from test_jobs import check_wandb, check_whole

from llmops_kit.evaluation.answers import AnswerPairs, choose_pairs, left_model, load_predictions, pair_up
from llmops_kit.evaluation.judge import pair_questions, read_scores, read_verdicts, rubric_questions
from llmops_kit.evaluation.judges import Budget, EndpointJudge, ask_all
from llmops_kit.evaluation.labels import Labels, label_report, merge_labels, stand_in
from llmops_kit.evaluation.raters import cohen_kappa, krippendorff_alpha
from llmops_kit.runs.errors import UserError

VERBS = "Return Close Open Read Write Parse Format Join Split Send Find Count".split()


def predictions(folder, n=36):
    "The tuned model says what the function does; the base writes its number."
    rows = [{"id": f"f{i}", "prompt": f"Write the one-line docstring of function {i}.", "reference": f"{VERBS[i % 12]} the value of field {i}.",
             "base": f"A function with the number {i}.", "tuned": f"{VERBS[i % 12]} the value {i}."} for i in range(n)]
    path = folder/"predictions.jsonl"
    path.write_text("".join(json.dumps(o) + "\n" for o in rows))
    return path


@pytest.fixture
def pairs(tmp_path): return choose_pairs(pair_up(load_predictions(str(predictions(tmp_path)))), 0)


# -- people

def test_no_answer_is_lost_wherever_the_machine_stops(pairs, tmp_path):
    labels = Labels(tmp_path/"whole.jsonl", pairs)
    for label in ("left", "tie", "right"): labels.give("ada", labels.next("ada")["id"], label)
    whole = labels.path.read_bytes()
    for cut in range(len(b"".join(whole.splitlines(keepends=True)[:2])), len(whole)):
        (tmp_path/"cut.jsonl").write_bytes(whole[:cut])
        again = Labels(tmp_path/"cut.jsonl", pairs)
        kept = 2 + (cut == len(whole) - 1)  # only the line's end is missing
        assert [e["label"] for e in again.given("ada")] == ["left", "tie", "right"][:kept]
        again.give("ada", again.next("ada")["id"], "skip")
        assert [e["label"] for e in Labels(again.path, pairs).given("ada")] == ["left", "tie", "right"][:kept] + ["skip"]


def test_sides_are_drawn_and_each_rater_has_their_own(pairs):
    sides = {r: [left_model(pairs, row["id"], r) == "tuned" for row in pairs.rows] for r in ("ada", "ben", "cleo")}
    assert all(0.25 < np.mean(s) < 0.75 for s in sides.values()) and len(set(map(tuple, sides.values()))) == 3


def test_labels_of_other_answers_are_none(pairs, tmp_path):
    labels = Labels(tmp_path/"labels.jsonl", pairs)
    stand_in(labels, "ada", lambda row, m: m == "tuned")
    changed = AnswerPairs(pairs.models, [row | {"answers": row["answers"] | {"tuned": row["answers"]["tuned"] + "!"}} for row in pairs.rows])
    with pytest.raises(UserError, match=f"{len(pairs.rows)} lines are about other pairs"): label_report(Labels(labels.path, changed))
    assert label_report(Labels(labels.path, pairs)).win.verdict == "better"
    (tmp_path/"wrong.jsonl").write_text('{"rater": "ada", "pair": "f0", "answers": "x", "label": "best"}\n')
    with pytest.raises(UserError, match="no label"): merge_labels([tmp_path/"wrong.jsonl"], tmp_path/"to.jsonl")


def alpha_by_pairs(ratings):
    "Krippendorff's alpha from its definition: disagreement within items over disagreement among all answers."
    items = [[of[i] for of in ratings.values() if i in of] for i in sorted(set().union(*ratings.values()))]
    items = [v for v in items if len(v) > 1]
    every = [a for v in items for a in v]
    observed = sum(sum(a != b for a, b in itertools.permutations(v, 2))/(len(v) - 1) for v in items)/len(every)
    return 1 - observed/(sum(a != b for a, b in itertools.permutations(every, 2))/(len(every)*(len(every) - 1)))


def test_agreement_is_that_of_the_references():
    from sklearn.metrics import cohen_kappa_score
    largest = 0
    for seed in range(40):
        rng = random.Random(seed)
        n, categories = rng.randint(4, 40), ["base", "tie", "tuned"][:rng.randint(2, 3)]
        ratings = {r: {i: rng.choice(categories) for i in range(n) if rng.random() < 0.8} for r in "abc"[:rng.randint(2, 3)]} | {"d": {i: categories[i % 2] for i in range(n)}}
        largest = max(largest, abs(krippendorff_alpha(ratings).value - alpha_by_pairs(ratings)))
        both = [i for i in ratings["a"] if i in ratings["d"]]
        theirs = cohen_kappa_score(*([ratings[r][i] for i in both] for r in "ad"))
        largest = max(largest, abs(cohen_kappa(both, *([ratings[r][i] for i in both] for r in "ad")).value - theirs))
    assert largest < 1e-12


def test_labels_train_a_preference(tmp_path, warm):
    "label and prefer, as a user runs them; a batch run without labels says what to do."
    env, given = warm | {"LLMOPS_RUNS": str(tmp_path/"runs")}, predictions(tmp_path)
    done = run_command("llmops", "run", "label", "-p", "predictions", given, "-p", "wandb", "off", env=env)
    assert done.returncode == 1 and "nobody to click" in done.stderr and "Traceback" not in done.stderr
    label = json.loads(llmops("run", "label", "-p", "predictions", given, "-p", "labels", "stand-in", "-p", "pairs", "36", "--json", env=env))
    check_whole(label, tmp_path/"runs"/label["id"], {"predictions", "labels", "pairs"})
    check_wandb(label, tmp_path/"runs"/label["id"])
    assert label["metrics"]["people/raters"] == 2 and label["metrics"]["people/win_rate/low"] > 0.5, "the stand-ins follow ROUGE-L, and the tuned answers have it"
    assert any("simulated" in o for o in label["warnings"])
    prefer = json.loads(llmops("run", "prefer", "-p", "data", "latest:label", "-p", "max_steps", "2", "-p", "validation_examples", "4", "-p", "test_examples", "8", "-p", "eval_every", "2",
                               "-p", "max_new_tokens", "4", "-p", "wandb", "off", "--json", env=env))
    data, = [o for o in prefer["inputs"] if o["name"] == "data"]
    assert prefer["status"] == "finished" and data["run"] == label["id"] and data["sha256"] == next(o["sha256"] for o in label["outputs"] if o["name"] == "preferences")
    assert prefer["metrics"]["train/steps"] == 2


# -- judges

class Server(ThreadingHTTPServer):
    "An OpenAI-compatible endpoint on loopback; `answer` gets the prompt and gives a text, (status, headers), or None to hang up."
    def __init__(self, answer):
        self.answer, self.seen, self.keys = answer, [], []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/v1"
    def __enter__(self): return self
    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        answer = self.server.answer(body["messages"])
        if answer is None: return self.connection.close()
        status, headers = (200, {}) if isinstance(answer, str) else answer
        said = json.dumps({"choices": [{"message": {"content": answer}}], "usage": {"prompt_tokens": 200, "completion_tokens": 10}}).encode()
        self.send_response(status)
        for k, v in (headers | {"Content-Length": str(len(said))}).items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(said)
    def log_message(self, *args): pass


def verdict(v): return json.dumps({"reason": "because", "verdict": v})
def better_place(messages): return "A" if any(v in re.search("<answer A>\n(.*)\n", messages[0]["content"])[1] for v in VERBS) else "B"


def fair(seed=0, right=0.9):
    "Knows the better answer, with some mistakes; likes no place."
    rng = random.Random(seed)
    return lambda messages: verdict(better_place(messages) if rng.random() < right else rng.choice("ABC"))


def judged(server, pairs, path, sleep=lambda s: None, questions=None, **bounds):
    judge = EndpointJudge(server.url, "stand-in", auth_variable="JUDGE_KEY_FOR_TESTS", sleep=sleep)
    return ask_all(judge, questions or pair_questions(pairs), path, Budget(**bounds))


def test_a_fair_judge_finds_the_better_model_and_has_no_bias(pairs, tmp_path):
    with Server(fair()) as server: found = read_verdicts(pairs, judged(server, pairs, tmp_path/"r.jsonl"))
    assert found.win.verdict == "better" and not found.bias.excludes_zero and found.consistent.low > 0.5 and not found.open
    assert server.seen[0]["response_format"]["json_schema"]["schema"]["properties"]["verdict"]["enum"] == ["A", "B", "C"]


def test_a_judge_that_always_takes_the_first_is_found(pairs, tmp_path):
    with Server(lambda messages: verdict("A")) as server: found = read_verdicts(pairs, judged(server, pairs, tmp_path/"r.jsonl"))
    assert found.bias.low > 0.8 and found.bias_text == "prefers the first place" and found.win.verdict == "not decided"
    assert set(found.outcomes.values()) == {"inconsistent"}


def test_a_habit_that_half_of_the_verdicts_have_is_found(pairs, tmp_path):
    rng, honest = random.Random(3), fair(4)
    with Server(lambda m: verdict("B") if rng.random() < 0.5 else honest(m)) as server: found = read_verdicts(pairs, judged(server, pairs, tmp_path/"r.jsonl"))
    assert found.bias.high < 0 and found.bias_text == "prefers the second place"


def test_nonsense_is_counted_and_never_guessed(pairs, tmp_path):
    with Server(lambda messages: "Answer A is clearly better. A!") as server: replies = judged(server, pairs, tmp_path/"r.jsonl")
    found = read_verdicts(pairs, replies)
    n = 2*len(pairs.rows)
    assert replies.counts == {"unparsable": n} and replies.budget.calls == 2*n and not found.outcomes and set(found.open.values()) == {"unparsable"}
    with Server(lambda m: verdict(better_place(m)) if len(m) > 1 else "Well, ...") as server: replies = judged(server, pairs, tmp_path/"r2.jsonl")
    assert replies.counts == {"repaired": n} and read_verdicts(pairs, replies).win.verdict == "better"


def test_hanging_up_and_rate_limits_are_waited_for_and_bounded(pairs, tmp_path):
    calls, waits, honest = Counter(), [], fair(right=1)
    def sometimes(messages):
        n = calls[messages[0]["content"]] = calls[messages[0]["content"]] + 1
        return None if n == 1 else (429, {"Retry-After": "7"}) if n == 2 else honest(messages)
    with Server(sometimes) as server: replies = judged(server, pairs, tmp_path/"r.jsonl", waits.append)
    n = 2*len(pairs.rows)
    assert replies.counts == {"ok": n} and replies.budget.calls == 3*n and waits == [1.0, 7.0]*n
    for answer, why, calls in ((None, "no answer", 12), ((429, {"Retry-After": "3600"}), "asks to wait for 3600 s", 3), ((500, {}), "HTTP 500", 12)):
        with Server(lambda messages: answer) as server: replies = judged(server, pairs, tmp_path/f"{calls}{why[:4]}.jsonl")
        assert replies.counts == {"failed": 3} and replies.budget.calls == calls and why in replies.stopped, "three in a row are enough"
    with Server(lambda messages: (302, {"Location": "http://127.0.0.1:9/"})) as server, pytest.raises(UserError, match="HTTP 302"): judged(server, pairs, tmp_path/"moved.jsonl")


def test_bounds_stop_it_between_two_pairs_and_the_rest_is_named(pairs, tmp_path):
    with Server(fair(right=1)) as server:
        replies = judged(server, pairs, tmp_path/"r.jsonl", max_calls=11)
        found = read_verdicts(pairs, replies)
        assert len(server.seen) == 11 and len(found.outcomes) == 5 and list(found.open.values()) == ["not asked"]*(len(pairs.rows) - 5)
        money = judged(server, pairs, tmp_path/"m.jsonl", max_cost=0.005, price_in=2, price_out=10)
        assert money.budget.cost == pytest.approx(0.005) and len(money.replies) == 10 and "0.005" in money.stopped


def test_nothing_is_asked_twice_and_another_question_is(pairs, tmp_path):
    path = tmp_path/"r.jsonl"
    with Server(fair(right=1)) as server:
        judged(server, pairs, path, max_calls=20)
        path.write_bytes(path.read_bytes()[:-30])  # the machine stopped while it wrote the last one
        replies = judged(server, pairs, path)
        assert replies.reused == 19 and len(server.seen) == 20 + 2*len(pairs.rows) - 19 and len(set(json.dumps(o) for o in server.seen)) == 2*len(pairs.rows)
        asked = len(server.seen)
        assert judged(server, pairs, path).reused == 2*len(pairs.rows) and len(server.seen) == asked
        judged(server, pairs, path, questions=pair_questions(pairs, "Shorter is better."))
        assert len(server.seen) == asked + 2*len(pairs.rows), "another rubric is another question"


def test_rubric_scores_of_an_endpoint(pairs, tmp_path):
    score = lambda messages: json.dumps({"reason": "r", "score": "4" if any(v in messages[0]["content"].partition("<answer>")[2] for v in VERBS) else "2"})
    with Server(score) as server: found = read_scores(pairs, judged(server, pairs, tmp_path/"r.jsonl", questions=rubric_questions(pairs)))
    assert found.verdict == "better" and [i.value for i in found.means.values()] == [2, 4]


def test_the_job_with_an_endpoint_and_people(tmp_path, warm):
    key = "a-key-that-stands-nowhere-9f3b"
    env = warm | {"LLMOPS_RUNS": str(tmp_path/"runs"), "JUDGE_API_KEY": key}
    given = predictions(tmp_path)
    people = Labels(tmp_path/"people.jsonl", choose_pairs(pair_up(load_predictions(str(given))), 12))
    for name in ("ada", "ben"): stand_in(people, name, lambda row, m: 0.5*(m == "tuned"))
    with Server(fair(right=1)) as server:
        record = json.loads(llmops("run", "judge", "-p", "predictions", given, "-p", "judge", "stand-in", "-p", "base_url", server.url, "-p", "auth_variable", "JUDGE_API_KEY", "-p", "method", "pairs",
                                   "-p", "pairs", "12", "-p", "labels", people.path, "-p", "max_calls", "23", "-p", "price_in", "1", "--json", env=env))
    assert set(server.keys) == {f"Bearer {key}"} and len(server.seen) == 23
    check_whole(record, tmp_path/"runs"/record["id"], {"predictions", "judge", "base_url", "auth_variable", "method", "pairs", "labels", "max_calls", "price_in"})
    check_wandb(record, tmp_path/"runs"/record["id"])
    metrics = record["metrics"]
    assert (metrics["judge/wins"], metrics["judge/open"], metrics["questions/not_asked"]) == (11, 1, 1) and metrics["cost/price"] == pytest.approx(23*200/1e6)
    assert metrics["people/same"] > 0.8 and any("1 of 24 questions were not asked: the bound of 23 calls" in o for o in record["warnings"])
    assert not [p for p in (tmp_path/"runs").rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
