"""Which sub-tasks a device's data comes from, inferred from what it can tell (not in the paper).

Each function returns a *mixture*, float64 ``[S]``: proportions of the sub-tasks, which sum to 1.

================  ==================================  ==============================================
from              a device sends                      tells apart
================  ==================================  ==============================================
label counts      C numbers                           sub-tasks of different classes, nothing else
importance        nothing more than ECLM's profile    what the module selector tells apart
local losses      S numbers, after it was sent the    whatever makes a difference to the sub-models
                  sub-model of every sub-task
================  ==================================  ==============================================
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import nnls
from scipy.special import softmax

from eclm_flower.adaptation.profile import Importance


def mixture_from_label_counts(counts: np.ndarray, by_sub_task: np.ndarray) -> np.ndarray:
    """Infer from how often a device has each class.

    Every sample votes with the probability that a sample of its class is of sub-task s, if all
    sub-tasks are equally frequent. Where classes say nothing, as in environments that differ in
    looks alone, all sub-tasks get about the same.

    Parameters
    ----------
    counts : np.ndarray
        ``[C]``, of the device.
    by_sub_task : np.ndarray
        ``[S, C]``, of the proxy data.
    """
    counts, by_sub_task = np.asarray(counts, float), np.asarray(by_sub_task, float)
    if counts.shape != by_sub_task.shape[1:] or counts.sum() <= 0:
        raise ValueError(
            f"Expected counts of {by_sub_task.shape[1]} classes, some above 0, got {counts}."
        )
    share = by_sub_task / by_sub_task.sum(axis=1, keepdims=True)
    total = share.sum(axis=0)
    # A class that the proxy data lacks votes for all sub-tasks alike.
    votes = np.divide(share, total, out=np.full_like(share, 1 / len(share)), where=total > 0)
    return np.asarray(votes @ counts / counts.sum())


def mixture_from_importance(
    importance: Importance, by_sub_task: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Infer from the importance of the modules for a device's data.

    Importance is a mean over samples, so that of a mixture is the mixture of those of its
    sub-tasks: the closest one, by non-negative least squares over all layers.

    Parameters
    ----------
    importance : dict[str, np.ndarray]
        Layer name -> ``[N]``, from the device's profile.
    by_sub_task : dict[str, np.ndarray]
        Layer name -> ``[S, N]``, on the proxy data: `prototyping.stages.mean_gates`.
    """
    seen = np.concatenate([np.asarray(importance[name], float) for name in by_sub_task])
    known = np.hstack([np.asarray(rows, float) for rows in by_sub_task.values()])
    if seen.shape != known.shape[1:]:
        raise ValueError(f"Expected the importance of {known.shape[1]} modules, got {len(seen)}.")
    # Equal rows would leave the solver free: a faint pull to equal proportions decides.
    pull = 1e-6 * np.linalg.norm(known) * np.eye(len(known))
    weights, _ = nnls(np.vstack([known.T, pull]), np.concatenate([seen, np.zeros(len(known))]))
    return np.asarray(weights / weights.sum())


def mixture_from_losses(losses: np.ndarray, samples: int) -> np.ndarray:
    """Infer from the loss of each sub-task's sub-model on a device's data.

    The probability of each sub-task, if the data is of one of them: with more than a few samples,
    nearly all of it goes to the least loss.

    Parameters
    ----------
    losses : np.ndarray
        ``[S]``, mean cross-entropy on the device's samples.
    samples : int
        How many those are.
    """
    return np.asarray(softmax(-samples * np.asarray(losses, float)))
