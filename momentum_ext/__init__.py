"""FusedMomentum: everything that torch.optim.SGD does with momentum, in one pass over memory.

    optimizer = momentum_ext.FusedMomentum(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

See `FusedMomentum` for what is supported and `momentum_ext.reference` for the rule in plain torch.
"""

from momentum_ext._config import import_compiled_module, show_config

__version__ = "0.1.0"

import_compiled_module()  # or an ImportError that says what to do, before anything else needs it

from momentum_ext.adam import FusedAdam, FusedAdamW  # noqa: E402
from momentum_ext.grad_scaler import GradScaler  # noqa: E402
from momentum_ext.momentum import FusedMomentum  # noqa: E402
from momentum_ext.nadam import FusedNAdam  # noqa: E402

__all__ = ["FusedAdam", "FusedAdamW", "FusedMomentum", "FusedNAdam", "GradScaler", "__version__", "show_config"]
