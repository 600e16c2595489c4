"Sources: every kind with every schema, read whole and in pieces, and every kind of damage with its place and its reason."
import codecs, csv, gzip, io, json, pickle, subprocess, sys
from types import SimpleNamespace

import pytest

from llmops_kit.data.formats import MAX_TEXT
from llmops_kit.data.remote import fetch, fetch_url, fetch_wandb
from llmops_kit.data.rows import BadRow, canonical_row, check_fields, digest, one_schema, parse_columns, schema_of, texts_of, with_texts
from llmops_kit.data.sources import data_files, find_path, is_python_tree, read_files, read_shard, shards_of
from llmops_kit.runs.errors import UserError

N = 40
ODD = "Zürich – 東京 🙂 \u2028\u0085 a,\"b\"\tc\nd" # what naive readers cut or lose

def conversations(): return [{"prompt": f"Where is parcel {i}? {ODD}", "completion": f"On truck {i}."} for i in range(N)]
def messages(): return [{"messages": [{"role": "system", "content": "You help."}, {"role": "user", "content": f"{i}? {ODD}"}, {"role": "assistant", "content": f"{i}."}]} for i in range(N)]
def sharegpt(): return [{"conversations": [{"from": "human", "value": f"{i}? {ODD}"}, {"from": "gpt", "value": f"{i}."}]} for i in range(N)]
def alpaca(): return [{"instruction": f"Translate {i}.", "input": ODD, "output": f"Done {i}."} for i in range(N)]
def preferences(): return [{"prompt": f"{i}? {ODD}", "chosen": f"{i}.", "rejected": f"No idea, {i}."} for i in range(N)]
def labels(): return [{"text": f"{i}: {ODD}", "label": "angry" if i % 3 else "calm"} for i in range(N)]
def texts(): return [{"text": f"Chapter {i}. {ODD}"} for i in range(N)]

SCHEMAS = {"conversation": conversations, "messages": messages, "sharegpt": sharegpt, "alpaca": alpaca,
           "preference": preferences, "classification": labels, "text": texts}
FLAT = {"conversation", "alpaca", "preference", "classification", "text"} # what a CSV cell can hold

def lines(rows, end="\n"): return "".join(json.dumps(r, ensure_ascii=False) + end for r in rows)

def table(rows, delimiter=","):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()

def parquet(rows, path):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)

def arrow(rows, path, stream=False):
    import pyarrow as pa
    whole = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as out, (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=7)

def disk(rows, path):
    from datasets import Dataset, DatasetDict
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(path)

KINDS = {
    "a.jsonl": lambda rows, path: path.write_text(lines(rows)),
    "bom.jsonl": lambda rows, path: path.write_bytes(codecs.BOM_UTF8 + lines(rows, "\r\n").encode()),
    "u16.ndjson": lambda rows, path: path.write_bytes(lines(rows, "\r\n").encode("utf-16")),
    "be.jsonl": lambda rows, path: path.write_bytes(codecs.BOM_UTF16_BE + lines(rows).encode("utf-16-be")),
    "last.jsonl": lambda rows, path: path.write_text("\n\n" + lines(rows).replace("\n", "\n \n").rstrip()), # blank lines, and none at the end
    "packed.jsonl.gz": lambda rows, path: path.write_bytes(gzip.compress(lines(rows).encode())),
    "list.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1)),
    "data.json": lambda rows, path: path.write_bytes(codecs.BOM_UTF8 + json.dumps({"version": 1, "data": rows}, ensure_ascii=False).encode()),
    "renamed.json": lambda rows, path: path.write_text(lines(rows)),
    "a.csv": lambda rows, path: path.write_text(table(rows), newline=""),
    "excel.csv": lambda rows, path: path.write_bytes(table(rows).encode("utf-16")),
    "bom.tsv": lambda rows, path: path.write_bytes(codecs.BOM_UTF8 + table(rows, "\t").encode()),
    "packed.csv.gz": lambda rows, path: path.write_bytes(gzip.compress(table(rows).encode())),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "b.feather": lambda rows, path: arrow(rows, path, stream=True),
    "disk": disk,
}

def write(folder, name, content):
    path = folder/name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path

def problems(path): return [(i.line, i.problem) for i in read_files(path) if i.problem]


# -- every kind with every schema

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_kind_holds_every_schema(tmp_path, kind, schema):
    if ("csv" in kind or "tsv" in kind) and schema not in FLAT: return
    rows = SCHEMAS[schema]()
    KINDS[kind](rows, tmp_path/kind)
    found = list(read_files(tmp_path/kind))
    assert [i.row for i in found] == rows and not any(i.problem for i in found)
    assert [canonical_row(i.row) for i in found] == [canonical_row(r) for r in rows]
    for max_bytes in (1, 97, 1000): # pieces: in worker processes, so they are pickled
        pieces = pickle.loads(pickle.dumps(shards_of(tmp_path/kind, max_bytes)))
        assert [i for s in pieces for i in read_shard(s)] == found
    if kind in ("a.jsonl", "bom.jsonl", "last.jsonl", "renamed.json", "disk", "a.csv", "bom.tsv"): assert len(shards_of(tmp_path/kind, 1)) >= N
    if kind in ("a.parquet", "a.arrow"): assert len(shards_of(tmp_path/kind, 1)) == 6

def test_line_numbers_in_pieces(tmp_path):
    rows = [json.dumps({"text": "é" * n}, ensure_ascii=False) for n in range(1, 60)]
    path = write(tmp_path, "a.jsonl", codecs.BOM_UTF8 + "\r\n".join(r if n % 7 else "{cut\r\n" for n,r in enumerate(rows)).encode())
    whole = list(read_files(path))
    raw = path.read_bytes().split(b"\n")
    for item in whole:
        text = raw[item.line - 1].removeprefix(codecs.BOM_UTF8).decode().rstrip("\r")
        assert text == item.text if item.problem else json.loads(text) == item.row
    for max_bytes in (*range(1, 40), 200, 1 << 20): assert [i for s in shards_of(path, max_bytes) for i in read_shard(s)] == whole
    pieces = shards_of(path, 100)
    assert pieces[0].start == 0 and pieces[-1].stop == path.stat().st_size and all(a.stop == b.start for a,b in zip(pieces, pieces[1:]))

def test_text_trees(tmp_path):
    (tmp_path/"howto").mkdir()
    write(tmp_path, "index.md", codecs.BOM_UTF8 + b"# A\r\n\r\nText.\r\n")
    write(tmp_path, "howto/b.txt", "Zürich".encode("utf-16"))
    write(tmp_path, "bad.txt", b"Caf\xe9")
    write(tmp_path, "conf.py", "project = 'A'")
    found = {i.file: i for i in read_files(tmp_path)}
    assert found["index.md"].row == {"id": "index.md", "group": "index.md", "text": "# A\n\nText.\n"}
    assert found["howto/b.txt"].row["text"] == "Zürich" and found["bad.txt"].problem == "not UTF-8 at byte 4"
    assert canonical_row(found["index.md"].row) == found["index.md"].row
    assert not is_python_tree(tmp_path)

def test_what_a_folder_is(tmp_path):
    write(tmp_path, "app.py", "def run(): ...")
    write(tmp_path, "README.md", "# App")
    write(tmp_path, "package.json", "{}")
    assert is_python_tree(tmp_path)
    data = write(tmp_path, "train.csv.gz", gzip.compress(table(conversations()).encode()))
    write(tmp_path, ".hidden.jsonl", "{}")
    assert not is_python_tree(tmp_path) and data_files(tmp_path) == [data]

def test_labels_with_names_and_unnamed_splits(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    features = Features({"text": Value("string"), "label": ClassLabel(names=["calm", "angry"])})
    part = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    DatasetDict(train=part, dev=part, unsupervised=part).save_to_disk(tmp_path/"d")
    found = list(read_files(tmp_path/"d"))
    assert [(i.file, i.split, i.row["label"]) for i in found if i.row][:3] == [("dev", "validation", "angry"), ("dev", "validation", "calm"), ("dev", "validation", None)]
    assert {i.problem for i in found if i.file == "unsupervised"} == {"split: not train, validation or test"}
    with pytest.raises(BadRow, match="blank label"): canonical_row(found[2].row)


# -- far away

def test_addresses(tmp_path):
    import fsspec
    memory = fsspec.filesystem("memory")
    memory.pipe({"/b/set/train.jsonl": lines(conversations()).encode(), "/b/set/test.jsonl": lines(texts()).encode(), "/b/set/notes.pdf": b"%PDF"})
    whole = fetch("memory://b/set", tmp_path/"cache")
    assert [s.file for s in shards_of(whole.path)] == ["test.jsonl", "train.jsonl"] and whole.source == "memory://b/set"
    assert fetch("memory://b/set", tmp_path/"cache") == whole
    path = write(tmp_path, "local.csv", table(conversations()))
    one = fetch(f"file://{path}", tmp_path/"cache")
    assert [i.row for i in read_files(one.path)] == conversations() and one.path.name == "local.csv"
    memory.rm("/b", recursive=True)
    with pytest.raises(UserError, match="There is nothing at memory://b/set"): fetch("memory://b/set", tmp_path/"cache")

def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem
    fsspec.filesystem("memory").pipe({"/c/a.jsonl": b"{}\n", "/c/b.jsonl": b"{}\n"})
    real = MemoryFileSystem.get_file
    def breaks(self, remote, local, **kw):
        if remote.endswith("b.jsonl"): raise ConnectionError("reset by peer")
        return real(self, remote, local, **kw)
    with monkeypatch.context() as m:
        m.setattr(MemoryFileSystem, "get_file", breaks)
        with pytest.raises(UserError, match="cannot be reached .ConnectionError: reset by peer"): fetch("memory://c", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(list(read_files(fetch("memory://c", tmp_path).path))) == 2

def test_a_served_file(tmp_path):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            if "short" not in self.path: return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"{}\n")
    write(tmp_path, "a.jsonl", lines(conversations()))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        got = fetch(f"{url}/a.jsonl?token=secret", tmp_path/"cache")
        assert [i.row for i in read_files(got.path)] == conversations() and got.source == f"{url}/a.jsonl"
        with pytest.raises(UserError, match="the answer broke off"): fetch(f"{url}/short.jsonl", tmp_path/"other")
        assert list((tmp_path/"other").iterdir()) == []
        with pytest.raises(UserError, match="There is nothing at"): fetch(f"{url}/b.jsonl", tmp_path/"cache")
        server.shutdown()
    with pytest.raises(UserError, match="cannot be reached"): fetch(f"{url}/a.jsonl", tmp_path/"cache")

def test_missing_package_and_unknown_storage(tmp_path, monkeypatch):
    from fsspec.registry import known_implementations
    monkeypatch.setitem(known_implementations, "shelf", {"class": "no_such_package.Shelf", "err": "Install shelffs to use shelves"})
    with pytest.raises(UserError, match="needs a package that is not installed: Install shelffs"): fetch_url("shelf://a/b.jsonl", tmp_path)
    with pytest.raises(UserError, match="no address that fsspec knows"): fetch_url("s4://a/b.jsonl", tmp_path)

class Api: # stands in for wandb.Api
    def __init__(self): self.downloads = 0
    def artifact(self, name):
        if "nothing" in name: raise ValueError("artifact not found")
        return SimpleNamespace(version="v3", digest="abc", download=self.download)
    def download(self, root):
        self.downloads += 1
        (__import__("pathlib").Path(root)/"tickets.jsonl").write_text(lines(conversations()))

def test_wandb_artifact(tmp_path, monkeypatch):
    api = Api()
    got = fetch_wandb("wandb:team/support/tickets:latest", tmp_path, api)
    assert got.source == "wandb:team/support/tickets:v3" and [i.row for i in read_files(got.path)] == conversations()
    assert fetch_wandb("wandb:team/support/tickets:v3", tmp_path, api) == got and api.downloads == 1
    with pytest.raises(UserError, match="cannot be fetched from W&B .ValueError: artifact not found"): fetch_wandb("wandb:team/support/nothing:v1", tmp_path, api)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="W&B is switched off here .WANDB_MODE=offline"): fetch("wandb:team/support/tickets:v3", tmp_path)
    with pytest.raises(UserError, match="names no version"): fetch("wandb:tickets", tmp_path)

def test_hub(tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict
    from huggingface_hub import constants
    from llmops_kit.data import remote
    tables = DatasetDict(train=Dataset.from_list(conversations()), test=Dataset.from_list(conversations()[:3]))
    with monkeypatch.context() as m:
        m.setattr(remote, "load_hub", lambda data: ("0123abc", tables))
        got = fetch("owner/set@main", tmp_path)
        assert got.source == "owner/set@0123abc" and fetch("owner/set", tmp_path) == got
        found = [i for s in shards_of(got.path, 1) for i in read_shard(s)]
        assert [i.row for i in found if i.split == "train"] == conversations() and sum(i.split == "test" for i in found) == 3
        assert [i.row for i in remote.read_hub("owner/set")[1]] == [i.row for i in found]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Hub cannot be reached.*What works without it: `docstrings`"): fetch("nobody/no-such-set", tmp_path)

def test_addresses_are_no_paths(): assert [find_path(n) for n in ("s3://b/a.jsonl", "https://x.org/a.csv", "wandb:a/b/c:v1")] == [None] * 3


# -- bad input

def test_bad_lines_are_kept_with_their_place(tmp_path):
    good = b'{"prompt": "a", "completion": "b"}\n'
    path = write(tmp_path, "a.jsonl", good + b'{"prompt": "cut\n' + b"\r\n" + b"[1, 2]\n" + b'{"prompt": "Caf\xe9"}\n' + b'{"a": 1, "b": {"c": 1, "c": 2}}\n'
                 + b"\0\0\0\0\n" + b"[" * 100_000 + b"\n" + good)
    found = problems(path)
    assert [line for line,_ in found] == [2, 4, 5, 6, 7, 8]
    for (_,problem),reason in zip(found, ["not JSON: Unterminated string", "not an object but list", "not UTF-8 at byte 16 of the line",
                                          "the key c stands there twice", "NUL bytes", "not JSON: "]): assert problem.startswith(reason)
    assert list(read_files(path))[1].text == '{"prompt": "cut'

def test_clean_lines_have_no_problem(tmp_path):
    assert problems(write(tmp_path, "a.jsonl", lines(conversations()))) == []

def test_utf16_without_its_mark_and_cut(tmp_path):
    assert "UTF-16 without its mark" in problems(write(tmp_path, "a.jsonl", lines(conversations()).encode("utf-16-le")))[0][1]
    with pytest.raises(UserError, match="is not UTF-16.*iconv"): list(read_files(write(tmp_path, "b.jsonl", lines(conversations()).encode("utf-16") + b"x")))

def test_latin1(tmp_path):
    for name in ("a.csv", "a.tsv"):
        with pytest.raises(UserError, match=r"is not UTF-8 in line 3.*iconv -f latin1 -t utf-8 " + name): list(read_files(write(tmp_path, name, b"text\nok\nCaf\xe9\n")))
    with pytest.raises(UserError, match=r"is not UTF-8 in line 1.*iconv -f latin1 -t utf-8 a.json"): list(read_files(write(tmp_path, "a.json", b'[{"text": "Caf\xe9"}]')))

def test_duplicate_columns(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    with pytest.raises(UserError, match="has two columns of one name: text. Rename one"): list(read_files(write(tmp_path, "a.csv", "text,label,text\na,b,c\n")))
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path/"a.parquet")
    with pytest.raises(UserError, match="has two columns of one name: text"): shards_of(tmp_path/"a.parquet")

def test_ragged_csv(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\r\n"a\r\nb",x\r\n"only\r\none"\r\n\r\nc,y,z\r\nd\0,w\r\n')
    assert problems(path) == [(4, "1 fields instead of 2"), (7, "3 fields instead of 2"), (8, "NUL bytes: a file cut by a crash, or UTF-16 without its mark")]
    whole = list(read_files(path))
    for max_bytes in range(1, 60): assert [i for s in shards_of(path, max_bytes) for i in read_shard(s)] == whole
    marked = write(tmp_path, "marked.csv", codecs.BOM_UTF8 + b'"te\nxt",label\n1,2\n"3\n3",4\n')
    assert [(i.line, i.row) for s in shards_of(marked, 1) for i in read_shard(s)] == [(3, {"te\nxt": "1", "label": "2"}), (4, {"te\nxt": "3\n3", "label": "4"})]
    mac = write(tmp_path, "mac.csv", "text\r" + "a\r" * 9) # line ends of another age
    assert [i for s in shards_of(mac, 4) for i in read_shard(s)] == list(read_files(mac)) and len(list(read_files(mac))) == 9
    with pytest.raises(UserError, match="not valid CSV near line .*Repair the quotation marks"): [*read_shard(shards_of(write(tmp_path, "q.csv", 'text\n"never closed\n'), 1)[0])]

def test_json_that_holds_no_rows(tmp_path):
    read = lambda text: list(read_files(write(tmp_path, "a.json", text)))
    for text,message in (('[{"a": 1}, {"a": 2}', "not valid JSON near line 1"), ('"text"', "holds no rows but str"), ('{"a": [{}], "b": [{}]}', "holds several lists: a, b"),
                         ('[{"a": 1}] x', "Extra data"), ('{"a": 1, "a": 2}', "the key a stands there twice"), ("nonsense", "save it as JSONL"), ("[" * 100_000, "not valid JSON")):
        with pytest.raises(UserError, match=message): read(text)
    assert [(i.line, i.problem) for i in read('[{"a": 1}, 7, {"b": 1, "b": 2}]')][1:] == [(2, "not an object but int"), (3, "the key b stands there twice")]
    assert read("[]") == read("") == []
    assert [i.row for i in read('{"prompt": "a",\n "completion": "b"}')] == [{"prompt": "a", "completion": "b"}]

def test_json_too_large_to_hold(tmp_path):
    with open(tmp_path/"a.json", "wb") as file:
        file.write(b"[")
        file.truncate(MAX_TEXT + 2)
    with pytest.raises(UserError, match="has more than 128 MB.*jq -c"): list(read_files(tmp_path/"a.json"))

@pytest.mark.parametrize("name,content,message", [
    ("a.parquet", b"PAR1 no more", "not a readable Parquet file"), ("a.arrow", b"ARROW1 no more", "not a readable Arrow file"),
    ("b.arrow", b"nothing", "not a readable Arrow file"), ("a.jsonl.gz", b"not packed", "is cut or no gzip file"),
    ("b.jsonl.gz", gzip.compress(b"{}\n" * 9999, mtime=0)[:-9], "is cut or no gzip file"), ("a.docx", b"PK", "of a kind that is not read here")])
def test_damaged_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message): list(read_files(write(tmp_path, name, content)))

def test_damaged_datasets_folder(tmp_path):
    disk(conversations(), tmp_path/"d")
    next((tmp_path/"d"/"train").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="no complete folder of the datasets library"): shards_of(tmp_path/"d")

def test_empty(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.json", "a.tsv"): assert list(read_files(write(tmp_path, name, ""))) == []
    assert list(read_files(write(tmp_path, "b.csv", "prompt,completion\n"))) == []
    with pytest.raises(UserError, match="holds no .jsonl"): shards_of(tmp_path.joinpath("none").mkdir() or tmp_path/"none")

MEASURE = """
import resource, sys
from llmops_kit.data.sources import read_shard, shards_of
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(i.row is not None for s in shards_of(sys.argv[1]) for i in read_shard(s))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
def measured(path): # rows, and how many MB the reading took
    rows,kilobytes = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True).stdout.split()
    return int(rows), int(kilobytes) / 1024

def test_ten_megabytes_on_one_line(tmp_path):
    long = json.dumps({"prompt": "a", "completion": "é" * 5_000_000}, ensure_ascii=False) + "\n"
    path = write(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "b"}\n' + long * 5)
    rows,memory = measured(path)
    assert rows == 6 and memory < 90 # the line, its text and its value; not five of them
    assert [s.line for s in shards_of(path, 1000)] == [1, 3, 4, 5, 6] # the first two lines together

def test_a_million_identical_rows_stream(tmp_path):
    row = b'{"prompt": "Where is my invoice?", "completion": "Under Billing."}\n'
    rows,memory = measured(write(tmp_path, "a.jsonl", row * 1_000_000))
    assert rows == 1_000_000 and memory < 20


# -- rows

@pytest.mark.parametrize("row,reason,malformed", [
    ({"prompt": {"text": "a"}, "completion": "b"}, "prompt is not text but dict", True),
    ({"prompt": 7, "completion": "b"}, "prompt is not text but int", True),
    ({"prompt": "a", "completion": ["b"]}, "completion[0] is not an object but str", True),
    ({"prompt": "a", "completion": None}, "blank completion", False),
    ({"prompt": "a", "completion": " \n"}, "blank completion", False),
    ({"prompt": None, "completion": None}, "blank completion", False),
    ({"prompt": " ", "completion": "b"}, "blank prompt", False),
    ({"prompt": "half \ud800", "completion": "b"}, "text with half a surrogate pair", True),
    ({"prompt": "a", "completion": "b", "id": "\ud800"}, "text with half a surrogate pair", True),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}, "messages[1].role is 'bot', not system, user, assistant or tool", True),
    ({"messages": [{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}]}, "messages[0].content is not text but list", True),
    ({"messages": [{"content": "a"}]}, "messages[0] has no role", True),
    ({"messages": []}, "the last message is not the assistant's", True),
    ({"messages": {"role": "user"}}, "messages is not text but dict", True),
    ({"messages": [{"role": "user", "content": "a"}]}, "the last message is not the assistant's", True),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "x", "tool_call_id": "c9"}, {"role": "assistant", "content": "b"}]}, "messages[1].tool_call_id answers no call before it", True),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "messages[1].tool_calls[0].function has no name", True),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{cut"}}]}]}, "messages[1].tool_calls[0].function.arguments is not JSON", True),
    ({"prompt": "a", "completion": "b", "tools": [{}]}, "tools[0] is no tool with a name", True),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "conversations[0].from is 'narrator', not human, gpt, function, observation, system, user, assistant, tool", True),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "blank rejected", False),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same", False),
    ({"text": "a", "label": None}, "blank label", False),
    ({"text": "a", "label": 0.5}, "label is not text or a whole number but float", True),
    ({"text": " "}, "blank text", False),
    ({"text": {"a": 1}}, "text is not text but dict", True),
    ({"body": "a"}, "without prompt and completion, messages, chosen and rejected, or text", True)])
def test_bad_rows(row, reason, malformed):
    with pytest.raises(BadRow) as e: canonical_row(row)
    assert (str(e.value), e.value.malformed) == (reason, malformed)

def test_ids_and_groups_are_what_they_always_were():
    "Datasets that exist keep their ids: these digests were written down when the format was new."
    row = canonical_row({"prompt": "Where is my invoice?", "completion": "Under Billing."})
    assert (row["id"], row["group"]) == (digest(row["messages"]), digest(row["messages"][:-1])) == ("a910751a662c38fd", "3e81cc9bf8d779d6")
    same = canonical_row({"messages": [{"role": "user", "content": "Where is my invoice?"}, {"role": "assistant", "content": "Under Billing.", "weight": 1}], "title": "x"})
    assert same == row
    assert canonical_row({"id": 7, "prompt": "a", "completion": "b", "customer": 3}, group="customer")["group"] == "3"
    with pytest.raises(BadRow, match="without customer"): canonical_row({"prompt": "a", "completion": "b", "customer": ""}, group="customer")

def test_fields_that_a_table_fills_with_null():
    empty = {"messages": None, "conversations": None, "chosen": None, "rejected": None, "label": None, "id": None, "group": None, "tools": None}
    for row in ({"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}): assert canonical_row(empty | row) == canonical_row(row)

@pytest.mark.parametrize("schema", SCHEMAS)
def test_texts_come_back_in_their_order(schema):
    for row in map(canonical_row, SCHEMAS[schema]()):
        assert with_texts(row, texts_of(row)) == row
        changed = with_texts(row, [t.upper() for t in texts_of(row)])
        assert texts_of(changed) == [t.upper() for t in texts_of(row)] != texts_of(row)
        assert schema_of(changed) == schema_of(row) and changed.get("label") == (row["label"].upper() if "label" in row else None)

def test_tool_calls_survive():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"to": "a@b.org", "n": [1, "x"]}'}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call], "name": None}, {"role": "tool", "content": "ok", "tool_call_id": "c1", "tool_calls": None}]
    row = canonical_row({"messages": [*turns, {"role": "assistant", "content": "b"}], "tools": json.dumps(tools)})
    assert row["tools"] == tools and row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"to": "a@b.org", "n": [1, "x"]}
    assert texts_of(row) == ["a", "", "a@b.org", "x", "ok", "b"]
    assert with_texts(row, texts_of(row)) == row
    assert with_texts(row, [t.replace("a@b.org", "[EMAIL]") for t in texts_of(row)])["messages"][1]["tool_calls"][0]["function"]["arguments"]["to"] == "[EMAIL]"
    assert canonical_row({"messages": turns[:2]})["messages"][-1]["content"] == "" # a call is an answer

def test_preferences_in_all_their_forms():
    plain = canonical_row({"prompt": "Why?", "chosen": "Because.", "rejected": "No."})
    ask,won,lost = ({"role": r, "content": c} for r,c in (("user", "Why?"), ("assistant", "Because."), ("assistant", "No.")))
    for row in ({"prompt": [ask], "chosen": [won], "rejected": [lost]}, {"chosen": [ask, won], "rejected": [ask, lost]},
                {"prompt": "Why?", "chosen": [ask, won], "rejected": [ask, lost], "messages": [ask, won]},
                {"prompt": "Why?", "chosen": "Why?\nBecause.", "rejected": "Why?\nNo."},
                {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}): assert canonical_row(row) == plain
    assert plain["rejected"] == [lost] and plain["messages"] == [ask, won] and plain["group"] == digest([ask])
    assert canonical_row({"prompt": "I", "chosen": "I think.", "rejected": "I do not."})["messages"][-1]["content"] == "I think."
    with pytest.raises(BadRow, match="differ in more than the last message"): canonical_row({"chosen": [ask, won, ask, won], "rejected": [ask, lost]})

def test_columns_and_schema():
    columns = parse_columns("prompt=ticket,completion=reply")
    assert canonical_row({"ticket": "a", "reply": "b", "messages": "other"}, columns=columns) == canonical_row({"prompt": "a", "completion": "b"})
    assert schema_of(canonical_row({"text": "a", "label": 1, "prompt": "x"}, schema="text")) == "text"
    assert schema_of(canonical_row({"body": "a", "label": 1}, columns={"text": "body"})) == "classification"
    with pytest.raises(BadRow, match="without reply, named in columns"): canonical_row({"ticket": "a"}, columns=columns)
    for text,message in (("promt=a", "no field promt. Did you mean prompt"), ("prompt", "is no field=column"), ("text=a,text=b", "names text twice")):
        with pytest.raises(UserError, match=message): parse_columns(text)
    check_fields("a.csv", ["ticket", "reply"], columns=columns)
    for found,options,message in ((["ticket", "replies"], {"columns": columns}, "no column reply, only ticket, replies. Did you mean replies"),
                                  (["ticket", "reply"], {}, "has the columns ticket, reply, but `prompt` and `completion`"),
                                  (["text"], {"schema": "preference"}, "but prompt, chosen and rejected, are needed"),
                                  (["text"], {"schema": "preferences"}, "no schema preferences. Did you mean preference"),
                                  (["text", "customer"], {"group": "costumer"}, "no column costumer to group by, only text, customer. Did you mean customer")):
        with pytest.raises(UserError, match=message): check_fields("a.csv", found, **options)

def test_two_schemas_in_one_source():
    assert one_schema({"text": ("a.jsonl", 1)}) == "text" and one_schema({}) is None
    with pytest.raises(UserError, match=r"mixes text \(a.jsonl line 1\) and conversation \(a.jsonl line 9\)"): one_schema({"conversation": ("a.jsonl", 9), "text": ("a.jsonl", 1)})
