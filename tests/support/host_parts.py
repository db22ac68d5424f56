"""`HostRunner` whose adapters have any parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.runners.cuda.magnitude_loads import MagnitudeLoad, MagnitudeLoads
from loraplex_engine.runners.cuda.magnitudes import RowScales, has_magnitudes
from support.host_decoder import BUCKET, CPU, HostRunner

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from kernels.host_kernels import HostLibrary
    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_engine.rank_group import RankGroup
    from loraplex_engine.step import StepPlan
    from numpy.typing import NDArray
    from support.host_decoder import Done


class PartRunner(HostRunner):
    """Computes c of DoRA adapters before a load is done, as `CudaRunner` does."""

    def __init__(
        self,
        model_dir: Path,
        library: HostLibrary,
        *,
        max_rows_beside: int = BUCKET,
        weight_form: WeightForm = WeightForm.WHOLE,
        group: RankGroup | None = None,
    ) -> None:
        super().__init__(model_dir, library, max_rows_beside=max_rows_beside, weight_form=weight_form, group=group)
        scales = RowScales(self.pool, self.geometry, self.decoder._model.linears, library.dtype)
        self.magnitudes = MagnitudeLoads(scales, self.geometry, CPU, group)
        self.steps: list[torch.Tensor] = []

    def load_adapter(
        self,
        index: int,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        slots: tuple[int, ...] = (),
    ) -> Done:
        done = super().load_adapter(index, spec, pages, source)
        if has_magnitudes(spec):
            load = MagnitudeLoad(spec, pages, None, None)
            self.magnitudes.start(load)
            while not load.is_done():
                pass
        return done

    def launch(self, plan: StepPlan) -> Done:
        done = super().launch(plan)
        self.steps.append(self.logits.clone())
        return done
