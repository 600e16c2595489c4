__version__ = "0.1.0"

import logging
# On import, libraries of the extra `quant` report which accelerators this machine lacks.
for _name in "bitsandbytes", "torchao", "torch.utils._pytree": logging.getLogger(_name).setLevel(logging.ERROR)
