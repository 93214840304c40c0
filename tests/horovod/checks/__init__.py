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
# It uses torch.compile, after which every step() waits, and the other checks would show less.
SHARDED["readers_wait"] = SHARDED.pop("readers_wait")
# After it there is no Horovod.
SHARDED["a_rank_that_leaves_lets_the_others_have_the_parameters"] = SHARDED.pop(
    "a_rank_that_leaves_lets_the_others_have_the_parameters"
)
CHECKS = {"replicated": REPLICATED, "sharded": SHARDED}
