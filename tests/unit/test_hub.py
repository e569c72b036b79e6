"""Where the dense model comes from: its name, its identity, its copy in the store, and its licence."""

import json
import os
import shutil
from pathlib import Path

import pytest
from models import dense_directory

from sparsekd_ray.config import Model
from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import hub, loading, origin, saving


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense model whose tokenizer has an end-of-text token."""
    folder = dense_directory(tmp_path / "dense", "phi3", True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "w6"}))
    return folder


def imported(folder: Path, out: Path) -> Path:
    out.mkdir()
    hub.import_model(Model(path=str(folder)), out)
    return out


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("someone/Phi-4-mini", "Phi-4-mini"),
        ("someone/Phi-4-mini/", "Phi-4-mini"),
        ("my model (v2)", "my-model-v2"),
        ("Modèle", "Modele"),
        ("模型", "model"),
        (".hidden", "hidden"),
        ("x" * 60 + ".", "x" * 48),
        (".", "plain"),
        ("..", "plain"),
    ],
)
def test_any_path_gives_a_label(
    path: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plain" if path != ".." else tmp_path / "plain" / "below"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert hub.label(Model(path=path)) == label


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "a/b/c", "Modèle", "my model (v2)", "x" * 300])
def test_a_path_that_is_neither_directory_nor_hub_id_is_named(path: str) -> None:
    if path == "x" * 300:
        path = f"./{path}"
    with pytest.raises(ModelError, match=r"model\.path"):
        hub.identify(Model(path=path))


def test_a_file_is_no_model_directory(dense: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json' is a file: give a Hugging Face directory"):
        hub.identify(Model(path=str(dense / "config.json")))


@pytest.mark.parametrize("cache", ["", "/proc/nowhere"])
def test_the_hub_s_refusal_is_explained(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache or str(tmp_path))
    with pytest.raises(
        ModelError, match="nobody/no-such-model' is no local directory, and the hub"
    ) as caught:
        hub.import_model(Model(path="nobody/no-such-model", revision="v1"), tmp_path)
    assert ("set HF_HOME" in str(caught.value)) == bool(cache)


def test_identity_is_of_the_files_that_are_read(dense: Path) -> None:
    model = Model(path=str(dense))
    before = hub.identify(model)
    (dense / "README.md").write_text("changed")
    (dense / "LICENSE").write_text("MIT License")
    (dense / "notes.json").write_text("{}")
    assert hub.identify(model) == before
    (dense / "generation_config.json").write_text("{}")
    assert hub.identify(model) != before


def test_the_copy_holds_card_licence_and_origin(dense: Path, tmp_path: Path) -> None:
    card = "---\nlicense: other\nlicense_name: small-print\nlicense_link: LICENSE\n---\n# Ours\n"
    (dense / "README.md").write_text(card)
    (dense / "LICENSE").write_text("Small print\n")
    (dense / "Notice.txt").write_text("Made by somebody\n")
    (dense / "pytorch_model.bin").write_text("a pickle")
    (dense / "modeling_theirs.py").write_text("raise SystemExit")
    out = imported(dense, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md", "LICENSE", "Notice.txt", "sparsekd_origin.json",
    }  # fmt: skip
    assert (out / "README.md").read_text() == card
    assert origin.read(out) == origin.Origin(None, "other", "small-print", "LICENSE")
    saving.save(loading.load(out), out, tmp_path / "student", "card")
    assert origin.read(tmp_path / "student") == origin.read(out)
    assert (tmp_path / "student" / "LICENSE").read_text() == "Small print\n"
    assert (tmp_path / "student" / "Notice.txt").exists()


def test_several_licences_are_one_of_no_common_name(dense: Path) -> None:
    (dense / "README.md").write_text("---\nlicense: [mit, apache-2.0]\nlicense_link: LICENSE\n---\n")
    assert origin.read(dense) == origin.Origin(None, "other", "mit, apache-2.0", "LICENSE")


def test_a_snapshot_in_the_hub_s_cache_has_its_id(dense: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--some-one--a--model" / "snapshots" / "0123"
    shutil.copytree(dense, cached)
    assert origin.read(cached).base_model == "some-one/a--model"
    assert origin.read(dense).base_model is None
    assert origin.read(dense, "one/two").base_model == "one/two"


@pytest.mark.parametrize(
    "terms",
    [
        "license: cc-by-nd-4.0",
        "license: cc-by-nc-nd-4.0",
        "license: [mit, cc-by-nc-nd-4.0]",
        "license: other\nlicense_name: no-derivatives-1.0",
    ],
)
def test_a_licence_that_forbids_students_is_refused_before_work(
    terms: str, dense: Path, tmp_path: Path
) -> None:
    (dense / "README.md").write_text(f"---\n{terms}\n---\n# Theirs\n")
    with pytest.raises(ModelError, match=r"licence of the dense model .* forbids students: its card states"):
        hub.identify(Model(path=str(dense)))
    with pytest.raises(ModelError, match="forbids students"):
        imported(dense, tmp_path / "out")


def test_a_licence_file_is_read_too(dense: Path) -> None:
    (dense / "LICENSE.md").write_text(
        "# Creative Commons\n\n## Attribution-NonCommercial-NoDerivatives 4.0\n"
    )
    with pytest.raises(ModelError, match=r"LICENSE\.md says"):
        hub.identify(Model(path=str(dense)))


@pytest.mark.parametrize(
    "text", ["MIT License", "Copyright (c) 2024 ND Labs\nAll rights reserved.\n\nRedistribution"]
)
@pytest.mark.parametrize(
    "card", ["license: apache-2.0", "license: cc-by-sa-4.0", "language: en", "license: [a: {"]
)
def test_other_licences_and_none_pass(text: str, card: str, dense: Path) -> None:
    (dense / "LICENSE").write_text(text)
    (dense / "README.md").write_text(f"---\n{card}\n---\n# Theirs\n")
    hub.identify(Model(path=str(dense)))
    stated = origin.read(dense).license
    assert stated == (
        "unknown" if card in ("language: en", "license: [a: {") else card.removeprefix("license: ")
    )


def test_a_model_that_computes_otherwise_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = dense_directory(tmp_path / "granite", "granite", True, logits_scaling=8.0)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "w6"}))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="fails the probe “the logits equal the head times"):
        hub.identify(Model(path=str(folder)))


def test_a_tokenizer_that_cannot_serve_is_refused_before_work(dense: Path) -> None:
    (dense / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    with pytest.raises(ModelError, match="no end-of-text token"):
        hub.identify(Model(path=str(dense)))


def test_the_hub_s_commit_is_recorded_and_read_throughout(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, revisions = tmp_path / "snapshots" / "c0ffee", []
    shutil.copytree(dense, snapshot)

    def download(_: str, revision: str | None, allow_patterns: list[str]) -> str:
        revisions.append(revision)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "out").mkdir()
    figures = hub.import_model(Model(path="someone/model"), tmp_path / "out")
    assert figures["commit"] == "c0ffee" and revisions == [None, "c0ffee"]
    (tmp_path / "again").mkdir()
    assert "commit" not in hub.import_model(Model(path=str(dense)), tmp_path / "again")


@pytest.mark.parametrize("damage", ["cut", "absent", "no end of text", "slow"])
def test_a_tokenizer_that_cannot_serve_is_refused(damage: str, dense: Path, tmp_path: Path) -> None:
    file, settings = dense / "tokenizer.json", dense / "tokenizer_config.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "no end of text":
        settings.write_text(json.dumps({"unk_token": "<unk>"}))
    else:
        file.unlink()
        if damage == "absent":
            settings.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        imported(dense, tmp_path / "out")


def test_links_as_in_the_hub_s_cache_are_followed(dense: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for path in dense.iterdir():
        os.symlink(path, links / path.name)
    out = imported(links, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.iterdir())
