"""Which kernels take the time of one layer: `python benchmarks/where_time_goes.py --tokens 131072`.

Prints a table of the profiler for a prefill (build, search and read), for a step of training and for a token of decode,
heaviest kernels first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from mgam import engine
from mgam.benchmarks.setting import Setting, built, plan_of, reading_of, states
from mgam.benchmarks.training import training_step
from mgam.device import decode
from mgam.policies.compact import CompactKeys

CALLS = 3


def main(
    tokens: Annotated[int, typer.Option(help="Length of the text.")] = 131072,
    every: Annotated[int, typer.Option(help="Every n-th query of a text searches.")] = 32,
    dims: Annotated[int, typer.Option(help="Dimensions of search keys.")] = 64,
    bits: Annotated[int, typer.Option(help="Bits of search keys.")] = 8,
) -> None:
    """Profiles and prints."""
    setting = Setting(every=every, dims=dims, bits=bits)
    queries, keys, values = states(setting, tokens)
    policy, positions, scale = setting.policy, setting.placed, setting.dim**-0.5
    plan, reading = plan_of(setting, tokens), reading_of(setting)
    table(
        f"prefill, {tokens} tokens",
        lambda: engine.read(queries, built(setting, keys, values), plan, reading, scale),
    )
    table(f"forward + backward, {min(tokens, 32768)} tokens", training_step(setting, min(tokens, 32768)))
    for batch in (1, 16):
        some = states(setting, min(tokens, 32768) if batch > 1 else tokens, batch, 1)
        pyramid = built(setting, *some[1:])
        if policy.compact is not None:
            CompactKeys.of(pyramid, pyramid.levels, policy.compact)
        held = some[1].shape[2]
        lengths = torch.full((batch,), held, device="cuda")
        table(
            f"decode, batch {batch}, {held} tokens",
            lambda some=some, lengths=lengths, pyramid=pyramid, held=held: decode(  # type: ignore[misc]
                some[0], lengths, pyramid, policy, positions, scale, chunks=held // setting.sizes[1]
            ),
        )


def table(name: str, call: Callable[[], object]) -> None:
    """Microseconds on the device a call, by kernel."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    rows = [
        (event.self_device_time_total / CALLS, event.count / CALLS, event.key)
        for event in found.key_averages()
        if event.self_device_time_total and str(event.device_type).endswith("CUDA")
    ]
    print(f"{name}: {sum(row[0] for row in rows):.0f} us on the device in {sum(row[1] for row in rows):.0f} launches")
    for time, count, key in sorted(rows, reverse=True)[:24]:
        print(f"  {time:10.1f} us  x{count:5.1f}  {key[:110]}", flush=True)


if __name__ == "__main__":
    typer.run(main)
