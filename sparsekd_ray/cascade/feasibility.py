"""Checks before any work that every requested size can be reached. Needs only the shapes of the dense model."""

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
    """Raises ConfigError if no method reads a changed setting, or if a method cannot reach a requested size."""
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
    """Raises ConfigError if the method cannot cut one model to these sparsities, one after the other.

    `what` begins the message. Without shapes (of a model that is not fetched yet), nothing is checked.
    """
    if not shapes:
        return
    method = METHODS[settings.method]
    try:
        method.check(shapes, method.only_read(settings), sparsities)
    except ConfigError as error:
        raise ConfigError(f"{what}: {method.name}: {error}") from None


def check_settings(settings: Prune, others: Collection[str] = ()) -> None:
    """Raises ConfigError for a changed setting that neither the method nor one of the `others` reads.

    `others` are the methods of the baselines, which share the settings except the allocation. A setting that only
    they read is a warning. `align` is never refused, because whole layers and masks are aligned in any case.
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
