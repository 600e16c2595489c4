"What an estimate says, against what is: parameters and operations of every family, memory of a real run in a fresh process, and the command."
import copy, json, sys
import pytest, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from conftest import few, llmops, run_command
from llmops_kit.models.families import FAMILIES, random_lm
from llmops_kit.training.adapters import add_lora
from llmops_kit.training.costs import line_through, operations, step_memory, trained_parameters
from llmops_kit.training.estimate import largest_budget
from llmops_kit.training.loss import token_nll

ROWS, WIDTH, TRAINED = 6, 48, 17  # trained: of each row; the first token of a row never is
SHAPE = ROWS*WIDTH, ROWS*WIDTH**2, ROWS*TRAINED

@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(10, 4000, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :WIDTH - TRAINED] = -100
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)

@pytest.fixture(scope="module", params=few(FAMILIES, ["llama", "gpt2", "qwen3_moe"]))
def family(request): return random_lm(request.param)

def methods(base):
    "A method's name, a model that it trains, and what it said it would train."
    attention = {"random_gpt2": "c_attn", "random_phi3": "qkv_proj"}.get(base.name, "q_proj,v_proj")
    yield "lora", add_lora(base, 8).model, trained_parameters(base, "lora", 8)
    yield "some layers", add_lora(base, 4, target_modules=attention).model, trained_parameters(base, "lora", 4, attention)
    yield "dora", add_lora(base, 8, target_modules=attention, variant="dora").model, trained_parameters(base, "dora", 8, attention)
    yield "full", copy.deepcopy(base.model).requires_grad_(True), trained_parameters(base, "full")

def counted(model, batch):
    model.set_experts_implementation("eager") if hasattr(model.config, "num_experts") else None  # the counter does not know grouped products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: token_nll(model.train(), batch).mean().backward()
    return counter.get_total_flops()

def test_parameters_and_operations_of_every_family(family, batch):
    for method, model, said in methods(family):
        assert said == sum(p.numel() for p in model.parameters() if p.requires_grad), method
        ratio = operations(model, batch)[1](*SHAPE)/counted(model, batch)
        assert abs(ratio - 1) < 0.03, f"{method}: {ratio}"  # exact but for DoRA's norms, and where the first layer's values need no gradient of their scores

def test_a_wrong_count_of_operations_is_seen(batch):
    "Logits of every position, weight gradients of frozen matrices, no attention: each is further off than the tolerance."
    base = random_lm("llama", hidden_size=64)
    model = add_lora(base, 8).model
    real = counted(model, batch)
    right = operations(model, batch)[1]
    full = operations(copy.deepcopy(base.model).requires_grad_(True), batch)[1]
    for wrong in (right(SHAPE[0], SHAPE[1], SHAPE[0]), full(*SHAPE), right(SHAPE[0], 0, SHAPE[2])): assert abs(wrong/real - 1) > 0.05

def test_two_pieces_tell_the_memory_of_a_batch(batch):
    model = add_lora(random_lm("llama"), 8).model.train()
    for p in model.parameters():
        if p.requires_grad: p.grad = torch.zeros_like(p)
    def taken(rows, everywhere=False):
        part = {k: v[:rows] for k, v in batch.items()}
        if everywhere: part["labels"] = part["input_ids"]
        return rows*WIDTH, step_memory(lambda: token_nll(model, part).mean().backward(), torch.device("cpu"))
    taken(1)  # the first step makes tables that later ones find
    line, (tokens, real) = line_through([taken(1), taken(2)]), taken(ROWS)
    assert abs(line(tokens)/real - 1) < 0.05
    assert largest_budget(line, int(line(tokens)) + 1) == tokens
    wrong = line_through([taken(1, True), taken(2, True)])  # logits of every position
    assert wrong(tokens)/real > 1.15

# -- a whole run

@pytest.fixture(scope="module", params=few(["off", "quick"], ["off"]))
def certify(request): return request.param

@pytest.fixture(scope="module")
def place(tmp_path_factory, certify):
    folder = tmp_path_factory.mktemp("estimate")
    random_lm("llama", hidden_size=128, layers=2, folder=folder/"model")
    rows = [{"prompt": f"What is {i} and {i % 7}? "*(1 + i % 9), "completion": f"It is {i + i % 7}, as one counts."} for i in range(300)]
    (folder/"rows.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows))
    return folder

@pytest.fixture(scope="module")
def arguments(place, certify): # the second look comes after the last step
    values = {"data": place/"rows.jsonl", "model": place/"model", "tokens_per_batch": 4096, "eval_every": 50, "patience": 0, "max_new_tokens": 4, "wandb": "off", "certify": certify}
    return [str(o) for k, v in values.items() for o in ("-p", k, v)]

@pytest.fixture(scope="module")
def estimate(place, arguments): return json.loads(llmops("estimate", "finetune", *arguments, "--price", "3", "--json", env={"LLMOPS_RUNS": str(place/"runs")}))

def test_an_estimate_writes_no_run(place, estimate):
    assert not (place/"runs").exists()

def test_an_estimate_of_a_run(place, arguments, estimate):
    record = json.loads(llmops("run", "finetune", *arguments, "--json", env={"LLMOPS_RUNS": str(place/"runs")}))
    metrics = record["metrics"]
    assert estimate["parameters"] == {"trained": metrics["parameters/trained"], "total": metrics["parameters/total"]}
    assert (estimate["steps"], estimate["tokens"], estimate["trained_tokens"]) == (metrics["train/steps"], metrics["train/tokens"], metrics["train/trained_tokens"])
    assert estimate["memory_measured"] and abs(estimate["memory_bytes"]/record["peak_memory_bytes"] - 1) < 0.15
    assert estimate["fits"] and estimate["cost"] == pytest.approx(3*estimate["seconds"]/3600)
    assert estimate["seconds_low"] <= estimate["seconds"] <= estimate["seconds_high"]

@pytest.mark.parametrize("arguments, message", [
    (["finetune", "-p", "lrr", "1e-3"], "Did you mean lr?"),
    (["finetune", "-p", "lr", "-1"], "lr = -1.0 is not"),
    (["prepare"], "There is no estimate for prepare. Jobs that have one: finetune"),
    (["finetune", "--price", "much"], "invalid float value"),
])
def test_a_wrong_call_exits_2(arguments, message, tmp_path):
    done = run_command("llmops", "estimate", *arguments, cwd=tmp_path, env={"LLMOPS_RUNS": str(tmp_path/"runs")})
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""

def test_the_command_asks_for_no_heavy_library():
    code = "import sys, llmops_kit.training.estimate, llmops_kit.runs.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert run_command(sys.executable, "-c", code).returncode == 0
