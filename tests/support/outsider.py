"""What a process without this package, and perhaps with another version of transformers, finds in exported directories.

As a script: `python -I outsider.py FOLDER DIRECTORY…` reads every directory by its card's own snippet and by the Auto
classes; the packages in FOLDER, if any, come before the installed ones.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TEXTS = ("The river's stone, don't 12345!", "  北京\n\tw7 w8<|user|> naïve 🙂 ")


def read_elsewhere(tmp_path: Path, paths: list[Path], packages: str = "") -> dict[str, dict[str, Any]]:
    """What such a process finds in each directory; `packages`: a folder made by `pip install --target`."""
    modules = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / f"modules-{Path(packages).name}")}
    done = subprocess.run(
        [sys.executable, "-I", __file__, packages, *paths],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **modules},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.split("ANSWER ")[1]))


class Blocker(importlib.abc.MetaPathFinder):
    """Keeps this package out."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "sparsekd_ray":
            raise ModuleNotFoundError(name)


def read(path: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    os.chdir(path)
    code = {"trust_remote_code": True} if path.name == "low-rank" else {}
    refusal = "none"
    if code:
        try:
            AutoModelForCausalLM.from_pretrained(path)
        except ValueError as error:
            refusal = str(error)
    model = AutoModelForCausalLM.from_pretrained(path, **code)
    base = AutoModel.from_pretrained(path, **code)
    tokenizer = AutoTokenizer.from_pretrained(path, **code)
    snippet = re.search("```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.S)
    assert snippet is not None
    exec(snippet[1], {})
    ids = torch.arange(20)[None]
    with torch.no_grad():
        return {
            "refusal": refusal,
            "classes": [type(m).__module__ + "." + type(m).__name__ for m in (model, base)],
            "params": sum(p.numel() for p in model.parameters()),
            "logits": model(ids).logits.tolist(),
            "base logits": (base(ids).last_hidden_state @ model.lm_head.weight.T).tolist(),
            "generated": model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False).tolist(),
            "tokens": [dict(tokenizer(text)) for text in TEXTS],
            "special": tokenizer.special_tokens_map,
        }


def main() -> None:
    sys.path[:0] = [sys.argv[1]] if sys.argv[1] else []
    sys.meta_path.insert(0, Blocker())
    try:
        import sparsekd_ray  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("sparsekd_ray can be imported: this proves nothing")
    import transformers

    answer = {path: read(Path(path)) | {"version": transformers.__version__} for path in sys.argv[2:]}
    assert not [name for name in sys.modules if name.startswith("sparsekd_ray")]
    print("ANSWER", json.dumps(answer))


if __name__ == "__main__":
    main()
