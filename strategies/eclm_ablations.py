"""ECLM without each of its parts, and with others.

- **no deltas**: sub-tasks differ in nothing; what is left are nested sub-models.
- **fixed deltas**: delta modules stay as the offline stage left them; devices change W alone.
- **born deltas**: delta modules start at zero, as one of an environment that the proxy data
  lacks would; all they hold comes from devices, whose sub-tasks the selector nevertheless knows.
- **chosen**: modules of one's own instead of delta modules, as in the paper: behind a core of two,
  each device gets those that its importance is largest for. Trained as deployed.
- **uniform merge**: the same, and a_ik is the number of examples alone, as in FedAvg.
- **no importance**: whatever a device's data, it gets the first modules of every layer, as many as
  fit, without delta modules; no selector is sent. The cloud trained as for ECLM.
- **no distillation**: sub-models train in the cloud on labels alone, without a teacher.
- **no ability enhancing**: the cloud never trains sub-models. The whole model trains for as many
  epochs instead.
"""

from __future__ import annotations

from functools import partial

from eclm_flower import ECLM
from strategies.method import Method
from strategies.nested import Nested

NO_DELTAS = Method(name="eclm-no-deltas", strategy=ECLM, offline="no-deltas")
FIXED_DELTAS = Method(name="eclm-fixed-deltas", strategy=partial(ECLM, delta_step=0.0))
BORN_DELTAS = Method(name="eclm-born-deltas", strategy=ECLM, offline="blank")
CHOSEN = Method(name="eclm-chosen", strategy=ECLM, offline="chosen")
UNIFORM_MERGE = Method(
    name="eclm-uniform-merge", strategy=partial(ECLM, weighting="examples"), offline="chosen"
)
NO_IMPORTANCE = Method(name="eclm-no-importance", strategy=Nested)
NO_DISTILLATION = Method(name="eclm-no-distillation", strategy=ECLM, offline="untaught")
NO_ENHANCING = Method(name="eclm-no-enhancing", strategy=ECLM, offline="split")
