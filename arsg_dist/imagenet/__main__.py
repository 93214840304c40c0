"""Run `arsg-imagenet` as a module, as `torchrun -m` and `deepspeed --module` start ranks."""

from arsg_dist.imagenet.cli import main

if __name__ == "__main__":
    main()
