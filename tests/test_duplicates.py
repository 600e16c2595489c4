"Near-duplicates: planted pairs are found, strangers are not put together, and neither chunks nor order nor a million equal rows change that."
import random
from hashlib import sha256

import numpy as np
import pytest

import llmops_kit.data.duplicates as duplicates
from llmops_kit.data.duplicates import BLOCK, estimated_jaccard, hash_words, blocks, near_duplicates, normalise, signatures
from llmops_kit.runs.errors import UserError

from planted_duplicates import SAME_WORDS, pairs, prose, strangers

ODD = ["", " ", "!!!", "a", "Ünïcödé  \u2028 lines", "don’t can't", "汉字 and kana かな", "e\u0301 combined", "half \ud800 a pair", "zero\u200bwidth",
       "snake_case_name = x", "über-\nraschung", "ﬁligree Ⅷ ²", "नमस्ते दुनिया", "tabs\tand\r\nlines", "\x00\x01", "emoji 😀 here"]

@pytest.fixture(scope="module")
def planted(): return pairs(seed=11)


def test_vectorised_words_are_the_words_of_normalise():
    r = random.Random(3)
    alphabet = [chr(c) for c in (*range(32, 127), *range(0xA0, 0x250), 0x3B1, 0x2019, 0x2014, 0x4E00, 0x0416, 10, 10, 32, 32, 32, 32, 32, 32)]
    texts = ODD + ["".join(r.choices(alphabet, k=r.randrange(80))) for _ in range(500)]
    number = {}
    for _,pieces in blocks(texts):
        words,first,*_ = hash_words(pieces)
        got = [words[a:b].tolist() for a,b in zip(first, first[1:])]
    expected = [normalise(t) for t in texts]
    assert [len(g) for g in got] == [len(e) for e in expected]
    for g,e in zip(got, expected):
        for h,w in zip(g, e): assert number.setdefault(w, h) == h
    assert len(set(number.values())) == len(number) > 2000

def test_a_signature_depends_on_its_text_alone():
    texts = ODD + strangers(5, 60) + ["word " * 3*BLOCK, "x"*5*BLOCK, prose(random.Random(1), 40_000)]
    whole = signatures(texts)
    order = random.Random(2).sample(range(len(texts)), len(texts))
    assert (signatures([texts[i] for i in order]) == whole[order]).all()
    assert (np.concatenate([signatures([t]) for t in texts]) == whole).all()
    assert sha256(signatures(["the same on every machine, today and later, whatever the version of numpy"]).tobytes()).hexdigest()[:16] == "c9cb353bf7ff0833"

def test_edits_that_leave_the_words_leave_the_signature():
    texts = [prose(random.Random(i), 60) for i in range(20)]
    for kind,edit in SAME_WORDS.items(): assert (signatures([edit(t) for t in texts]) == signatures(texts)).all(), kind

def test_the_estimate_has_no_bias_and_the_error_of_256_places(planted):
    a,b = (signatures([getattr(p, s) for p in planted]) for s in "ab")
    error = estimated_jaccard(a, b) - np.array([p.jaccard for p in planted])
    assert abs(error.mean()) < 0.005 and error.std() < 0.03
    unrelated = estimated_jaccard(a, np.roll(b, 1, axis=0))
    assert abs(unrelated.mean()) < 0.01 and unrelated.max() < 0.1

def test_recall_and_precision_on_planted_pairs_among_strangers(planted):
    others = signatures(strangers(12, 3000))
    a,b = (signatures([getattr(p, s) for p in planted]) for s in "ab")
    true = np.array([p.jaccard for p in planted])
    for threshold,within in ((0.8, 0.05), (0.6, 0.07)):
        labels = near_duplicates(np.concatenate([a, others, b]), threshold)
        hit = labels[-len(b):] == np.arange(len(a))
        assert hit[true > threshold + within].mean() > 0.99
        assert hit[true < threshold - within].mean() < 0.02
        assert (labels[:-len(b)] == np.arange(len(a) + len(others))).all() # the clean control: no stranger is put together with anyone
    kinds = {p.kind for p in planted if p.jaccard == 1}
    assert all(hit[[p.kind == k for p in planted]].all() for k in kinds) and len(kinds) >= 5

def test_short_texts():
    texts = ["yes", "no", "Yes!", "reset my password please", "reset my  password, please", "reset my router please", "", "?", "!", "", "2+2", "2+3"]
    assert near_duplicates(signatures(texts)).tolist() == [0, 1, 0, 3, 3, 5, 6, 7, 8, 6, 10, 11]

def test_a_chain_is_one_cluster_and_its_label_is_the_first_text():
    words = prose(random.Random(4), 150).split()
    step = lambda k: " ".join(w if i > 6*k or i < 6*(k-1)*0 else f"new{i}" for i,w in enumerate(words))
    chain = [step(k) for k in range(8)]
    s = signatures(["something else altogether, " + prose(random.Random(9), 90)] + chain)
    assert estimated_jaccard(s[1], s[8]) < 0.7 # the ends are no near-duplicates, each neighbour is
    assert near_duplicates(s).tolist() == [0] + [1]*8
    assert near_duplicates(s[::-1].copy()).tolist() == [0]*8 + [8]

def compared(s, monkeypatch):
    "Clusters, and how many pairs were compared for them."
    count,alike = [],duplicates._alike
    with monkeypatch.context() as m:
        m.setattr(duplicates, "_alike", lambda s,a,b,t: count.append(len(a)) or alike(s, a, b, t))
        return near_duplicates(s), sum(count)

def test_a_hundred_thousand_equal_rows_are_compared_once_each(monkeypatch):
    s = np.broadcast_to(signatures([prose(random.Random(1), 100)]), (100_000, 256)).copy()
    labels,count = compared(s, monkeypatch)
    assert labels.max() == 0 and count == len(s) - 1

def test_a_band_that_all_rows_share_hides_no_pair_and_costs_no_square(monkeypatch):
    r = np.random.default_rng(0)
    s = r.integers(0, 256, (20_000, 256), np.uint8)
    s[:, :8] = 7 # as a long template does it
    s[10_000:, 16:] = s[:10_000, 16:]
    labels,count = compared(s, monkeypatch)
    assert (labels == np.arange(20_000) % 10_000).all() and count < 6*len(s)

def test_a_memory_map_gives_what_memory_gives(tmp_path, planted):
    s = signatures([p.a for p in planted] + [p.b for p in planted])
    mapped = np.memmap(tmp_path/"signatures", np.uint8, "w+", shape=s.shape)
    mapped[:] = s
    told = []
    assert (near_duplicates(mapped, on_progress=lambda done,total,text: told.append((done, total))) == near_duplicates(s)).all()
    assert told == [(k + 1, 32) for k in range(32)]

def test_a_threshold_that_cannot_be_searched():
    with pytest.raises(UserError, match="from 0.5 to 1"): near_duplicates(signatures(["a", "b"]), 0.2)
    assert near_duplicates(signatures([])).tolist() == []
