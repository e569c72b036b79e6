"""Whether every size that is asked for can be reached: from the shapes of the dense model alone, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsekd_ray.cascade.plan import PLAIN
from sparsekd_ray.config import Config, Prune
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.prune.allocate import max_sparsity

Shapes = Mapping[str, tuple[int, int]]


def check_cascade(config: Config, shapes: Shapes) -> None:
    """ConfigError if a round, a one-shot control or a student beside the rounds asks for more than its method gives."""
    sizes = [round_.sparsity for round_ in config.cascade.rounds]
    check("cascade.rounds", shapes, config.prune, sizes)
    one_shot = PLAIN.model_copy(update={"align": config.prune.align})
    check("the rounds' one-shot control", shapes, one_shot, sizes)
    for branch in config.cascade.baselines:
        settings = config.prune.model_copy(update={"method": branch.method})
        check(f"cascade.baselines {branch.title}", shapes, settings, [branch.sparsity])


def check(what: str, shapes: Shapes, settings: Prune, sparsities: Sequence[float]) -> None:
    """ConfigError, beginning with `what`, if the method cannot cut one model to these sizes one after the other.

    shapes: (m, n) of every MLP matrix of the dense model; where there are none, nothing is known yet and all passes.
    """
    if not shapes:
        return
    if settings.method in ("svd", "svd-whitened"):
        _low_rank(what, shapes, settings, max(sparsities, default=0.0))
        return
    try:
        if settings.method in ("neurons", "sdm"):
            _neurons(shapes, settings, sparsities)
        elif settings.method == "depth":
            _layers(shapes, sparsities)
    except ConfigError as error:
        raise ConfigError(f"{what}: {settings.method}: {error}") from None


def _low_rank(what: str, shapes: Shapes, settings: Prune, asked: float) -> None:
    bias = settings.bias and settings.method == "svd-whitened"
    limit = max_sparsity(shapes, settings.align, settings.storage == "gauge", bias)
    if asked > limit:
        raise ConfigError(
            f"{what}: asks for sparsity {asked:g}; truncated SVD of this model with ranks in multiples of "
            f"{settings.align} can remove at most {limit:.4f} of the MLP parameters"
        )


def _neurons(shapes: Shapes, settings: Prune, sparsities: Sequence[float]) -> None:
    from sparsekd_ray.prune import neurons  # imports transformers

    (hidden, width), *others = [shape for name, shape in shapes.items() if name.endswith("down_proj")]
    dense, layers = sum(m * n for m, n in shapes.values()), 1 + len(others)
    for sparsity in sparsities:
        width = neurons.width(dense, sparsity, hidden, layers, settings.align, present=width)


def _layers(shapes: Shapes, sparsities: Sequence[float]) -> None:
    from sparsekd_ray.prune import depth

    layers = left = sum(name.endswith("down_proj") for name in shapes)
    for sparsity in sparsities:
        left -= depth.count(left, 1 - (1 - sparsity) * layers / left)
