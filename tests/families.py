"Small tokenizers and models in the formats of well-known families, made in code, and broken ones."
import copy, json, re
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmops_kit.models.chat import DEFAULT_TEMPLATE
from llmops_kit.models.load import load_model
from llmops_kit.models.templates import one_start
from llmops_kit.models.tiny import new_model

TEXTS = ["Return the area of a rectangle with its width and height.", "What is the capital of France? Paris is the capital of France.",
         "Is it raining in Oslo? The weather report says: rain, 7 degrees.", "def perimeter(width, height):\n    return 2 * (width + height)\n",
         "system user assistant model tool function name arguments parameters", "You are a helpful assistant. Be brief and answer in one sentence."]

@dataclass
class Family:
    template: str           # with generation markers; `unmarked` takes them out
    special: list[str]      # tokens of its own
    eos: str                # the tokenizer's end token
    bos: str|None = None    # the tokenizer's start token
    pad: str|None = None    # the end token, if there is none
    ends: tuple = ()        # tokens at which generation stops, as generation_config says; the tokenizer's end token, if there are none
    adds_start: bool = False# as published, the tokenizer adds a start token, too
    sentencepiece: bool = False # words with ▁ and bytes as a fallback, else bytes
    rstrip: bool = False    # special tokens swallow the space after them
    system: bool = True     # knows a system role
    tools: bool = False     # knows tools and tool calls

LLAMA = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot_id|>{% endgeneration %}{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.') }}
    {{- '\\n\\n# Tools\\n\\nCall them when they help.\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{- m.content or '' }}
        {%- for call in m.tool_calls or [] %}{{- '\\n' if m.content or not loop.first }}{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{%- endfor %}
        {{- '<|im_end|>\\n' }}{% endgeneration %}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif m.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endgeneration %}{% else %}{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""

PHI = """{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>\\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FAMILIES = {
    "llama-3": Family(LLAMA, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"], "<|eot_id|>", "<|begin_of_text|>",
                      ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), adds_start=True),
    "qwen": Family(QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", pad="<|endoftext|>", ends=("<|im_end|>", "<|endoftext|>"), tools=True),
    "gemma": Family(GEMMA, ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>", "<pad>", ends=("<eos>", "<end_of_turn>"),
                    adds_start=True, sentencepiece=True, system=False),
    "mistral": Family(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "<s>", adds_start=True, sentencepiece=True, system=False),
    "phi-3": Family(PHI, ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<|endoftext|>", "<s>", ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
                    sentencepiece=True, rstrip=True),
    "chatml": Family(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", pad="<|endoftext|>"),
}

@lru_cache
def _tiny(): return load_model("tiny").tokenizer

def unmarked(template):
    "The template without generation markers, and with the same text."
    return re.sub(r"\{%-? (end)?generation -?%\}", "", template)

@lru_cache
def _bytes():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return bpe

@lru_cache
def _sentencepiece(prefix):
    "BPE over words with ▁ for the space; other characters are bytes."
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    made = json.loads(bpe.to_str())["model"]
    vocab = {t: i for i, t in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *(t for t, _ in sorted(made["vocab"].items(), key=lambda o: o[1]))])}
    bpe = Tokenizer(models.BPE(vocab, [tuple(o) for o in made["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        bpe.normalizer = normalizers.Replace(" ", "▁")
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return bpe

def tokenizer_of(name, markers=True):
    "A tokenizer of a family, as published."
    if name in ("tiny", "default"):
        made = copy.deepcopy(_tiny())
        template = DEFAULT_TEMPLATE if name == "default" else made.chat_template
    else:
        family = FAMILIES[name]
        bpe = _sentencepiece(prefix=name != "gemma") if family.sentencepiece else _bytes()
        bpe = Tokenizer.from_str(bpe.to_str())
        bpe.add_special_tokens([AddedToken(o, special=True, normalized=False, rstrip=family.rstrip and o.startswith("<|")) for o in family.special])
        made = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, clean_up_tokenization_spaces=False, bos_token=family.bos, eos_token=family.eos, pad_token=family.pad or family.eos)
        if family.adds_start: made.add_bos_token = True
        template = family.template
    made.chat_template = template if markers else unmarked(template)
    return made

def model_of(name, tokenizer):
    "An untrained model for a tokenizer, which stops where those of the family stop."
    lm = new_model(tokenizer, 64, 1, 64, name)
    ends = FAMILIES[name].ends if name in FAMILIES else ()
    if ends: lm.model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(ends))
    return lm

def clean(name, markers=True):
    "A model of a family that is ready to train: one start token, whoever tokenizes."
    tokenizer = tokenizer_of(name, markers)
    one_start(tokenizer)
    return model_of(name, tokenizer)

def rows(system=True, turns=2, tools=False, n=8):
    "Conversations that the families know: with a system turn or without, with one answer or several, with tool calls."
    found = []
    for i in range(n):
        messages = [{"role": "system", "content": "Be brief."}] * system
        for turn in range(1 + (turns - 1) * (i % 2)):
            messages = [*messages, {"role": "user", "content": f"What is {i} + {turn}?\nAnd why?"}, {"role": "assistant", "content": f"{i + turn}, as one counts.\n\n    {i}\n+ {turn}"}]
        row = {"id": f"r{i}", "group": f"r{i}", "messages": messages}
        if tools and i % 2: row = row | {"tools": [WEATHER], "messages": messages[:system] + CALL}
        found.append(row)
    return found

WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather of a city.",
                                            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
CALL = [{"role": "user", "content": "Is it raining in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
        {"role": "tool", "name": "weather", "content": "rain, 7 degrees"}, {"role": "assistant", "content": "Yes, at 7 degrees."}]
