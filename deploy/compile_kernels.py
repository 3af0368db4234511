#!/usr/bin/env python3
"""Run while the image is built: does once what containers do, so that the kernels they need are compiled then."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from trilith_services.commands.demo import DemoOptions, run_demo
from trilith_services.ps.replicas.sync import wire
from trilith_services.serving.models import Models

with TemporaryDirectory() as scratch:
    exports = Path(scratch, "exports")
    training = DemoOptions(
        num_ps=0,
        workers=1,
        mode="embedded",
        model="deepfm",
        data="synthetic:2000",
        model_dir=Path(scratch, "model"),
        epochs=1,
        steps=0,
        batch_size=512,
        save_every=0,
        seed=0,
        baseline=False,
        export=exports,
        export_mode="standalone",
    )
    assert run_demo(training) == 0
    wire.compile_kernels()
    models = Models(str(exports))
    assert models.refresh()
    models.close()
