"""Run `deepspeed --module arsg_dist.launch.cli doctor` as documents showed it: `arsg_dist.cli.main`."""

from arsg_dist.cli.main import main

if __name__ == "__main__":
    main()
