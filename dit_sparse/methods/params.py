# SPDX-License-Identifier: Apache-2.0
"""Methods from the params of a strategy file and back; every message names the key."""

from __future__ import annotations

import json
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from dit_sparse.errors import StrategyError
from dit_sparse.methods import method_class

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dit_sparse.core.call import Method


def param_names(name: str) -> tuple[str, ...]:
    """List the params of the method called ``name``, in the order of its dataclass."""
    return tuple(field.name for field in fields(method_class(name)))  # type: ignore[arg-type]


@cache
def _adapter(name: str) -> TypeAdapter[Method]:
    return TypeAdapter(method_class(name))


def build_method(name: str, params: Mapping[str, Any]) -> Method:
    """Make the method called ``name``; params that are not given keep their defaults.

    Types are strict (a string is no number), except that a list stands for a tuple, as in JSON.

    Raises:
        StrategyError: Unknown method or key, wrong type, or a value that the method refuses.
    """
    known = param_names(name)
    for key in params:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            takes = ", ".join(known) if known else "no params"
            raise StrategyError(f"unknown key {key!r}{hint}; {name} takes: {takes}")
    try:
        text = json.dumps(dict(params), allow_nan=False)
        return _adapter(name).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            raise StrategyError(str(first["ctx"]["error"])) from error
        where = str(first["loc"][0]) if first["loc"] else name
        given = params.get(where, "nothing")
        raise StrategyError(f"{where}: {first['msg']}, got {given!r:.80}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise StrategyError(f"params must be plain JSON values: {error}") from error


def params_of(method: Method) -> dict[str, Any]:
    """Write out every param of ``method`` as JSON values, defaults included."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    return plain


def method_text(doing: tuple[str, Mapping[str, Any]], *, short: bool = False) -> str:
    """Write a method with its params; ``short`` leaves out those that have their defaults."""
    name, params = doing
    usual = params_of(build_method(name, {})) if short else {}
    told = ", ".join(
        f"{key} {value}"
        for key, value in params.items()
        if key not in usual or value != usual[key]
    )
    return f"{name} ({told})" if told else name
