"""Bad data, configurations and tokenizers, each with the line that refuses it.

``{path}`` is the file or folder; ``...`` stands for words of a library, which differ between its versions.
"""

from __future__ import annotations

import json
from typing import Any

Case = tuple[Any, str]

_USER = {"role": "user", "content": "Hi"}
_GOOD = json.dumps({"messages": [_USER, {"role": "assistant", "content": "Hello"}]}) + "\n"


def _row(*messages: Any) -> str:
    return _GOOD + json.dumps({"messages": messages}) + "\n"


CHATS: dict[str, Case] = {
    "cut off.jsonl": (
        _GOOD + '{"messages": [',
        "{path}:2: not valid JSON (Expecting value at column 15); write one JSON object per line",
    ),
    "array not closed.json": ("[" + _GOOD, "{path}:2: not valid JSON (',' or ']' expected); mend the array"),
    "latin-1.jsonl": (
        _GOOD.encode() + b'{"prompt": "caf\xe9"}\n',
        "{path}:2: not UTF-8 (byte 0xe9 at offset 108 of the file); save the file as UTF-8",
    ),
    "zeros.jsonl": (
        bytes(64),
        "{path}:1: not valid JSON (Expecting value at column 1); write one JSON object per line",
    ),
    "nested without end.jsonl": ("[" * 100_000, "{path}:1: JSON too deep or too long to read (...); remove the row"),
    "a number without end.jsonl": ("9" * 5000, "{path}:1: JSON too deep or too long to read (...); remove the row"),
    "empty.jsonl": ("", "{path}: the file is empty; give a file with at least one row"),
    "no rows of ours.jsonl": (
        _GOOD + '{"text": "x"}\n',
        "{path}:2: no field 'messages', nor 'prompt' and 'response' (found 'text'); rename the fields",
    ),
    "a list.jsonl": (
        _GOOD + "[1]\n",
        "{path}:2: a row must be an object with 'messages' or 'prompt' and 'response', not a list",
    ),
    "unknown role.jsonl": (
        _row({"role": "root\u001b[2J\nx", "content": "x"}),
        "{path}:2: 'messages'[0]: unknown role 'root\\x1b[2J\\nx'; use one of system, user, assistant, tool",
    ),
    "null content.jsonl": (
        _row(_USER, {"role": "assistant", "content": None}),
        "{path}:2: 'messages'[1]: field 'content' is null; give it a value or remove the row",
    ),
    "content that is an object.jsonl": (
        _row(_USER, {"role": "assistant", "content": {"a": 1}}),
        "{path}:2: 'messages'[1]: 'content' must be text, not an object",
    ),
    "nothing to learn.jsonl": (
        _row(_USER),
        "{path}:2: no assistant turn, so nothing to learn; add one or remove the row",
    ),
    "half a surrogate pair.jsonl": (
        '{"prompt": "\\ud83d", "response": "x"}\n',
        "{path}:1: 'prompt' holds \\ud83d, half of a surrogate pair; write the whole character",
    ),
    "pickled.jsonl": (
        b"\x80\x04\x95\x1d\x00\x00\x00cos\nsystem\n",
        "{path}:1: not UTF-8 (byte 0x80 at offset 0 of the file); save the file as UTF-8",
    ),
    "pickled.pkl": (
        b"\x80\x04\x95\x1d\x00\x00\x00cos\nsystem\n",
        "{path}: unknown kind of file '.pkl'; use .jsonl, .json or .parquet",
    ),
    "no parquet.parquet": ("PAR1 and no more PAR1", "{path}: not a parquet file (...); write it again"),
}

PAIRS: dict[str, Case] = {
    "no rejected.jsonl": (
        '{"prompt": "a", "chosen": "b"}\n',
        "{path}:1: field 'rejected' is missing; add it or remove the row",
    ),
    "the same twice.jsonl": (
        '{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
        "{path}:1: 'chosen' and 'rejected' are the same, so nothing is preferred; remove the row",
    ),
    "no prompt.jsonl": (
        '{"chosen": "b", "rejected": "c"}\n',
        "{path}:1: answers as text need a field 'prompt'; add it, or give whole conversations",
    ),
}

CONFIGS: dict[str, Case] = {
    "unknown key": (
        "num-layers: 2\nogpsa-granularty: tensor\n",
        "{path}:2: unknown key 'ogpsa-granularty', did you mean ogpsa-granularity?",
    ),
    "too large": ("#" * (1 << 20) + "\n", "{path}: larger than 1 MiB, so no configuration: check the path"),
    "twice": ("num-layers: 2\nnum_layers: 4\n", "{path}:2: num-layers stands on line 1 already: keep one of them"),
    "twice in launch": (
        "launch:\n  nnodes: 2\n  nproc_per_node: 1\n  nnodes: 3\n",
        "{path}:4: launch: nnodes stands on line 2 already: keep one of them",
    ),
    "not YAML": ("lr: [1, 2\n", "{path}:2: not YAML (...): mend the line"),
    "tab": ("num-layers: 2\n\tlr: 1\n", "{path}:2: not YAML (...): mend the line"),
    "control character": (
        "num-layers: 2\nlr: \x00\n",
        "{path}:2: not YAML (a character that is not allowed): mend the line",
    ),
    "not UTF-8": (b"num-layers: 2\nsave: caf\xe9\n", "{path}:2: not UTF-8 text (byte offset 23): save it as UTF-8"),
    "a module to import": (
        "spec: [evil, layer]\n",
        "{path}:1: spec names a Python module, which is imported: give --spec on the command line",
    ),
    "a list": ("- num-layers\n", "{path}: not a mapping: write one flag a line, such as 'num-layers: 4'"),
    "empty": ("", "{path}: not a mapping: write one flag a line, such as 'num-layers: 4'"),
    "a mapping for a number": ("lr: {a: 1}\n", "{path}:1: lr: takes a value, not a mapping"),
    "a truth value for a number": ("lr: true\n", "{path}:1: lr: takes a value, not true"),
    "a number for a switch": ("bf16: 3\n", "{path}:1: bf16: is a switch: write true or false, not '3'"),
    "a flag for a value": (
        "save: --use-cpu-initialization\n",
        "{path}:1: save: '--use-cpu-initialization' is a flag, not a value: give flags lines of their own",
    ),
    "nested without end": (
        "lr: " + "[" * 600 + "\n",
        "{path}: nested too deeply: write one flag a line, such as 'num-layers: 4'",
    ),
    "aliases of aliases": (
        "x: &a [l, l]\nlr: [*a, *a]\n",
        "{path}:2: lr: a list or mapping within another (line 1): write plain values",
    ),
    "merged": ("x: &a {lr: 1}\n<<: *a\n", "{path}:2: merging ('<<') is not supported: write the flags themselves"),
    "a tag that calls": (
        "lr: !!python/object/apply:os.system ['touch $MARKER']\n",
        "{path}:1: lr: the tag !!python/object/apply:os.system (line 1) is not supported: write the plain value",
    ),
    "a launcher of its own": (
        "launch: $(touch x)\n",
        "{path}:1: launch: write a mapping, such as 'nproc-per-node: 8'",
    ),
}

TOKENIZERS: dict[str, Case] = {
    "no tokenizer.json": (
        {"tokenizer.json": None},
        "--tokenizer-model {path}: no tokenizer could be loaded (...); check the folder",
    ),
    "tokenizer.json cut off": (
        {"tokenizer.json": '{"version": "1.0", "model": '},
        "--tokenizer-model {path}: no tokenizer could be loaded (...); check the folder",
    ),
    "tokenizer.json zeroed": (
        {"tokenizer.json": bytes(100)},
        "--tokenizer-model {path}: no tokenizer could be loaded (...); check the folder",
    ),
    "a model of no kind": (
        {"tokenizer.json": {"model": {"type": "Neural", "vocab": {}}}},
        "--tokenizer-model {path}: no tokenizer could be loaded (...); check the folder",
    ),
    "merges of unknown tokens": (
        {"tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}},
        "--tokenizer-model {path}: no tokenizer could be loaded (...); check the folder",
    ),
    "a configuration that is a list": (
        {"tokenizer_config.json": "[1]"},
        "--tokenizer-model {path}: no tokenizer could be loaded (...); check the folder",
    ),
    "nothing to pad with": (
        {"tokenizer_config.json": {"pad_token": None, "eos_token": None}},
        "--tokenizer-model {path}: has neither a padding nor an end-of-sequence token; set one in tokenizer_config.json",
    ),
    "template is not Jinja": (
        {"chat_template.jinja": "line\n{% for %}"},
        "{path} (chat template):2: ...; mend the chat template",
    ),
    "template divides by zero": (
        {"chat_template.jinja": "{{ 1 // (messages | length - 2) }}"},
        "the chat template refuses the conversation (integer division or modulo by zero); mend the row or the template",
    ),
    "template that never ends": (
        {
            "chat_template.jinja": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
            "{% endfor %}{% endfor %}{% endfor %}"
        },
        "the chat template refuses the conversation (it ran for more than 0.2 seconds); mend the row or the template",
    ),
    "template takes all memory": (
        {"chat_template.jinja": "{{ 'x' * 99999999999 }}"},
        "the chat template refuses the conversation (MemoryError); mend the row or the template",
    ),
    "template looks around": (
        {"chat_template.jinja": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        "the chat template refuses the conversation (access to attribute '__class__' ...); mend the row or the template",
    ),
}

SENTENCEPIECES: dict[str, Case] = {
    "zeros.model": (
        bytes(100),
        "--tokenizer-model {path}: not a sentencepiece model; give the .model file that training wrote",
    ),
    "text.model": (
        "no model at all",
        "--tokenizer-model {path}: not a sentencepiece model; give the .model file that training wrote",
    ),
    "empty.model": (
        "",
        "--tokenizer-model {path}: not a sentencepiece model; give the .model file that training wrote",
    ),
}
