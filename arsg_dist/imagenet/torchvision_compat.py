"""Import torchvision, also a CUDA build of it beside a CPU-only torch.

The registry's torchvision wheel is a CUDA build. Beside a CPU-only torch its C++ library cannot be loaded, and
`import torchvision` then fails with "operator torchvision::nms does not exist", because it attaches Python code to
operators that library would have defined. Models, datasets and transforms need none of them, so after such a failure
the two schemas are declared here and the import is repeated. Where `import torchvision` works, nothing else is done.
"""

import importlib
import sys
from typing import Any

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: Any = None  # the declarations live as long as this object


def _import_torchvision() -> Any:
    global _library
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        # Without this torch's number pip takes the newest torchvision and replaces torch by the one that it needs.
        own = torch.__version__.partition("+")[0]
        raise ImportError(
            f"arsg_dist.imagenet needs torchvision: pip install 'arsg-dist[imagenet]' torch=={own}, "
            "or run launch/setup.sh in a checkout"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    library: Any = torch.library
    _library = library.Library("torchvision", "FRAGMENT")
    _library.define("nms" + _SCHEMA)
    _library.define("qnms" + _SCHEMA)
    return importlib.import_module("torchvision")


torchvision = _import_torchvision()
v2: Any = importlib.import_module("torchvision.transforms.v2")
