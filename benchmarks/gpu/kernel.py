"""A few steps of the fused kernel, for tools that watch one."""

from __future__ import annotations

import argparse

import torch

from arsg_dist import ARSG


def main() -> None:
    """Make three steps of each kind of state, over full chunks, tails and an address that is not aligned."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    for state, dtype in (("float32", None), ("bfloat16", None), ("8bit", None), ("8bit", torch.bfloat16)):
        whole = torch.randn(300_001, device=device)
        params = [
            torch.nn.Parameter(x.to(dtype) if dtype else x)
            for x in (whole[1:], torch.randn(257, 33, device=device), torch.randn(7, device=device))
        ]
        optimizer = ARSG(params, fused=True, state_dtype=state, master="split" if dtype else None)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        assert all(bool(param.isfinite().all()) for param in params)
    print("three steps of each kind of state")


if __name__ == "__main__":
    main()
