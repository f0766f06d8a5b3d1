"""ECLM without each of its parts, and with others.

- **no prior**: devices train and use what they were sent without a class prior, as rivals do.
- **no deltas**: sub-tasks differ in nothing; what is left are nested sub-models.
- **fixed deltas**: delta modules stay as the offline stage left them; devices change W alone.
- **born deltas**: delta modules start at zero, as one of an environment that the proxy data
  lacks would; all they hold comes from devices, whose sub-tasks the selector nevertheless knows.
- **chosen**: modules of one's own instead of delta modules, as in the paper: behind a core of two,
  each device gets those that its importance is largest for. Trained as deployed.
- **uniform merge**: the same, and a_ik is the number of examples alone, as in FedAvg.
- **no importance**: whatever a device's data, it gets the first modules of every layer, as many as
  fit, without delta modules; no selector is sent. The cloud trained as for ECLM.
- **no ability enhancing**: the cloud never trains sub-models. The whole model trains for as many
  epochs instead.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from eclm_flower import ECLM
from strategies.eclm import METHOD
from strategies.nested import Nested

_without = partial(replace, METHOD)

NO_PRIOR = _without(name="eclm-no-prior", class_prior=False)
NO_DELTAS = _without(name="eclm-no-deltas", offline="no-deltas")
FIXED_DELTAS = _without(name="eclm-fixed-deltas", strategy=partial(ECLM, delta_step=0.0))
BORN_DELTAS = _without(name="eclm-born-deltas", offline="blank")
CHOSEN = _without(name="eclm-chosen", offline="chosen")
UNIFORM_MERGE = _without(
    name="eclm-uniform-merge", strategy=partial(ECLM, weighting="examples"), offline="chosen"
)
NO_IMPORTANCE = _without(name="eclm-no-importance", strategy=Nested)
NO_ENHANCING = _without(name="eclm-no-enhancing", offline="split")
