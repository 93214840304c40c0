"""Two ranks, each with a learning rate of its own."""

from arsg_dist.deepspeed import connect
from arsg_dist.engine import JobError, check_agreement, discover_ranks, end_process

ranks = discover_ranks()
communicator = connect(ranks)
try:
    check_agreement(communicator, config={"lr": 0.1 + 0.1 * ranks.rank})
    code = 0
except JobError as error:
    print(error, flush=True)
    code = 2
communicator.close()
end_process(code)
