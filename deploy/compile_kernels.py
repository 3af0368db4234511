#!/usr/bin/env python3
"""Run while the image is built: does once what containers do, so that the kernels they need are compiled then."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from trilith_services.commands.demo import DemoOptions, Mode, run_demo
from trilith_services.commands.export import ExportMode
from trilith_services.ps.replicas.sync import wire
from trilith_services.serving.models import Models

with TemporaryDirectory() as scratch:
    exports = Path(scratch, "exports")
    training = DemoOptions(
        mode=Mode.embedded,
        data="synthetic:2000",
        model_dir=Path(scratch, "model"),
        epochs=1,
        save_every=0,
        baseline=False,
        export=exports,
        export_mode=ExportMode.standalone,
    )
    assert run_demo(training) == 0
    wire.compile_kernels()
    models = Models(str(exports))
    assert models.refresh()
    models.close()
