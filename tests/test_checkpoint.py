"""Model directories: support, counts, loading, saving, and exports in a process without this package."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import checkpoint, export
from sparsekd_ray.prune.apply import factorise

torch.set_num_threads(1)

FAMILIES = ("phi3", "qwen3")
VOCABULARY = 97


def tiny_config(family: str, tied: bool, **more: Any) -> transformers.PretrainedConfig:
    stock = {"phi3": transformers.Phi3Config, "qwen3": transformers.Qwen3Config}[family]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 45, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return stock(
        **{**sizes, **heads, **tokens, "tie_word_embeddings": tied, "initializer_range": 0.2, **more}
    )


def dense_model(family: str, tied: bool, **more: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(family, tied, **more)).eval()


def dense_directory(path: Path, family: str, tied: bool, **more: Any) -> Path:
    """A stock model with random weights and a word-level tokenizer."""
    dense_model(family, tied, **more).save_pretrained(path)
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "The": 5, **{f"w{i}": i for i in range(6, VOCABULARY)}}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


def sparse_directory(path: Path, family: str, tied: bool) -> Path:
    """A student whose first matrix stays dense and whose others have rank 5."""
    source = dense_directory(path.parent / f"{path.name}-dense", family, tied)
    model = checkpoint.load(source)
    ranks: dict[str, int | None] = dict.fromkeys(checkpoint.shapes_from_config(model), 5)
    ranks[next(iter(ranks))] = None
    checkpoint.save(factorise(model, ranks, print), source, path, "card")
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


# what a config says


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_from_the_config_are_those_of_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = dense_model(family, tied)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if ".mlp." in name and isinstance(module, torch.nn.Linear)
    }
    assert checkpoint.shapes_from_config(model.config) == shapes == checkpoint.shapes_from_config(model)
    assert list(checkpoint.shapes_from_config(model.config)) == list(shapes)
    assert (
        checkpoint.total_parameters(model.config)
        == model.num_parameters()
        == checkpoint.count_parameters(model)
    )
    assert checkpoint.mlp_parameters(model) == sum(m * n for m, n in shapes.values())
    sparse = checkpoint.load(sparse_directory(tmp_path / "sparse", family, tied))
    assert checkpoint.shapes_from_config(sparse) == shapes
    assert checkpoint.total_parameters(tmp_path / "sparse") == sparse.num_parameters()
    mlp = sum(p.numel() for name, p in sparse.named_parameters() if ".mlp." in name)
    assert checkpoint.mlp_parameters(sparse) == mlp < checkpoint.mlp_parameters(model)


def test_counts_of_published_models() -> None:
    """Sizes of Phi-4-mini and Qwen3-0.6B, against the counts published for them."""
    phi = {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
    phi |= {
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
        "tie_word_embeddings": True,
    }
    assert checkpoint.total_parameters(phi) == 3_836_021_760
    assert checkpoint.mlp_parameters(phi) == 2_415_919_104
    qwen = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    qwen |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    assert checkpoint.total_parameters(qwen | {"tie_word_embeddings": True}) == 596_049_920
    assert checkpoint.mlp_parameters(qwen) == 264_241_152


def test_attention_biases_and_head_sizes_are_counted() -> None:
    model = dense_model("qwen3", False, attention_bias=True, head_dim=12)
    assert checkpoint.total_parameters(model) == model.num_parameters()


def test_planning_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from sparsekd_ray.model import checkpoint; from sparsekd_ray.prune import allocate;"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts (num_experts)"),
        ({"model_type": "phi3", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "phi3", "mlp_bias": True}, "biased MLP (mlp_bias)"),
        ({}, "model_type None"),
    ],
)
def test_what_is_not_supported_is_named(values: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError, match=re.escape(found) + ".*supported are .*phi3, qwen3, sparsekd_phi3"):
        checkpoint.check_supported(values)


def test_supported_families() -> None:
    types = ("phi3", "qwen3", "sparsekd_phi3", "sparsekd_qwen3")
    assert [checkpoint.check_supported({"model_type": t, "mlp_bias": False}) for t in types] == [
        *FAMILIES
    ] * 2


# loading


def test_a_directory_without_config_or_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no readable config"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "phi3", "hidden_size": "wide"}')
    with pytest.raises(ModelError, match="no whole number for hidden_size, intermediate_size"):
        checkpoint.shapes_from_config(tmp_path)


def test_resolve_takes_directories_and_explains_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert checkpoint.resolve_dense(str(tmp_path)) == tmp_path
    for name in ("nobody/no-such-model", str(tmp_path / "absent")):
        with pytest.raises(ModelError, match=f"{name}' is no local directory, and the hub did not give it"):
            checkpoint.resolve_dense(name, "v1")


@pytest.mark.parametrize("damage", ["cut", "missing", "left over", "misshapen", "absent"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_damaged_weights_are_refused(kind: str, damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = (dense_directory if kind == "dense" else sparse_directory)(tmp_path / kind, "phi3", False)
    file, name = path / "model.safetensors", "model.layers.0.mlp.gate_up_proj.weight"
    tensors = load_file(file)
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:-1000])
        case "absent":
            file.unlink()
        case "missing":
            del tensors[name]
        case "left over":
            tensors["model.layers.0.mlp.gate_up_proj.bias"] = torch.zeros(90)
        case "misshapen":
            tensors[name] = torch.zeros(90, 31)
    if damage not in ("cut", "absent"):
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=name.removesuffix(".weight") if damage not in ("cut", "absent") else "load"
    ):
        checkpoint.load(path)


def test_a_wrong_recorded_count_is_refused(tmp_path: Path) -> None:
    path = sparse_directory(tmp_path / "sparse", "qwen3", True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_parameters_expected": 12}))
    with pytest.raises(ModelError, match="num_parameters_expected is 12"):
        checkpoint.load(path)


def test_a_header_cut_short_is_named(tmp_path: Path) -> None:
    for content in (b"", (1 << 60).to_bytes(8, "little") + b'{"a": '):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors is cut short"):
            checkpoint.tensors_on_disk(tmp_path)


# saving


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_directory_is_complete_and_keeps_generation_settings(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = dense_directory(tmp_path / "dense", family, True)
    generation = json.loads((source / "generation_config.json").read_text()) | {"max_new_tokens": 7}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "config.json").write_text(
        json.dumps(
            json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoConfig": "theirs.Config"}}
        )
    )
    model = checkpoint.load(source, dtype=dtype)
    out = tmp_path / "out"
    student = factorise(model, dict.fromkeys(checkpoint.shapes_from_config(model), 3), print)
    assert student.dtype == dtype and student.generation_config.max_new_tokens == 7
    checkpoint.save(student, source, out, "the card")
    assert {p.name for p in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "modeling_sparsekd.py",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (out / "README.md").read_text() == "the card"
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert checkpoint.load(out, dtype="auto").dtype == dtype
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == f"sparsekd_{family}" and str(tmp_path) not in json.dumps(config)
    assert all(reference.startswith("modeling_sparsekd.Sparse") for reference in config["auto_map"].values())
    checkpoint.save(model, source, tmp_path / "stock", "card")
    assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    assert not (tmp_path / "stock" / "modeling_sparsekd.py").exists()


def test_save_refuses_what_does_not_reload_and_a_missing_tokenizer(tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", "phi3", False)
    model = checkpoint.load(source)
    with pytest.raises(ModelError, match="has no tokenizer"):
        checkpoint.save(model, tmp_path, tmp_path / "out", "card")
    model.model.norm.weight.data[0] = torch.nan  # never equal to itself
    with pytest.raises(ModelError, match=r"did not reload as it was saved: changed model\.norm\.weight"):
        checkpoint.save(model, source, tmp_path / "out", "card")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_model_is_stock_and_the_same_function(family: str, tied: bool, tmp_path: Path) -> None:
    sparse = checkpoint.load(sparse_directory(tmp_path / "sparse", family, tied))
    merged = checkpoint.merge(sparse)
    assert type(merged) is type(dense_model(family, tied)) and merged.config.model_type == family
    assert merged.num_parameters() == dense_model(family, tied).num_parameters()
    torch.testing.assert_close(logits(merged), logits(sparse), atol=1e-5, rtol=1e-5)
    assert (logits(merged) - logits(dense_model(family, tied))).abs().max() > 0.1


def test_long_rope_survives_conversion(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **factors}
    source = dense_directory(
        tmp_path / "dense", "phi3", True, rope_parameters=rope, original_max_position_embeddings=32
    )
    model = checkpoint.load(source)
    ranks: dict[str, int | None] = dict.fromkeys(checkpoint.shapes_from_config(model))
    checkpoint.save(factorise(model, ranks, print), source, tmp_path / "out", "card")
    unchanged = checkpoint.load(tmp_path / "out")
    assert unchanged.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(unchanged), logits(model))


# export

OUTSIDER = """
import importlib.abc, json, os, re, sys
from pathlib import Path

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsekd_ray":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
try:
    import sparsekd_ray
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("sparsekd_ray can be imported: this proves nothing")

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
answer = {}
for root in map(Path, sys.argv[1:]):
    try:
        AutoModelForCausalLM.from_pretrained(root / "low-rank")
        refusal = "none"
    except ValueError as error:
        refusal = str(error)
    found = {"refusal": refusal}
    for name in ("low-rank", "merged"):
        code = {"trust_remote_code": True} if name == "low-rank" else {}
        model = AutoModelForCausalLM.from_pretrained(root / name, **code)
        ids = torch.arange(20)[None]
        os.chdir(root / name)
        snippet = re.search("```python\\n(.*?)```", Path("README.md").read_text(), re.S)[1]
        exec(snippet, {})
        found[name] = {
            "class": type(model).__module__ + "." + type(model).__name__,
            "params": sum(p.numel() for p in model.parameters()),
            "logits": model(ids).logits.tolist(),
            "generated": model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False).tolist(),
        }
    answer[str(root)] = found
assert not [name for name in sys.modules if name.startswith("sparsekd_ray")]
print("ANSWER", json.dumps(answer))
"""

FIGURES = {
    "window": 64,
    "stride": 32,
    **{
        p: {"ppl": 12.345, "tokens": 9000, "domains": {"prose": {"ppl": 6.5, "tokens": 9000}}}
        for p in ("sliding", "disjoint")
    },
}


@pytest.fixture
def module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps transformers' copies of shipped code out of the user's cache."""
    cache = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(cache)
    return cache


def test_exports_load_where_this_package_is_not(
    module_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {}
    for family, tied in (("phi3", True), ("qwen3", False)):
        source = sparse_directory(tmp_path / f"student-{family}", family, tied)
        out, said = tmp_path / f"export-{family}", []
        facts = {
            "sparsity": 0.5,
            "base_model": "someone/base",
            "perplexity": FIGURES,
            "dense_perplexity": FIGURES,
        }
        metrics = export.export(source, out, card_facts=facts, say=said.append)
        assert len(said) == 2 and not [
            p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")
        ]
        models[out] = checkpoint.load(source)
        assert metrics["low-rank"]["params"] == checkpoint.count_parameters(models[out])
        assert max(m["logits_difference"] for m in metrics.values()) <= 1e-5
        shutil.rmtree(source)
    script = tmp_path / "outsider.py"
    script.write_text(OUTSIDER)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "elsewhere"))
    done = subprocess.run(
        [sys.executable, "-I", script, *models],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.split("ANSWER ")[1])
    for out, ours in models.items():
        found = answer[str(out)]
        assert "trust_remote_code" in found["refusal"]
        assert found["low-rank"]["class"].startswith("transformers_modules.")
        assert found["merged"]["class"].startswith("transformers.models.")
        dense = checkpoint.total_parameters(out / "merged")
        assert found["merged"]["params"] == dense > found["low-rank"]["params"] == ours.num_parameters()
        expected = ours.generate(torch.arange(20)[None], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        for name in ("low-rank", "merged"):
            torch.testing.assert_close(
                torch.tensor(found[name]["logits"]), logits(ours), atol=1e-5, rtol=1e-5
            )
            assert found[name]["generated"] == expected.tolist()


def test_card_states_what_the_model_is() -> None:
    import yaml

    facts = {"sparsity": 0.35, "parameters": 12345, "base_model": "someone/base", "license": "mit"}
    card = export.model_card({**facts, "perplexity": FIGURES, "dense_perplexity": FIGURES}, low_rank=True)
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert (
        front["base_model"] == "someone/base"
        and front["library_name"] == "transformers"
        and front["license"] == "mit"
    )
    assert "low-rank" in front["tags"]
    assert "35.0%" in body and "12,345" in body and "trust_remote_code=True" in body
    assert (
        "| windows of 64 tokens, stride 32, every token of every window | prose | 9,000 | 6.50 | 6.50 |"
        in body
    )
    plain = export.model_card({"sparsity": 0.35, "parameters": 1}, low_rank=False)
    assert "base_model" not in plain and "Perplexity" not in plain and "trust_remote_code" not in plain


def test_export_refuses_a_stock_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="stock model already"):
        export.export(
            dense_directory(tmp_path / "dense", "phi3", True), tmp_path / "out", card_facts={}, say=print
        )
