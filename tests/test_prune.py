"""The prune stage on real model directories."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_checkpoint import FAMILIES, dense_directory

from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.model import checkpoint
from sparsekd_ray.prune.apply import prune

torch.set_num_threads(1)


def elements(path: Path, part: str = "") -> int:
    """Elements of the tensors on disk, as another reader of the format sees them."""
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).numel() for name in tensors.keys() if part in name)  # noqa: SIM118
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_prune_meets_the_budget_on_disk_in_two_rounds(family: str, tied: bool, tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", family, tied)
    dense_mlp = checkpoint.mlp_parameters(source)
    previous, held = source, dict.fromkeys(checkpoint.shapes_from_config(source), 10**9)
    for sparsity in (0.3, 0.6):
        out, said = tmp_path / f"{sparsity}", []
        metrics = prune(
            previous, out, sparsity=sparsity, align=2, dense_mlp_params=dense_mlp, say=said.append
        )
        assert metrics["params"] == elements(out) and metrics["mlp_params"] == elements(out, ".mlp.")
        assert metrics["params"] == checkpoint.count_parameters(checkpoint.load(out))
        assert metrics["sparsity"] == 1 - metrics["mlp_params"] / dense_mlp
        half_step = 2 * (32 + 45) / 2 / dense_mlp  # of a matrix of 32 by 45, two ranks at a time
        assert metrics["sparsity"] == pytest.approx(sparsity, abs=half_step)
        assert metrics["sparsity_requested"] == sparsity and said
        assert all(rank is None or rank <= held[name] for name, rank in metrics["ranks"].items())
        previous, held = out, {name: rank or held[name] for name, rank in metrics["ranks"].items()}
    with pytest.raises(ConfigError, match=r"above 0\.[56]"):
        prune(previous, tmp_path / "back", sparsity=0.3, align=2, dense_mlp_params=dense_mlp, say=print)
    assert not (tmp_path / "back").exists()


def test_factors_are_those_of_the_joint_matrix(tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", "phi3", tied=True)
    metrics = prune(
        source,
        tmp_path / "out",
        sparsity=0.5,
        align=4,
        dense_mlp_params=checkpoint.mlp_parameters(source),
        say=print,
    )
    dense, student = checkpoint.load(source), checkpoint.load(tmp_path / "out")
    name = "model.layers.1.mlp.gate_up_proj"
    W_mn = dense.get_submodule(name).weight.detach().double()
    sigma_k = torch.linalg.svdvals(W_mn)[metrics["ranks"][name] :]
    error = torch.linalg.norm(W_mn - checkpoint.mlp_matrix(student, name))
    assert error == pytest.approx(float(sigma_k.square().sum().sqrt()), rel=1e-5)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", "phi3", tied=True)
    model = checkpoint.load(source)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.inf
    model.save_pretrained(source)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        prune(source, tmp_path / "out", sparsity=0.5, align=2, dense_mlp_params=9000, say=print)
