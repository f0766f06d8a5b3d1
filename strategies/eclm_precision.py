"""ECLM that sends less: half precision, and 8-bit changes with error feedback.

- **half**: sub-models travel in float16, and what changed of them comes back in float16;
- **8-bit**: sub-models travel in float16, and what changed comes back as 8-bit integers, a scale
  for every 1024 values. What a device's rounding loses is added to its next reply.

Budgets are in bytes, so a device whose link is what limits it gets more modules.
"""

from __future__ import annotations

from functools import partial

import torch

from eclm_flower import ECLM
from strategies.method import Method

HALF = Method(
    name="eclm-half",
    strategy=partial(ECLM, download_dtype=torch.float16, upload_dtype=torch.float16),
    feedback=True,
    class_prior=True,
)
EIGHT_BIT = Method(
    name="eclm-8-bit",
    strategy=partial(ECLM, download_dtype=torch.float16, upload_dtype=torch.int8),
    feedback=True,
    class_prior=True,
)
