"""No code of ours executes what it reads: every module is searched, and every rule of the search is seen to work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.untrusted.scan import findings

ROOT = Path(__file__).parents[2]

PLANTED = {
    "import pickle": "pickle",
    "import os, dill as d": "pickle",
    "from joblib import load": "pickle",
    "import marshal": "pickle",
    "torch.load(path)": "weights_only",
    "torch.load(path, weights_only=False)": "weights_only",
    "load(path, weights_only=flag)": "weights_only",
    "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)": "trust_remote_code",
    "AutoTokenizer.from_pretrained(folder, trust_remote_code=flag)": "trust_remote_code",
    "AutoTokenizer.from_pretrained(folder, **{'trust_remote_code': True})": "trust_remote_code",
    "numpy.load(path, allow_pickle=True)": "allow_pickle",
    "yaml.load(text, Loader=yaml.SafeLoader)": "yaml.load",
    "yaml.compose(text, Loader=yaml.UnsafeLoader)": "yaml.UnsafeLoader",
    "from yaml import unsafe_load": "yaml.unsafe_load",
    "pandas.read_pickle(path)": "pandas.read_pickle",
    "eval(text)": "eval",
    "exec(text)": "exec",
    "compile(text, 'file', 'exec')": "compile",
    "subprocess.getoutput(text)": "subprocess.getoutput",
    "__import__(name)": "__import__",
    "os.system(text)": "os.system",
    "subprocess.run(text, shell=True)": "shell",
}

INNOCENT = (
    "torch.load(path, weights_only=True)",
    "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)",
    "yaml.compose(text, Loader=yaml.SafeLoader)",
    "re.compile(pattern)",
    "model.eval()",
    "# import pickle",
)


@pytest.mark.parametrize("snippet", PLANTED)
def test_each_rule_fires_on_what_is_planted(snippet: str) -> None:
    assert f"1: {PLANTED[snippet]}" in findings(snippet)


@pytest.mark.parametrize("snippet", INNOCENT)
def test_no_rule_fires_on_what_is_harmless(snippet: str) -> None:
    assert findings(snippet) == []


def test_no_module_executes_what_it_reads() -> None:
    modules = sorted((ROOT / "megatron_ogpsa").rglob("*.py"))
    assert len(modules) > 50
    found = {str(path.relative_to(ROOT)): findings(path.read_text(encoding="utf-8")) for path in modules}
    assert {path: places for path, places in found.items() if places} == {}
