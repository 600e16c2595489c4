"Texts with planted near-duplicates and planted leaks of evaluation items whose truth is known, and clean ones beside them. Made from a seed."
import random, re, textwrap
from typing import NamedTuple

SYLLABLES = "ba ce di fo gu la me ni po ru sa te vi zo tar len mis don kel pra sti gro ner vul".split()

def vocabulary(size=6000):
    "Made-up words, the frequent ones short."
    r = random.Random(7)
    return list(dict.fromkeys("".join(r.choices(SYLLABLES, k=1 + (i > 40) + (i > 600)*r.randrange(1, 3))) for i in range(2*size)))[:size]

WORDS = vocabulary()
WEIGHTS = [1/(i + 5) for i in range(len(WORDS))] # few words make up half of a text, as in any language
drawn = lambda r, n: r.choices(WORDS, WEIGHTS, k=n)

def prose(r, n):
    "About `n` words as sentences with commas."
    words,out = drawn(r, n),[]
    while words:
        k = r.randrange(6, 18)
        sentence,words = words[:k],words[k:]
        if len(sentence) > 8: sentence[4] += ","
        out.append(" ".join(sentence).capitalize() + r.choice(["."]*8 + ["?", "!"]))
    return " ".join(out)

# -- what leaves the words as they are

def rewrapped(text, width=31): return "\n".join(textwrap.wrap(text, width))
def quoted(text): return "\n".join(f"> {l}" for l in textwrap.wrap(text, 40))
def recased(text): return text.upper()
def repunctuated(text): return re.sub(r"[,;]", " –", text).replace(".", " …").replace("?", " ?!").replace("'", "’")
def hyphenated(text, width=38):
    "Lines cut inside words, as a typesetter does it."
    out,line = [],""
    for word in text.split():
        if len(line) + len(word) > width and len(word) > 5 and word.isalpha():
            out.append(f"{line} {word[:3]}-".strip())
            line = word[3:]
        else:
            if len(line) + len(word) > width: out.append(line); line = ""
            line = f"{line} {word}".strip()
    return "\n".join(out + [line])

SAME_WORDS = {"verbatim": str, "re-wrapped": rewrapped, "quoted lines": quoted, "re-cased": recased, "punctuation changed": repunctuated,
              "hyphenated lines": hyphenated, "all of these": lambda t: rewrapped(repunctuated(recased(t)))}

# -- near-duplicates

class Pair(NamedTuple):
    a: str
    b: str
    kind: str
    jaccard: float # of the sets of three words in a row, counted plainly

def plain_jaccard(a, b):
    a,b = (set(zip(w, w[1:], w[2:])) for w in (re.findall(r"[a-z0-9]+", t.lower()) for t in (a, b)))
    return len(a & b)/len(a | b)

def replaced(r, text, jaccard):
    "Replace as many words as brings the similarity near the one asked for."
    words = text.split(" ")
    k = round((len(words) - 2)*(1 - jaccard)/(3*(1 + jaccard)))
    step = len(words)/max(k, 1)
    for i in range(k): words[int((i + r.random())*step) % len(words)] = f"{r.choice(WORDS)}{r.choice(SYLLABLES)}"
    return " ".join(words)

FOOTER = "Copyright by the authors. Subscribe to our newsletter for more stories like this one, and share this page with your friends."

def pairs(seed, each=40):
    "Pairs of about 170 words with their similarity: words replaced for 0.5 to 0.95, and edits that leave nearly everything."
    r = random.Random(seed)
    made = []
    for target in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        for _ in range(each):
            a = prose(r, 170)
            made.append((a, replaced(r, a, target), "words replaced"))
    for kind,edit in SAME_WORDS.items():
        if kind not in ("verbatim", "hyphenated lines"): made += [(a, edit(a), kind) for a in (prose(r, 170) for _ in range(each))]
    made += [(a, f"{a}\n\n{FOOTER}", "footer added") for a in (prose(r, r.randrange(100, 400)) for _ in range(each))]
    return [Pair(a, b, kind, plain_jaccard(a, b)) for a,b,kind in made]

def strangers(seed, n):
    "Texts that share nothing but the language, a greeting and a footer."
    r = random.Random(seed)
    return [f"Dear customer, thank you for writing to us.\n\n{prose(r, 150)}\n\n{FOOTER}" for _ in range(n)]

# -- leaks of evaluation items

HEADER = "The following is a question with four answers. Say which of them is right, and nothing else."

def exam(seed, n=200, name="exam"):
    "Multiple-choice items of one template."
    r = random.Random(seed)
    def item(k):
        options = [" ".join(drawn(r, r.choice([1, 2, 4, 7]))) for _ in range(4)]
        return {"set": name, "id": f"{name}-{k}", "question": prose(r, r.randrange(14, 40)), "options": options, "answer": r.randrange(4)}
    return [with_text(item(k)) for k in range(n)]

def with_text(item):
    lines = [f"{c}) {o}" for c,o in zip("ABCD", item["options"])]
    return item | {"text": "\n".join([HEADER, "", item["question"], *lines, f"Answer: {'ABCD'[item['answer']]}"])}

def open_items(seed, n=200, name="open"):
    "A prompt of one template and a written answer."
    r = random.Random(seed)
    return [{"set": name, "id": f"{name}-{k}", "text": f"Answer in one sentence, as briefly as you can.\n\n{prose(r, r.randrange(12, 60))}\n{prose(r, r.randrange(4, 15))}"} for k in range(n)]

class Leak(NamedTuple):
    text: str # what the training set holds
    id: str   # of the item that leaked; "" for a clean text
    kind: str

def reordered(r, item):
    order = r.sample(range(4), 4)
    if order == [0, 1, 2, 3]: order = [1, 0, 3, 2]
    return with_text(item | {"options": [item["options"][o] for o in order], "answer": order.index(item["answer"])})["text"]

def leaks(items, seed, each=40):
    "For each kind of change, items that leaked in that form."
    r = random.Random(seed)
    body = lambda text: text.split("\n\n", 1)[1] # a leak rarely keeps the instruction
    def half(text): w = body(text).split(); return " ".join(w[:len(w)//2] if r.random() < 0.5 else w[len(w)//2:])
    forms = {k: lambda i, f=f: f(i["text"]) for k,f in SAME_WORDS.items()} | {
        "without the instruction": lambda i: body(i["text"]),
        "inside a document": lambda i: f"{prose(r, 150)}\n{rewrapped(body(i['text']))}\n{prose(r, 150)}",
        "half of it, inside a document": lambda i: f"{prose(r, 60)} {half(i['text'])} {prose(r, 60)}",
        "options reordered": lambda i: reordered(r, i),
        "options reordered, marked (a) (b)": lambda i: re.sub(r"(?m)^([A-D])\)", lambda m: f"({m[1].lower()})", reordered(r, i)),
        "options reordered, re-cased, one line": lambda i: " ".join(reordered(r, i).upper().split())}
    return [Leak(form(i), i["id"], kind) for kind,form in forms.items()
            for i in r.sample([i for i in items if "options" in i or "options" not in kind], each)]

def clean(items, seed, n=400):
    "Texts that are no leaks: other items of the same templates, the options of an item under another question, and documents of the same language."
    r = random.Random(seed)
    choices = [i for i in items if "options" in i]
    return ([Leak(i["text"], "", "another item, same template") for i in exam(seed + 1, n//2) + open_items(seed + 2, n//2)]
            + [Leak(with_text(i | {"question": prose(r, 25)})["text"], "", "another question, same options") for i in r.sample(choices, min(n//4, len(choices)))]
            + [Leak(prose(r, 170), "", "a document") for _ in range(n)])
