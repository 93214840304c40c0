"""Keep, for one release, what scripts written before call by its name here: it is in `arsg_dist.cli`."""

import warnings

warnings.warn(
    "arsg_dist.launch will be removed: write arsg_dist.cli.launch.supervise for arsg_dist.launch.watch, and "
    "arsg_dist.cli.main for arsg_dist.launch.cli, or let `arsg-dist launch` write the script anew",
    FutureWarning,
    stacklevel=2,
)
