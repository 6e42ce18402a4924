"""Scoring and losses for recommenders: fused from id lookup to loss, in Triton on a GPU and in PyTorch anywhere.

A row of ``user``, ``query`` or ``item`` is a vector; a matrix is an embedding table or the output of a tower. Shapes:

    P  (user, item) pairs        B  rows of a batch: users, or interactions
    N  items                     K  negatives of a row; M negatives shared by the batch
    D  dimensions of a vector    T  targets of all rows together

Needs PyTorch alone; Triton is loaded when an operator first runs on it.
"""

from recbole_llm_kernels import functional, optim, sampled_losses, tower_ops
from recbole_llm_kernels.backends import default_backend
from recbole_llm_kernels.functional import *  # noqa: F403
from recbole_llm_kernels.optim import *  # noqa: F403
from recbole_llm_kernels.sampled_losses import *  # noqa: F403
from recbole_llm_kernels.tower_ops import *  # noqa: F403

__version__ = "0.1.0"

__all__ = ["default_backend"]
__all__ += functional.__all__
__all__ += optim.__all__
__all__ += sampled_losses.__all__
__all__ += tower_ops.__all__
