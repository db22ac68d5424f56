"""Whether a checkpoint can be served, and its canonical form if so."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.image_geometry import ImageError
from loraplex_common.rank_limits import check_servable

from loraplex_adapter_store.checkpoint.added_tokens import check_rows
from loraplex_adapter_store.checkpoint.canonical import CanonicalForm, canonicalise
from loraplex_adapter_store.checkpoint.confinement import Confinement
from loraplex_adapter_store.checkpoint.dialects import peft_config_data
from loraplex_adapter_store.checkpoint.exploding import exploding_of
from loraplex_adapter_store.checkpoint.peft_config import parse_peft_config
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_adapter_store.checkpoint.text_check import check_strange_texts
from loraplex_adapter_store.import_notes import ImportNotes

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from loraplex_common.rank_limits import RankLimits

    from loraplex_adapter_store.attach.attached import WeightNorms
    from loraplex_adapter_store.bases import KnownBases
    from loraplex_adapter_store.imports.files import CheckpointFiles
    from loraplex_adapter_store.signatures.check import Signatures


class CheckpointChecker:
    """Checks checkpoints against their base models and the engines.

    Args:
        bases: The base models known here.
        engines: Tells what the engines known can take.
        norms: Gives what is known of a base's weights, by its fingerprint; called in a thread.
        executor: Runs the checks.
        signatures: Says whether files may be read at all.
    """

    def __init__(
        self,
        bases: KnownBases,
        engines: Callable[[], tuple[RankLimits, ...]],
        norms: Callable[[str], WeightNorms],
        executor: Executor,
        signatures: Signatures,
    ) -> None:
        self._signatures = signatures
        self._bases = bases
        self._norms = norms
        self._engines = engines
        self._executor = executor

    async def check(self, files: CheckpointFiles, base_model: str) -> CanonicalForm:
        """Return the canonical form of a checkpoint.

        Args:
            files: The checkpoint.
            base_model: Overrides the base model that the checkpoint names; may be empty.

        Raises:
            LoraplexError: If it cannot be served; the message says what does not fit.
        """
        confinement = Confinement()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._executor, self._check_blocking, files, base_model, self._engines(), confinement
            )
        finally:
            confinement.close()  # if this is cancelled, the thread still works

    def _check_blocking(
        self, files: CheckpointFiles, base_model: str, engines: tuple[RankLimits, ...], confinement: Confinement
    ) -> CanonicalForm:
        signed = self._signatures.check(files)  # first: nothing parses what is not trusted
        config = parse_peft_config(peft_config_data(files.config))
        chosen = self._bases.choose(config.base_model_name_or_path, base_model)
        base = chosen.base
        texts = check_strange_texts(files.texts, base.directory, confinement)
        checkpoint = read_checkpoint(
            files.config,
            files.weights,
            base.info,
            confinement,
            base_dir=base.directory,
            weights_file=files.weights_file,
        )
        check_rows(texts.parts.added_tokens, checkpoint.modules, base.info)
        form = canonicalise(checkpoint, texts.parts)
        try:
            check_servable(form.spec.sizes, base.info, engines, form.spec.last_row_id)
        except ImageError as error:
            raise AdapterIncompatibleError(str(error)) from error
        exploding = exploding_of(checkpoint.modules, self._norms(base.info.fingerprint))
        unsigned = (signed.warning,) if signed.warning else ()
        warnings = (*unsigned, *chosen.warnings, *texts.warnings, *form.warnings, *exploding)
        notes = ImportNotes(
            method=checkpoint.method,
            rules=checkpoint.rules,
            folded=checkpoint.folded,
            signer=signed.signer,
            warnings=tuple(each for each in warnings if each not in checkpoint.rules),
        )
        return replace(form, warnings=warnings, notes=notes)
