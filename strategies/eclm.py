"""ECLM: every device gets the modules that matter for its data and fit its budget."""

from __future__ import annotations

from eclm_flower import ECLM
from strategies.method import Method

METHOD = Method(name="eclm", strategy=ECLM, class_prior=True)
