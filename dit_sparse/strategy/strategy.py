# SPDX-License-Identifier: Apache-2.0
"""Strategies: which method runs where, as validated data that is a file.

Past 300 lines, as it is one class: every way to get, change, keep and ask a strategy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from dit_sparse._version import __version__
from dit_sparse.core.reading import refuse_controls
from dit_sparse.errors import StrategyError
from dit_sparse.methods import METHODS, method_class
from dit_sparse.methods.params import param_names
from dit_sparse.strategy import hub
from dit_sparse.strategy.files import (
    CONFIG_NAME,
    explain,
    is_there,
    read_json,
    shipped_file,
    shipped_names,
    to_text,
    unknown_name,
    write_text,
)
from dit_sparse.strategy.form import FORM, Grid, Line, Model, Receipt, Rule
from dit_sparse.strategy.schedule import Schedule

if TYPE_CHECKING:
    from dit_sparse.core.call import Method

SCHEMA_VERSION: Final = 1
MAX_RULES = 50_000  # one for each head of the largest model in five step bands: 20,000
_MAX_CACHED = 1 << 16


class Choice(NamedTuple):
    """What some heads of one layer do at one step.

    Args:
        rule: Index of the rule that says so; None: no rule, or the schedule says dense.
        method: The method; None: dense.
        heads: The heads, ascending.
    """

    rule: int | None
    method: Method | None
    heads: tuple[int, ...]


class Strategy(BaseModel):
    """Which method runs in which layers, heads and steps; what no rule names is dense.

    Args:
        schema_version: Version of this form, 1.
        name: A name for people.
        model: The model it was made for; None: any.
        grid: The latents grid it was made at; None: any. It runs on others too.
        library_version: Version of dit_sparse that wrote it.
        schedule: Dense steps and layers, over all rules.
        rules: In rising order of precedence: a later rule wins over an earlier one for the heads,
            layers and steps that both name.
        receipt: How it was found and what was measured.
    """

    model_config = FORM

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Annotated[Line, Field(min_length=1, max_length=200)]
    model: Model | None = None
    grid: Grid | None = None
    library_version: Line = __version__
    schedule: Schedule = Schedule()
    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = ()
    receipt: Receipt = Receipt()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], shown: str = "strategy") -> Strategy:
        """Validate plain data; errors start with ``shown`` and name the key.

        ``schema_version`` must be there: data without it is something else.
        """
        version = data.get("schema_version", "nothing")
        if type(version) is not int or version != SCHEMA_VERSION:
            newer = type(version) is int and version > SCHEMA_VERSION
            raise StrategyError(
                f"{shown}: schema_version: must be {SCHEMA_VERSION}, got {version!r:.80}"
                + (f"; dit_sparse {__version__} is too old for this file" if newer else "")
            )
        try:
            refuse_controls(data)
            if len(rules := data.get("rules") or ()) > MAX_RULES:
                raise StrategyError(  # noqa: TRY301
                    f"{shown}: rules: at most {MAX_RULES:,} are allowed, got {len(rules):,}; "
                    "combine heads with the same method in one rule"
                )
            return cls.model_validate_json(json.dumps(data, allow_nan=False), strict=True)
        except ValidationError as error:
            raise explain(error, shown, _KEYS) from error
        except StrategyError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise StrategyError(f"{shown}: not valid JSON data: {error}") from error

    @classmethod
    def load(cls, name: str | PathLike[str]) -> Strategy:
        """Read a strategy file by its path, or a shipped strategy by its name."""
        if isinstance(name, str) and (shipped := shipped_file(name)) is not None:
            return cls.from_dict(read_json(shipped, shipped.name), shipped.name)
        path = Path(name)
        if path.suffix != ".json" and not is_there(path):
            raise unknown_name(str(name), tuple(sorted(METHODS)))
        return cls.from_dict(read_json(path, str(path)), str(path))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the file, whole or not at all; what is there is replaced."""
        write_text(Path(path), self.to_json())

    def to_dict(self) -> dict[str, Any]:
        """Give the content of the file as plain data, defaults included."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Give the content of the file."""
        return to_text(self.to_dict())

    @classmethod
    def single(cls, method: str, *, name: str | None = None, **options: Any) -> Strategy:
        """Make the strategy that runs one method everywhere.

        Args:
            method: A name from the table of methods.
            name: The strategy's name; the method's where None.
            **options: The method's params and the schedule's fields.
        """
        plain = cls(name=method if name is None else name, rules=(_rule(method, {}),))
        return plain.with_options(**options)

    @classmethod
    def coerce(
        cls, profile: Strategy | str | PathLike[str] | Mapping[str, Any], **options: Any
    ) -> Strategy:
        """Make a strategy of whatever names one; ``options`` override its settings.

        Args:
            profile: A strategy; the content of one as a dict; the name of a method (runs it
                everywhere) or of a shipped strategy; the path of a file, or of a folder that
                holds ``sparse_strategy.json``; ``FOLDER:place`` in a folder; a Hub repository
                (``owner/name``, ``owner/name@revision:place``). Tried in this order.
            **options: See ``with_options``.
        """
        if isinstance(profile, Strategy):
            return profile.with_options(**options)
        if isinstance(profile, Mapping):
            return cls.from_dict(profile).with_options(**options)
        if not isinstance(profile, str | PathLike):
            raise StrategyError(
                "strategy must be a name, a path, a Hub repository, a dict or a Strategy, got "
                f"{type(profile).__name__}"
            )
        if isinstance(profile, str) and profile in METHODS:
            return cls.single(profile, **options)
        if isinstance(profile, str) and profile in shipped_names():
            return cls.load(profile).with_options(**options)
        path = Path(profile)
        if is_there(path / CONFIG_NAME):
            return cls.from_pretrained(path).with_options(**options)
        elsewhere = isinstance(profile, str) and (
            hub.inside(profile) or (hub.parse(profile) and not hub.means_a_file(profile))
        )
        if elsewhere and not is_there(path):
            return cls.from_pretrained(profile).with_options(**options)
        return cls.load(profile).with_options(**options)

    def with_options(self, **options: Any) -> Strategy:
        """Override fields of the schedule or, where the rules name one method, its params.

        Rules of the method "dense", which has no params, do not count.
        """
        if not options:
            return self
        methods = sorted({rule.method for rule in self.rules} - {"dense"})
        params = param_names(methods[0]) if len(methods) == 1 else ()
        scheduled = tuple(Schedule.model_fields)
        unknown = [key for key in options if key not in params and key not in scheduled]
        if unknown:
            several, of = "", f"{methods[0]}: {', '.join(params)}; " if methods else ""
            if len(methods) > 1:
                of = ""
                several = (
                    f"change the params of several methods ({', '.join(methods)}) in a file; "
                )
            raise StrategyError(
                f"{self.name}: unknown option {unknown[0]!r}; {several}options are {of}schedule: "
                f"{', '.join(scheduled)}"
            )
        data = self.to_dict()
        for key, value in options.items():
            if key in scheduled:
                data["schedule"][key] = value
                continue
            for rule in data["rules"]:
                if rule["method"] in methods:
                    rule["params"][key] = value
        # What was measured or published was so with other settings.
        data["receipt"] |= {"published": False, "measured": {}}
        note = f"changed from {self.name} by options: {', '.join(sorted(options))}"
        old = data["receipt"]["note"]
        data["receipt"]["note"] = note if old is None else f"{old}; {note}"
        return type(self).from_dict(data, self.name)

    def validate_for(
        self,
        model_class: str,
        num_layers: int,
        num_heads: int,
        *,
        stages: tuple[str, ...] = ("transformer",),
        config_hash: str | None = None,
    ) -> tuple[str, ...]:
        """Raise ``StrategyError`` where the strategy cannot be meant for this model.

        Args:
            model_class: Class name of the transformer.
            num_layers: Its transformer blocks.
            num_heads: Heads of each.
            stages: The pipeline's transformers.
            config_hash: ``config_hash(config)`` of the transformer.

        Returns:
            Remarks: what is odd, but runs.
        """
        if self.model is not None and model_class not in self.model.classes:
            raise StrategyError(
                f"{self.name}: model: made for {' or '.join(self.model.classes)}, but this model "
                f"is a {model_class}; to use it anyway, set model to null in a copy of the file"
            )
        self._check_range("schedule.dense_layers", self.schedule.dense_layers, num_layers, "layer")
        for i_rule, rule in enumerate(self.rules):
            at = f"rules[{i_rule}]"
            self._check_range(f"{at}.layers", rule.layers, num_layers, "layer")
            self._check_range(f"{at}.heads", rule.heads, num_heads, "head")
            if rule.stage is not None and rule.stage not in stages:
                raise StrategyError(
                    f"{self.name}: {at}.stage: this pipeline has no {rule.stage!r}; its stages "
                    f"are {', '.join(stages)}"
                )
        wanted = None if self.model is None else self.model.config_hash
        if wanted is not None and config_hash is not None and wanted != config_hash:
            return (
                f"{self.name} was made for another config of {model_class}; check its quality",
            )
        return ()

    def _check_range(
        self, key: str, named: Literal["all"] | tuple[int, ...], size: int, word: str
    ) -> None:
        if named != "all" and named and named[-1] >= size:
            raise StrategyError(
                f"{self.name}: {key}: {word} {named[-1]} is out of range; this model has {size} "
                f"{word}s, 0 to {size - 1}"
            )

    def assign(
        self,
        layer: int,
        step: int,
        num_steps: int,
        stage: str,
        num_heads: int,
        num_layers: int,
    ) -> tuple[Choice, ...]:
        """Say what each head of a layer does at a step; heads that share a choice are one group.

        Every head is in exactly one group; groups are ordered by their first head. All dense
        heads are one group, whose method is None. Heads whose rules name equal methods (same
        params) are one group too, under the first of those rules. Repeated calls are cached.
        """
        key = (layer, step, num_steps, stage, num_heads, num_layers)
        found = self._assigned.get(key)
        if found is None:
            if not (0 <= layer < num_layers and 0 <= step < num_steps and num_heads > 0):
                raise StrategyError(
                    f"{self.name}: no layer {layer} of {num_layers}, step {step} of {num_steps}, "
                    f"or head among {num_heads}"
                )
            if len(self._assigned) >= _MAX_CACHED:
                self._assigned.clear()
            found = self._assigned[key] = self._assign(layer, step, num_steps, stage, num_heads)
        return found

    @cached_property
    def _assigned(self) -> dict[tuple[int, int, int, str, int, int], tuple[Choice, ...]]:
        return {}

    def _assign(
        self, layer: int, step: int, num_steps: int, stage: str, num_heads: int
    ) -> tuple[Choice, ...]:
        rule_of: list[int | None] = [None] * num_heads
        if not self.schedule.is_dense(layer, step, num_steps):
            for i_rule, rule in enumerate(self.rules):
                if rule.covers(layer, step, num_steps, stage):
                    named = range(num_heads) if rule.heads == "all" else rule.heads
                    for head in named:
                        if head < num_heads:
                            rule_of[head] = i_rule
        groups: dict[Method | None, tuple[list[int], list[int]]] = {}
        for head, i_head_rule in enumerate(rule_of):
            chosen = None if i_head_rule is None else self.rules[i_head_rule]
            method = None if chosen is None or chosen.method == "dense" else chosen.instance
            rules, heads = groups.setdefault(method, ([], []))
            heads.append(head)
            if i_head_rule is not None:
                rules.append(i_head_rule)
        return tuple(
            Choice(min(rules) if rules else None, method, tuple(heads))
            for method, (rules, heads) in groups.items()
        )

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        filename: str = CONFIG_NAME,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the strategy into a folder, a model's own for instance.

        Args:
            folder: Made if need be. Diffusers loads a pipeline's folder with it in it as before.
            filename: Name of the file; ``enable_sparse_attention()`` without a name looks for
                the usual one.
            push_to_hub: Upload it too.
            **options: For ``push_to_hub``; ``repo_id`` is the folder's name where not given.
        """
        if options and not push_to_hub:
            raise TypeError(f"{', '.join(options)}: requires push_to_hub=True")
        self.save(Path(folder) / filename)
        if push_to_hub:
            repo_id = options.pop("repo_id", Path(folder).resolve().name)
            self.push_to_hub(repo_id, filename=filename, **options)

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        *,
        subfolder: str | None = None,
        filename: str | None = None,
        **options: Any,
    ) -> Strategy:
        """Read a strategy from a folder or a Hub repository, a model's own for instance.

        Args:
            name: The folder; ``owner/name`` on the Hub, or ``owner/name@revision:place``, the
                place being a folder or a ``.json`` file in it. A folder takes a place too.
            subfolder: The place, in words of Diffusers.
            filename: Of the file; ``sparse_strategy.json`` where None.
            **options: For ``hf_hub_download`` (``revision``, ``token``, ``cache_dir``,
                ``local_files_only``, ``endpoint``, ...).
        """
        shown = str(name)
        local = (Path(name), None) if Path(name).is_dir() else hub.inside(shown)
        address = hub.parse(shown)
        place = local[1] if local else address.place if address else None
        if None not in {place, subfolder}:
            raise StrategyError(
                f"{shown}: already contains a folder, and subfolder={subfolder!r} gives another; "
                "use only one"
            )
        file = hub.file_of(subfolder if place is None else place, filename, shown)
        if local is not None:
            path = local[0] / file
            return cls.from_dict(read_json(path, str(path)), str(path))
        if address is None:
            raise StrategyError(
                f"{shown}: folder not found, and not a valid Hub repository (owner/name); to "
                "load a file, use Strategy.load"
            )
        revision = address.revision
        if revision is not None and options.setdefault("revision", revision) != revision:
            raise StrategyError(
                f"{shown}: already contains a revision, and revision={options['revision']!r} "
                "gives another; use only one"
            )
        path = hub.download(address.repo_id, file, **options)
        shown = str(hub.Address(address.repo_id, options.get("revision"), file))
        return cls.from_dict(read_json(path, shown), shown)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        filename: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        **options: Any,
    ) -> str:
        """Upload the strategy to a Hub repository, made if need be; returns the commit's URL.

        Args:
            repo_id: ``owner/name``: a repository of its own, or the model's.
            subfolder: Folder in the repository; None: its root.
            filename: Of the file; ``sparse_strategy.json`` where None.
            private: Whether a repository made now is private.
            token: Of the account; None: the one that is logged in.
            commit_message: None: names the strategy and its methods.
            **options: For ``HfApi.upload_file`` (``revision``, ``create_pr``, ...), and
                ``endpoint``.
        """
        if commit_message is None:
            methods = sorted({rule.method for rule in self.rules}) or ["dense"]
            commit_message = f"Add sparse attention strategy {self.name} ({', '.join(methods)})"
        file = hub.file_of(subfolder, filename, repo_id)
        return hub.upload(
            self.to_json().encode(),
            repo_id,
            file,
            commit_message=commit_message,
            private=private,
            token=token,
            **options,
        )


def _rule(method: str, params: dict[str, Any]) -> Rule:
    method_class(method)
    return Rule(method=method, params=params)


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash a model's config (sha256, first 16 hex digits), private keys ("_...") left out."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    text = json.dumps(public, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_FORMS: dict[str, type[BaseModel]] = {
    "": Strategy,
    "model": Model,
    "grid": Grid,
    "schedule": Schedule,
    "rules": Rule,
    "receipt": Receipt,
}
_KEYS = {path: tuple(form.model_fields) for path, form in _FORMS.items()}
