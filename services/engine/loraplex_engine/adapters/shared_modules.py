"""Most adapters are made by a few recipes: the same modules, ranks and scalings. Each list of modules is kept once."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec, ModuleSpec

MAX_LISTS: Final = 256


class SharedModules:
    """The module lists seen last; a 7B model's has 224 entries, far more than all else that is known of an adapter."""

    def __init__(self) -> None:
        self._modules: OrderedDict[tuple[ModuleSpec, ...], tuple[ModuleSpec, ...]] = OrderedDict()

    def share(self, spec: AdapterSpec) -> AdapterSpec:
        """Return an equal spec whose modules are shared with all others that have equal ones."""
        known = self._modules.setdefault(spec.modules, spec.modules)
        self._modules.move_to_end(known)
        if len(self._modules) > MAX_LISTS:
            self._modules.popitem(last=False)
        return spec if known is spec.modules else dataclasses.replace(spec, modules=known)
