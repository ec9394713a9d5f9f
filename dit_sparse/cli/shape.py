# SPDX-License-Identifier: Apache-2.0
"""Find out how many layers, heads and steps a strategy file is about: files do not say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.cli.console import UserError
from dit_sparse.errors import DitSparseError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dit_sparse.strategy import Strategy

MOST_HEADS = 100_000  # of a model, over all layers; the largest has a few thousand
STEPS = 50


@dataclass(frozen=True)
class Shape:
    """What a strategy is applied to.

    Args:
        layers: Of each transformer.
        heads: Of each layer.
        num_steps: Of a generation.
        source: Where the numbers come from, for people.
        known: The model was told or is sure, not guessed.
        stages: Transformers of the pipeline.
        config: The transformer's config, where a model is known.
        vae: The VAE's config.
    """

    layers: int
    heads: int
    num_steps: int
    source: str
    known: bool = True
    stages: tuple[str, ...] = ("transformer",)
    config: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] | None = None


def shape_of(
    strategies: Sequence[Strategy],
    model: str | None = None,
    *,
    layers: int | None = None,
    heads: int | None = None,
    steps: int | None = None,
    files: Sequence[Path] = (),
) -> Shape:
    """Find the shape: as told, of ``model``, of the measurements beside a file, or assumed.

    Args:
        strategies: What is looked at.
        model: Folder, Hub id or known name.
        layers: As told.
        heads: As told.
        steps: As told.
        files: The strategies' files, beside which a search may have left its measurements.

    Raises:
        UserError: A strategy that names a layer or head which the model does not have.
        DitSparseError: A model that is not known, or not the strategy's.
    """
    found = (
        _of_model(strategies, model)
        or _of_store(strategies, files)
        or _of_name(strategies)
        or _of_rules(strategies)
        or _of_class(strategies)
        or Shape(40, 24, STEPS, "assumed; set with --layers and --heads", known=False)
    )
    if layers is not None or heads is not None:
        told = " and ".join(
            f"{n} {word}" for n, word in ((layers, "layers"), (heads, "heads")) if n is not None
        )
        both = layers is not None and heads is not None
        found = Shape(
            layers or found.layers,
            heads or found.heads,
            found.num_steps,
            told if both else f"{told} as given, the rest: {found.source}",
            both or found.known,
            found.stages,
            found.config,
            found.vae,
        )
    stages = found.stages
    if any(rule.stage == "transformer_2" for each in strategies for rule in each.rules):
        stages = ("transformer", "transformer_2")
    for each in strategies:
        name = "" if each.model is None else each.model.classes[0]
        each.validate_for(name, found.layers, found.heads, stages=stages)
    if found.layers * found.heads > MOST_HEADS:
        raise UserError(
            f"{found.layers} layers x {found.heads} heads ({found.source}): too many to show, "
            f"the maximum is {MOST_HEADS:,} heads; set the model's size with --layers and --heads"
        )
    return Shape(
        found.layers,
        found.heads,
        steps or found.num_steps,
        found.source,
        found.known,
        stages,
        found.config,
        found.vae,
    )


def _of_model(strategies: Sequence[Strategy], model: str | None) -> Shape | None:
    """Size a model and refuse a strategy of another one."""
    if model is None:
        return None
    from dit_sparse.cli.forecast import read_model
    from dit_sparse.strategy import config_hash

    known, vae = read_model(model)
    size = _size(known.config, model)
    for each in strategies:
        each.validate_for(
            size[2],
            size[0],
            size[1],
            stages=("transformer", "transformer_2"),
            config_hash=config_hash(known.config),
        )
    name = Path(model).name if Path(model).is_dir() else model
    return Shape(size[0], size[1], known.num_steps, name, config=known.config, vae=vae)


def _of_store(strategies: Sequence[Strategy], files: Sequence[Path]) -> Shape | None:
    from dit_sparse.profiler.stored import beside, fits, read_stored

    for strategy, path in zip(strategies, files, strict=False):
        try:
            found = read_stored(beside(path))
        except DitSparseError:
            continue  # the shape then comes from elsewhere, and ``source`` says so
        if found is not None and fits(found, strategy) is None:
            stages = tuple(dict.fromkeys(key[0] for key in found.rows))
            return Shape(
                found.layers, found.heads, found.num_steps, found.folder.name, stages=stages
            )
    return None


def _of_name(strategies: Sequence[Strategy]) -> Shape | None:
    """Recognise a shipped strategy's model in its name."""
    from dit_sparse.pipelines.known import KNOWN_MODELS

    for name in sorted(KNOWN_MODELS, key=len, reverse=True):
        if any(each.name.startswith(f"{name}.") for each in strategies):
            return _known(name, f"{name}, from the strategy's name")
    return None


def _of_rules(strategies: Sequence[Strategy]) -> Shape | None:
    """Take the largest layer and head that rules name; nothing is known of those beyond."""
    most = [0, 0]
    for each in strategies:
        for rule in each.rules:
            for i, named in enumerate((rule.layers, rule.heads)):
                if named != "all":
                    most[i] = max(most[i], named[-1] + 1)
    if not all(most):
        return None
    source = "the highest layer and head in the rules; set --model for the exact numbers"
    return Shape(most[0], most[1], STEPS, source, known=False)


def _of_class(strategies: Sequence[Strategy]) -> Shape | None:
    from dit_sparse.pipelines.known import KNOWN_MODELS

    for each in strategies:
        for name, known in KNOWN_MODELS.items():
            if each.model is not None and known.config["_class_name"] in each.model.classes:
                source = f"assumed: those of {name}, which has the same class; set --model"
                return _known(name, source, sure=False)
    return None


def _known(name: str, source: str, *, sure: bool = True) -> Shape:
    from dit_sparse.pipelines.known import known_model

    known = known_model(name)
    layers, heads, _ = _size(known.config, name)
    return Shape(layers, heads, known.num_steps, source, sure, config=known.config)


def _size(config: Mapping[str, Any], shown: str) -> tuple[int, int, str]:
    """Count layers and heads of a config, without weights."""
    import diffusers
    import torch

    from dit_sparse.pipelines import family_by_name
    from dit_sparse.pipelines.family import heads_of

    name = str(config.get("_class_name", ""))
    family = family_by_name(name)
    try:
        with torch.device("meta"):
            model = getattr(diffusers, name).from_config(dict(config))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{shown}: transformer/config.json: layers and heads cannot be counted: {error}"
        ) from error
    modules = family.attention_modules(model)
    return len(modules), heads_of(modules[0][1]), name


def load_strategy(name: str) -> tuple[Strategy, Path]:
    """Load what names a strategy; the path is its file's where it is one.

    Raises:
        DitSparseError: It cannot be found or read.
    """
    from dit_sparse.strategy import CONFIG_NAME, Strategy

    path = Path(name)
    try:
        if (path / CONFIG_NAME).is_file():
            path = path / CONFIG_NAME
    except (OSError, ValueError):  # a name that is no path
        path = Path("-")
    if not name:
        raise UserError("strategy must be a file, a shipped strategy or a method, got ''")
    return Strategy.coerce(name), path
