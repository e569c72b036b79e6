"""Checks before any work that every requested size can be reached, from the shapes of the dense model alone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from sparsekd_ray.cascade.plan import PLAIN
from sparsekd_ray.config import Config, Prune
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.prune.methods.spec import Shapes

logger = logging.getLogger(__name__)


def check_cascade(config: Config, shapes: Shapes) -> None:
    """ConfigError if no method reads a setting that was changed, or if a method cannot reach a size asked of it."""
    baselines = config.cascade.baselines
    check_settings(config.prune, {baseline.method for baseline in baselines})
    sizes = [round_.sparsity for round_ in config.cascade.rounds]
    check("cascade.rounds", shapes, config.prune, sizes)
    one_shot = PLAIN.model_copy(update={"align": config.prune.align})
    check("the rounds' one-shot control", shapes, one_shot, sizes)
    for baseline in baselines:
        settings = config.prune.model_copy(update={"method": baseline.method})
        check(f"cascade.baselines {baseline.title}", shapes, settings, [baseline.sparsity])


def check(what: str, shapes: Shapes, settings: Prune, sparsities: Sequence[float]) -> None:
    """ConfigError, beginning with `what`, if the method cannot cut one model to these sparsities, one after the other.

    Where there are no shapes, nothing is known yet and everything passes.
    """
    if not shapes:
        return
    method = METHODS[settings.method]
    try:
        method.check(shapes, method.only_read(settings), sparsities)
    except ConfigError as error:
        raise ConfigError(f"{what}: {method.name}: {error}") from None


def check_settings(settings: Prune, others: Collection[str] = ()) -> None:
    """ConfigError if neither the method nor one of the `others`, which share its settings, reads what was changed.

    A line of warning where only the others read it. The allocation is not shared. `align` is never refused: whole
    layers and masks are aligned in any case.
    """
    for name in Prune.model_fields.keys() - {"method", "align", *METHODS[settings.method].settings}:
        value, default = getattr(settings, name), Prune.model_fields[name].default
        readers = [method for method, spec in METHODS.items() if name in spec.settings]
        sharing = [method for method in readers if method in others and name != "allocation"]
        unread = f"prune.{name} is {value}, and {settings.method} does not read it"
        if value != default and sharing:
            logger.warning(f"{unread}: only the baselines by {' and '.join(sharing)} do")
        elif value != default:
            raise ConfigError(f"{unread}: leave it at {default}, or choose {' or '.join(readers)}")
