"""Tells transformers of the structured models, whenever it is imported, without importing it.

transformers finds a model's class by the `model_type` in its config.json, in a mapping that one can add to.
There are hundreds of types, so ours are made when one is asked for. The mapping exists only once
transformers' auto classes have been imported: before, a finder waits for that import.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PREFIX = "einlinear_"
"""What the `model_type` of a structured model starts with; the rest is that of the dense one."""

AUTO = "transformers.models.auto.configuration_auto"


class _Types(dict[str, Any]):
    """Registered config classes by type; those of structured models are made when asked for."""

    known: Any

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (
            isinstance(key, str) and key.startswith(PREFIX) and key.removeprefix(PREFIX) in self.known
        )

    def __missing__(self, key: str) -> Any:
        from einlinear.hf.models import config_class

        self[key] = config_class(key.removeprefix(PREFIX))
        return self[key]


class _Waiting(MetaPathFinder):
    """Has the mapping extended right after its module has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_extend(module: ModuleType) -> None:
                execute(module)
                _extend(module)

            spec.loader.exec_module = then_extend  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Has structured models found by transformers' auto classes, now or once they are imported."""
    if AUTO in sys.modules:
        _extend(sys.modules[AUTO])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _extend(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _Types):
        mapping._extra_content = _Types(mapping._extra_content)
        mapping._extra_content.known = mapping._mapping
