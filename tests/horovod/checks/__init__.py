"""What a Horovod user does beside training, and what must be refused; by form and subject."""

from collections.abc import Callable
from types import ModuleType

from tests.horovod.checks import construction, gradients, groups, lifetime, parameters, replicated, state


def _checks_of(*modules: ModuleType) -> dict[str, Callable[[], None]]:
    return {
        name.removeprefix("check_"): check
        for module in modules
        for name, check in vars(module).items()
        if name.startswith("check_") and check.__module__ == module.__name__
    }


REPLICATED = _checks_of(replicated)
SHARDED = _checks_of(parameters, lifetime, gradients, state, groups, construction)
# The first uses torch.compile, after which every step() waits, and other checks would show less; after the second there
# is no Horovod.
for last in ("readers_wait", "a_rank_that_leaves_lets_the_others_have_the_parameters"):
    SHARDED[last] = SHARDED.pop(last)
CHECKS = {"replicated": REPLICATED, "sharded": SHARDED}
