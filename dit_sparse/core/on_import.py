# SPDX-License-Identifier: Apache-2.0
"""Do something when another package's module has been imported, without importing it ourselves."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Action = Callable[[ModuleType], None]


def on_import(name: str, action: Action) -> None:
    """Call ``action`` with the module called ``name``: now, or as soon as it has been imported.

    An error of ``action`` is one of that import.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Finds one module, once, and gives it a loader that calls ``action`` after loading it."""

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action = name, action

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Answer for this one module."""
        if fullname != self.name:
            return None
        if self in sys.meta_path:  # else another thread was faster
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(Loader):
    """Loads a module as its own loader does, then calls ``action``."""

    def __init__(self, loader: Loader, action: Action) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module; then it has its own loader back, and the action follows.

        Where either fails so does the import, and the action waits for the next one.
        """
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        try:
            self.loader.exec_module(module)
            self.action(module)
        except BaseException:
            sys.meta_path.insert(0, _Finder(module.__name__, self.action))
            raise
