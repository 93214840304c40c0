"""Whether DeepSpeed can keep state on NVMe here."""

import deepspeed.git_version_info
import pytest

NVME = bool(deepspeed.git_version_info.installed_ops.get("async_io"))
WITHOUT_NVME = "DeepSpeed was not built with async_io (DS_BUILD_AIO=1)"
needs_nvme = pytest.mark.skipif(not NVME, reason=WITHOUT_NVME)
