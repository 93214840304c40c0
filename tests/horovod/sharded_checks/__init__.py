"""What a Horovod user does beside training, and what must be refused, on a sharded optimizer; by subject."""

from collections.abc import Callable

from tests.horovod.sharded_checks import construction, gradients, groups, lifetime, parameters, readers, state

CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check
    for module in (readers, lifetime, gradients, parameters, state, groups, construction)
    for name, check in vars(module).items()
    if name.startswith("check_") and check.__module__ == module.__name__
}
# It uses torch.compile, after which every step() waits, and the other checks would show less.
CHECKS["readers_wait"] = CHECKS.pop("readers_wait")
# After it there is no Horovod.
CHECKS["a_rank_that_leaves_lets_the_others_have_the_parameters"] = CHECKS.pop(
    "a_rank_that_leaves_lets_the_others_have_the_parameters"
)
