"""Keeps each list of modules once: most adapters share their modules, ranks and scalings with many others."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec, ModuleSpec

MAX_LISTS: Final = 256


class SharedModules:
    """The module lists seen last; a 7B model's list has 224 entries, most of what the engine knows of an adapter."""

    def __init__(self) -> None:
        self._modules: OrderedDict[tuple[ModuleSpec, ...], tuple[ModuleSpec, ...]] = OrderedDict()

    def share(self, spec: AdapterSpec) -> AdapterSpec:
        """Return an equal spec whose list of modules is the one shared by all adapters with an equal list."""
        known = self._modules.setdefault(spec.modules, spec.modules)
        self._modules.move_to_end(known)
        if len(self._modules) > MAX_LISTS:
            self._modules.popitem(last=False)
        return spec if known is spec.modules else dataclasses.replace(spec, modules=known)
