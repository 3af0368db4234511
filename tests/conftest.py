"""What every test tier shares: the hypothesis profile."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The first example may compile a kernel, so neither a deadline nor the too-slow check says anything here.
settings.register_profile(
    "trilith",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("trilith")
